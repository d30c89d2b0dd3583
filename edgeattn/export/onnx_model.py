"""Torch graph to an ONNX model: our ops as nodes of the `edgeattn` domain with a model-local function each."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxscript
import torch
from onnx import helper
from torch import nn

from edgeattn.data.interface import Interface
from edgeattn.errors import NumericError, UnsupportedOp
from edgeattn.export.functions import attach_functions
from edgeattn.ops.registry import DOMAIN, DOMAIN_VERSION, OPSET, PLUGIN_ATTRIBUTES, OpSpec, load_ops
from edgeattn.quant import quantizer as _quantizer  # noqa: F401 (registers the torch ops that are translated here)
from edgeattn.quant.graph import traced

ATTENTION_OPSET = 23
_EXTERNAL_BYTES = 1.8e9  # below protobuf's 2 GiB, with room for the graph itself
# The oldest that the opset allows, so that old runtimes read it: 10 up to opset 22, 11 from 23.
_IR_VERSION = (10, 11)


def to_onnx(graph: nn.Module, interface: Interface, opset: int | None = None) -> onnx.ModelProto:
    """An ONNX model with the interface's names and free axes.

    Args:
        opset: of the standard domain; None is 21, or 23 where the graph has scaled_dot_product_attention, which is the
            standard op Attention from there on.

    Raises:
        UnsupportedOp: a torch op has no ONNX form.
        NumericError: an initializer holds NaN or infinity; it is named.
    """
    program = _program(graph, interface)
    opset = opset or (ATTENTION_OPSET if _has_attention(program) else OPSET)
    model: onnx.ModelProto = _exported(program, interface, opset).model_proto
    _complete(model, opset, _axis_names(program, interface))
    _check_finite(model)
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclasses.dataclass(frozen=True)
class Written:
    """What `save_onnx` wrote: number of nodes by op type, and the shapes of the outputs with the names of free axes."""

    nodes: dict[str, int]
    shapes: dict[str, list[int | str]]


def save_onnx(graph: nn.Module, interface: Interface, path: Path) -> Written:
    """Write `to_onnx` to a file.

    A model beyond protobuf's limit of 2 GB keeps its weights in `PATH.data` beside it and is never held in memory
    as a whole a second time.
    """
    if sum(tensor.nbytes for tensor in graph.state_dict().values()) < _EXTERNAL_BYTES:
        model = to_onnx(graph, interface)
        path.write_bytes(model.SerializeToString())
    else:
        program = _program(graph, interface)
        _check_state_finite(program.state_dict)
        opset = ATTENTION_OPSET if _has_attention(program) else OPSET
        _exported(program, interface, opset).save(path, external_data=True)
        model = onnx.load(path, load_external_data=False)
        _complete(model, opset, _axis_names(program, interface))
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path), full_check=True)
    shapes = {value.name: _shape(value) for value in model.graph.output}
    return Written(dict(Counter(node.op_type for node in model.graph.node).most_common()), shapes)


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]


def _check_state_finite(state: Mapping[str, Any]) -> None:
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericError(f"weight {name} holds NaN or infinity; use another checkpoint.")


def _program(graph: nn.Module, interface: Interface) -> torch.export.ExportedProgram:
    try:
        with _quiet():
            return traced(graph, interface)
    except RuntimeError as error:
        raise UnsupportedOp(f"torch.export cannot trace the rewritten graph: {error}") from error


def _has_attention(program: torch.export.ExportedProgram) -> bool:
    target = torch.ops.aten.scaled_dot_product_attention.default
    return any(node.target is target for node in program.graph.nodes)


def _exported(program: torch.export.ExportedProgram, interface: Interface, opset: int) -> torch.onnx.ONNXProgram:
    try:
        with _quiet():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=[spec.name for spec in interface.inputs],
                output_names=list(interface.outputs), custom_translation_table=_translations(), verbose=False,
                optimize=True,
            )  # fmt: skip
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise UnsupportedOp(
            f"the model cannot be written as ONNX opset {opset}: {error}. "
            "Replace the named operation by one that ONNX has, or register an op of our own for it."
        ) from error
    assert exported is not None
    return exported


def _axis_names(program: torch.export.ExportedProgram, interface: Interface) -> dict[str, str]:
    """The tracer's symbols of free axes to the interface's names; an axis in steps has the symbol of the steps."""
    given = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    names: dict[str, str] = {}
    for spec, name in zip(interface.inputs, program.graph_signature.user_inputs, strict=True):
        for axis, side in zip(spec.shape, given[str(name)].shape, strict=True):
            found = re.fullmatch(r"(\d+\*)?(s\d+)", str(side))
            if found and isinstance(axis, str):
                names[found[2]] = f"{axis}_steps" if found[1] else axis
    return names


def _complete(model: onnx.ModelProto, opset: int, axes: dict[str, str]) -> None:
    """Make the exporter's model ours: no traces of its source, functions for our ops, the oldest fitting IR version,
    free axes called by the interface's names everywhere."""
    for value in (*model.graph.value_info, *model.graph.output):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_param = re.sub(r"\bs\d+\b", lambda m: axes.get(m[0], m[0]), side.dim_param)
    model.ir_version = _IR_VERSION[opset >= ATTENTION_OPSET]
    _pack_int4(model)
    _strip(model)
    attach_functions(model, opset)


def _pack_int4(model: onnx.ModelProto) -> None:
    """Codes that the graph casts to 4 bits are stored in 4 bits."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type != "Cast" or node.input[0] not in stored:
            continue
        if helper.get_node_attr_value(node, "to") != onnx.TensorProto.INT4:
            continue
        tensor = stored[node.input[0]]
        codes = onnx.numpy_helper.to_array(tensor).astype(ml_dtypes.int4)
        tensor.CopyFrom(onnx.numpy_helper.from_array(codes, node.output[0]))
        for value in [v for v in model.graph.value_info if v.name in (node.input[0], node.output[0])]:
            model.graph.value_info.remove(value)
        model.graph.node.remove(node)


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
    standard = onnxscript.opset21
    table: dict[Any, Any] = {
        torch.ops.edgeattn.quantize.default: lambda x, scale, zero: standard.QuantizeLinear(x, scale, zero),
        torch.ops.edgeattn.dequantize.default: lambda q, scale, zero: standard.DequantizeLinear(q, scale, zero, axis=0),
        torch.ops.edgeattn.dequantize_int4.default: _int4_values,
    }
    for spec in load_ops().values():
        table[getattr(torch.ops.edgeattn, spec.torch_op.split("::")[1]).default] = _custom_node(spec)
    return table


def _int4_values(codes: Any, scale: Any, axis: int, block_size: int) -> Any:
    """DequantizeLinear blocked or per output channel; the codes come as int8, see `_pack_int4`."""
    narrow: Any = onnxscript.opset21.Cast(codes, to=onnx.TensorProto.INT4)
    if codes.shape[axis] == block_size and not _has_kernel(block_size):
        one_axis: Any = [-1]
        flat: Any = onnxscript.opset21.Reshape(scale, one_axis)
        return onnxscript.opset21.DequantizeLinear(narrow, flat, axis=1 - axis)
    return onnxscript.opset21.DequantizeLinear(narrow, scale, axis=axis, block_size=block_size)


def _has_kernel(block_size: int) -> bool:
    """Whether ONNX Runtime multiplies by 4-bit weights in blocks of this size: powers of two from 16 on. It dequantizes
    others in every call, but whole channels it takes as they are: 1.4 ms for 4.2 ms (12 layers of 192 x 192)."""
    return block_size >= 16 and block_size & (block_size - 1) == 0


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
