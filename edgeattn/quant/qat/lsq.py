"""LSQ and LSQ+: a grid with a learned scale, and OFQ's form of it with a learned shift before and after.

LSQ: Esser et al., ICLR 2020 (arXiv 1902.08153), section 2. LSQ+: Bhalgat et al., 2020 (arXiv 2004.09576), section 3.
OFQ (arXiv 2302.02210): y = clip(round((x + c) / a), Qn, Qp) a + d.

A scale's shape says what shares it: its axes of size 1 are shared, the batch always. `scale_shape` has the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgeattn.errors import RecipeError

Granularity = Literal["tensor", "token", "channel", "token_head"]
Start = Literal["mean", "three_sigma", "range"]
SCALE_FLOOR = 1e-5
_SHRINKS = tuple(0.1 * i for i in range(1, 11))


def scale_shape(granularity: Granularity, tokens: int = 1, channels: int = 1, heads: int = 1) -> tuple[int, ...]:
    """Shape of the scale of (batch, tokens, channels), or of (batch, tokens, heads, channels) for "token_head"."""
    shapes: dict[str, tuple[int, ...]] = {
        "tensor": (1, 1, 1), "token": (1, tokens, 1), "channel": (1, 1, channels), "token_head": (1, tokens, heads, 1),
    }  # fmt: skip
    return shapes[granularity]


def code_limits(bits: int, signed: bool) -> tuple[int, int]:
    """(Qn, Qp).

    Raises:
        RecipeError: fewer than 2 bits or over 16.
    """
    if not 2 <= bits <= 16:
        raise RecipeError(f"LSQ with {bits} bit(s): expected 2 to 16.")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _shared_sum(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum over the axes that a scale of this shape shares."""
    axes = [i for i, side in enumerate(shape) if side == 1]
    return x.sum(axes, keepdim=True) if axes else x


def gradient_factor(x: Tensor, scale: Tensor, qp: int) -> float:
    """1 / sqrt(elements per scale * Qp), the batch included (LSQ, section 2.2)."""
    return 1 / math.sqrt(x.numel() / scale.numel() * qp)


class _Lsq(torch.autograd.Function):
    """Few passes over memory: on a processor this is half the time of training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qn: int, qp: int) -> Tensor:  # type: ignore[override]
        step = scale.clamp(min=SCALE_FLOOR)
        place = x / step
        code = place.clamp(qn, qp).round_()
        ctx.save_for_backward(place, code, step)
        ctx.limits = qn, qp
        return code * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        place, code, step = ctx.saved_tensors
        qn, qp = ctx.limits
        # The gradient inside [Qn, Qp], ends included; this kernel leaves its ends out, hence the next number outside.
        margin = torch.finfo(place.dtype).eps * max(-qn, qp)
        to_x = torch.ops.aten.hardtanh_backward(gradient, place, qn - margin, qp + margin)
        # d y / d step is Qn or Qp outside, round(x / step) - x / step inside.
        to_scale = _shared_sum((gradient * code).addcmul_(to_x, place, value=-1), step.shape)
        return to_x, to_scale * gradient_factor(place, step, qp), None, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


def lsq(x: Tensor, scale: Tensor, qn: int, qp: int) -> Tensor:
    """round(clip(x / scale, Qn, Qp)) * scale with LSQ's gradients; scale broadcasts to x and is at least 1e-5."""
    return _Lsq.apply(x, scale, qn, qp)


def lsq_plus(x: Tensor, scale: Tensor, offset: Tensor, qn: int, qp: int) -> Tensor:
    """LSQ of x - offset, plus offset; the offset learns with LSQ's factor too (LSQ+, section 3.1)."""
    offset = _ScaledGradient.apply(offset, gradient_factor(x, scale, qp))
    return lsq(x - offset, scale, qn, qp) + offset


def initial_scale(x: Tensor, shape: Sequence[int], qp: int, factor: float = 2.0) -> Tensor:
    """factor mean|x| / sqrt(Qp), of `shape` (LSQ, section 2.1)."""
    count = x.numel() / math.prod(shape)
    return factor * _shared_sum(x.detach().abs(), torch.Size(shape)) / count / math.sqrt(qp)


def _three_sigma(x: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    """max(|mean - 3 std|, |mean + 3 std|) / 2^(bits - 1) (LSQ+, section 3.2, weights)."""
    shared = [i for i, side in enumerate(shape) if side == 1]
    mean, std = x.mean(shared, keepdim=True), x.std(shared, keepdim=True)
    return torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 2 ** (bits - 1)


def _best_range(x: Tensor, shape: Sequence[int], qn: int, qp: int) -> tuple[Tensor, Tensor]:
    """(scale, offset) of the least squared error among ten shrinkings of each own range (LSQ+, section 3.2)."""
    shared, size = [i for i, side in enumerate(shape) if side == 1], torch.Size(shape)
    low, high = x.amin(shared, keepdim=True), x.amax(shared, keepdim=True)
    best = None
    for shrink in _SHRINKS:
        scale = ((high - low) * shrink / (qp - qn)).clamp(min=SCALE_FLOOR)
        offset = low * shrink - qn * scale
        error = _shared_sum((torch.round(((x - offset) / scale).clamp(qn, qp)) * scale + offset - x) ** 2, size)
        if best is None:
            best = error, scale, offset
        else:
            better = error < best[0]
            pairs = zip((error, scale, offset), best, strict=True)
            best = tuple(torch.where(better, new, old) for new, old in pairs)  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2]


class LsqQuantizer(nn.Module):
    """A learned grid; every tensor of its state has its shape from the start, so that loading needs no forward pass.

    The first batch in training mode sets the scale; `initialised` says that it has been.

    Args:
        shape: of the scale, broadcast to the input; axis 0, the batch, is 1 for activations.
        signed: codes [-n, n - 1], else [0, 2^bits - 1].
        offset: LSQ+, of the scale's shape.
        shifts: OFQ, shape of the learned vectors added before (c) and after (d); None has none.
        start: of the scale: "mean" is LSQ's, "three_sigma" LSQ+'s of weights, "range" LSQ+'s of activations.
        factor: in place of the 2 in LSQ's first scale; OFQ's release takes 4 where codes are unsigned.

    Raises:
        RecipeError: bits outside 2 to 16.
    """

    initialised: Tensor

    def __init__(
        self, shape: Sequence[int], bits: int, *, signed: bool = True, offset: bool = False,
        shifts: Sequence[int] | None = None, start: Start = "mean", factor: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bits, self.start, self.factor = bits, start, factor
        self.limits = code_limits(bits, signed)
        self.scale = nn.Parameter(torch.ones(*shape))
        self.offset = nn.Parameter(torch.zeros(*shape)) if offset else None
        self.before = nn.Parameter(torch.zeros(*shifts)) if shifts is not None else None
        self.after = nn.Parameter(torch.zeros(*shifts)) if shifts is not None else None
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the scale (and the offset) from a tensor that the quantizer will see."""
        shape, x = self.scale.shape, x.detach().to(self.scale.dtype)
        if self.start == "range":
            scale, offset = _best_range(x, shape, *self.limits)
            if self.offset is not None:
                self.offset.copy_(offset)
        elif self.start == "three_sigma":
            scale = _three_sigma(x, shape, self.bits)
        else:
            scale = initial_scale(x, shape, self.limits[1], self.factor)
        self.scale.copy_(scale.clamp(min=SCALE_FLOOR))
        self.initialised.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """x on the grid, of x's shape.

        Raises:
            RecipeError: in evaluation before any batch of training or stored state has set the scale.
        """
        if not self.initialised:
            if not self.training:
                raise RecipeError(
                    "a quantizer's scale was never set: run one batch in training mode, or load a trained state."
                )
            self.initialise(x)
        x = x if self.before is None else x + self.before
        if self.offset is None:
            y = lsq(x, self.scale, *self.limits)
        else:
            y = lsq_plus(x, self.scale, self.offset, *self.limits)
        return y if self.after is None else y + self.after

    def position(self, weight: Tensor) -> Tensor:
        """clip(W / scale, Qn, Qp), of W's shape: where a weight lies among the codes, its nearest integers."""
        return (weight.detach() / self.scale.detach().clamp(min=SCALE_FLOOR)).clamp(*self.limits)

    def codes(self, weight: Tensor) -> Tensor:
        """Codes, integral values in W's type and shape."""
        return torch.round(self.position(weight))

    def export_grid(self, weight: Tensor) -> tuple[Tensor, Tensor, float]:
        """(integer codes, scale of each row, zero point 0) of a weight, with W_q = codes * scale."""
        kind = torch.int8 if self.bits <= 8 else torch.int16
        scale = self.scale.detach().clamp(min=SCALE_FLOOR)
        return self.codes(weight).to(kind), scale.expand(len(weight), *scale.shape[1:]), 0.0
