"""The residual stream of pre-norm transformers rotated as a whole: QuaRot (arXiv 2404.00456), section 4, stage 1.

The stream is what additions and concatenations of tokens join. It is rotated where only layers with constant weights
and constants write to it, and only layers, or LayerNorms in front of linear layers, read it: the LayerNorms' affine
then goes into those layers. The rotation keeps the mean of the channels, so that LayerNorm stays LayerNorm.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.errors import RecipeError
from edgeattn.quant.graph import add_attribute, aten, attribute, calls, is_call
from edgeattn.quant.layout import SHAPE_ONLY, Flow
from edgeattn.quant.methods.rotation import layer_norm_rotation, random_signs, rotate_channels
from edgeattn.quant.rewrite import (
    NORM,
    Misfit,
    affine_of,
    axis_of,
    bias_of,
    is_constant,
    is_dense,
    replace_input,
    weight_of,
)

_SEED = 0


@dataclasses.dataclass
class _Stream:
    """A residual stream.

    Attributes:
        members: nodes that hold it, and the axis of its channels, counted from the end.
        writers, readers: layers. norms: LayerNorms, and the linear layers that read each.
        constants: (constant, node that reads it, axis).
    """

    channels: int
    members: dict[fx.Node, int] = dataclasses.field(default_factory=dict)
    writers: list[fx.Node] = dataclasses.field(default_factory=list)
    readers: list[fx.Node] = dataclasses.field(default_factory=list)
    norms: dict[fx.Node, list[fx.Node]] = dataclasses.field(default_factory=dict)
    constants: list[tuple[fx.Node, fx.Node, int]] = dataclasses.field(default_factory=list)


def rotate_streams(graph: fx.GraphModule, flow: Flow) -> tuple[int, Counter[str]]:
    """Rotate every stream that fits; how many, and why the LayerNorms that read the others are left."""
    streams: list[_Stream] = []
    left: Counter[str] = Counter()
    for norm in calls(graph, NORM):
        if any(norm in stream.norms for stream in streams):
            continue
        try:
            streams.append(_Follower(graph, flow, norm).follow())
        except Misfit as reason:
            left[str(reason)] += 1
    for stream in streams:
        _rotate(graph, stream)
    return len(streams), left


class _Follower:
    """Follows one stream from a LayerNorm that reads it, against and along the edges of the graph."""

    def __init__(self, graph: fx.GraphModule, flow: Flow, norm: fx.Node) -> None:
        self._graph, self._flow = graph, flow
        self._stream = _Stream(flow.shapes[norm][-1])
        self._todo: list[tuple[fx.Node, int]] = [(norm.args[0], -1)]  # type: ignore[list-item]

    def follow(self) -> _Stream:
        """
        Raises:
            Misfit: something writes or reads it that takes no rotation; no Hadamard matrix of its size.
        """
        stream = self._stream
        try:
            layer_norm_rotation(torch.ones(stream.channels))
        except RecipeError as error:
            raise Misfit(str(error)) from error
        while self._todo:
            node, axis = self._todo.pop()
            if stream.members.get(node, axis) != axis or self._size(node, axis) != stream.channels:
                raise Misfit("its channels change places")
            if node not in stream.members:
                stream.members[node] = axis
                self._against(node, axis)
                for user in node.users:
                    self._along(user, node, axis)
        return stream

    def _size(self, node: fx.Node, axis: int) -> int:
        shape = self._flow.shapes.get(node, ())
        return shape[axis] if len(shape) >= -axis else 0

    def _against(self, node: fx.Node, axis: int) -> None:
        """Take in what a member is made of."""
        source = self._flow.source(node)
        if is_dense(self._graph, node) and self._layer_axis(node) == axis:
            self._stream.writers.append(node)
            return
        if source is not None:
            parts, axis = [source], self._axis_before(node, source, axis)
        elif self._joins(node, axis):
            parts = list(node.args[0] if is_call(node, aten.cat.default) else node.args)  # type: ignore[arg-type]
        else:
            raise Misfit(f"op {_name(node)} writes to it")
        for part in parts:
            constant = attribute(self._graph, part)
            if constant is None:
                self._todo.append((part, axis))
            elif constant.dim() >= -axis and constant.shape[axis] == self._stream.channels:
                self._stream.constants.append((part, node, axis))
            else:
                raise Misfit("a constant for all channels is added to it")

    def _along(self, user: fx.Node, node: fx.Node, axis: int) -> None:
        """Take in what reads a member."""
        if user.target in SHAPE_ONLY:
            return
        if self._flow.source(user) is node:
            self._todo.append((user, self._axis_after(user, node, axis)))
        elif self._joins(user, axis):
            self._todo.append((user, axis))
        elif is_call(user, NORM) and axis == -1 and is_constant(self._graph, user):
            self._stream.norms[user] = self._norm_readers(user)
        elif is_dense(self._graph, user) and user.args[0] is node and self._layer_axis(user) == axis:
            self._stream.readers.append(user)
        else:
            raise Misfit(f"op {_name(user)} reads it")

    def _joins(self, node: fx.Node, axis: int) -> bool:
        """Whether a node adds, or concatenates along another axis than the channels'."""
        if is_call(node, aten.cat.default):
            rank = len(self._flow.shapes[node])
            along: Any = node.args[1] if len(node.args) > 1 else 0
            return along % rank - rank != axis
        return is_call(node, aten.add.Tensor) and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)

    def _layer_axis(self, node: fx.Node) -> int:
        return -1 if axis_of(node) == -1 else axis_of(node) - len(self._flow.shapes[node])

    def _axis_after(self, node: fx.Node, source: fx.Node, axis: int) -> int:
        """Where a node that moves its source has the channels that are on an axis of the source."""
        axes = self._axes_after(node, source, axis)
        if not axes:
            raise Misfit("its channels change places")
        return axes[0]

    def _axes_after(self, node: fx.Node, source: fx.Node, axis: int) -> list[int]:
        """As `_axis_after`: one axis, or none."""
        moved, every = self._flow.moved(node, self._flow.marks(source, axis)[0]), torch.arange(self._stream.channels)
        axes = range(-moved.dim(), 0) if isinstance(moved, Tensor) else ()
        return [a for a in axes if moved.shape[a] == len(every) and (moved.movedim(a, -1) == every).all()]

    def _axis_before(self, node: fx.Node, source: fx.Node, axis: int) -> int:
        """Where the source of a node that moves it has the channels that the node has on an axis."""
        for before in range(-len(self._flow.shapes.get(source, ())), 0):
            if self._size(source, before) == self._stream.channels and axis in self._axes_after(node, source, before):
                return before
        raise Misfit("its channels change places")

    def _norm_readers(self, norm: fx.Node) -> list[fx.Node]:
        """The linear layers that read a LayerNorm's output, each token as it is or tokens averaged."""
        readers = []
        for read in self._flow.reads(norm, *self._flow.marks(norm, -1)):
            places, vectors = read.marks
            linear = is_call(read.node, aten.linear.default) and is_dense(self._graph, read.node)
            if not linear:
                raise Misfit(f"op {_name(read.node)} reads it behind a LayerNorm")
            if places.shape[-1] != self._stream.channels or (vectors != vectors[..., :1]).any():
                raise Misfit("its channels change places")
            if (places != torch.arange(self._stream.channels)).any():
                raise Misfit("its channels change places")
            readers.append(read.node)
        return readers


def _name(node: fx.Node) -> str:
    """Of an operation: gelu of aten.gelu.default."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _rotate(graph: fx.GraphModule, stream: _Stream) -> None:
    turn = layer_norm_rotation(random_signs(stream.channels, _SEED).double())
    every = torch.arange(stream.channels)[None]
    for norm, readers in stream.norms.items():
        for reader in readers:
            _take_affine(graph, norm, reader)
        replace_input(graph, norm, 2, torch.ones(stream.channels))
        replace_input(graph, norm, 3, torch.zeros(stream.channels))
    for reader in [*stream.readers, *(reader for readers in stream.norms.values() for reader in readers)]:
        replace_input(graph, reader, 1, rotate_channels(weight_of(graph, reader), every, turn, 1))
    for writer in stream.writers:
        replace_input(graph, writer, 1, rotate_channels(weight_of(graph, writer), every, turn, 0))
        bias = bias_of(graph, writer)
        if bias is not None:
            replace_input(graph, writer, 2, rotate_channels(bias, every, turn, 0))
    for constant, reader, axis in stream.constants:
        value = attribute(graph, constant)
        assert value is not None
        turned = rotate_channels(value.detach(), every, turn, axis).to(value.dtype)
        reader.replace_input_with(constant, add_attribute(graph, f"{constant.target}_rotated", turned, reader))


def _take_affine(graph: fx.GraphModule, norm: fx.Node, reader: fx.Node) -> None:
    """Move a LayerNorm's weight and bias into a linear layer that reads it; its own is to be reset."""
    gain, offset = (value.double() for value in affine_of(graph, norm))
    weight, bias = weight_of(graph, reader).double(), bias_of(graph, reader)
    shift = weight @ offset
    replace_input(graph, reader, 2, shift if bias is None else bias + shift)
    replace_input(graph, reader, 1, weight * gain)
