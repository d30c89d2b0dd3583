"""Compares what the library computes with one quantization golden file; every output of the file must be computed.

JUDGES replaces the comparison by equality where a file has more than one right answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.quant.adapters import METHODS, Case, Outputs
from tests.golden.quant.cases import Case as CaseFile
from tests.golden.quant.qat_adapters import QAT_METHODS

_MEASURED = 1e-4  # relative: numbers in params depend on all codes, and are measured on sums


def judge_mixed_precision(case: Case, got: Outputs) -> list[str]:
    """The assignment by objective and budget: another optimum is as good."""
    p, bits = case.params, list(case.params["bits"])
    chosen = np.array([bits.index(b) for b in got["assignment_bits"]])
    objective = float(case.outputs["normalised"][np.arange(len(chosen)), chosen].sum())
    cost = int((case.inputs["size"] * got["assignment_bits"]).sum())
    problems = case.compare({"normalised": got["normalised"]})
    if objective > p["objective"] * (1 + 1e-6):
        problems.append(f"{case.name}.assignment_bits: objective {objective}, the optimum is {p['objective']}")
    if cost > p["budget_bits"]:
        problems.append(f"{case.name}.assignment_bits: {cost} bits, the budget is {p['budget_bits']}")
    return problems


def judge_nfds(case: Case, got: Outputs) -> list[str]:
    """Clusters by their members: ours are numbered as the file numbers the cluster of their first member."""
    want, labels = case.outputs["partition"], np.asarray(got["partition"])
    names = [int(want[np.flatnonzero(labels == c)[0]]) for c in range(len(got["centroids"]))]
    if sorted(names) != list(range(len(names))):
        return [f"{case.name}.partition: clusters {labels.tolist()}, expected {want.tolist()} up to their names"]
    partition = np.array([names[label] if label >= 0 else -1 for label in labels])
    return case.compare({**got, "partition": partition, "centroids": np.asarray(got["centroids"])[np.argsort(names)]})


JUDGES: dict[str, Callable[[Case, Outputs], list[str]]] = {"mixed_precision": judge_mixed_precision, "nfds": judge_nfds}


def _off(name: str, got: Any, want: Any) -> list[str]:
    """Problems of a measured number in `params`, or of a table or list of them."""
    if isinstance(want, dict):
        missing = [f"{name}.{key}: not computed" for key in want if key not in got]
        return missing + [p for key in want if key in got for p in _off(f"{name}.{key}", got[key], want[key])]
    close = np.allclose(got, want, rtol=_MEASURED, atol=0)
    return [] if close else [f"{name}: {got}, the file has {want}"]


def is_quant_case(path: Path) -> bool:
    """Whether a JSON file describes a quantization case, not a model."""
    return "method" in json.loads(path.read_text(encoding="utf-8"))


def check_quant_file(path: Path) -> list[str]:
    """Everything that differs from one file; [] when it agrees. A crash of the library is a problem like others."""
    if not path.with_suffix(".npz").is_file():
        return [f"{path.stem}: {path.with_suffix('.npz').name} is missing beside it"]
    try:
        return check_case(CaseFile(path))
    except Exception as error:
        return [f"{path.stem}: {type(error).__name__}: {error}"]


def check_case(case: Case) -> list[str]:
    """Everything that differs from one case; [] when all of its outputs are computed and agree."""
    known = METHODS | QAT_METHODS
    compute = known.get(case.method)
    if compute is None:
        return [f"{case.name}: unknown method {case.method!r}; known: {', '.join(sorted(known))}"]
    computed = compute(case)
    got = {key: np.asarray(value) for key, value in computed.items() if not key.startswith("params.")}
    measured = {key.removeprefix("params."): value for key, value in computed.items() if key.startswith("params.")}
    problems = [
        f"{case.name}.{key}: not computed by the adapter of {case.method}" for key in case.outputs if key not in got
    ]
    if problems:
        return problems
    got = {key: got[key] for key in case.outputs}
    judge = JUDGES.get(case.method)
    problems += judge(case, got) if judge else case.compare(got)
    for key, value in measured.items():
        if key in case.params:
            problems += _off(f"{case.name}.params.{key}", value, case.params[key])
    return problems
