"""More bits for what costs most of the accuracy, found by giving layers back one at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.quant.graph import module_path
from edgeattn.quant.placement import Plan, after_activation
from edgeattn.quant.recipe import Recipe, Rule
from edgeattn.quant.sensitivity import StandIn, noise_alone, stand_ins
from edgeattn.quant.steps import Revert
from edgeattn.quant.weights import INT8

_CANDIDATES = 8  # layers with the most noise of their own that each round tries
_ADDS = "residual additions"  # reverted together


class Reverting:
    """The search on one graph: `needed` says whether it has to run at all, `run` does it."""

    def __init__(
        self,
        graph: fx.GraphModule,
        plan: Plan,
        recipe: Recipe,
        ranges: Mapping[fx.Node, tuple[float, float]],
        pictures: Tensor,
    ) -> None:
        self.graph, self.plan, self.recipe, self.pictures = graph, plan, recipe, pictures
        self.step = next(step for step in recipe.steps if isinstance(step, Revert))
        self.layers: dict[str, list[StandIn]] = defaultdict(list)
        for stand_in in stand_ins(graph, plan, recipe, ranges):
            self.layers[_ADDS if stand_in.kind == "add" else module_path(stand_in.node)].append(stand_in)
        self.plain = self._logits({})
        self.goal = float(self.plain.norm(dim=1).sum()) / 10 ** (self.step.goal_db / 20)
        self.noise = self._noise(self.layers)

    @property
    def needed(self) -> bool:
        """Whether the noise is above the goal."""
        return self.noise > self.goal

    def run(self) -> tuple[Recipe, str]:
        """The recipe with what was reverted and without the step, so that it is stored and repeated; what was done."""
        layers, before, rules, residual = dict(self.layers), self.noise, [], self.recipe.residual
        own = self._own_noise() if self.needed else {}
        four_bits = {module_path(node) for node, scheme in self.plan.weighted.items() if scheme.bits == 4}
        for _ in range(int(self.step.most * len(layers))):
            candidates = sorted(layers, key=lambda path: -own[path])[:_CANDIDATES] if self.needed else []
            candidates += [_ADDS] if candidates and _ADDS in layers and _ADDS not in candidates else []
            left = {path: self._noise({k: v for k, v in layers.items() if k != path}) for path in candidates}
            best = min(left, key=lambda path: left[path], default=None)
            if best is None or self.noise - left[best] < self.step.least * self.noise:
                break
            if best == _ADDS:
                residual = "float"
            else:
                reason = f"without it the logits have {1 - left[best] / self.noise:.0%} less quantization noise"
                changed: dict[str, Any] = {"weights": INT8} if best in four_bits else {"precision": "float"}
                rules.append(Rule(modules=best, reason=reason, **changed))
            self.noise = left[best]
            del layers[best]
        steps = tuple(other for other in self.recipe.steps if other is not self.step)
        changes = {"rules": (*rules, *self.recipe.rules), "steps": steps, "residual": residual}
        return self.recipe.model_copy(update=changes), self._described(before, len(rules), residual)

    def _described(self, before: float, rules: int, residual: str) -> str:
        added = " and the residual additions" if residual != self.recipe.residual else ""
        return (
            f"reverted {rules} layers{added}: logits {self._decibels(before):.1f} dB above their quantization noise, "
            f"then {self._decibels(self.noise):.1f} dB, simulated on {len(self.pictures)} calibration pictures "
            f"(goal {self.step.goal_db:g} dB)"
        )

    def _decibels(self, noise: float) -> float:
        return self.step.goal_db + 20 * math.log10(self.goal / noise) if noise else math.inf

    def _own_noise(self) -> dict[str, float]:
        alone = noise_alone(self.graph, [one for group in self.layers.values() for one in group], self.pictures)
        return {path: sum(alone[one.node] for one in group) for path, group in self.layers.items()}

    def _noise(self, layers: Mapping[str, list[StandIn]]) -> float:
        """Sum of the errors' norms; of their squares a few odd pictures would make most."""
        return float((self._logits(layers) - self.plain).norm(dim=1).sum())

    @torch.no_grad()
    def _logits(self, layers: Mapping[str, list[StandIn]]) -> Tensor:
        """Logits (N, classes) with these layers quantized together."""
        stands = {one.node: one for group in layers.values() for one in group}

        class Quantized(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n in stands:
                    return stands[n].output(self.env)
                source = n.args[0] if n.args else None
                behind = isinstance(source, fx.Node) and source in stands and after_activation(source) is n
                value = super().run_node(n)
                return stands[source].on_grid(n, value) if behind else value  # type: ignore[index]

        result = Quantized(self.graph).run(self.pictures)
        return result[0] if isinstance(result, (tuple, list)) else result
