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
OPSET = 20  # of the standard domain; function bodies and models must agree on it
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(DOMAIN_VERSION)}

_OP_MODULES = ("cascaded_group_attention",)
OPS: dict[str, OpSpec] = {}


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """One op of the `edgeattn` ONNX domain.

    Attributes:
        name: ONNX op type; never that of a standard op.
        inputs, outputs: names in order; none is optional.
        attributes: name to example value, which fixes the type (int, float, str, list of int).
        reference: the definition: float64 numpy inputs by name, attributes by name, to the tuple of outputs.
        body: attributes to the FunctionProto that says the same in standard ops.
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


class BodyWriter:
    """Collects the named nodes of a function body."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op_type: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any) -> None:
        """Append a node; it is named after its first output."""
        from onnx import helper

        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=f"cga_{names[0]}", **attributes))

    def constant(self, name: str, value: Any) -> str:
        """An int64 or float32 constant tensor."""
        from onnx import numpy_helper

        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        self.add("Constant", [], name, value=numpy_helper.from_array(array, name))
        return name

    def attribute(self, name: str, attribute: str, kind: str) -> str:
        """A constant that takes the calling node's attribute; `kind` is value_int, value_ints or value_float."""
        from onnx import AttributeProto

        types = {
            "value_int": AttributeProto.INT,
            "value_ints": AttributeProto.INTS,
            "value_float": AttributeProto.FLOAT,
        }
        self.add("Constant", [], name)
        reference = self.nodes[-1].attribute.add()
        reference.name, reference.ref_attr_name, reference.type = kind, attribute, types[kind]
        return name

    def function(self, spec_name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str]) -> Any:
        """The finished FunctionProto; it declares the plugin attributes too."""
        from onnx import helper

        return helper.make_function(
            DOMAIN, spec_name, list(inputs), list(outputs), self.nodes, [helper.make_opsetid("", OPSET)],
            attributes=[*attributes, *PLUGIN_ATTRIBUTES],
        )  # fmt: skip
