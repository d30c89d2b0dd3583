"""Put the simulated layers of a preset into any torch module: choose the layers, calibrate, allocate bits, replace."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeattn.errors import DataError, NumericError, RecipeError
from edgeattn.quant.methods.allocation import allocate, normalise, size_budget
from edgeattn.quant.methods.channel_balance import range_index
from edgeattn.quant.methods.dual_smoothing import before_smoothing
from edgeattn.quant.methods.presets import SimulationSettings, at_timestep, get_preset, simulated_linear
from edgeattn.quant.methods.rotation import rotate
from edgeattn.quant.methods.smoothing import ActivationMaximum

Metric = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class TimedInputs:
    """Inputs of one call of a denoising model, a tuple or a dict, and the time step that all its samples have."""

    timestep: int
    inputs: Any


@dataclasses.dataclass(frozen=True)
class SimulationReport:
    """What was done; `module.simulation` of the module that `simulate` returns.

    Attributes:
        bits: (weight, activation) of each quantized layer; None is floating point.
        kept: reason for each linear layer that stayed in floating point.
        notes: departures from the settings, a sentence each.
        average_bits: of the quantized layers' weights, floats count 32; `per_range` stores as many copies.
    """

    settings: SimulationSettings
    bits: Mapping[str, tuple[int | None, int | None]]
    kept: Mapping[str, str]
    notes: tuple[str, ...]
    average_bits: float


def simulate(
    module: nn.Module,
    preset: str | SimulationSettings,
    calibration: Iterable[Any],
    *,
    keep_float: Sequence[str] | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> nn.Module:
    """A copy of `module`, in eval mode, whose linear layers are simulated as the preset quantizes them.

    The copy has a `SimulationReport` as its attribute `simulation`. Layers that are timestep-aware run inside
    `at_timestep(copy, t)`.

    Args:
        preset: name of `PRESETS`, or settings.
        calibration: inputs of each call, a tuple or a dict; as TimedInputs where the preset looks at time steps.
            Inputs without one count as of the last range, unless each range has its own scale.
        keep_float: shell patterns on names of layers, or of modules that hold them, in place of the preset's.
        metrics: for mixed precision, by the settings' group: error of the outputs (reference, got), 0 or more. The
            default is the relative squared error.

    Raises:
        RecipeError: unknown preset, pattern or group; no layer selected; a selected layer that calibration never
            reached; a budget that cannot be kept. DataError: no calibration. NumericError: NaN or infinity.
    """
    settings = get_preset(preset) if isinstance(preset, str) else preset
    _check_metrics(metrics or {}, settings)
    items = list(calibration)
    if not items:
        raise DataError("calibration is empty: give the inputs of at least one call.")
    result = _copied(module)
    layers, kept = _select(result, settings, keep_float)
    plans, notes = _plan_rotations(layers, settings)
    maxima = _calibrate(result, layers, plans, items, settings)
    if settings.average_bits is not None:
        plans = _allocate(result, layers, plans, maxima, items, dict(metrics or {}))
    new = {layers[name]: simulated_linear(layers[name], plan, maxima[name]) for name, plan in plans.items()}
    result = _replaced(result, new)
    object.__setattr__(result, "simulation", _report(settings, plans, layers, kept, notes))
    return result


def _report(
    settings: SimulationSettings,
    plans: Mapping[str, SimulationSettings],
    layers: Mapping[str, nn.Linear],
    kept: Mapping[str, str],
    notes: Sequence[str],
) -> SimulationReport:
    size = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    average = sum(size[name] * (plan.w_bits or 32) for name, plan in plans.items()) / sum(size.values())
    bits = {name: (plan.w_bits, plan.a_bits) for name, plan in plans.items()}
    return SimulationReport(settings, bits, kept, tuple(notes), average)


def _check_metrics(metrics: Mapping[str, Metric], settings: SimulationSettings) -> None:
    groups = [] if settings.average_bits is None else [name for name, _ in settings.groups]
    if unknown := sorted(set(metrics) - set(groups)):
        raise RecipeError(f"metrics of {unknown}: the groups of mixed precision in these settings are {groups}.")


def _copied(module: nn.Module) -> nn.Module:
    result = copy.deepcopy(module).eval()
    for layer in result.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            # Its fused path reads the weights of its linear layers; this is one of the conditions for taking it.
            layer.activation_relu_or_gelu = 0
    return result


def _select(
    module: nn.Module, settings: SimulationSettings, keep_float: Sequence[str] | None
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """(layers to quantize, reasons for the other linear layers), by name."""
    patterns = settings.keep_float if keep_float is None else tuple(keep_float)
    if isinstance(keep_float, str):
        raise RecipeError(f"keep_float {keep_float!r} is one string: give a list of patterns.")
    names = [name for name, _ in module.named_modules()]
    for pattern in keep_float or ():
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3)
            raise RecipeError(
                f"keep_float {pattern!r} matches no module"
                + (f"; near names: {', '.join(near)}." if near else ": see module.named_modules().")
            )
    modules = dict(module.named_modules())
    layers, kept = {}, {}
    for name, layer in modules.items():
        if not isinstance(layer, nn.Linear):
            continue
        reason = _reason_to_keep(name, layer, modules, patterns)
        if reason is None:
            layers[name] = layer
        else:
            kept[name] = reason
    if not layers:
        why = f"all {len(kept)} are kept in floating point ({'; '.join(sorted(set(kept.values())))})" if kept else ""
        raise RecipeError(
            f"no linear layer of {type(module).__name__} is selected: {why or 'it has none'}. Change keep_float."
        )
    return layers, kept


def _reason_to_keep(
    name: str, layer: nn.Linear, modules: Mapping[str, nn.Module], patterns: Sequence[str]
) -> str | None:
    if isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention reads its weight without calling it"
    if type(layer).forward is not nn.Linear.forward:
        return f"{type(layer).__name__} has a forward of its own"
    parts = name.split(".")
    for path in (".".join(parts[:n]) for n in range(1, len(parts) + 1)):
        for pattern in patterns:
            if fnmatch.fnmatchcase(path, pattern):
                return f"keep_float {pattern!r}"
    return None


def _plan_rotations(
    layers: Mapping[str, nn.Linear], settings: SimulationSettings
) -> tuple[dict[str, SimulationSettings], list[str]]:
    """Settings of each layer, and notes: without rotation where there is no Hadamard matrix of its inputs."""
    plans, notes = {}, []
    plain = dataclasses.replace(settings, steps=tuple(step for step in settings.steps if step != "rotate"))
    for name, layer in layers.items():
        plans[name] = settings
        signs = settings.signs(layer.in_features)
        if signs is None:
            continue
        try:
            rotate(torch.zeros(1, layer.in_features), signs)
        except RecipeError as error:
            plans[name] = plain
            notes.append(f"{name}: not rotated, {error}")
    return plans, notes


def _calibrate(
    module: nn.Module,
    layers: Mapping[str, nn.Linear],
    plans: Mapping[str, SimulationSettings],
    items: Sequence[Any],
    settings: SimulationSettings,
) -> dict[str, list[Tensor]]:
    """The maxima of every layer, one per scale of the settings."""
    count = max(len(settings.time_ranges), 1)
    seen = {name: [ActivationMaximum() for _ in range(count)] for name in layers}
    index = 0

    def hook(name: str) -> Callable[..., None]:
        def watch(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            if x.numel():
                x = x if x.dtype == torch.float64 else x.float()
                signs = plans[name].signs(x.shape[-1])
                seen[name][index].update(before_smoothing(x, plans[name].steps, signs))

        return watch

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for item in items:
            index = _range_of(item, settings)
            _call(module, item)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _values(name, found, settings) for name, found in seen.items()}


def _range_of(item: Any, settings: SimulationSettings) -> int:
    if not settings.time_ranges:
        return 0
    if isinstance(item, TimedInputs):
        return range_index(settings.time_ranges, item.timestep)
    if settings.per_range:
        raise RecipeError(
            "a scale per time range needs to know the time step of each call: give TimedInputs(t, inputs)."
        )
    return len(settings.time_ranges) - 1


def _values(name: str, found: Sequence[ActivationMaximum], settings: SimulationSettings) -> list[Tensor]:
    """The maxima of one layer that its scales are made of."""
    if all(one.average is None for one in found):
        raise RecipeError(
            f"calibration never reached the layer {name!r}: give inputs that use it, or add it to keep_float."
        )
    values = []
    for number, one in list(enumerate(found))[-settings.scales :]:
        if one.average is None:
            raise RecipeError(
                f"calibration of the layer {name!r} has no call in the time range {settings.time_ranges[number]}, "
                "which a scale is made of: add one."
            )
        if not one.value.isfinite().all():
            raise NumericError(f"the inputs of the layer {name!r} in calibration hold NaN or infinity.")
        values.append(one.value)
    return values


def _call(module: nn.Module, item: Any) -> list[Tensor]:
    """The tensors that a module returns for one item of calibration."""
    timed = isinstance(item, TimedInputs)
    inputs = item.inputs if timed else item
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise DataError(f"calibration holds a {type(inputs).__name__}: expected a tuple or a dict of a call's inputs.")
    with torch.no_grad(), at_timestep(module, item.timestep) if timed else contextlib.nullcontext():
        output = module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
    return list(_tensors(output))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output.detach()
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def relative_error(reference: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Squared error over energy of the reference, mean over the tensors that are not 0."""
    pairs = [(r.double(), g.double()) for r, g in zip(reference, got, strict=True) if r.is_floating_point() and r.any()]
    return float(np.mean([float((g - r).square().sum() / r.square().sum()) for r, g in pairs] or [0.0]))


def search_alpha(
    module: nn.Module,
    preset: str | SimulationSettings,
    calibration: Iterable[Any],
    alphas: Sequence[float] = ALPHAS,
    *,
    keep_float: Sequence[str] | None = None,
) -> tuple[SimulationSettings, dict[float, float]]:
    """(settings with the exponent of the least output error, the error of each) over the calibration itself.

    What ViDiT-Q asks for on models that it gives no exponent of. Mixed precision is left out of the search: every
    layer has `w_bits`. Arguments and errors as for `simulate`.
    """
    settings = get_preset(preset) if isinstance(preset, str) else preset
    items = list(calibration)
    exact = _copied(module)
    references = [_call(exact, item) for item in items]
    errors = {}
    for alpha in alphas:
        tried = dataclasses.replace(settings, alpha=alpha, widths=(), average_bits=None)
        made = simulate(module, tried, items, keep_float=keep_float)
        found = [relative_error(r, _call(made, item)) for r, item in zip(references, items, strict=True)]
        errors[alpha] = float(np.mean(found))
    return dataclasses.replace(settings, alpha=min(errors, key=errors.__getitem__)), errors


def _allocate(
    module: nn.Module,
    layers: Mapping[str, nn.Linear],
    plans: Mapping[str, SimulationSettings],
    maxima: Mapping[str, list[Tensor]],
    items: Sequence[Any],
    metrics: Mapping[str, Metric],
) -> dict[str, SimulationSettings]:
    """Settings of each layer with its share of the average bits, by the error that it makes when quantized alone."""
    settings = next(iter(plans.values()))
    assert settings.average_bits is not None
    references = [_call(module, item) for item in items]
    groups = [_group(name, settings) for name in layers]
    errors = np.zeros((len(layers), len(settings.widths)))
    for row, (name, layer) in enumerate(layers.items()):
        metric = metrics.get(groups[row], relative_error)
        for column, width in enumerate(settings.widths):
            candidate = simulated_linear(layer, dataclasses.replace(plans[name], w_bits=width), maxima[name])
            changed = _replaced(module, {layer: candidate})
            found = [metric(r, _call(changed, item)) for r, item in zip(references, items, strict=True)]
            _replaced(changed, {candidate: layer})
            errors[row, column] = np.mean(found)
    size = [layer.in_features * layer.out_features for layer in layers.values()]
    budget = size_budget(size, settings.widths, settings.average_bits * sum(size))
    table = normalise(errors, np.array(groups), settings.widths)
    chosen = allocate(table, settings.widths, [budget]).bits
    return {name: dataclasses.replace(plans[name], w_bits=b) for name, b in zip(layers, chosen, strict=True)}


def _group(name: str, settings: SimulationSettings) -> str:
    for group, pattern in settings.groups:
        if fnmatch.fnmatchcase(name, pattern):
            return group
    raise RecipeError(f"the layer {name!r} is in none of the metric groups {settings.groups}: add one for it.")


def _replaced(module: nn.Module, new: Mapping[Any, nn.Module]) -> nn.Module:
    """The module with other layers in the place of some, under every name that they have; changed in place."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent._modules[name] = new[child]
    return new.get(module, module)
