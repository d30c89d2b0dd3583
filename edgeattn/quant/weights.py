"""Weights on their grid: which scheme a layer takes, its codes and scales, and what rounding does to its output."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.equalization import bias_correction
from edgeattn.quant.methods.gptq import gptq
from edgeattn.quant.quantizer import quantize_weight
from edgeattn.quant.recipe import WeightScheme
from edgeattn.quant.scheme import Scheme
from edgeattn.quant.steps import Gptq

_AUTOMATIC_GROUPS = (32, 16)  # what the runtimes' 4-bit kernels take, the fewest scales first
_SHRINK_STEPS, _LEAST_SHRINK, _NORM = 20, 0.6, 2.4  # search of a group's range; the norm is GPTQ's
INT8 = WeightScheme()


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A layer's weight as it is stored.

    Attributes:
        codes: int8, of the weight's shape; 4-bit codes in -8 to 7.
        scale: (out,), or (out, groups) for groups along the input axis.
        group: inputs that share a scale; None: per output channel.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    group: int | None

    @property
    def values(self) -> Tensor:
        """What the codes stand for."""
        if self.group is None:
            return self.codes.float() * self.scale.reshape(-1, *[1] * (self.codes.dim() - 1))
        rows = self.codes.flatten(1).unflatten(1, (-1, self.group)).float()
        return (rows * self.scale[..., None]).reshape(self.codes.shape)

    @property
    def size_bytes(self) -> int:
        """Of codes and float32 scales."""
        return self.codes.numel() * self.bits // 8 + 4 * self.scale.numel()

    @property
    def label(self) -> str:
        """For tables: int8, or int4 in groups of 32."""
        return f"int{self.bits}" + ("" if self.group is None else f" in groups of {self.group}")


def resolve(scheme: WeightScheme, weight: Tensor, path: str) -> WeightScheme:
    """The scheme that a layer really gets: groups only where the layer is linear or a dense 1x1 convolution.

    Raises:
        RecipeError: the group size does not divide the layer's inputs; the nearest that do are named.
    """
    if scheme.bits == 8:
        return scheme
    inputs = weight.shape[1]
    if weight[0, 0].numel() != 1 or inputs == 1:
        return INT8
    if scheme.group_size == "auto":
        size = next((g for g in _AUTOMATIC_GROUPS if inputs % g == 0), None)
        return INT8 if size is None else scheme.model_copy(update={"group_size": size})
    if isinstance(scheme.group_size, int) and inputs % scheme.group_size:
        divisors = [d for d in range(2, inputs + 1) if inputs % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - scheme.group_size))[:2])  # type: ignore[operator]
        raise RecipeError(
            f"group_size {scheme.group_size} does not divide the {inputs} inputs of layer {path}. Use "
            f"{' or '.join(map(str, near))}, group_size: auto, or a rule that gives this layer another scheme."
        )
    return scheme


def quantize(
    weight: Tensor, scheme: WeightScheme, floor: Tensor | None, hessian: Tensor | None, method: Gptq | None
) -> QuantizedWeight:
    """Codes of a weight by rounding, or by GPTQ where there is a Hessian (in, in) of the layer's inputs.

    Args:
        scheme: resolved (no `auto`). floor: smallest scale per channel, 8 bits only (see `weight_scale_floor`).
    """
    if scheme.bits == 8:
        codes, scale = quantize_weight(weight, floor)
        return QuantizedWeight(codes, scale, 8, None)
    group = scheme.group_size if isinstance(scheme.group_size, int) else None
    flat = weight.detach().flatten(1).double()
    grid = Scheme(4, True, "channel" if group is None else "group", group)
    step = _best_scale(flat, grid)
    if method is not None and hessian is not None:
        scales = step.squeeze(-1)
        parameters = scales, torch.full_like(scales, 8)
        found = gptq(flat, hessian.double(), 4, group, True, method.act_order, method.percdamp, parameters=parameters)
        codes = found.codes - 8
    else:
        codes = grid.encode(flat, step, torch.zeros_like(step))
    scales = step.float().reshape(len(flat), -1)
    codes = codes.to(torch.int8).reshape(weight.shape)
    return QuantizedWeight(codes, scales.squeeze(1) if group is None else scales, 4, group)


def _best_scale(flat: Tensor, grid: Scheme) -> Tensor:
    """The scale per group, of 20 between the full range and 0.6 of it, with the least sum of |error|^2.4."""
    rows = grid.rows(flat)
    best = torch.full_like(rows[..., :1], float("inf"))
    scale = torch.ones_like(best)
    for i in range(_SHRINK_STEPS):
        candidate, zero = grid.parameters(flat, 1 - (1 - _LEAST_SHRINK) * i / _SHRINK_STEPS)
        error = (grid.rows(grid.fake_quantize(flat, candidate, zero)) - rows).abs().pow(_NORM).sum(-1, keepdim=True)
        scale = torch.where(error < best, candidate, scale)
        best = torch.minimum(error, best)
    return scale


def correction(weight: Tensor, quantized: QuantizedWeight, input_mean: Tensor) -> Tensor:
    """What to add to the layer's bias, (out,), so that rounding its weight leaves the mean of its output."""
    return bias_correction(weight.detach().double(), quantized.values.double(), input_mean.double()).float()
