"""ONNX Runtime: a standard DeformConv beside GridSample and Conv, at LITv2-S's three downsamplings, interleaved.

    python scripts/compare_deform_conv.py

Prints the ratio of median times (DeformConv over GridSample form; above 1 means the GridSample form is faster) with the
range of that ratio over five rounds, and the largest relative difference of the results.
"""

from __future__ import annotations

import time

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeattn.data.interface import Interface, TensorSpec
from edgeattn.export.onnx_model import to_onnx
from edgeattn.models.litv2 import DeformableConv
from edgeattn.quant.graph import capture

SHAPES = ((96, 56), (192, 28), (384, 14))  # channels and side of the map
ROUNDS, RUNS = 5, 40


def session(model: object) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def standard(layer: DeformableConv, side: int) -> object:
    """The layer with its offset convolution as Conv and the rest as DeformConv."""
    values = {f"offset.{k}": v for k, v in layer.conv_offset.named_parameters()}
    values |= {"weight": layer.weight, "bias": layer.bias}
    nodes = [
        helper.make_node("Conv", ["x", "offset.weight", "offset.bias"], ["offset"], strides=[2, 2]),
        helper.make_node("DeformConv", ["x", "weight", "offset", "bias"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, layer.weight.shape[1], side, side])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    constants = [numpy_helper.from_array(v.detach().numpy(), k) for k, v in values.items()]
    graph = helper.make_graph(nodes, "standard", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def median_ms(runner: onnxruntime.InferenceSession, x: np.ndarray) -> float:
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        runner.run(None, {"x": x})
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def main() -> None:
    torch.manual_seed(0)
    for channels, side in SHAPES:
        layer = DeformableConv(channels, 2 * channels).eval()
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.5 / channels**0.5)
        interface = Interface((TensorSpec("x", ("batch", channels, side, side)),), ("y",))
        pair = session(standard(layer, side)), session(to_onnx(capture(layer, interface), interface))
        x = np.random.default_rng(0).standard_normal((1, channels, side, side), np.float32)
        first, second = (runner.run(None, {"x": x})[0] for runner in pair)
        times = [[median_ms(runner, x) for runner in pair] for _ in range(ROUNDS)]
        ratios = [a / b for a, b in times]
        print(
            f"{channels} x {side} x {side}: ratio {np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}], "
            f"DeformConv {np.median([a for a, _ in times]):.2f} ms, "
            f"relative difference {np.abs(first - second).max() / first.std():.1e}"
        )


if __name__ == "__main__":
    main()
