"""Tensors of a checkpoint made for another size or written in another form, fitted to a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fit_shape(model: torch.nn.Module, key: str, value: Tensor, own: Tensor) -> tuple[Tensor, str] | None:
    """`value` made to fit `own`, where the architecture says how, and a line that says what was done."""
    fitted = _fit_shape(key, value, own)
    architecture: Any = getattr(model, "fit_tensor", None)
    if fitted is None and architecture is not None:
        fitted = architecture(key, value)
    return fitted if fitted is not None and fitted[0].shape == own.shape else None


def _fit_shape(key: str, value: Tensor, own: Tensor) -> tuple[Tensor, str] | None:
    """A tensor that fits `own`, where the architecture defines how: 2-D matrices of 1x1 convolutions, bias tables."""
    if own.dim() == 4 and value.dim() == 2 and own.shape == (*value.shape, 1, 1):
        return value[:, :, None, None], f"{key}: 2-D matrix used as a 1x1 convolution"
    if key.endswith("attention_bias_idxs"):
        return own.clone(), f"{key}: rebuilt for the new window"
    old_side, new_side = round(value.shape[-1] ** 0.5), round(own.shape[-1] ** 0.5)
    if not key.endswith("attention_biases") or value.dim() != 2 or value.shape[0] != own.shape[0]:
        return None
    if old_side**2 != value.shape[-1] or new_side**2 != own.shape[-1]:
        return None
    table = value.float().reshape(1, -1, old_side, old_side)
    table = torch.nn.functional.interpolate(table, (new_side, new_side), mode="bicubic", align_corners=False)
    return (
        table.reshape(own.shape),
        f"{key}: bias table resized from {old_side}x{old_side} to {new_side}x{new_side} (bicubic) for this img_size",
    )
