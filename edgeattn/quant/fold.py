"""One graph step: constants evaluated; BatchNorm into the convolution before or behind it, or the linear layer behind
it; the residual identity into a depthwise convolution.

The last follows RepVGG's identity branch (Ding et al., CVPR 2021, section 3.3): x + dw(x) is one depthwise
convolution with 1 added at the kernel's centre.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.models.folding import bn_scale_shift
from edgeattn.quant.graph import add_attribute, aten, attribute, calls, finish, is_call, module_path, set_input


def fold(graph: fx.GraphModule) -> dict[str, int]:
    """Rewrite the graph in place; returns how many of each fold were made."""
    counts = {
        "constants": _constants(graph),
        "conv_bn": sum(_conv_bn(graph, node) for node in calls(graph, aten.batch_norm.default)),
        "bn_conv": sum(_bn_conv(graph, node) for node in calls(graph, aten.batch_norm.default)),
        "bn_linear": sum(_bn_linear(graph, node) for node in calls(graph, aten.batch_norm.default)),
        "residual_depthwise": sum(_residual(graph, node) for node in calls(graph, aten.add.Tensor)),
    }
    finish(graph)
    return counts


def _constants(graph: fx.GraphModule) -> int:
    """Evaluate what does not depend on the input (position tables, coordinates); returns how many tensors that left."""
    values: dict[fx.Node, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        inputs = {arg: values.get(arg, attribute(graph, arg)) for arg in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            continue
        with torch.no_grad():
            result = node.target(*fx.map_arg(node.args, inputs.get), **fx.map_arg(node.kwargs, inputs.get))
        if isinstance(result, Tensor):
            values[node] = result
    kept = [node for node in values if any(user not in values for user in node.users)]
    for node in kept:
        new = add_attribute(graph, f"{module_path(node) or 'graph'}.constant", values[node].contiguous(), node)
        node.replace_all_uses_with(new)
    graph.graph.eliminate_dead_code()
    return len(kept)


def _bn_values(graph: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of an evaluation-mode batch_norm node: (x, weight, bias, mean, var, training, momentum, eps)."""
    weight, bias, mean, var = (attribute(graph, arg) for arg in node.args[1:5])
    if mean is None or var is None or node.args[5]:
        return None
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return bn_scale_shift(weight.detach(), bias.detach(), mean, var, float(node.args[7]))  # type: ignore[arg-type]


def _replace_weights(graph: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor) -> None:
    path = module_path(node)
    set_input(node, 1, add_attribute(graph, f"{path}.weight", weight.float(), node))
    set_input(node, 2, add_attribute(graph, f"{path}.bias", bias.float(), node))


def _conv_bn(graph: fx.GraphModule, bn: fx.Node) -> bool:
    conv = bn.args[0]
    if not isinstance(conv, fx.Node) or not is_call(conv, aten.conv2d.default) or len(conv.users) != 1:
        return False
    weight, values = attribute(graph, conv.args[1]), _bn_values(graph, bn)
    if weight is None or values is None:
        return False
    scale, shift = values
    old = attribute(graph, conv.args[2]) if len(conv.args) > 2 else None
    bias = shift if old is None else old.detach().double() * scale + shift
    _replace_weights(graph, conv, weight.detach().double() * scale[:, None, None, None], bias)
    bn.replace_all_uses_with(conv)
    graph.graph.erase_node(bn)
    return True


def _bn_conv(graph: fx.GraphModule, bn: fx.Node) -> bool:
    """BatchNorm in front of dense convolutions without padding: a zero-padded border would miss the shift."""
    users, values = list(bn.users), _bn_values(graph, bn)
    if values is None or not users or not all(_takes_affine(graph, user, bn) for user in users):
        return False
    scale, shift = values
    for conv in users:
        weight = attribute(graph, conv.args[1])
        assert weight is not None
        wide = weight.detach().double()
        old = attribute(graph, conv.args[2]) if len(conv.args) > 2 else None
        bias = wide.sum((2, 3)) @ shift
        _replace_weights(graph, conv, wide * scale[None, :, None, None], bias if old is None else bias + old.detach())
        set_input(conv, 0, bn.args[0])
    graph.graph.erase_node(bn)
    return True


def _takes_affine(graph: fx.GraphModule, conv: fx.Node, x: fx.Node) -> bool:
    """Whether the node is a convolution of x with constant weights, one group and no padding."""
    if not is_call(conv, aten.conv2d.default) or conv.args[0] is not x or attribute(graph, conv.args[1]) is None:
        return False
    padding, groups = _options(conv)[1], _options(conv)[3]
    return groups == 1 and not any(padding if isinstance(padding, (list, tuple)) else [padding])


def _options(conv: fx.Node) -> list[Any]:
    """stride, padding, dilation and groups of an aten.conv2d node."""
    given: list[Any] = list(conv.args[3:])
    return (given + [[1, 1], [0, 0], [1, 1], 1][len(given) :])[:4]


def _bn_linear(graph: fx.GraphModule, bn: fx.Node) -> bool:
    """BatchNorm of (B, C) in front of linear layers: y = W (x * scale + shift) + b."""
    users = list(bn.users)
    values = _bn_values(graph, bn)
    if values is None or not users or not all(is_call(u, aten.linear.default) and u.args[0] is bn for u in users):
        return False
    example = bn.meta.get("val")
    if example is None or example.dim() != 2:
        return False
    scale, shift = values
    for linear in users:
        weight = attribute(graph, linear.args[1])
        if weight is None:
            return False
        wide = weight.detach().double()
        old = attribute(graph, linear.args[2]) if len(linear.args) > 2 else None
        bias = wide @ shift if old is None else old.detach().double() + wide @ shift
        _replace_weights(graph, linear, wide * scale[None, :], bias)
        set_input(linear, 0, bn.args[0])
    graph.graph.erase_node(bn)
    return True


def _residual(graph: fx.GraphModule, add: fx.Node) -> bool:
    if len(add.args) != 2 or add.kwargs:
        return False
    for conv, other in (add.args, add.args[::-1]):
        if not isinstance(conv, fx.Node) or not is_call(conv, aten.conv2d.default):
            continue
        weight = attribute(graph, conv.args[1])
        if conv.args[0] is not other or len(conv.users) != 1 or weight is None or not _keeps_shape(conv, weight):
            continue
        merged = weight.detach().double()
        merged[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
        bias = attribute(graph, conv.args[2]) if len(conv.args) > 2 else None
        _replace_weights(graph, conv, merged, torch.zeros(len(weight)) if bias is None else bias.detach())
        add.replace_all_uses_with(conv)
        graph.graph.erase_node(add)
        return True
    return False


def _keeps_shape(conv: fx.Node, weight: Tensor) -> bool:
    """Depthwise, stride 1, odd kernel with same padding, no dilation."""
    stride, padding, dilation, groups = _options(conv)
    sides = list(weight.shape[2:])
    return (
        groups == weight.shape[0] and weight.shape[1] == 1 and all(side % 2 for side in sides)
        and list(stride) == [1, 1] and list(dilation) == [1, 1] and list(padding) == [side // 2 for side in sides]
    )  # fmt: skip
