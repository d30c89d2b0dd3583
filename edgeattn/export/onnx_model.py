"""Torch graph to an ONNX model: our ops as nodes of the `edgeattn` domain with a model-local function each."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch
from onnx import helper
from torch import fx

from edgeattn.errors import NumericError, UnsupportedOp
from edgeattn.ops.registry import DOMAIN, DOMAIN_VERSION, OPS, OPSET, PLUGIN_ATTRIBUTES, OpSpec, alias, load_ops
from edgeattn.quant import quantizer as _quantizer  # noqa: F401 (registers the torch ops that are translated here)
from edgeattn.runtime.session import INPUT, OUTPUT

_IR_VERSION = 10  # readable by every runtime of the last two years; nothing newer is needed


def to_onnx(graph: fx.GraphModule, input_shape: Sequence[int]) -> onnx.ModelProto:
    """An ONNX model with input `image` (batch, *input_shape) and output `logits`, opset 20, batch axis free.

    Raises:
        UnsupportedOp: a torch op has no ONNX form.
        NumericError: an initializer holds NaN or infinity; it is named.
    """
    example = torch.zeros(2, *input_shape)
    try:
        with _quiet():
            program = torch.export.export(
                graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},), strict=False
            )
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT],
                custom_translation_table=_translations(), verbose=False, optimize=True,
            )  # fmt: skip
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise UnsupportedOp(
            f"the model cannot be written as ONNX opset {OPSET}: {error}. "
            "Replace the named operation by one that ONNX has, or register an op of our own for it."
        ) from error
    assert exported is not None
    model: onnx.ModelProto = exported.model_proto
    model.ir_version = _IR_VERSION
    _strip(model)
    _attach_functions(model)
    _check_finite(model)
    onnx.checker.check_model(model, full_check=True)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and version hints on stdout and through warnings; ours is the only output."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    standard = onnxscript.opset20
    table: dict[Any, Any] = {
        torch.ops.edgeattn.quantize.default: lambda x, scale, zero: standard.QuantizeLinear(x, scale, zero),
        torch.ops.edgeattn.dequantize.default: lambda q, scale, zero: standard.DequantizeLinear(q, scale, zero, axis=0),
    }
    for spec in load_ops().values():
        table[getattr(torch.ops.edgeattn, spec.torch_op.split("::")[1]).default] = _custom_node(spec)
    return table


def _custom_node(spec: OpSpec) -> Callable[..., Any]:
    """A translation that writes one node: tensors are inputs, the remaining arguments are attributes in order."""
    schema = _schema(spec)
    op = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), spec.name, schema)

    def translate(*args: Any) -> Any:
        count = len(spec.inputs)
        attributes = dict(zip(spec.attributes, args[count:], strict=True))
        return op(*args[:count], **attributes, **PLUGIN_ATTRIBUTES)

    return translate


def _schema(spec: OpSpec) -> onnx.defs.OpSchema:
    """A schema wide enough for the exporter; the op's shape rule and checker do the validation."""
    parameter, schema = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema
    kinds = {
        int: schema.AttrType.INT,
        float: schema.AttrType.FLOAT,
        str: schema.AttrType.STRING,
        list: schema.AttrType.INTS,
    }
    types = ["tensor(float)", "tensor(float16)", "tensor(int8)"]
    names = {**spec.attributes, **PLUGIN_ATTRIBUTES}
    return schema(
        spec.name, DOMAIN, DOMAIN_VERSION,
        inputs=[parameter(name, f"T{i}") for i, name in enumerate(spec.inputs)],
        outputs=[parameter(name, "T0") for name in spec.outputs],
        type_constraints=[(f"T{i}", types, "") for i in range(len(spec.inputs))],
        attributes=[schema.Attribute(name, kinds[type(value)]) for name, value in names.items()],
    )  # fmt: skip


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes about the source: stack traces with paths of the machine that exported."""
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer,
                   *model.graph.input, *model.graph.output):  # fmt: skip
        del holder.metadata_props[:]
        holder.doc_string = ""
    model.producer_name = "edgeattn"
    del model.functions[:]


def _attach_functions(model: onnx.ModelProto) -> None:
    """Give every node of ours a function body.

    A body fits one value of the op's structural attributes (its `signature`). Functions are found by name alone in
    some parsers (TensorRT's, onnx's reference evaluator ignore overloads), so a second body in one model gets a name
    of its own: the op's name with the attribute's value, which the plugin knows too.
    """
    names: dict[str, dict[tuple[Any, ...], str]] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        spec = OPS[node.op_type]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in spec.attributes}
        key = tuple(attributes[name] for name in spec.signature)
        known = names.setdefault(spec.name, {})
        if key not in known:
            known[key] = alias(spec.name, spec.signature, key) if known else spec.name
            model.functions.append(spec.body(**attributes, name=known[key]))
        node.op_type = known[key]
    opsets = {entry.domain for entry in model.opset_import}
    if names and DOMAIN not in opsets:
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def _check_finite(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if not np.isfinite(values).all():
            raise NumericError(
                f"constant {tensor.name} holds {int((~np.isfinite(values)).sum())} NaN or infinite value(s) "
                "after folding. A BatchNorm variance or weight of that layer is broken; use another checkpoint."
            )
