"""AdaRound (arXiv 2004.10568): whether each weight is rounded up or down, learned through a rectified sigmoid.

Every function takes the scheme's scale and zero point; v has the shape of w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeattn.quant.scheme import Scheme

ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Tensor, zeta: float = ZETA, gamma: float = GAMMA) -> Tensor:
    """h(v) = clip((zeta - gamma) sigmoid(v) + gamma, 0, 1), the share by which a weight is rounded up (equation 23)."""
    return (torch.sigmoid(v) * (zeta - gamma) + gamma).clamp(0, 1)


def initial_v(w: Tensor, scheme: Scheme, scale: Tensor, zeta: float = ZETA, gamma: float = GAMMA) -> Tensor:
    """The v at which h(v) is the fractional part of w / scale, so that the soft weight equals w inside the grid."""
    steps = scheme.rows(w) / scale
    share = (steps - steps.floor()).reshape(w.shape)
    return torch.logit((share - gamma) / (zeta - gamma))


def soft_weight(w: Tensor, h: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
    """scale * (clip(floor(w / scale) + h + zero_point) - zero_point), with h in 0 to 1 (equation 22)."""
    codes = torch.floor(scheme.rows(w) / scale) + scheme.rows(h) + zero_point
    return ((codes.clamp(*scheme.limits) - zero_point) * scale).reshape(w.shape)


def hard_weight(w: Tensor, v: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
    """The weight after training: rounded up where v >= 0 (h >= 1/2), down elsewhere."""
    return soft_weight(w, (v >= 0).to(w.dtype), scheme, scale, zero_point)


def regularizer(h: Tensor, beta: float) -> Tensor:
    """sum(1 - |2h - 1|^beta): 0 when every h is 0 or 1 (equation 24)."""
    return (1 - (2 * h - 1).abs() ** beta).sum()


def beta_at(step: int, steps: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float | None:
    """The regularizer's exponent at a step: linear from `start` to `end` after the warm-up, in which it is None."""
    first = warmup * steps
    if step < first:
        return None
    return end + (start - end) * max(0.0, 1 - (step - first) / max(steps - first, 1e-9))
