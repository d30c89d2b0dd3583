"""What `export` asks of a search for the best placement; `edgeattn.devices.placing` is the one that measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import nn

from edgeattn.data.source import ImageSource
from edgeattn.export.target import Artifact
from edgeattn.quant.recipe import Recipe
from edgeattn.runtime.bundle import PlacementEntry


@dataclasses.dataclass(frozen=True)
class Placed:
    """A target's own recipe, what it leaves in floating point that the one asked for quantizes, and why."""

    recipe: Recipe
    left_float: tuple[str, ...]
    reason: str


class Placer(Protocol):
    """Chooses by measurement what a target quantizes."""

    def place(self, model: nn.Module, recipe: Recipe, source: ImageSource, targets: Sequence[str]) -> dict[str, Placed]:
        """The parts of a recipe that pay on each target."""
        ...

    def judge(
        self, plain: Artifact, quantized: Artifact, inputs: Mapping[str, np.ndarray], placed: Placed, margin: float
    ) -> PlacementEntry:
        """Which of a target's two finished artefacts to ship: the quantized one if it is `margin` times as fast."""
        ...
