"""DSFQ of QuantVGGT (arXiv 2509.21302): a rotation and a channel scale before quantizing a linear layer.

The two steps come in either order, or alone; the transform of the activation is online, that of the weight is merged.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor
from torch.nn import functional

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.rotation import rotate
from edgeattn.quant.methods.smoothing import smoothquant_scale, weight_maximum
from edgeattn.quant.scheme import Scheme

Step = Literal["rotate", "smooth"]
Steps = tuple[Step, ...]
DSFQ: Steps = ("rotate", "smooth")


@dataclasses.dataclass(frozen=True)
class Transform:
    """x -> x' and w -> w' with x' w'^T = x w^T: `steps` in their order, `signs` (in,) and `channel_scale` (in,)."""

    steps: Steps = ()
    signs: Tensor | None = None
    channel_scale: Tensor | None = None

    def __post_init__(self) -> None:
        for step, value in (("rotate", self.signs), ("smooth", self.channel_scale)):
            if self.steps.count(step) != (value is not None):  # type: ignore[arg-type]
                needs = "signs" if step == "rotate" else "channel_scale"
                raise RecipeError(
                    f"steps {self.steps}: {step!r} must come once when {needs} is given, else not at all."
                )

    def activation(self, x: Tensor) -> Tensor:
        """x (..., in) rotated and divided by the channel scale."""
        for step in self.steps:
            x = self._rotated(x) if step == "rotate" else x / self._scale
        return x

    def weight(self, w: Tensor) -> Tensor:
        """w (out, in) rotated and multiplied by the channel scale."""
        for step in self.steps:
            w = self._rotated(w) if step == "rotate" else w * self._scale
        return w

    @property
    def _scale(self) -> Tensor:
        assert self.channel_scale is not None
        return self.channel_scale

    def _rotated(self, x: Tensor) -> Tensor:
        assert self.signs is not None
        return rotate(x, self.signs)


def before_smoothing(x: Tensor, steps: Steps, signs: Tensor | None) -> Tensor:
    """x as the smoothing step meets it: what the activation statistic is taken of. Of a weight likewise."""
    if "smooth" not in steps or "rotate" not in steps[: steps.index("smooth")]:
        return x
    if signs is None:
        raise RecipeError(f"steps {steps} need the signs of the rotation.")
    return rotate(x, signs)


def make_transform(
    w: Tensor,
    act_max: Tensor | None,
    signs: Tensor | None,
    steps: Steps = DSFQ,
    alpha: float = 0.5,
    release_scale: bool = False,
) -> Transform:
    """The transform of a linear layer with the weight w (out, in).

    `act_max` (in,) is the maximum of `before_smoothing(x, ...)` as `ActivationMaximum` finds it. `release_scale` takes
    max|w| before the rotation, as the release of QuantVGGT does, in place of after it, as its paper does.

    Raises:
        RecipeError: a step lacks its signs or maximum; no Hadamard matrix of this size.
    """
    if "smooth" not in steps:
        return Transform(steps, signs if "rotate" in steps else None)
    if act_max is None:
        raise RecipeError(f"steps {steps} need the maximum of the activation per channel.")
    seen = w if release_scale else before_smoothing(w, steps, signs)
    scale = smoothquant_scale(act_max, weight_maximum(seen), alpha)
    return Transform(steps, signs if "rotate" in steps else None, scale)


@dataclasses.dataclass(frozen=True)
class TransformedLinear:
    """A quantized linear layer with an online transform: everything that an exporter needs.

    Attributes:
        transform: of the activation, computed in floating point before it is quantized.
        weight_codes: (out, in), on `weight_scheme`; weight_scale and weight_zero are shaped as by `Scheme.parameters`.
        activation_scheme: dynamic; its ranges are taken from the transformed activation.
    """

    transform: Transform
    weight_scheme: Scheme
    activation_scheme: Scheme
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, scale, zero_point) of x (..., in) after the transform."""
        x = self.transform.activation(x)
        scale, zero_point = self.activation_scheme.parameters(x)
        return self.activation_scheme.encode(x, scale, zero_point), scale, zero_point

    def weight(self) -> Tensor:
        """The quantized weight in the transformed space, (out, in)."""
        return self.weight_scheme.decode(self.weight_codes, self.weight_scale, self.weight_zero)

    def __call__(self, x: Tensor) -> Tensor:
        """Output (..., out) for x (..., in)."""
        return functional.linear(self.activation_scheme.decode(*self.quantize_input(x)), self.weight(), self.bias)


def quantize_linear(
    w: Tensor, bias: Tensor | None, transform: Transform, weight_scheme: Scheme, activation_scheme: Scheme
) -> TransformedLinear:
    """The layer with its transformed weight rounded to nearest. w is (out, in), bias (out,).

    Raises:
        RecipeError: the activation scheme is not dynamic, or a group size does not divide the inputs.
    """
    if not activation_scheme.dynamic:
        raise RecipeError("the activation of a transformed linear layer is quantized dynamically: set dynamic=True.")
    w = transform.weight(w)
    scale, zero = weight_scheme.parameters(w)
    codes = weight_scheme.encode(w, scale, zero)
    return TransformedLinear(transform, weight_scheme, activation_scheme, codes, scale, zero, bias)


def dual_smooth(
    w: Tensor,
    bias: Tensor | None,
    act_max: Tensor | None,
    signs: Tensor | None,
    w_bits: int = 4,
    a_bits: int = 4,
    alpha: float = 0.5,
    steps: Steps = DSFQ,
    release_scale: bool = False,
) -> TransformedLinear:
    """DSFQ without learned clipping: weights symmetric per row, activations symmetric per token and dynamic.

    Shapes and errors as for `make_transform` and `quantize_linear`.
    """
    transform = make_transform(w, act_max, signs, steps, alpha, release_scale)
    activations = Scheme(a_bits, True, "token", dynamic=True)
    return quantize_linear(w, bias, transform, Scheme(w_bits, True, "channel"), activations)
