"""What an op of ours is, the table of all of them, and a small writer for their ONNX function bodies."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

DOMAIN = "edgeattn"
DOMAIN_VERSION = 1
OPSET = 21  # of the standard domain; function bodies and models must agree on it
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(DOMAIN_VERSION)}

_OP_MODULES = ("cascaded_group_attention", "elu_linear_attention", "hilo_attention", "single_head_attention")
OPS: dict[str, OpSpec] = {}


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """One op of the `edgeattn` ONNX domain.

    Attributes:
        name: ONNX op type; never that of a standard op.
        inputs, outputs: names in order; none is optional.
        attributes: name to example value, which fixes the type (int, float, str, list of int).
        reference: the definition: float64 numpy inputs by name, attributes by name, to the tuple of outputs.
        body: attributes, and `dtype` of the floating-point inputs, to the FunctionProto in standard ops.
        infer_shape: shapes of the inputs (in order) and attributes to the shapes of the outputs; refuses what is wrong.
        torch_op: qualified name of the torch custom op, "edgeattn::..."; takes the inputs, then the attributes.
        signature: the attributes that change the body's structure, so that a model needs one body per value of them.
        weights: the inputs that are weights with output channels on axis 0, which may be stored as int8.
        quantized: name of the op that takes those weights as int8 with scales, or None.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    reference: Callable[..., tuple[np.ndarray, ...]]
    body: Callable[..., onnx.FunctionProto]
    infer_shape: Callable[..., tuple[tuple[int, ...], ...]]
    torch_op: str
    signature: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    quantized: str | None = None


def register_op(spec: OpSpec) -> OpSpec:
    """Add an op to the table; the name must be new."""
    if spec.name in OPS:
        raise ValueError(f"op {spec.name!r} is registered twice")
    OPS[spec.name] = spec
    return spec


def load_ops() -> dict[str, OpSpec]:
    """The table with every op in it, by ONNX name."""
    for module in _OP_MODULES:
        importlib.import_module(f"edgeattn.ops.{module}")
    return OPS


def alias(name: str, signature: Sequence[str], values: Sequence[Any]) -> str:
    """Node type for a second body of an op in one model: the op's name and the values that its structure depends on."""
    return name + "".join(f"_{key}{value}" for key, value in zip(signature, values, strict=True))


def spec_name(op_type: str) -> str:
    """The op's name from a node type, which may be an alias."""
    return op_type.partition("_")[0]


def scale_name(weight: str) -> str:
    """Name of the input that holds the scale of an int8 weight input."""
    return weight.replace("weight", "scale")


def with_scales(inputs: Sequence[str], weights: Sequence[str]) -> tuple[str, ...]:
    """Inputs of an op's quantized form: every weight is followed by its scale."""
    return tuple(n for name in inputs for n in ((name, scale_name(name)) if name in weights else (name,)))


def dequantize_inputs(
    values: Sequence[Any], inputs: Sequence[str], weights: Sequence[str], dequantize: Callable[[Any, Any], Any]
) -> list[Any]:
    """Values of the plain op's `inputs` from those of its quantized form; dequantize(codes, scale) makes a weight."""
    named = dict(zip(with_scales(inputs, weights), values, strict=True))
    for name in weights:
        named[name] = dequantize(named[name], named.pop(scale_name(name)))
    return [named[name] for name in inputs]


class BodyWriter:
    """Collects the nodes of a function body, named after their first output with a prefix.

    `dtype` is numpy's name of the type that the op computes in; float attributes and constants are written in it.
    """

    def __init__(self, prefix: str, dtype: str = "float32") -> None:
        self.prefix, self.dtype = prefix, dtype
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op_type: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any) -> None:
        """Append a node."""
        from onnx import helper

        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(
            helper.make_node(op_type, list(inputs), names, name=f"{self.prefix}_{names[0]}", **attributes)
        )

    def constant(self, name: str, value: Any) -> str:
        """A constant tensor: int64, or of the op's type for a float."""
        from onnx import numpy_helper

        array = np.asarray(value, self.dtype if isinstance(value, float) else np.int64)
        self.add("Constant", [], name, value=numpy_helper.from_array(array, name))
        return name

    def attribute(self, name: str, attribute: str, kind: str, dtype: str | None = None) -> str:
        """A constant that takes the calling node's attribute; `kind` is value_int, value_ints or value_float.

        A float attribute is a float32 constant in ONNX; it is cast to `dtype` (None: the op's) where that differs.
        """
        from onnx import AttributeProto

        types = {
            "value_int": AttributeProto.INT,
            "value_ints": AttributeProto.INTS,
            "value_float": AttributeProto.FLOAT,
        }
        dtype = dtype or self.dtype
        typed = kind != "value_float" or dtype == "float32"
        self.add("Constant", [], name if typed else f"{name}_float32")
        reference = self.nodes[-1].attribute.add()
        reference.name, reference.ref_attr_name, reference.type = kind, attribute, types[kind]
        if not typed:
            self.cast(f"{name}_float32", name, dtype)
        return name

    def cast(self, source: str, name: str, dtype: str) -> None:
        """A Cast to numpy's type."""
        from onnx import helper

        self.add("Cast", [source], name, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def function(self, spec_name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str]) -> Any:
        """The finished FunctionProto; it declares the plugin attributes too."""
        from onnx import helper

        return helper.make_function(
            DOMAIN, spec_name, list(inputs), list(outputs), self.nodes, [helper.make_opsetid("", OPSET)],
            attributes=[*attributes, *PLUGIN_ATTRIBUTES],
        )  # fmt: skip
