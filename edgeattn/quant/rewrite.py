"""Rewrites of a folded float graph that leave its function as it is and make it easier to quantize."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.quant.graph import add_attribute, aten, attribute, calls, finish, is_call, module_path, set_input
from edgeattn.quant.methods import equalization
from edgeattn.quant.methods.smoothing import smoothquant_scale

LAYERS = (aten.conv2d.default, aten.linear.default)
NORM = aten.layer_norm.default
_BATCH = 16
_TOKENS = 2048  # of every tensor, for searches: 6 MB at 768 channels
_ROUNDS = 20  # of equalisation along a chain; ranges settle to within a percent in half of that


class Misfit(Exception):
    """Why a rewrite leaves a part of a graph as it is."""


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
    for producer in calls(graph, *LAYERS, NORM):
        if not is_constant(graph, producer):
            continue
        users = list(producer.users)
        is_relu = len(users) == 1 and is_call(users[0], aten.relu.default)
        tensor = users[0] if is_relu else producer
        consumers = tuple(tensor.users)
        if consumers and all(_reads_channels(graph, u, tensor) and axis_of(u) == axis_of(producer) for u in consumers):
            found.append(Pair(producer, tensor, consumers))
    return found


def is_constant(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a layer's or LayerNorm's weight and bias are constants, one per channel, or absent."""
    first = weight_index(node)
    if is_call(node, NORM) and len(node.args[1]) != 1:  # type: ignore[arg-type]
        return False
    return all(arg is None or attribute(graph, arg) is not None for arg in node.args[first : first + 2])


def is_dense(graph: fx.GraphModule, node: Any) -> bool:
    """Whether a node is a layer with constant weights in which every output reads every input."""
    if not is_call(node, *LAYERS) or attribute(graph, node.args[1]) is None or not is_constant(graph, node):
        return False
    return is_call(node, aten.linear.default) or len(node.args) < 7 or node.args[6] == 1


def weight_index(node: fx.Node) -> int:
    """Position of the weight among a layer's or LayerNorm's arguments; the bias follows."""
    return 2 if is_call(node, NORM) else 1


def _reads_channels(graph: fx.GraphModule, node: fx.Node, tensor: fx.Node) -> bool:
    """Whether a node is a dense or depthwise layer of the tensor with a constant weight."""
    weight = attribute(graph, node.args[1]) if is_call(node, *LAYERS) else None
    if weight is None or node.args[0] is not tensor:
        return False
    channels = tensor.meta["val"].shape[axis_of(node)]
    return weight.shape[1] == channels or is_depthwise(weight, channels)


def is_depthwise(weight: Tensor, channels: int) -> bool:
    """Whether each channel has a kernel of its own."""
    return weight.shape[1] == 1 and len(weight) == channels


def equalize(graph: fx.GraphModule) -> str:
    """Cross-layer equalisation of every pair of layers, chains until they settle; returns what was done."""
    pairs = [p for p in scalable_pairs(graph) if is_call(p.producer, *LAYERS) and len(p.consumers) == 1]
    for _ in range(_ROUNDS):
        worst = 0.0
        for pair in pairs:
            first, second = weight_of(graph, pair.producer), weight_of(graph, pair.consumers[0])
            scale = equalization.equalization_scale(first.flatten(1), second)
            scale_pair(graph, pair, scale)
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
    maxima = _channel_maxima(graph, {p.tensor: axis_of(p.consumers[0]) for p in pairs}, pictures)
    for pair in pairs:
        scale_pair(graph, pair, _smoothing_scale(graph, pair.consumers, maxima[pair.tensor], alpha))
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
    readers = {node: found for node, found in readers.items() if found and len({axis_of(user) for user in found}) == 1}
    maxima = _channel_maxima(graph, {node: axis_of(found[0]) for node, found in readers.items()}, pictures)
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
    shape = (-1, 1, 1) if axis_of(readers[0]) == 1 else (-1,)
    path = module_path(readers[0])
    factor = add_attribute(graph, f"{path}.prescale", (1 / scale).reshape(shape), node.next)
    with graph.graph.inserting_after(factor):
        scaled = graph.graph.call_function(aten.mul.Tensor, (node, factor))
    scaled.meta["val"], scaled.meta["module_path"] = node.meta["val"], f"{path}.prescale"
    for reader in readers:
        weight = weight_of(graph, reader)
        axis = 0 if is_depthwise(weight, len(scale)) else 1
        replace_input(graph, reader, 1, weight * _shaped(scale, axis, weight))
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


def axis_of(node: fx.Node) -> int:
    """The axis of the channels that a layer or LayerNorm reads and gives."""
    return 1 if is_call(node, aten.conv2d.default) else -1


def _input_maxima(graph: fx.GraphModule, readers: tuple[fx.Node, ...], channels: int) -> Tensor:
    """max|w| per input channel over all weights that read a tensor."""
    weights = [weight_of(graph, reader) for reader in readers]
    rows = [w.abs().movedim(0 if is_depthwise(w, channels) else 1, 0).flatten(1).amax(1) for w in weights]
    return torch.stack(rows).amax(0)


def weight_of(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """A layer's constant weight."""
    weight = attribute(graph, node.args[1])
    assert weight is not None
    return weight.detach()


def bias_of(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The constant bias of a layer or LayerNorm, if it has one."""
    index = weight_index(node) + 1
    bias = attribute(graph, node.args[index]) if len(node.args) > index else None
    return None if bias is None else bias.detach()


def affine_of(graph: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Weight and bias of a LayerNorm, (channels,) each; 1 and 0 where it has none."""
    value = norm.meta["val"]
    size, dtype = value.shape[-1], value.dtype
    weight = attribute(graph, norm.args[2]) if len(norm.args) > 2 else None
    bias = bias_of(graph, norm)
    return (
        torch.ones(size, dtype=dtype) if weight is None else weight.detach(),
        torch.zeros(size, dtype=dtype) if bias is None else bias,
    )


def scale_pair(graph: fx.GraphModule, pair: Pair, scale: Tensor) -> None:
    """Divide the producer's output channels by `scale`, multiply what the consumers read them with."""
    first, bias = weight_index(pair.producer), bias_of(graph, pair.producer)
    is_norm = is_call(pair.producer, NORM)
    weight = affine_of(graph, pair.producer)[0] if is_norm else weight_of(graph, pair.producer)
    replace_input(graph, pair.producer, first, weight / _shaped(scale, 0, weight))
    if bias is not None:
        replace_input(graph, pair.producer, first + 1, bias / scale)
    for consumer in pair.consumers:
        weight = weight_of(graph, consumer)
        axis = 0 if is_depthwise(weight, len(scale)) else 1
        replace_input(graph, consumer, 1, weight * _shaped(scale, axis, weight))


def _shaped(scale: Tensor, axis: int, like: Tensor) -> Tensor:
    return scale.reshape([-1 if i == axis else 1 for i in range(like.dim())])


def replace_input(graph: fx.GraphModule, node: fx.Node, index: int, value: Tensor) -> None:
    """Give a layer or LayerNorm a new weight or bias, in the type of those that it has."""
    first, old = weight_index(node), node.args[index] if len(node.args) > index else None
    own = [attribute(graph, arg) for arg in node.args[first : first + 2]]
    dtype = next((tensor.dtype for tensor in own if tensor is not None), node.meta["val"].dtype)
    name = f"{module_path(node)}.{'weight' if index == first else 'bias'}"
    set_input(node, index, add_attribute(graph, name, value.to(dtype), node))
    if isinstance(old, fx.Node) and not old.users:  # the next round finds nothing left over
        graph.graph.erase_node(old)


def sampled_tokens(graph: fx.GraphModule, axes: dict[fx.Node, int], pictures: Tensor) -> dict[fx.Node, Tensor]:
    """(tokens, channels) of nodes, channels on the given axis: at most 2048 tokens of all pictures, always the same."""
    found: dict[fx.Node, list[Tensor]] = {node: [] for node in axes}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in axes:
                rows = value.movedim(axes[n], -1).flatten(0, -2)
                count = max(1, _TOKENS * len(batch) // len(pictures))
                # At random: tokens a fixed number apart may all be of one column of the picture.
                chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
                found[n].append(rows[chosen])
            return value

    with torch.no_grad():
        for batch in pictures.split(_BATCH):
            Watch(graph).run(batch)
    return {node: torch.cat(rows) for node, rows in found.items()}
