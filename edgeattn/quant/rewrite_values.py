"""The values of attention rotated head by head: QuaRot (arXiv 2404.00456), section 4, stage 1b, merged into weights.

The rows that make a head's values and the columns that read its result take one Hadamard matrix, so outliers of single
channels spread over the head. Queries and keys are left: nothing quantizes them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.errors import RecipeError
from edgeattn.quant.graph import aten, is_call
from edgeattn.quant.layout import Flow, Read
from edgeattn.quant.methods.rotation import random_signs, rotate_channels, rotation
from edgeattn.quant.rewrite import Misfit, axis_of, bias_of, is_dense, replace_input, weight_of

_SEED = 0
_ATTENTION = aten.scaled_dot_product_attention.default
_PRODUCTS = (aten.matmul.default, aten.bmm.default)  # where attention is written out: probabilities times values


@dataclasses.dataclass(frozen=True)
class _Values:
    """Rows (heads, size) of the layer that makes an attention's values, columns (heads, size) of those that read it."""

    maker: fx.Node
    rows: Tensor
    readers: tuple[tuple[fx.Node, Tensor], ...]


def rotate_values(graph: fx.GraphModule, flow: Flow) -> tuple[int, Counter[str]]:
    """Rotate the values of every attention that fits; how many, and why others are left."""
    found, left = [], Counter[str]()
    for node in graph.graph.nodes:
        if getattr(node.target, "namespace", "") == "edgeattn" and node.op == "call_function":
            left["queries, keys and values are in one op"] += 1
        if not is_call(node, _ATTENTION, *_PRODUCTS):
            continue
        try:
            found.append(_values(graph, flow, node))
        except Misfit as reason:
            if is_call(node, _ATTENTION):  # any other product may have nothing to do with attention
                left[str(reason)] += 1
    for values in found:
        _rotate(graph, values)
    return len(found), left


def _values(graph: fx.GraphModule, flow: Flow, attention: fx.Node) -> _Values:
    """
    Raises:
        Misfit: something else than constant layers makes or reads the values; no Hadamard matrix of their size.
    """
    index = 2 if is_call(attention, _ATTENTION) else 1
    maker: Any = attention.args[index]
    while isinstance(maker, fx.Node) and (source := flow.source(maker)) is not None:
        maker = source
    if not is_dense(graph, maker):
        raise Misfit("its values do not come from a layer with constant weights")
    reads = flow.reads(maker, *flow.marks(maker, axis_of(maker)))
    rows = _rows(reads, attention, index)
    readers = []
    for read in flow.reads(attention, *flow.marks(attention, -1)):
        if not is_dense(graph, read.node) or read.averaged:
            raise Misfit("something else than layers with constant weights reads its result")
        readers.append((read.node, _columns(read, rows.shape[1])))
    try:
        rotation(torch.ones(rows.shape[1]))
    except RecipeError as error:
        raise Misfit(str(error)) from error
    return _Values(maker, rows, tuple(readers))


def _rows(reads: list[Read], attention: fx.Node, index: int) -> Tensor:
    """Rows (heads, size) that are an attention's values."""
    own = [read for read in reads if read.node is attention and read.index == index]
    channels, tokens = (mark.reshape(-1, mark.shape[-1]) for mark in own[0].marks)
    rows = channels.unique(dim=0)
    if any(read.averaged for read in reads) or (tokens != tokens[:, :1]).any() or len(rows.unique()) < rows.numel():
        raise Misfit("its values do not lie head by head in the layer that makes them")
    others = [read.marks[0] for read in reads if read is not own[0]]
    if any(torch.isin(marks, rows).any() for marks in others):
        raise Misfit("something else reads its values too")
    return rows.long()


def _columns(read: Read, size: int) -> Tensor:
    """Columns (heads, size) of a layer's weight that belong to one head each, in the order of the head's channels."""
    axis = axis_of(read.node)
    places, vectors = (mark.movedim(axis, -1).flatten(0, -2) for mark in read.marks)
    order = torch.argsort(vectors[0] * size + places[0])
    if len(order) % size == 0:
        columns = order.reshape(-1, size)
        first = columns[:, :1].expand_as(columns)
        in_order = (places[:, columns] == torch.arange(size)).all()
        if in_order and (vectors[:, columns] == vectors[:, first]).all():
            return columns
    raise Misfit("the layer behind it does not read it head by head")


def _rotate(graph: fx.GraphModule, values: _Values) -> None:
    turn = rotation(random_signs(values.rows.shape[1], _SEED).double())
    replace_input(graph, values.maker, 1, rotate_channels(weight_of(graph, values.maker), values.rows, turn, 0))
    bias = bias_of(graph, values.maker)
    if bias is not None:
        replace_input(graph, values.maker, 2, rotate_channels(bias, values.rows, turn, 0))
    for node, columns in values.readers:
        replace_input(graph, node, 1, rotate_channels(weight_of(graph, node), columns, turn, 1))
