"""Published recipes by name, and the linear layer that simulates them: QuantVGGT and ViDiT-Q.

What each preset means, and where a release departs from its paper, is said beside it. `edgeattn.quant.simulate` puts
the layers into a module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.channel_balance import STATIC_THEN_ROTATE, range_index
from edgeattn.quant.methods.dual_smoothing import DSFQ, Steps, Transform, make_transform, quantize_linear
from edgeattn.quant.methods.rotation import random_signs
from edgeattn.quant.scheme import Scheme

Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class SimulationSettings:
    """How every linear layer is quantized: weights per output channel, activations per token and dynamic.

    Attributes:
        w_bits, a_bits: 2 to 16; None leaves weights or activations in floating point.
        symmetric: both grids; else both have zero points.
        steps: of the transform before quantizing, in their order.
        alpha: exponent of the channel scale; for `per_range` one for all ranges, or one each.
        release_scale: see `make_transform`.
        time_ranges: (first, last) of each; a scale that is not `per_range` is that of the last, which has most noise.
        per_range: a scale and a weight grid for each range.
        widths, average_bits: mixed precision: each layer's weight has one of the widths; mean over all their weights.
        groups: (name, shell pattern): a layer's metric group in mixed precision is the first that matches.
        keep_float: shell patterns on the names of layers, or of modules that hold them.
        seed: of the rotation's signs, which all layers of one width share.
    """

    w_bits: int | None = 8
    a_bits: int | None = 8
    symmetric: bool = True
    steps: Steps = ()
    alpha: float | tuple[float, ...] = 0.5
    release_scale: bool = False
    time_ranges: Ranges = ()
    per_range: bool = False
    widths: tuple[int, ...] = ()
    average_bits: float | None = None
    groups: tuple[tuple[str, str], ...] = (("all", "*"),)
    keep_float: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_range and ("smooth" not in self.steps or not self.time_ranges):
            raise RecipeError("per_range needs the step 'smooth' and time_ranges: there is nothing else per range.")
        if isinstance(self.alpha, tuple) and not (self.per_range and len(self.alpha) == len(self.time_ranges)):
            count = len(self.time_ranges) if self.per_range else 1
            raise RecipeError(f"{len(self.alpha)} values of alpha for {count} scales: give one number, or one each.")
        if bool(self.widths) != (self.average_bits is not None):
            raise RecipeError(f"widths {self.widths} with average_bits {self.average_bits}: give both or none.")

    @property
    def scales(self) -> int:
        """Channel scales of a layer: one, or one for each time range."""
        return len(self.time_ranges) if self.per_range else 1

    @property
    def alphas(self) -> tuple[float, ...]:
        """Exponent of each channel scale."""
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * self.scales

    def signs(self, channels: int) -> Tensor | None:
        """Signs (channels,) of the rotation, if there is one."""
        return random_signs(channels, self.seed) if "rotate" in self.steps else None


# QuantVGGT (arXiv 2509.21302), DSFQ: rotation, then channel scale. The release quantizes the blocks of the
# aggregator alone. Its learned clipping and its tuning of each block are training, and not part of a preset.
_VGGT = SimulationSettings(steps=DSFQ, alpha=0.5, keep_float=("*patch_embed", "*_head", "head"))
_RELEASE = dataclasses.replace(_VGGT, release_scale=True)
# ViDiT-Q (arXiv 2406.02540): 0.12 and 0.11 are its exponents for OpenSORA. PixArt has 0.3.
_RANGES: Ranges = ((0, 500), (501, 1000))
_DIT_FLOAT = ("*x_embedder", "*t_embedder", "*y_embedder", "*t_block", "*adaLN_modulation", "*final_layer")
_VIDIT = SimulationSettings(
    symmetric=False, steps=STATIC_THEN_ROTATE, alpha=0.12, time_ranges=_RANGES, keep_float=_DIT_FLOAT
)
_VIDIT_V1 = dataclasses.replace(_VIDIT, steps=("smooth",), alpha=0.11, per_range=True)
# What each group does to a sample is seen by another metric.
_GROUPS = (("cross-attention", "*cross_attn*"), ("temporal-attention", "*temporal*"), ("visual", "*"))

PRESETS = MappingProxyType(
    {
        "quantvggt-w8a8": _VGGT,
        "quantvggt-w4a4": dataclasses.replace(_VGGT, w_bits=4, a_bits=4),
        "quantvggt-release-w8a8": _RELEASE,
        "quantvggt-release-w4a4": dataclasses.replace(_RELEASE, w_bits=4, a_bits=4),
        "vidit-q-w8a8": _VIDIT,
        "vidit-q-w4a8": dataclasses.replace(_VIDIT, w_bits=4),
        "vidit-q-v1-w8a8": _VIDIT_V1,
        "vidit-q-v1-w4a8": dataclasses.replace(_VIDIT_V1, w_bits=4),
        "vidit-q-w4a8-mp": dataclasses.replace(
            _VIDIT, w_bits=4, widths=(4, 6, 8), average_bits=5.0, groups=_GROUPS
        ),
    }
)  # fmt: skip


def get_preset(name: str) -> SimulationSettings:
    """The settings called `name`.

    Raises:
        RecipeError: there are none; near names are suggested.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise RecipeError(f"unknown preset {name!r}: {hint}Known: {', '.join(PRESETS)}.")
    return PRESETS[name]


class SimulatedLinear(nn.Module):
    """A linear layer whose operands lie on their grids, computed in floating point: (..., in) to (..., out).

    Its state holds the weight as decoded from its codes, in the transformed space, and the signs of the rotation.
    """

    def __init__(self, linear: nn.Linear, transform: Transform, w_scheme: Scheme | None, a_scheme: Scheme | None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.steps, self.weight_scheme, self.activation_scheme = transform.steps, w_scheme, a_scheme
        w, bias = full_weight(linear), linear.bias
        if w_scheme is None:
            w = transform.weight(w)
        else:
            w = quantize_linear(w, None, transform, w_scheme, a_scheme or Scheme(dynamic=True)).weight()
        # Not `weight`: what reads a linear layer's weight past its forward must fail here, not leave out the transform.
        self.quantized_weight = nn.Parameter(w, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(w), requires_grad=False)
        self.register_buffer("signs", transform.signs)
        self.register_buffer("channel_scale", transform.channel_scale)

    @property
    def transform(self) -> Transform:
        """Of the activation; that of the weight is merged."""
        return Transform(self.steps, self.signs, self.channel_scale)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the type of x."""
        y = self.transform.activation(x.to(self.quantized_weight.dtype))
        if self.activation_scheme is not None:
            y = self.activation_scheme.fake_quantize(y)
        return functional.linear(y, self.quantized_weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and bits, for print."""
        bits = [s.bits if s else "float" for s in (self.weight_scheme, self.activation_scheme)]
        steps = " then ".join(self.steps) or "none"
        return f"{self.in_features} -> {self.out_features}, weight {bits[0]}, activation {bits[1]}, transform {steps}"


class TimestepLinear(nn.Module):
    """ViDiT-Q v1: a SimulatedLinear for each range of time steps; `at_timestep` says which."""

    def __init__(self, ranges: Ranges, layers: Sequence[SimulatedLinear]):
        super().__init__()
        self.ranges, self.layers = ranges, nn.ModuleList(layers)
        self.timestep: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out).

        Raises:
            RecipeError: no time step is set, or it lies in no range.
        """
        if self.timestep is None:
            raise RecipeError("a timestep-aware layer ran without a time step: run it inside `at_timestep(module, t)`.")
        return self.layers[range_index(self.ranges, self.timestep)](x)


@contextlib.contextmanager
def at_timestep(module: nn.Module, timestep: int) -> Iterator[None]:
    """Every timestep-aware layer inside `module` takes the grids of this time step, for the length of the block.

    Raises:
        RecipeError: the step lies in no range of a layer.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, TimestepLinear)]
    before = [layer.timestep for layer in layers]
    for layer in layers:
        range_index(layer.ranges, timestep)
    try:
        for layer in layers:
            layer.timestep = timestep
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.timestep = old


def full_weight(linear: nn.Linear) -> Tensor:
    """The weight (out, in) in at least float32: what 16-bit types would round is not the method's error."""
    w = linear.weight.detach()
    return w if w.dtype == torch.float64 else w.float()


def simulated_linear(
    linear: nn.Linear, settings: SimulationSettings, maxima: Sequence[Tensor | None]
) -> SimulatedLinear | TimestepLinear:
    """The layer that takes the place of `linear`, by the settings' `w_bits` and `a_bits`.

    maxima are (in,) each, one per scale of the settings: of the activation as `before_smoothing` gives it.

    Raises:
        RecipeError: the numbers of maxima and of scales differ, or the transform cannot be made.
    """
    if len(maxima) != settings.scales:
        raise RecipeError(f"{len(maxima)} maxima of activations for {settings.scales} scales.")
    w, signs = full_weight(linear), settings.signs(linear.in_features)
    signs = None if signs is None else signs.to(w)
    w_scheme = None if settings.w_bits is None else Scheme(settings.w_bits, settings.symmetric, "channel")
    a_scheme = None if settings.a_bits is None else Scheme(settings.a_bits, settings.symmetric, "token", dynamic=True)
    layers = []
    for top, alpha in zip(maxima, settings.alphas, strict=True):
        top = None if top is None else top.to(w)
        transform = make_transform(w, top, signs, settings.steps, alpha, settings.release_scale)
        layers.append(SimulatedLinear(linear, transform, w_scheme, a_scheme))
    return TimestepLinear(settings.time_ranges, layers) if settings.per_range else layers[0]
