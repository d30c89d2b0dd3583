"""BatchNorm arithmetic shared by fused modules and the folding graph pass. Computed in float64, returned in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def bn_scale_shift(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Per-channel (scale, shift) in float64 such that batch_norm(x) = x * scale + shift in evaluation mode."""
    scale = weight.double() / (var.double() + eps).sqrt()
    return scale, bias.double() - mean.double() * scale


def fold_conv_bn(conv: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the one convolution that equals the Conv2d then the BatchNorm2d."""
    scale, shift = bn_scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    bias = torch.zeros_like(shift) if conv.bias is None else conv.bias.double()
    weight = conv.weight.double() * scale[:, None, None, None]
    return weight.float().detach(), (bias * scale + shift).float().detach()


def fuse_attention(model: nn.Module) -> nn.Module:
    """A copy of the model in which every module that offers `to_fused()` is replaced by its inference-only op.

    The copy shares its tensors with the model: nothing writes into them, and the largest models are 5 GB.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared).eval()
    for name, module in list(model.named_modules()):
        if hasattr(module, "to_fused"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.to_fused())
    return model
