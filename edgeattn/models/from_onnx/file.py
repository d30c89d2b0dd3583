"""An ONNX file as a model: read, refused with a reason or rebuilt from torch ops, and checked before it is returned."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, inliner, numpy_helper

from edgeattn.data.files import sha256_of
from edgeattn.data.interface import BATCH, Interface, TensorSpec, classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import CheckpointError, UnsupportedOp, UsageError
from edgeattn.models.from_onnx.check import check_batch, check_values
from edgeattn.models.from_onnx.graph import MOST_INPUTS, OnnxGraph, build_graph, standard_opset
from edgeattn.models.from_onnx.ops import load_onnx_ops
from edgeattn.models.sizes import as_pair

_CROP = 0.875
_OLDEST_OPSET = 7  # before it, operands had to be told how to broadcast
_STANDARD = ("", "ai.onnx")
_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INPUT_TYPES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.INT32: "int32"}


def load_onnx(
    path: str | os.PathLike[str],
    *,
    img_size: int | Sequence[int] | None = None,
    weights: Any = None,
    num_classes: int | None = None,
    **config: Any,
) -> OnnxGraph:
    """The file's graph as a module in evaluation mode, which computed what onnxruntime computes on one random input.

    It carries `interface`, `notes`, and for a classifier `preprocessing` and `num_classes`.

    Args:
        img_size: for a file whose height and width are free.

    Raises:
        CheckpointError: unreadable. UsageError: quantized already, free sizes, batch baked in, or arguments that an
        ONNX file has no use for. UnsupportedOp: all op types that cannot be run are named.
    """
    given = {"weights": weights, "num_classes": num_classes, **config}
    extra = ", ".join(key for key, value in given.items() if value is not None)
    if extra:
        raise UsageError(
            f"{path} is an ONNX file: it has its weights, classes and architecture in it, so {extra} cannot be set. "
            "Leave that out, or give the model by name or as package.module:callable."
        )
    path = Path(path)
    model = _read(path)
    inputs = _input_specs(model, path, img_size)
    opset, producer = standard_opset(model), f"{model.producer_name} {model.producer_version}".strip()
    ends, freed = _ends_in_softmax(model), not _has_free_batch(model)
    halved = _to_float32(model)
    graph = build_graph(model, [spec.name for spec in inputs])
    checked = check_values(graph, inputs, path, lambda: _floated(_read(path)), halved)
    check_batch(graph, inputs, path)
    size = {} if img_size is None else {"img_size": list(as_pair(img_size))}
    graph.name, graph.config = path.stem, {"file": path.name, "sha256": sha256_of(path), **size}
    notes = [
        f"{path.name}: ONNX opset {opset} by {producer or 'an unnamed exporter'}, run with standard ops; {checked}"
    ]
    notes += [f"{path.name}: float16 converted to float32"] if halved else []
    notes += [f"{path.name}: its fixed batch of 1 made free"] if freed else []
    notes += [
        f"{path.name}: input {spec.name!r} is tried with whole numbers below {spec.high:g}"
        for spec in inputs
        if spec.dtype != "float32"
    ]
    notes += _describe(graph, inputs, checked.shapes, ends)
    graph.notes = notes
    return graph


def _describe(
    graph: OnnxGraph, inputs: Sequence[TensorSpec], shapes: Sequence[tuple[int, ...]], has_softmax: bool
) -> list[str]:
    """Set interface, preprocessing and num_classes; returns what was assumed."""
    shape = inputs[0].shape
    is_image = len(inputs) == 1 and len(shape) == 4 and inputs[0].dtype == "float32"
    if not (is_image and shape[1] == 3 and len(shapes) == 1 and len(shapes[0]) == 2):
        graph.interface = Interface(tuple(inputs), graph.outputs)
        if is_image and shape[3] == 3:
            return ["its pictures are (height, width, 3), so it is no classifier here; that takes (3, height, width)"]
        return []
    size = int(shape[2]), int(shape[3])
    graph.interface = classifier_interface(size)
    graph.preprocessing = Preprocessing(size=size, crop_fraction=_CROP)
    graph.num_classes = shapes[0][1]
    notes = [
        f"an ONNX file does not say how its pictures are prepared; assumed: centre crop of {_CROP} after a bicubic "
        "resize, ImageNet mean and standard deviation. Set model.preprocessing in Python if it was trained otherwise"
    ]
    if has_softmax:
        notes.append(
            "its output ends in Softmax: probabilities stand where logits are expected; the ranking is the same"
        )
    return notes


def _read(path: Path) -> onnx.ModelProto:
    """The model with functions inlined and weights loaded, of ops that can all be run."""
    if not path.is_file():
        raise UsageError(
            f"model file {path} does not exist; expected an ONNX file, a name of the zoo or module:callable."
        )
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise CheckpointError(
            f"cannot read {path} ({path.stat().st_size} bytes) as ONNX: {error}. "
            "It is truncated or corrupt, or not an ONNX file; copy or export it again."
        ) from error
    if not model.graph.node or not model.opset_import:
        raise CheckpointError(f"{path} holds no ONNX graph; expected a model with nodes. Export it again.")
    if model.functions:
        model = inliner.inline_local_functions(model)
    _check_ops(model, path)
    try:
        onnx.checker.check_model(str(path))
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a valid ONNX model: {' '.join(str(error).split())} "
            "Export it again; weights in a file of their own must lie beside it under the same name."
        ) from error
    return model


def _check_ops(model: onnx.ModelProto, path: Path) -> None:
    """Refuse what cannot be run before anything is run."""
    ops, _ = load_onnx_ops()
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    unknown: dict[str, str] = {}
    for node in model.graph.node:
        name = node.name or next(iter(node.output), "")
        if node.op_type in _QUANTIZED or node.op_type.startswith("QLinear"):
            raise UsageError(
                f"{path} is already quantized ({node.op_type} {name!r}); give the float model it was made from."
            )
        if node.domain not in _STANDARD or (node.op_type not in ops and node.op_type != "Constant"):
            domain = node.domain or "ai.onnx"
            kind = f"{node.op_type} (node {name!r}, domain {domain}, opset {versions.get(domain, 'unstated')})"
            unknown.setdefault(f"{domain}.{node.op_type}", kind)
    if unknown:
        raise UnsupportedOp(
            f"{path} has {len(unknown)} op type(s) that edgeattn cannot run: {', '.join(unknown.values())}. Expected "
            "standard ONNX ops of a feed-forward network. Export without runtime-specific optimization and without "
            "pre- or post-processing, or give the model as package.module:callable."
        )
    if standard_opset(model) < _OLDEST_OPSET:
        raise UnsupportedOp(
            f"{path} is of opset {standard_opset(model)}; expected {_OLDEST_OPSET} or newer. "
            "Convert it: onnx.version_converter.convert_version(model, 17)."
        )
    if model.graph.sparse_initializer:
        raise UnsupportedOp(
            f"{path} has sparse weights ({model.graph.sparse_initializer[0].values.name}); expected dense."
        )


def _graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def _sides(value: onnx.ValueInfoProto) -> list[int | str]:
    """Sizes of a value's axes; a free one is its name, or "?"."""
    return [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]


def _has_free_batch(model: onnx.ModelProto) -> bool:
    return all(isinstance(_sides(value)[0], str) for value in _graph_inputs(model))


def _ends_in_softmax(model: onnx.ModelProto) -> bool:
    output = model.graph.output[0].name
    return any(node.op_type == "Softmax" and output in node.output for node in model.graph.node)


def _input_specs(model: onnx.ModelProto, path: Path, img_size: int | Sequence[int] | None) -> list[TensorSpec]:
    size = None if img_size is None else as_pair(img_size)
    found = _graph_inputs(model)
    if not 0 < len(found) <= MOST_INPUTS:
        raise UsageError(f"{path} has {len(found)} inputs; expected a network of 1 to {MOST_INPUTS}.")
    if size and not any(len(_sides(value)) == 4 for value in found):
        raise UsageError(
            f"{path} has no input of four axes that img_size {size[0]}x{size[1]} could be of; leave it out."
        )
    return [_spec(value, model, path, size) for value in found]


def _spec(value: onnx.ValueInfoProto, model: onnx.ModelProto, path: Path, size: tuple[int, int] | None) -> TensorSpec:
    kind = int(value.type.tensor_type.elem_type)
    sides = _sides(value)
    where = f"{path}: input {value.name!r} of shape {sides}"
    if kind not in (*_INPUT_TYPES, *_HALF):
        name = TensorProto.DataType.Name(kind).lower()
        raise UsageError(f"{where} is {name}; expected float32, int64 or int32. Export it without its pre-processing.")
    if not sides or (isinstance(sides[0], int) and sides[0] != 1):
        raise UsageError(
            f"{where}: expected a first axis that is the batch, free or 1. Export it with a dynamic batch axis."
        )
    if size and len(sides) == 4:
        for axis, side in zip((2, 3), size, strict=True):
            if isinstance(sides[axis], int) and sides[axis] != side:
                raise UsageError(
                    f"{where} has its size fixed; img_size {size[0]}x{size[1]} cannot be set. Leave it out, or export "
                    "the file again with that size or with free sizes."
                )
            sides[axis] = side
    free = [side for side in sides[1:] if isinstance(side, str)]
    if free:
        is_size = len(sides) == 4 and isinstance(sides[1], int)
        what = "Pass img_size (--img-size 224)." if is_size else "Export it with these sizes fixed."
        raise UsageError(f"{where} has free sizes ({', '.join(free)}); only the batch may be free. {what}")
    dtype = _INPUT_TYPES.get(kind, "float32")
    high = 0 if dtype == "float32" else _rows(value.name, model)
    return TensorSpec(value.name, (BATCH, *sides[1:]), dtype, high)


def _rows(name: str, model: onnx.ModelProto) -> int:
    """How many values a whole-number input may take: the rows of the table that it looks up, else two."""
    tables = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] == name and node.input[0] in tables:
            return int(tables[node.input[0]][0])
    return 2


def _floated(model: onnx.ModelProto) -> onnx.ModelProto:
    _to_float32(model)
    return model


def _to_float32(model: onnx.ModelProto) -> bool:
    """Make a float16 model a float32 one; returns whether there was anything to do."""
    found = False
    for tensor in model.graph.initializer:
        found |= _tensor_to_float32(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found |= _tensor_to_float32(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            found = True
    return found


def _tensor_to_float32(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in _HALF:
        return False
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    return True
