"""Every quantization golden case through the library, and what the checker says about cases it cannot judge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.golden.quant import cases
from tests.golden.quant.adapters import METHODS
from tests.golden.quant.check import check_case, check_quant_file, is_quant_case
from tests.golden.quant.qat_adapters import QAT_METHODS

FILES = sorted(Path(cases.HERE).glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_case(path):
    assert is_quant_case(path)
    assert check_quant_file(path) == []


def test_no_method_in_two_tables():
    assert not set(METHODS) & set(QAT_METHODS)


def changed(tmp_path, name, **fields):
    source = Path(cases.HERE) / f"{name}.json"
    target = tmp_path / source.name
    target.write_text(json.dumps(json.loads(source.read_text()) | fields))
    shutil.copy(source.with_suffix(".npz"), tmp_path)
    return target


def test_unknown_method_is_a_problem(tmp_path):
    (problem,) = check_quant_file(changed(tmp_path, "act_stat_ema_a", method="magic"))
    assert "unknown method 'magic'" in problem and "gptq" in problem


def test_output_that_is_not_computed_is_a_problem():
    (case,) = cases.load("act_stat_ema_a")
    case.outputs["variance"] = np.zeros(3)
    assert check_case(case) == ["act_stat_ema_a.variance: not computed by the adapter of momentum_act_max"]


def test_missing_arrays_and_crash_are_problems(tmp_path):
    path = changed(tmp_path, "act_stat_ema_a", params={})
    assert check_quant_file(path) == ["act_stat_ema_a: KeyError: 'momentum'"]
    path.with_suffix(".npz").unlink()
    assert "act_stat_ema_a.npz is missing" in check_quant_file(path)[0]


def test_wrong_number_in_params_is_a_problem():
    (case,) = cases.load("dsfq_w8a8_c32")
    case.params["sqnr_db"]["smooth"] += 0.1
    (problem,) = check_case(case)
    assert "sqnr_db.smooth" in problem


def test_partition_is_judged_up_to_names_and_assignment_by_objective():
    (case,) = cases.load("nfds")
    names = np.array([2, 0, 1, -1])  # the last one is for -1
    case.outputs["partition"] = names[case.outputs["partition"]]
    case.outputs["centroids"] = case.outputs["centroids"][np.argsort(names[:3])]
    assert check_case(case) == []
    case.outputs["partition"] = np.where(np.arange(len(case.outputs["partition"])) % 2, 0, 1)
    assert check_case(case)
    (case,) = cases.load("mixed_precision")
    case.outputs["assignment_bits"] = case.outputs["assignment_bits"][::-1]
    assert check_case(case) == []
    case.params["objective"] *= 0.99
    assert check_case(case)
