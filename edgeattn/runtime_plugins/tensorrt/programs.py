"""The program of each op for given shapes, attributes and type: launches, tile sizes, workspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgeattn.errors import UnsupportedOp
from edgeattn.ops.registry import load_ops
from edgeattn.runtime_plugins.tensorrt.program import Argument, Expression, Launch, Program, Value, Variant, product

TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_LEAST_TILE = 16  # of a tensor core's product
# Of CascadedGroupAttention: tokens of a window, and what its first kernel reads (the quantized form has all of it).
_MOST_WINDOW_TOKENS = 64
_HEAD_INPUTS = (
    "x", "qkv_weight", "qkv_scale", "qkv_bias", "dw_weight", "dw_scale", "dw_bias", "attention_bias",
)  # fmt: skip
# Loads of odd rows are too narrow to be copied ahead: a second stage changes nothing, or makes registers spill.
_STAGES = 1
Shapes = Mapping[str, tuple[int, ...]]
_BUILDERS: dict[str, Callable[[str, Shapes, Mapping[str, Any], str], Program]] = {}


def build_program(op: str, shapes: Sequence[Sequence[int]], attributes: Mapping[str, Any], dtype: str) -> Program:
    """The program of `op`, for any batch size and, where the op allows it, any height and width.

    Args:
        shapes: of the inputs, in order.
        dtype: numpy's name of the floating-point type of the inputs.

    Raises:
        UnsupportedOp: no kernels for the op, type or size; or the shapes are wrong.
    """
    specs = load_ops()
    plain = next((spec.name for spec in specs.values() if spec.quantized == op), op)
    if plain not in _BUILDERS:
        raise UnsupportedOp(f"no GPU kernels for op {op!r}; there are some for {', '.join(sorted(_BUILDERS))}.")
    if dtype not in TRITON_TYPES:
        raise UnsupportedOp(f"{op}: no GPU kernels for {dtype}; expected one of {', '.join(TRITON_TYPES)}.")
    specs[op].infer_shape(*shapes, **attributes)
    # ONNX stores float32: the same call is the same program, whichever way its attributes came.
    attributes = {name: float(np.float32(a)) if isinstance(a, float) else a for name, a in attributes.items()}
    named = {name: tuple(shape) for name, shape in zip(specs[op].inputs, shapes, strict=True)}
    return _BUILDERS[plain](op, named, attributes, dtype)


def _builder(op: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        _BUILDERS[op] = function
        return function

    return register


def tile(size: int) -> int:
    """The least power of two that holds `size` and that a tensor core multiplies."""
    return max(_LEAST_TILE, 1 << (size - 1).bit_length())


class _Call:
    """Collects the launches of one call of an op; arguments are named as the kernel's parameters."""

    def __init__(self, inputs: Sequence[str], dtype: str) -> None:
        self.inputs, self.dtype = list(inputs), dtype
        self.launches: list[Launch] = []

    def pointer(self, name: str) -> tuple[str, Argument] | None:
        """Type and argument of an input; None if this form of the op lacks it."""
        if name not in self.inputs:
            return None
        is_codes = name.endswith("_weight") and name.replace("weight", "scale") in self.inputs
        return "*i8" if is_codes else f"*{TRITON_TYPES[self.dtype]}", Argument("input", self.inputs.index(name))

    def output(self) -> tuple[str, Argument]:
        return f"*{TRITON_TYPES[self.dtype]}", Argument("output", 0)

    def launch(
        self, kernel: str, grid: tuple[Expression, Expression, Expression], arguments: Mapping[str, Any],
        constants: Mapping[str, Value], num_warps: int = 4,
    ) -> None:  # fmt: skip
        """Arguments are pairs from `pointer` and `output`, or int32 expressions; None becomes a constant."""
        given = {
            name: value if isinstance(value, tuple) and isinstance(value[-1], Argument) else
            ("i32", Argument("int32", value)) for name, value in arguments.items() if value is not None
        }  # fmt: skip
        absent = {name: None for name, value in arguments.items() if value is None}
        signature = tuple((name, kind) for name, (kind, _) in given.items())
        variant = Variant(kernel, self.dtype, signature, tuple({**absent, **constants}.items()), num_warps, _STAGES)
        self.launches.append(Launch(variant, grid, tuple(argument for _, argument in given.values())))


@_builder("SingleHeadAttention")
def _single_head(op: str, shapes: Shapes, attributes: Mapping[str, Any], dtype: str) -> Program:
    call, block, key_dim = _Call(list(shapes), dtype), 32, attributes["key_dim"]
    channels = shapes["x"][1]
    tokens = product("H", "W")
    call.launch(
        "single_head_attention.single_head_attention",
        (("cdiv", tokens, block), -(-channels // block), "B"),
        {
            "x": call.pointer("x"), "weight": call.pointer("qkv_weight"), "scale": call.pointer("qkv_scale"),
            "bias": call.pointer("qkv_bias"), "channels": channels, "tokens": tokens, "out": call.output(),
        },
        {
            "KEY_DIM": key_dim, "SCALE": attributes["scale"], "EPSILON": attributes["epsilon"], "BLOCK_N": block,
            "BLOCK_C": 16, "BLOCK_D": tile(key_dim), "BLOCK_V": block,
        },
    )  # fmt: skip
    patterns = (("B", channels, "H", "W"), *list(shapes.values())[1:])
    return Program(op, dtype, patterns, dict(attributes), (), tuple(call.launches))


@_builder("EluLinearAttention")
def _elu_linear(op: str, shapes: Shapes, attributes: Mapping[str, Any], dtype: str) -> Program:
    call, block, heads = _Call(list(shapes), dtype), 32, attributes["num_heads"]
    channels = shapes["v"][1]
    tokens = product("H", "W")
    call.launch(
        "elu_linear_attention.elu_linear_attention",
        # Every program of a head sums over all tokens: a few share the queries, so that time stays linear in tokens.
        (("min", ("cdiv", tokens, block), 4), heads, "B"),
        {
            "qk": call.pointer("qk"), "v": call.pointer("v"), "channels": channels, "tokens": tokens,
            "out": call.output(),
        },
        {
            "HEAD_DIM": channels // heads, "EPSILON": attributes["epsilon"], "BLOCK_N": block,
            "BLOCK_D": tile(channels // heads),
        },
    )  # fmt: skip
    patterns = (("B", 2 * channels, "H", "W"), ("B", channels, "H", "W"))
    return Program(op, dtype, patterns, dict(attributes), (), tuple(call.launches))


@_builder("HiLoAttention")
def _hilo(op: str, shapes: Shapes, attributes: Mapping[str, Any], dtype: str) -> Program:
    call, block, head_dim = _Call(list(shapes), dtype), 32, attributes["head_dim"]
    (_, tokens, low), high = shapes["lo_q"], shapes["hi_qkv"][2] // 3
    call.launch(
        "hilo_attention.hilo_attention",
        (-(-tokens // block), (low + high) // head_dim, "B"),
        {
            "lo_q": call.pointer("lo_q"), "lo_kv": call.pointer("lo_kv"), "hi_qkv": call.pointer("hi_qkv"),
            "tokens": tokens, "pooled": shapes["lo_kv"][1], "grid_width": attributes["grid"][1], "low": low,
            "high": high, "out": call.output(),
        },
        {
            "HEAD_DIM": head_dim, "SCALE": attributes["scale"], "WINDOW": attributes["window"], "BLOCK_N": block,
            "BLOCK_D": tile(head_dim),
        },
    )  # fmt: skip
    patterns: tuple[tuple[int | str, ...], ...] = tuple(("B", *shape[1:]) for shape in shapes.values())
    return Program(op, dtype, patterns, dict(attributes), (), tuple(call.launches))


@_builder("CascadedGroupAttention")
def _cascaded(op: str, shapes: Shapes, attributes: Mapping[str, Any], dtype: str) -> Program:
    call, heads, key_dim = _Call(list(shapes), dtype), attributes["num_heads"], attributes["key_dim"]
    (win_h, win_w), channels = attributes["window"], shapes["x"][1]
    window, rows = win_h * win_w, 2 * key_dim + channels // heads
    if window > _MOST_WINDOW_TOKENS:
        raise UnsupportedOp(
            f"{op}: a window of {win_h}x{win_w} tokens; the GPU kernel takes all queries of a window in one tile, at "
            f"most {_MOST_WINDOW_TOKENS} tokens. Run the function body instead."
        )
    windows = product("B", ("cdiv", "H", win_h), ("cdiv", "W", win_w))
    # float32: q, k and v of one head, and all heads' results.
    workspaces = (product(windows, rows * window * 4), product(windows, channels * window * 4))
    qkv, results = (("*fp32", Argument("workspace", i)) for i in range(2))
    sizes = {"channels": channels, "height": "H", "width": "W", "win_h": win_h, "win_w": win_w}
    call.launch(
        "cascaded_group_attention.cascaded_heads",
        (("cdiv", "W", win_w), ("cdiv", "H", win_h), "B"),
        {
            **{name: call.pointer(name) for name in _HEAD_INPUTS}, **sizes, "heads": heads,
            "side": shapes["dw_weight"][-1], "qkv": qkv, "results": results,
        },
        {
            "KEY_DIM": key_dim, "SCALE": attributes["scale"], "BLOCK_N": tile(window), "BLOCK_K": 16, "BLOCK_C": 16,
            "BLOCK_D": tile(key_dim), "BLOCK_V": 32,
        },
        num_warps=4 if tile(window) < _MOST_WINDOW_TOKENS else 8,
    )  # fmt: skip
    call.launch(
        "cascaded_group_attention.project_windows",
        (("cdiv", product("H", "W"), 32), -(-channels // 32), "B"),
        {
            "results": results, "weight": call.pointer("proj_weight"), "scale": call.pointer("proj_scale"),
            "bias": call.pointer("proj_bias"), **sizes, "out": call.output(),
        },
        {"BLOCK_N": 32, "BLOCK_C": 16, "BLOCK_O": 32},
    )  # fmt: skip
    patterns = (("B", channels, "H", "W"), *list(shapes.values())[1:])
    return Program(op, dtype, patterns, dict(attributes), workspaces, tuple(call.launches))
