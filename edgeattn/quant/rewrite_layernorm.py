"""Channels of LayerNorm outputs brought to one range: RepQ-ViT (arXiv 2212.08254), FQ-ViT's factors (arXiv 2111.13824).

Both move what differs between channels into the LayerNorm's affine and the linear layers behind it, so that one scale
and zero point for the tensor, all that runtimes have, serve every channel. The range itself is observed afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from edgeattn.quant.graph import calls, finish, is_call
from edgeattn.quant.methods import layernorm
from edgeattn.quant.rewrite import (
    NORM,
    Pair,
    affine_of,
    bias_of,
    is_constant,
    replace_input,
    sampled_tokens,
    scalable_pairs,
    scale_pair,
    weight_index,
    weight_of,
)

_BITS = 8
_MIDDLE = 2.0 ** (_BITS - 1)
_LEAST_RANGE = 1e-3  # of the channels' mean; a channel with less is as good as constant


def reparameterize(graph: fx.GraphModule, pictures: Tensor) -> str:
    """RepQ-ViT, section 3.2: one scale and one zero point for all channels of a LayerNorm; returns what was done.

    `pictures` (N, 3, H, W) show the channels' ranges. The common zero point is the middle of the grid in place of the
    published mean: every integer serves as well, and symmetric grids have that one.
    """
    pairs = [pair for pair in _norm_pairs(graph) if pair.tensor is pair.producer]
    pairs = [pair for pair in pairs if all(is_constant(graph, node) for node in pair.consumers)]
    tokens = sampled_tokens(graph, {pair.tensor: -1 for pair in pairs}, pictures)
    spread = [_reparameterize(graph, pair, tokens[pair.tensor].double()) for pair in pairs]
    finish(graph)
    return _said(
        graph, "reparameterized", pairs, f"ranges of channels differed up to {max(spread, default=1):.3g}-fold"
    )


def power_of_two(graph: fx.GraphModule, pictures: Tensor, symmetric: bool) -> str:
    """FQ-ViT, section 3.2: factors of 1, 2, 4 or 8 between the channels of a LayerNorm; returns what was done.

    FQ-ViT gives them to what a LayerNorm reads, for its own kernel to shift back. Here they are for what it gives, and
    merge into it and the layers behind.

    Args:
        pictures: (N, 3, H, W), show what the channels hold. symmetric: whether the grid has the zero point 0.
    """
    pairs, scaled, channels = _norm_pairs(graph), 0, 0
    tokens = sampled_tokens(graph, {pair.tensor: -1 for pair in pairs}, pictures)
    for pair in pairs:
        factor = layernorm.power_of_two_factors(tokens[pair.tensor], _BITS, symmetric=symmetric).factor
        scale_pair(graph, pair, torch.exp2(factor - factor.max()))
        scaled, channels = scaled + int((factor < factor.max()).sum()), channels + len(factor)
    finish(graph)
    return _said(graph, "merged power-of-two factors into", pairs, f"{scaled} of {channels} channels scaled by 2 to 8")


def _norm_pairs(graph: fx.GraphModule) -> list[Pair]:
    return [pair for pair in scalable_pairs(graph) if is_call(pair.producer, NORM)]


def _said(graph: fx.GraphModule, verb: str, pairs: list[Pair], detail: str) -> str:
    left = sum(1 for _ in calls(graph, NORM)) - len(pairs)
    if not pairs:
        return f"{verb} 0 LayerNorms: of {left} none has an output that only linear layers read"
    rest = f"; left {left} whose output something else than linear layers reads" if left else ""
    return f"{verb} {len(pairs)} LayerNorms ({detail}){rest}"


def _reparameterize(graph: fx.GraphModule, pair: Pair, tokens: Tensor) -> float:
    """Change a LayerNorm and the layers that read it; returns the largest range of a channel over the smallest."""
    low, high = tokens.amin(0), tokens.amax(0)
    # Not widened to hold 0, as the ranges of a grid are: an offset is what the shift takes out.
    scale = (high - low) / (2**_BITS - 1)
    if not torch.isfinite(tokens).all() or not scale.any():
        return 1.0  # calibration names a layer that gives NaN; nothing to share where every channel is constant
    live = scale >= _LEAST_RANGE * scale.mean()
    scale = torch.where(live, scale, scale.mean())
    weights = [weight_of(graph, node) for node in pair.consumers]
    biases = [bias_of(graph, node) for node in pair.consumers]
    stacked = [torch.zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    gain, offset = (value.double() for value in affine_of(graph, pair.producer))
    new = layernorm.reparameterize(
        scale, -low / scale, gain, offset, torch.cat(weights).double(), torch.cat(stacked).double(), zero=_MIDDLE
    )
    first, sizes = weight_index(pair.producer), [len(w) for w in weights]
    replace_input(graph, pair.producer, first, new.ln_weight)
    replace_input(graph, pair.producer, first + 1, new.ln_bias)
    for node, weight, bias in zip(pair.consumers, new.w.split(sizes), new.bias.split(sizes), strict=True):
        replace_input(graph, node, 1, weight)
        replace_input(graph, node, 2, bias)
    return float(scale[live].max() / scale[live].min())
