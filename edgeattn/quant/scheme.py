"""The quantizer abstraction: what grid a tensor is put on, and the arithmetic of putting it there.

Conventions: rounding to nearest, ties to even; x is divided by the scale, not multiplied by its reciprocal. Symmetric:
scale = max|x| / (n - 1), codes in [-n, n - 1] with n = 2^(bits - 1). Asymmetric: the range is widened to hold 0,
scale = (max - min) / (2^bits - 1), zero_point = round(-min / scale) in unsigned codes.

Every function keeps the floating-point type of its input, so that formulas are checked in float64.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from edgeattn.errors import RecipeError

Granularity = Literal["tensor", "channel", "token", "group"]
_LEAST = float(torch.finfo(torch.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A uniform grid.

    Attributes:
        bits: 2 to 16.
        symmetric: zero_point 0 and signed codes; else unsigned codes with a zero point.
        granularity: what shares one scale: the whole tensor; an output channel (axis 0 of a weight); a token (the last
            axis of an activation); a group of `group_size` neighbours along the input axis of a weight (its last).
        dynamic: ranges are taken from the tensor at run time.
        least_scale: floor of every scale, row by row; 0: only a range of nothing but 0 is replaced, by the scale 1.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "tensor"
    group_size: int | None = None
    dynamic: bool = False
    least_scale: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise RecipeError(f"{self.bits} bits: expected 2 to 16.")
        if (self.granularity == "group") != (self.group_size is not None):
            raise RecipeError(f"granularity {self.granularity!r} with group_size {self.group_size}: give both or none.")

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2**self.bits - 1)

    def rows(self, x: Tensor) -> Tensor:
        """x viewed so that the last axis is what shares one scale.

        Raises:
            RecipeError: the group size does not divide the input axis.
        """
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        if self.granularity == "token":
            return x
        flat = x.reshape(len(x), -1)
        if self.group_size is None:
            return flat
        if flat.shape[1] % self.group_size:
            divisors = [d for d in range(1, flat.shape[1] + 1) if flat.shape[1] % d == 0]
            near = min(divisors, key=lambda d: abs(d - self.group_size))  # type: ignore[operator]
            raise RecipeError(
                f"group_size {self.group_size} does not divide the {flat.shape[1]} inputs of a weight of "
                f"{tuple(x.shape)}; nearest that does: {near}."
            )
        return flat.unflatten(1, (-1, self.group_size))

    def parameters(self, x: Tensor, shrink: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) of the tensor's own minimum and maximum times `shrink`.

        Both have the shape of `rows(x)` with a last axis of 1; zero_point is integral, of x's type.
        """
        rows = self.rows(x.detach())
        return self.from_range(rows.amin(-1, keepdim=True) * shrink, rows.amax(-1, keepdim=True) * shrink)

    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) of given ranges; a range of nothing but 0 has the scale 1, or `least_scale`."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        smallest, largest = self.limits
        span = torch.maximum(-low, high) / largest if self.symmetric else (high - low) / (largest - smallest)
        empty = self.least_scale or 1.0
        scale = torch.where(span > 0, span.clamp(min=max(self.least_scale, _LEAST)), torch.full_like(span, empty))
        if self.symmetric:
            return scale, torch.zeros_like(scale)
        return scale, torch.round(-low / scale).clamp(smallest, largest)

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes, integral values in x's type and shape."""
        codes = torch.round(self.rows(x) / scale) + zero_point
        return codes.clamp(*self.limits).reshape(x.shape)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Values of codes."""
        return ((self.rows(codes) - zero_point) * scale).reshape(codes.shape)

    def fake_quantize(self, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
        """x as the grid holds it; without parameters on the grid of its own range (what `dynamic` means)."""
        if scale is None or zero_point is None:
            scale, zero_point = self.parameters(x)
        return self.decode(self.encode(x, scale, zero_point), scale, zero_point)
