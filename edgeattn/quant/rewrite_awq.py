"""AWQ (arXiv 2306.00978, section 3.2) as a rewrite: channels with large activations get finer steps in the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from edgeattn.quant.graph import aten, finish, is_call
from edgeattn.quant.methods.smoothing import awq_scale, awq_search
from edgeattn.quant.recipe import WeightScheme
from edgeattn.quant.rewrite import (
    Pair,
    axis_of,
    is_depthwise,
    sampled_tokens,
    scalable_pairs,
    scale_pair,
    weight_of,
)
from edgeattn.quant.scheme import Scheme

_GRID = 20  # exponents tried, as published
_Schemes = Mapping[fx.Node, WeightScheme]


def awq(graph: fx.GraphModule, pictures: Tensor, schemes: _Schemes) -> str:
    """Scale every tensor that a LayerNorm or layer makes and quantized weights read; returns what was done.

    Args:
        pictures: (N, 3, H, W), show what the channels hold. schemes: of the layers with quantized weights.
    """
    pairs = [pair for pair in scalable_pairs(graph) if _is_searchable(graph, pair, schemes)]
    tokens = sampled_tokens(graph, {pair.tensor: axis_of(pair.producer) for pair in pairs}, pictures)
    exponents = []
    for pair in pairs:
        exponent = _exponent(graph, pair, tokens[pair.tensor], schemes)
        if exponent:
            scale_pair(graph, pair, awq_scale(tokens[pair.tensor].double(), exponent))
            exponents.append(exponent)
    finish(graph)
    if not pairs:
        return "AWQ scaled 0 tensors: no LayerNorm or layer has an output that only layers, one of them quantized, read"
    reach = f" (exponents {min(exponents):g} to {max(exponents):g})" if exponents else ""
    left = len(pairs) - len(exponents)
    return f"AWQ scaled {len(exponents)} tensors{reach}" + (f", {left} are best as they are" if left else "")


def _is_searchable(graph: fx.GraphModule, pair: Pair, schemes: _Schemes) -> bool:
    """Whether every output that rounding changes is a product with single tokens, of one reader at least."""
    counted = [node for node in pair.consumers if node in schemes and not _is_unmoved(graph, pair, node)]
    return bool(counted) and all(weight_of(graph, node)[0, 0].numel() == 1 for node in counted)


def _is_unmoved(graph: fx.GraphModule, pair: Pair, node: fx.Node) -> bool:
    """Whether scaling its inputs leaves a layer's rounding as it is: one channel, so one scale, per kernel."""
    channels = pair.tensor.meta["val"].shape[axis_of(pair.producer)]
    return is_call(node, aten.conv2d.default) and is_depthwise(weight_of(graph, node), channels)


def _exponent(graph: fx.GraphModule, pair: Pair, tokens: Tensor, schemes: _Schemes) -> float:
    """The exponent of the least output error of all readers together; 0, no scale, where tokens hold NaN too."""
    rows: dict[WeightScheme, list[Tensor]] = defaultdict(list)
    for node in pair.consumers:
        if node in schemes and not _is_unmoved(graph, pair, node):
            rows[schemes[node]].append(weight_of(graph, node).flatten(1))
    error = torch.zeros(_GRID, dtype=tokens.dtype)
    for scheme, weights in rows.items():
        group = scheme.group_size if isinstance(scheme.group_size, int) else None
        grid = Scheme(scheme.bits, True, "channel" if group is None else "group", group)
        stacked = torch.cat(weights)
        error += len(stacked) * awq_search(tokens, stacked, grid, _GRID).loss
    return int(error.argmin()) / _GRID
