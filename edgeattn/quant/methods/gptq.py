"""GPTQ (arXiv 2210.17323): weights rounded column by column, each error spread over the columns still to come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgeattn.errors import NumericError, RecipeError
from edgeattn.quant.scheme import Scheme


@dataclasses.dataclass
class Hessian:
    """2/n X^T X of all tokens seen, (in, in), accumulated over batches in the type of the first."""

    total: Tensor | None = None
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        """Take in activations of shape (..., in).

        Raises:
            RecipeError: another number of channels than before.
        """
        flat = x.detach().reshape(-1, x.shape[-1])
        if self.total is not None and flat.shape[1] != len(self.total):
            raise RecipeError(f"a batch of {flat.shape[1]} channels after batches of {len(self.total)}.")
        product = flat.T @ flat
        self.total = product if self.total is None else self.total + product
        self.tokens += len(flat)

    @property
    def value(self) -> Tensor:
        """The matrix, without damping.

        Raises:
            RecipeError: no token was seen.
        """
        if self.total is None or not self.tokens:
            raise RecipeError("no activation was seen: run calibration before GPTQ.")
        return self.total * (2 / self.tokens)


@dataclasses.dataclass(frozen=True)
class GptqResult:
    """Attributes: codes (out, in), 0 to 2^bits - 1; scale and zero (out, groups); wq (out, in); all of w's type."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    wq: Tensor


def grid(w: Tensor, bits: int, group: int | None, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero) of w (out, in), both (out, groups), for unsigned codes; without `group` one group is the row.

    Symmetric is the convention of GPTQ's release: scale = 2 max|w| / (2^bits - 1), zero = 2^(bits - 1), so that the
    largest positive weight is half a step off; `Scheme(symmetric=True)` divides by 2^(bits - 1) - 1 instead.

    Raises:
        RecipeError: bits outside 2 to 16, or a group size that does not divide the inputs.
    """
    scheme = _scheme(bits, group)
    if not symmetric:
        scale, zero = scheme.parameters(w)
    else:
        top = scheme.rows(w).abs().amax(-1, keepdim=True)
        scale, _ = scheme.from_range(-top, top)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    return scale.reshape(len(w), -1), zero.reshape(len(w), -1)


def round_to_nearest(w: Tensor, bits: int, group: int | None = None, symmetric: bool = True) -> GptqResult:
    """Plain rounding on the grid of `grid`: the baseline that GPTQ improves on. Raises what `grid` raises."""
    scheme, (scale, zero) = _scheme(bits, group), grid(w, bits, group, symmetric)
    shaped = scale.reshape(*scheme.rows(w).shape[:-1], 1), zero.reshape(*scheme.rows(w).shape[:-1], 1)
    codes = scheme.encode(w, *shaped)
    return GptqResult(codes, scale, zero, scheme.decode(codes, *shaped))


def gptq(
    w: Tensor,
    hessian: Tensor,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    percdamp: float = 0.01,
    block: int = 128,
    parameters: tuple[Tensor, Tensor] | None = None,
) -> GptqResult:
    """Quantize w (out, in) so that the outputs of the tokens behind `hessian` (in, in) change least (section 4).

    Group grids come from the original weights, so with `act_order` (columns by falling diagonal of the Hessian) the
    stored order stays that of w. Inputs that are always 0 get the weight 0. `block` is for speed only. `parameters` are
    (scale, zero) of another grid, each (out, groups).

    Raises:
        RecipeError: shapes disagree, bits or group are impossible.
        NumericError: the damped Hessian is not positive definite.
    """
    if hessian.shape != (w.shape[1], w.shape[1]):
        raise RecipeError(f"a Hessian of {tuple(hessian.shape)} for a weight of {tuple(w.shape)}: expected (in, in).")
    hessian, work = hessian.to(w).clone(), w.detach().clone()
    scale, zero = parameters or grid(work, bits, group, symmetric)
    dead = hessian.diagonal() == 0
    work[:, dead] = 0
    hessian.diagonal()[dead] = 1
    of_column = torch.arange(w.shape[1]) // (w.shape[1] // scale.shape[1])
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(w.shape[1])
    factor = _inverse_factor(hessian[order][:, order], percdamp)
    scales, zeros = scale[:, of_column[order]], zero[:, of_column[order]]
    ordered = _solve(work[:, order], factor, scales, zeros, Scheme(bits, False, "token"), block)
    codes = torch.empty_like(ordered)
    codes[:, order] = ordered
    return GptqResult(codes, scale, zero, (codes - zero[:, of_column]) * scale[:, of_column])


def _solve(w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, block: int) -> Tensor:
    """Codes of the columns of w in their order; w is overwritten."""
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            column, parameters = w[:, j : j + 1], (scales[:, j : j + 1], zeros[:, j : j + 1])
            code = scheme.encode(column, *parameters)
            error = (column - scheme.decode(code, *parameters)) / factor[j, j]
            w[:, j + 1 : end] -= error * factor[j, j + 1 : end]
            codes[:, j : j + 1], errors[:, j - start : j - start + 1] = code, error
        w[:, end:] -= errors @ factor[start:end, end:]
    return codes


def _inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian."""
    hessian.diagonal().add_(percdamp * hessian.diagonal().mean())
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise NumericError(
            f"the Hessian of {len(hessian)} inputs with damping {percdamp} is not positive definite. "
            "Give more calibration tokens or a larger percdamp, or compute in float64."
        ) from error


def _scheme(bits: int, group: int | None) -> Scheme:
    if group is None or group <= 0:
        return Scheme(bits, False, "channel")
    return Scheme(bits, False, "group", group)


def convolution_inputs(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """What each output of a convolution reads: (groups, positions, channels / groups * kernel area) of x (n, c, h, w).

    A grouped convolution is `groups` separate problems (a depthwise one has a Hessian of the kernel's area per
    channel): keep one `Hessian` per group and give them to `gptq_grouped`.
    """
    columns = functional.unfold(x, kernel, dilation, padding, stride)
    per_group = columns.unflatten(1, (groups, -1))
    return per_group.permute(1, 0, 3, 2).flatten(1, 2)


def gptq_grouped(w: Tensor, hessians: Sequence[Tensor], bits: int, **settings: bool | int | float | None) -> GptqResult:
    """GPTQ of a convolution's weight (out, in / groups, kh, kw) with one Hessian per group, in the order of the groups.

    The result's tensors are as for the flattened weight (out, in / groups * kh * kw), `wq` has the shape of w.

    Raises:
        RecipeError: the number of Hessians does not divide the outputs; or as `gptq`.
    """
    if not hessians or len(w) % len(hessians):
        raise RecipeError(f"{len(hessians)} Hessians for {len(w)} output channels: expected one per group.")
    rows = w.flatten(1).split(len(w) // len(hessians))
    parts = [gptq(r, h, bits, **settings) for r, h in zip(rows, hessians, strict=True)]  # type: ignore[arg-type]
    joined = (torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scale", "zero", "wq"))
    codes, scale, zero, wq = joined
    return GptqResult(codes, scale, zero, wq.reshape(w.shape))
