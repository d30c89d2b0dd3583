"""Golden inputs, what each graph gives for them, and how far an artefact may be from that."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import fx

from edgeattn.data.interface import BATCH, IMAGE, RELATIVE_TOLERANCE
from edgeattn.data.source import ImageSource
from edgeattn.errors import NumericError
from edgeattn.quant.graph import first_nonfinite
from edgeattn.quant.quantize import QuantizedModel
from edgeattn.runtime.bundle import Golden

FLOAT = "float32"  # the graph that the others are compared with
_SAMPLES = 4
_LARGE = 100_000_000  # parameters
_FREE_SIZES = {"height": 224, "width": 256}  # of golden pictures where the model takes any size


def make_golden(
    model: QuantizedModel, graphs: Mapping[str, fx.GraphModule], source: ImageSource | None
) -> tuple[Golden, dict[str, dict[str, float]]]:
    """Golden inputs and the torch graphs' outputs; the largest allowed difference per graph and output.

    A float32 runtime may differ by rounding (1e-4 of an output's spread unless the interface says more). An integer
    runtime rounds each layer once more or less than the simulation, which can move a code by one: it may differ by no
    more than quantization itself changed the output, twice over.

    Raises:
        NumericError: a graph gives NaN or infinity; the layer where they begin is named.
    """
    inputs = _inputs(model, source)
    outputs = {name: _run(graph, model, inputs, name) for name, graph in graphs.items()}
    plain = outputs[FLOAT]
    shares = {name: model.interface.tolerance.get(name, RELATIVE_TOLERANCE) for name in plain}
    rounding = {name: shares[name] * max(1.0, float(value.std())) for name, value in plain.items()}
    tolerance = {
        graph: {name: rounding[name] + 2 * float(np.abs(values[name] - plain[name]).max()) for name in plain}
        for graph, values in outputs.items()
    }
    return Golden(inputs, outputs), tolerance


def _run(
    graph: fx.GraphModule, model: QuantizedModel, inputs: dict[str, np.ndarray], what: str
) -> dict[str, np.ndarray]:
    tensors = [torch.from_numpy(value) for value in inputs.values()]
    with torch.no_grad():
        results = graph(*tensors)
    results = tuple(results.values()) if isinstance(results, dict) else results
    results = results if isinstance(results, tuple) else (results,)
    outputs = {name: value.numpy() for name, value in zip(model.interface.outputs, results, strict=True)}
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            layer = first_nonfinite(graph, *tensors)
            raise NumericError(
                f"the {what} model gives NaN or infinite {name}; they begin in layer {layer}. "
                "Check the checkpoint and the preprocessing."
            )
    return outputs


def _inputs(model: QuantizedModel, source: ImageSource | None) -> dict[str, np.ndarray]:
    if source is None or model.preprocessing is None or not model.interface.is_classifier:
        # Without pictures any input shows whether a runtime computes the same. Large models get one sample.
        samples = _SAMPLES if model.parameters < _LARGE else 1
        sizes = {axis: _FREE_SIZES.get(axis, 2) for axis in model.interface.free_axes} | {BATCH: samples}
        return model.interface.examples(sizes)
    images = [model.preprocessing(sample.image) for sample in source.spread(_SAMPLES)]
    return {IMAGE: np.stack(images)}
