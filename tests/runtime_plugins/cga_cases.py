"""Random cases of CascadedGroupAttention, the C door to the kernels, and one-node ONNX models."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import numpy as np
import pytest

from edgeattn.runtime_plugins import cpu

WEIGHTS = ("qkv_weight", "dw_weight", "proj_weight")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call of the op."""

    batch: int = 1
    channels: int = 64
    height: int = 7
    width: int = 7
    heads: int = 4
    key_dim: int = 16
    window: tuple[int, int] = (7, 7)
    kernel: int = 5

    def __str__(self) -> str:
        return (
            f"b{self.batch}-c{self.channels}-{self.height}x{self.width}-h{self.heads}-d{self.key_dim}"
            f"-win{self.window[0]}x{self.window[1]}-k{self.kernel}"
        )

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(num_heads=self.heads, key_dim=self.key_dim, window=list(self.window), scale=self.key_dim**-0.5)

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs by name, in the op's order; weights are scaled so that activations keep unit size."""
        r = np.random.default_rng(seed)
        heads, d, v = self.heads, self.key_dim, self.channels // self.heads
        tokens, rows = self.window[0] * self.window[1], heads * (2 * d + v)
        values = dict(
            x=r.normal(size=(self.batch, self.channels, self.height, self.width)),
            qkv_weight=r.normal(size=(rows, v, 1, 1)) / v**0.5,
            qkv_bias=r.normal(size=rows) * 0.1,
            dw_weight=r.normal(size=(heads * d, 1, self.kernel, self.kernel)) / self.kernel,
            dw_bias=r.normal(size=heads * d) * 0.1,
            attention_bias=r.normal(size=(heads, tokens, tokens)),
            proj_weight=r.normal(size=(self.channels, self.channels, 1, 1)) / self.channels**0.5,
            proj_bias=r.normal(size=self.channels) * 0.1,
        )
        return {name: value.astype(np.float32) for name, value in values.items()}

    def quantized_inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """The same with int8 weights, each followed by its scale per output channel."""
        values: dict[str, np.ndarray] = {}
        for name, value in self.inputs(seed).items():
            values[name] = value
            if name in WEIGHTS:
                scale = np.abs(value).reshape(len(value), -1).max(1) / 127
                values[name] = np.rint(value / scale[:, None, None, None]).astype(np.int8)
                values[name.replace("weight", "scale")] = scale.astype(np.float32)
        return values


class Size(ctypes.Structure):
    """edgeattn_cga_size in c_api.h."""

    _fields_ = [
        *((n, ctypes.c_int) for n in ("batch", "channels", "height", "width", "num_heads", "key_dim", "kernel")),
        ("window_height", ctypes.c_int),
        ("window_width", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


def load_kernels() -> ctypes.CDLL:
    path = cpu.kernels_library()
    if path is None:
        pytest.skip(f"native kernels not built: {cpu.missing_reason()}", allow_module_level=True)
    library = ctypes.CDLL(str(path))
    for name in ("edgeattn_version", "edgeattn_compiled_isas", "edgeattn_best_isa"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def run_kernel(
    library: ctypes.CDLL, case: Case, inputs: dict[str, np.ndarray], isa: str, threads: int = 1
) -> np.ndarray:
    """The op through the C door; raises ValueError with the library's message. The result is surrounded by a guard."""
    a = case.attributes
    size = Size(*inputs["x"].shape, case.heads, case.key_dim, case.kernel, *case.window, a["scale"])
    guard, count = 64, inputs["x"].size
    out = np.full(count + 2 * guard, 12345.0, np.float32)
    pointers = [v.ctypes.data_as(ctypes.c_void_p) for v in inputs.values()]
    message = ctypes.create_string_buffer(300)
    y = ctypes.c_void_p(out.ctypes.data + 4 * guard)
    if library.edgeattn_cga_f32(isa.encode(), threads, ctypes.byref(size), *pointers, y, message, 300):
        raise ValueError(message.value.decode())
    assert (out[:guard] == 12345.0).all() and (out[-guard:] == 12345.0).all(), "written outside the output"
    return out[guard:-guard].reshape(inputs["x"].shape)


def assert_close(found: np.ndarray, reference: np.ndarray, limit: float = 1e-5) -> None:
    """Largest difference relative to the spread of the reference."""
    error = float(np.abs(found - reference).max() / reference.std())
    assert error < limit, f"error {error:.2e} of the output's standard deviation, limit {limit:.0e}"


def one_node_model(
    inputs: dict[str, np.ndarray], attributes: dict[str, Any], *, name: str = "", batch: int | str = "batch",
    weights: str = "constant", extra: dict[str, Any] | None = None,
) -> bytes:  # fmt: skip
    """A model of one node with its function body; `weights` "input" makes the weights graph inputs."""
    import onnx
    from onnx import TensorProto, helper

    from edgeattn.ops.cascaded_group_attention import body
    from edgeattn.ops.registry import OPSET, PLUGIN_ATTRIBUTES

    quantized = "qkv_scale" in inputs
    op = name or ("QCascadedGroupAttention" if quantized else "CascadedGroupAttention")
    attributes = {**attributes, **PLUGIN_ATTRIBUTES, **(extra or {})}
    node = helper.make_node(op, list(inputs), ["y"], name="attention", domain="edgeattn", **attributes)
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int8): TensorProto.INT8}
    shape = [batch, *inputs["x"].shape[1:]]
    as_inputs = [n for n in inputs if n != "x"] if weights == "input" else []
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        + [helper.make_tensor_value_info(n, types[inputs[n].dtype], inputs[n].shape) for n in as_inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(v, n) for n, v in inputs.items() if n != "x" and n not in as_inputs],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("edgeattn", 1)]
    functions = [body(num_heads=attributes["num_heads"], quantized=quantized, name=op)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10).SerializeToString()
