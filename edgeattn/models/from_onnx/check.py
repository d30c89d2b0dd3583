"""What a module rebuilt from an ONNX file must pass: it computes what onnxruntime computes, and takes any batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from edgeattn.data.interface import BATCH, RELATIVE_TOLERANCE, TensorSpec
from edgeattn.errors import EdgeAttnError, NumericError, UnsupportedOp, UsageError
from edgeattn.models.from_onnx.graph import OnnxGraph
from edgeattn.models.from_onnx.node import Node

_ROUNDING = 1e-6  # of the largest value: eight times float32's, for outputs that vary little around a large mean
_SIZED = ("Reshape", "Expand", "Squeeze", "Tile", "Concat", "Slice", "Resize")  # ops that a batch of 1 is baked into


@dataclasses.dataclass(frozen=True)
class Checked:
    """`difference` is the largest, as a share of the output's spread; `shapes` those of the outputs for one sample."""

    difference: float
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        version = onnxruntime.__version__
        return f"equal to onnxruntime {version} on a random input up to {self.difference:.1e} of the output's spread"


def _samples(inputs: Sequence[TensorSpec]) -> list[np.ndarray]:
    """Two random samples of every input."""
    generator = np.random.default_rng(0)
    return [spec.example({BATCH: 2}, generator) for spec in inputs]


def _run(
    graph: OnnxGraph, values: Sequence[np.ndarray], watch: Callable[[Node, Any], None] | None = None
) -> list[Tensor]:
    with torch.no_grad():
        results = graph.run([torch.from_numpy(value) for value in values], watch)
    return list(results) if isinstance(results, tuple) else [results]


def check_values(
    graph: OnnxGraph, inputs: Sequence[TensorSpec], path: Path, reread: Callable[[], onnx.ModelProto], changed: bool
) -> Checked:
    """Compare one sample's outputs with onnxruntime's.

    Args:
        reread: the model as it was read, for what the file itself cannot show.
        changed: the file's own model is another one, of float16.

    Raises:
        UnsupportedOp: a node cannot be run. NumericError: the outputs differ; the first node that does is named.
    """
    one = [value[:1] for value in _samples(inputs)]
    seen: list[Node] = []
    try:
        ours = [value.numpy() for value in _run(graph, one, lambda node, _: seen.append(node))]
    except EdgeAttnError:
        raise
    except Exception as error:  # torch raises many classes
        node = graph.steps[len(seen)].node
        raise UnsupportedOp(
            f"{path}: node {node.name!r} ({node.op}, opset {node.opset}) cannot be run with torch: {error}. "
            "Export the model with other options, or give it as package.module:callable."
        ) from error
    feed = dict(zip(graph.inputs, one, strict=True))
    theirs = _onnxruntime(reread() if changed else path, feed, path)
    worst = max(_excess(mine, theirs[name]) for name, mine in zip(graph.outputs, ours, strict=True))
    if not worst <= 1:
        raise NumericError(
            f"{path}: {_first_difference(graph, reread, one, path)}. Expected a difference of at most "
            f"{RELATIVE_TOLERANCE:g} of the spread. This is a fault of edgeattn: report the node and its attributes; "
            "until then give the model as package.module:callable."
        )
    return Checked(worst * RELATIVE_TOLERANCE, tuple(value.shape for value in ours))


def _excess(mine: np.ndarray, other: np.ndarray) -> float:
    """The largest difference as a multiple of what is allowed."""
    if mine.shape != other.shape:
        return float("inf")
    if other.dtype.kind not in "f" or not other.size:
        return 0.0 if np.array_equal(mine, other) else float("inf")
    if not np.array_equal(np.isfinite(mine), np.isfinite(other)):
        return float("inf")
    finite = np.isfinite(other)
    if not finite.any():
        return 0.0
    mine, other = mine[finite].astype(np.float64), other[finite].astype(np.float64)
    allowed = RELATIVE_TOLERANCE * other.std() + _ROUNDING * np.abs(other).max()
    return float(np.abs(mine - other).max() / max(allowed, np.finfo(np.float32).tiny))


def _onnxruntime(model: Path | onnx.ModelProto, feed: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    # As the file says: fused and reordered arithmetic would differ by more.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        results = session.run(None, feed)
    except Exception as error:  # onnxruntime raises classes of its own, protobuf beyond 2 GB another
        raise UsageError(
            f"onnxruntime {onnxruntime.__version__} cannot run {path}, so what edgeattn makes of it cannot be checked: "
            f"{' '.join(str(error).split())} Export the model again for this version."
        ) from error
    return {value.name: result for value, result in zip(session.get_outputs(), results, strict=True)}


def _first_difference(
    graph: OnnxGraph, reread: Callable[[], onnx.ModelProto], one: list[np.ndarray], path: Path
) -> str:
    """The first node whose output differs, or the output where onnxruntime cannot show the nodes'."""
    values: dict[str, np.ndarray] = {}
    nodes: dict[str, Node] = {}

    def keep(node: Node, results: Sequence[Any]) -> None:
        for name, result in zip(node.outputs, results, strict=False):
            if isinstance(result, Tensor) and name:
                values[name], nodes[name] = result.numpy(), node

    _run(graph, one, keep)
    model = reread()
    declared = {value.name for value in model.graph.output}
    made = {name for node in model.graph.node for name in node.output}
    model.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in values if name in made - declared
    )
    with contextlib.suppress(UsageError):
        theirs = _onnxruntime(model, dict(zip(graph.inputs, one, strict=True)), path)
        for name, mine in values.items():
            if name in theirs and not _excess(mine, theirs[name]) <= 1:
                node = nodes[name]
                return f"node {node.name!r} ({node.op}, opset {node.opset}) gives other values than onnxruntime"
    return f"output {', '.join(graph.outputs)} differs from onnxruntime's"


def check_batch(graph: OnnxGraph, inputs: Sequence[TensorSpec], path: Path) -> None:
    """Compare a batch of two with its samples one by one.

    Raises:
        UsageError: they differ; the node that has a batch of 1 in it is named.
    """
    both = _samples(inputs)
    single = [_run(graph, [value[i : i + 1] for value in both]) for i in range(2)]
    try:
        together = _run(graph, both)
        same = all(
            _excess(value.numpy(), torch.cat(pair).numpy()) <= 1
            for value, pair in zip(together, zip(*single, strict=True), strict=True)
        )
    except Exception:  # torch raises many classes where sizes do not fit
        same = False
    if not same:
        node = _baked_node(graph, both)
        raise UsageError(
            f"{path} has its batch size of 1 baked into node {node.name!r} ({node.op}): two samples at once do not "
            "give what each gives alone. Export it with a dynamic batch axis (torch.onnx.export with dynamic_shapes, "
            "or dynamic_axes before)."
        )


def _baked_node(graph: OnnxGraph, both: list[np.ndarray]) -> Node:
    """The node behind which two samples at once go wrong: one that sets sizes, where there is one."""
    runs: list[list[tuple[Node, Any]]] = []
    for values in (both, [value[:1] for value in both], [value[1:] for value in both]):
        runs.append([])
        with contextlib.suppress(Exception):
            _run(graph, values, lambda node, results: runs[-1].append((node, results[0])))
    together, *single = runs
    wrong = []
    for (node, value), (_, first), (_, second) in zip(together, *single, strict=False):
        if not isinstance(value, Tensor) or not value.dim():
            continue
        want = torch.cat([first, second]) if first.dim() else first
        if value.shape != want.shape or not _excess(value.numpy(), want.numpy()) <= 1:
            wrong.append(node)
    if len(together) < len(graph.steps):
        wrong.append(graph.steps[len(together)].node)
    return next((node for node in wrong if node.op in _SIZED), wrong[0] if wrong else graph.steps[-1].node)
