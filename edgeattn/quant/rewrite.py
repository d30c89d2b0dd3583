"""Rewrites of a folded float graph that leave its function as it is and make it easier to quantize."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.quant.graph import add_attribute, aten, attribute, calls, finish, is_call, module_path, set_input
from edgeattn.quant.methods import equalization
from edgeattn.quant.methods.smoothing import smoothquant_scale

_LAYERS = (aten.conv2d.default, aten.linear.default)
_BATCH = 16
_ROUNDS = 20  # of equalisation along a chain; ranges settle to within a percent in half of that


@dataclasses.dataclass(frozen=True)
class Pair:
    """A tensor whose channels can be scaled freely.

    Attributes:
        producer: the layer or LayerNorm that makes it; its weight and bias take the reciprocal scale.
        tensor: the node that the consumers read: the producer, or the ReLU behind it.
        consumers: layers with constant weights, all that reads the tensor.
    """

    producer: fx.Node
    tensor: fx.Node
    consumers: tuple[fx.Node, ...]


def scalable_pairs(graph: fx.GraphModule) -> list[Pair]:
    """All pairs of the graph, in order."""
    found = []
    for producer in calls(graph, *_LAYERS, aten.layer_norm.default):
        if attribute(graph, producer.args[2 if is_call(producer, aten.layer_norm.default) else 1]) is None:
            continue
        users = list(producer.users)
        is_relu = len(users) == 1 and is_call(users[0], aten.relu.default)
        tensor = users[0] if is_relu else producer
        consumers = tuple(tensor.users)
        if consumers and all(_reads_channels(graph, user, tensor) for user in consumers):
            found.append(Pair(producer, tensor, consumers))
    return found


def _reads_channels(graph: fx.GraphModule, node: fx.Node, tensor: fx.Node) -> bool:
    """Whether a node is a dense or depthwise layer of the tensor with a constant weight."""
    weight = attribute(graph, node.args[1]) if is_call(node, *_LAYERS) else None
    if weight is None or node.args[0] is not tensor:
        return False
    channels = tensor.meta["val"].shape[-1 if is_call(node, aten.linear.default) else 1]
    return weight.shape[1] == channels or _is_depthwise(weight, channels)


def _is_depthwise(weight: Tensor, channels: int) -> bool:
    return weight.shape[1] == 1 and len(weight) == channels


def equalize(graph: fx.GraphModule) -> str:
    """Cross-layer equalisation of every pair of layers, chains until they settle; returns what was done."""
    pairs = [p for p in scalable_pairs(graph) if is_call(p.producer, *_LAYERS) and len(p.consumers) == 1]
    for _ in range(_ROUNDS):
        worst = 0.0
        for pair in pairs:
            first, second = _weight(graph, pair.producer), _weight(graph, pair.consumers[0])
            scale = equalization.equalization_scale(first.flatten(1), second)
            _apply(graph, pair, scale)
            worst = max(worst, float((scale.log2().abs()).max()))
        if worst < 0.01:
            break
    finish(graph)
    return f"equalized {len(pairs)} pairs of layers"


def smooth(graph: fx.GraphModule, pictures: Tensor, alpha: float) -> str:
    """SmoothQuant of every tensor that a LayerNorm or layer makes and only layers read; returns what was done.

    `pictures` (N, 3, H, W) show how large each channel gets.
    """
    pairs = scalable_pairs(graph)
    maxima = _channel_maxima(graph, {p.tensor: _axis(p.consumers[0]) for p in pairs}, pictures)
    for pair in pairs:
        _apply(graph, pair, _smoothing_scale(graph, pair.consumers, maxima[pair.tensor], alpha))
    finish(graph)
    return f"smoothed {len(pairs)} tensors (alpha {alpha:g})"


def prescale(graph: fx.GraphModule, pictures: Tensor, alpha: float, imbalance: float) -> str:
    """SmoothQuant where nothing in front can take the scale: as a multiplication of its own; returns what was done.

    Only for tensors in which the channel that matters most, by its maximum times that of the weights that read it, is
    below `imbalance` of what one range for all channels has to allow for.
    """
    given = {pair.tensor for pair in scalable_pairs(graph)}
    readers = {
        node: tuple(user for user in node.users if _reads_channels(graph, user, node))
        for node in graph.graph.nodes
        if node.op == "call_function" and node not in given and isinstance(node.meta.get("val"), Tensor)
    }
    readers = {node: found for node, found in readers.items() if found and len({_axis(user) for user in found}) == 1}
    maxima = _channel_maxima(graph, {node: _axis(found[0]) for node, found in readers.items()}, pictures)
    count = 0
    for node, found in readers.items():
        largest = _input_maxima(graph, found, len(maxima[node]))
        if float((maxima[node] * largest).max()) < imbalance * float(maxima[node].max() * largest.max()):
            _multiply(graph, node, found, _smoothing_scale(graph, found, maxima[node], alpha))
            count += 1
    finish(graph)
    return f"scaled the channels of {count} tensors before quantizing them (alpha {alpha:g})"


def _multiply(graph: fx.GraphModule, node: fx.Node, readers: tuple[fx.Node, ...], scale: Tensor) -> None:
    scale = scale / scale.median()  # keeps the values in the usual range
    shape = (-1, 1, 1) if _axis(readers[0]) == 1 else (-1,)
    path = module_path(readers[0])
    factor = add_attribute(graph, f"{path}.prescale", (1 / scale).reshape(shape), node.next)
    with graph.graph.inserting_after(factor):
        scaled = graph.graph.call_function(aten.mul.Tensor, (node, factor))
    scaled.meta["val"], scaled.meta["module_path"] = node.meta["val"], f"{path}.prescale"
    for reader in readers:
        weight = _weight(graph, reader)
        axis = 0 if _is_depthwise(weight, len(scale)) else 1
        _replace(graph, reader, 1, weight * _shaped(scale, axis, weight))
        set_input(reader, 0, scaled)


def _smoothing_scale(graph: fx.GraphModule, readers: tuple[fx.Node, ...], maxima: Tensor, alpha: float) -> Tensor:
    largest = _input_maxima(graph, readers, len(maxima))
    alive = (maxima > 0) & (largest > 0)
    return torch.where(alive, smoothquant_scale(maxima, largest, alpha), torch.ones_like(maxima))


def _channel_maxima(graph: fx.GraphModule, axes: dict[fx.Node, int], pictures: Tensor) -> dict[fx.Node, Tensor]:
    """max|x| per channel (the given axis) of nodes."""
    maxima: dict[fx.Node, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in axes:
                new = value.abs().movedim(axes[n], 0).flatten(1).amax(1)
                maxima[n] = torch.maximum(maxima[n], new) if n in maxima else new
            return value

    with torch.no_grad():
        for batch in pictures.split(_BATCH):
            Watch(graph).run(batch)
    return maxima


def _axis(consumer: fx.Node) -> int:
    return -1 if is_call(consumer, aten.linear.default) else 1


def _input_maxima(graph: fx.GraphModule, readers: tuple[fx.Node, ...], channels: int) -> Tensor:
    """max|w| per input channel over all weights that read a tensor."""
    weights = [_weight(graph, reader) for reader in readers]
    rows = [w.abs().movedim(0 if _is_depthwise(w, channels) else 1, 0).flatten(1).amax(1) for w in weights]
    return torch.stack(rows).amax(0)


def _weight(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    weight = attribute(graph, node.args[1])
    assert weight is not None
    return weight.detach()


def _apply(graph: fx.GraphModule, pair: Pair, scale: Tensor) -> None:
    """Divide the producer's output channels by `scale`, multiply what the consumers read them with."""
    first = 2 if is_call(pair.producer, aten.layer_norm.default) else 1
    for index in (first, first + 1):
        value = attribute(graph, pair.producer.args[index]) if len(pair.producer.args) > index else None
        if value is not None:
            _replace(graph, pair.producer, index, value.detach() / _shaped(scale, 0, value))
    for consumer in pair.consumers:
        weight = _weight(graph, consumer)
        axis = 0 if _is_depthwise(weight, len(scale)) else 1
        _replace(graph, consumer, 1, weight * _shaped(scale, axis, weight))


def _shaped(scale: Tensor, axis: int, like: Tensor) -> Tensor:
    return scale.reshape([-1 if i == axis else 1 for i in range(like.dim())])


def _replace(graph: fx.GraphModule, node: fx.Node, index: int, value: Tensor) -> None:
    old = node.args[index]
    assert isinstance(old, fx.Node)
    set_input(
        node, index, add_attribute(graph, f"{module_path(node)}.{'weight' if index == 1 else 'bias'}", value, node)
    )
    if not old.users:  # the next round finds nothing left over
        graph.graph.erase_node(old)
