"""Rounding learned on pictures: AdaRound (arXiv 2004.10568) layer by layer, or BRECQ's blocks (arXiv 2102.05426).

Units are taken in graph order. A unit's inputs are those of the model whose earlier units are quantized already; what
it should give is what the float model gives on float inputs. Scales stay as plain rounding has them; only whether a
weight goes up or down is learned. BRECQ's weighting by squared gradients is left out: it needs labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from edgeattn.data.files import atomic_file
from edgeattn.quant import placement
from edgeattn.quant.calibration import Calibrator, Progress
from edgeattn.quant.graph import aten, attribute, is_call
from edgeattn.quant.methods import rounding
from edgeattn.quant.methods.gptq import convolution_inputs
from edgeattn.quant.quantizer import activation_parameters
from edgeattn.quant.recipe import Recipe
from edgeattn.quant.scheme import Scheme
from edgeattn.quant.sensitivity import stand_ins
from edgeattn.quant.steps import Reconstruct
from edgeattn.quant.sweep import Sweep, Unit, on_grid, units
from edgeattn.quant.weights import QuantizedWeight

logger = logging.getLogger(__name__)

_SEED = 20200422
# Weight of the regularizer's mean against the output error in units of plain rounding's. With less, many weights are
# still undecided at the end and rounding them costs what was won: a 4-bit fc1 of 512x128 keeps 61 % of the error with
# 0.1 and rate 0.02, 12 % with 1, 3 % with 10, both with rate 0.2 (500 iterations).
_REGULARIZER = 10.0
_UNFOLDED = 2**25  # elements of a convolution's unfolded input that are held at once
_FORMAT = "1"  # of stored units; part of their names


def reconstruct(
    graph: fx.GraphModule, plan: placement.Plan, seen: placement.Statistics, recipe: Recipe, calibrator: Calibrator,
    work: Path | None = None, progress: Progress | None = None,
) -> tuple[placement.Statistics, str]:  # fmt: skip
    """The statistics with every layer's learned weight in `stored`, and what was done.

    Args:
        work: folder that keeps finished units, so that a run that was stopped goes on; None keeps nothing.
        progress: called with ("reconstruct", units done, all) once a unit is stored.
    """
    step = next(step for step in recipe.steps if isinstance(step, Reconstruct))
    start = time.monotonic()
    pictures = calibrator.sample(step.images)
    mixed = pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(_SEED))]
    signedness = recipe.activations.signedness if recipe.activations else ""
    scales = {node: activation_parameters(*found, signedness)[0] for node, found in seen.ranges.items()}
    stored = {
        node: placement.rounded(graph, node, scheme, scales.get(node.args[0]), None, None)  # type: ignore[arg-type]
        for node, scheme in plan.weighted.items()
    }
    stands = {
        stand.node: dataclasses.replace(stand, weight={1: stored[stand.node].values}) if stand.node in stored else stand
        for stand in stand_ins(graph, plan, recipe, seen.ranges)
    }
    sweep, store = Sweep(graph, stands, mixed.split(step.batch_size)), None
    if work is not None:
        store = Path(work) / f"reconstruct-{_digest(graph, recipe, seen, pictures)[:24]}"
    todo, errors, resumed = units(graph, plan, step.unit), [], 0
    for i, unit in enumerate(todo):
        plain = {node: stored[node] for node in unit.layers}
        result = _read(store / f"{i:04d}.npz", plain) if store else None
        if result is None:
            sweep.advance(unit.nodes[0])
            learn = _learn_layer if len(unit.nodes) == 1 else _learn_block
            result = learn(sweep, unit, plain, step, torch.Generator().manual_seed(_SEED + i))
            if store:
                _write(store / f"{i:04d}.npz", result)
        else:
            resumed += len(unit.layers)
        for node, codes in result.codes.items():
            stored[node] = dataclasses.replace(stored[node], codes=codes)
            stands[node] = dataclasses.replace(stands[node], weight={1: stored[node].values})
        errors.append((result.before, result.after))
        if progress:
            progress("reconstruct", i + 1, len(todo))
    before, after = (sum(values) / len(values) for values in zip(*errors, strict=True))
    note = (
        f"reconstructed {len(stored)} layers{f' ({resumed} by an earlier run)' if resumed else ''} in "
        f"{time.monotonic() - start:.1f} s, mean squared error of their outputs {before:.3g} -> {after:.3g}"
    )
    return dataclasses.replace(seen, stored=stored), note


@dataclasses.dataclass(frozen=True)
class _Learned:
    """Codes per layer, and the mean squared error of the unit's output with plain and with learned rounding."""

    codes: dict[fx.Node, Tensor]
    before: float
    after: float


class _Rounding:
    """A weight between rounding down and up: `v` is learned (see methods/rounding.py)."""

    def __init__(self, weight: Tensor, plain: QuantizedWeight) -> None:
        self.weight, self.plain = weight.detach(), plain
        self.scheme = Scheme(plain.bits, True, "channel" if plain.group is None else "group", plain.group)
        self.scale = plain.scale[..., None]
        self.v = rounding.initial_v(self.weight, self.scheme, self.scale).requires_grad_()

    def soft(self) -> tuple[Tensor, Tensor]:
        """The weight, and the share by which each of its elements is rounded up."""
        h = rounding.rectified_sigmoid(self.v)
        return rounding.soft_weight(self.weight, h, self.scheme, self.scale), h

    @torch.no_grad()
    def codes(self) -> Tensor:
        """As learned, int8."""
        hard = rounding.hard_weight(self.weight, self.v, self.scheme, self.scale)
        return self.scheme.encode(hard, self.scale, torch.zeros_like(self.scale)).to(torch.int8)


def _descend(parts: Sequence[_Rounding], step: Reconstruct, error: Callable[[list[Tensor]], Tensor]) -> None:
    """Adam on the parts' v: error of the soft weights, in units of plain rounding's, plus the regularizer's mean."""
    optimizer = torch.optim.Adam([part.v for part in parts], lr=step.learning_rate)
    elements = sum(part.v.numel() for part in parts)
    for i in range(step.iterations):
        optimizer.zero_grad()
        soft = [part.soft() for part in parts]
        loss, beta = error([weight for weight, _ in soft]), rounding.beta_at(i, step.iterations)
        if beta is not None:
            penalty = torch.stack([rounding.regularizer(h, beta) for _, h in soft]).sum()
            loss = loss + _REGULARIZER / elements * penalty
        loss.backward()
        optimizer.step()


def _learn_layer(
    sweep: Sweep, unit: Unit, plain: Mapping[fx.Node, QuantizedWeight], step: Reconstruct, _: torch.Generator
) -> _Learned:
    """One layer: its error is a quadratic form of the weight's change, the same for every picture once summed up."""
    (node,) = unit.layers
    weight = _weight(sweep, node)
    gram, cross, constant, elements = _moments(sweep, node, weight)
    flat = weight.detach().flatten(1).unflatten(0, (len(gram), -1))

    part = _Rounding(weight, plain[node])

    def error(values: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
        """Per output channel, of all positions together; without the part that no rounding changes."""
        change = (values.reshape(flat.shape) - flat).to(gram)
        return ((change @ gram - 2 * cross) * change).sum(-1)

    noise = error(plain[node].values, gram, torch.zeros_like(cross))
    noise = noise.clamp(min=max(float(noise.mean()) * 1e-6, 1e-30)).float()
    single = gram.float(), cross.float()
    _descend([part], step, lambda soft: (error(soft[0], *single) / noise).mean())
    learned = dataclasses.replace(plain[node], codes=part.codes())
    before, after = (error(which.values, gram, cross) for which in (plain[node], learned))
    better = (after < before).flatten().reshape(-1, *[1] * (weight.dim() - 1))
    codes = torch.where(better, learned.codes, plain[node].codes)
    sums = float(before.sum()), float(torch.minimum(before, after).sum())
    return _Learned({node: codes}, *((constant + s) / elements for s in sums))


@torch.no_grad()
def _moments(sweep: Sweep, node: fx.Node, weight: Tensor) -> tuple[Tensor, Tensor, float, int]:
    """(X^T X, E^T X, |E|^2, elements) of a layer's inputs X (groups, positions, inputs) and of E, what the float model
    gives beyond what its weights make of X; in float64."""
    gram = cross = torch.zeros((), dtype=torch.float64)
    constant, elements = 0.0, 0
    stand = sweep.stands[node]
    for plain, quantized in zip(sweep.plain, sweep.quantized, strict=True):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        grid = stand.grids.get(source)
        wanted, given = plain[source], quantized[source] if grid is None else on_grid(quantized[source], grid)
        options = [attribute(sweep.graph, a) if isinstance(a, fx.Node) else a for a in node.args[1:]]
        for a, b in zip(*(_pieces(x, weight) for x in (wanted, given)), strict=True):
            missing = node.target(a, *options) - node.target(b, *options)  # type: ignore[operator]
            x, e = _positions(node, b, weight), _outputs(node, missing)
            gram = gram + (x.mT @ x).double()
            cross = cross + (e.mT @ x).double()
            constant += float(e.double().square().sum())
            elements += e.numel()
    return gram, cross, constant, elements


def _pieces(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, _UNFOLDED // (x[0].numel() * weight[0, 0].numel())))


def _convolution(node: fx.Node) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args[3:], strict=False))
    return {name: value if name == "groups" else (value[0], value[-1]) for name, value in given.items()}  # type: ignore[index]


def _positions(node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    if is_call(node, aten.linear.default):
        return x.reshape(1, -1, x.shape[-1])
    return convolution_inputs(x, (weight.shape[2], weight.shape[3]), **_convolution(node))


def _outputs(node: fx.Node, y: Tensor) -> Tensor:
    if is_call(node, aten.linear.default):
        return y.reshape(1, -1, y.shape[-1])
    groups = _convolution(node).get("groups", 1)
    return y.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)


def _learn_block(
    sweep: Sweep, unit: Unit, plain: Mapping[fx.Node, QuantizedWeight], step: Reconstruct, generator: torch.Generator
) -> _Learned:
    """Several layers at once, on what their block gives; batches in random order."""
    parts = {node: _Rounding(_weight(sweep, node), plain[node]) for node in unit.layers}
    inside = set(unit.nodes)
    outputs = [n for n in unit.nodes if isinstance(n.meta.get("val"), Tensor) and not inside >= set(n.users)]

    def run(batch: int, weights: Mapping[fx.Node, Tensor] | None) -> list[Tensor]:
        """The outputs in floating point on float inputs, or with these weights on those of the quantized model."""
        known = dict((sweep.plain if weights is None else sweep.quantized)[batch])
        stands = {} if weights is None else {n: sweep.stands[n] for n in unit.nodes if n in sweep.stands}
        for node, weight in (weights or {}).items():
            stands[node] = dataclasses.replace(stands[node], weight={1: weight})
        sweep.run(unit.nodes, known, stands)
        return [known[node] for node in outputs]

    def squared(batch: int, weights: Mapping[fx.Node, Tensor]) -> Tensor:
        return torch.stack([(a - b).square().mean() for a, b in zip(run(batch, weights), targets[batch], strict=True)])

    def error(values: Mapping[fx.Node, Tensor]) -> Tensor:
        return torch.stack([squared(i, values) for i in range(len(targets))]).mean(0)

    with torch.no_grad():
        targets = [run(i, None) for i in range(len(sweep.plain))]
        before = error({node: weight.values for node, weight in plain.items()})
        noise = (before - error({node: part.weight for node, part in parts.items()})).clamp(min=1e-3 * before + 1e-30)

    def loss(soft: list[Tensor]) -> Tensor:
        batch = int(torch.randint(len(targets), (), generator=generator))
        return (squared(batch, dict(zip(unit.layers, soft, strict=True))) / noise).mean()

    _descend(list(parts.values()), step, loss)
    codes = {node: part.codes() for node, part in parts.items()}
    with torch.no_grad():
        after = error({node: dataclasses.replace(plain[node], codes=codes[node]).values for node in codes})
    if float((after / noise).sum()) >= float((before / noise).sum()):
        codes, after = {node: weight.codes for node, weight in plain.items()}, before
    return _Learned(codes, float(before.mean()), float(after.mean()))


def _weight(sweep: Sweep, node: fx.Node) -> Tensor:
    weight = attribute(sweep.graph, node.args[1])
    assert weight is not None
    return weight


def _digest(graph: fx.GraphModule, recipe: Recipe, seen: placement.Statistics, pictures: Tensor) -> str:
    """Of all that the result depends on."""
    digest = hashlib.sha256(f"{_FORMAT}{recipe.model_dump_json()}{list(seen.ranges.values())}".encode())
    for name, value in sorted(graph.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    digest.update(pictures.numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, result: _Learned) -> None:
    arrays = {f"codes{i}": codes.numpy() for i, codes in enumerate(result.codes.values())}
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, errors=np.array([result.before, result.after]), **arrays)  # type: ignore[arg-type]


def _read(path: Path, plain: Mapping[fx.Node, QuantizedWeight]) -> _Learned | None:
    """A finished unit, or None if there is none that can be read."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            codes = {node: torch.from_numpy(archive[f"codes{i}"]) for i, node in enumerate(plain)}
            before, after = archive["errors"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read (%s); its layers are learned again", path, error)
        return None
    return _Learned(codes, before, after)
