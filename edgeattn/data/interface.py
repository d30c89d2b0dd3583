"""What goes into an exported model and what comes out: names, shapes with their free axes, types."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeattn.errors import UsageError

IMAGE, LOGITS = "image", "logits"  # tensor names of every exported classifier
BATCH = "batch"  # name of the axis that is free in every exported model
EVEN_BATCH = "even_batch"  # the same for guided calls: labelled samples, then as many unlabelled
RELATIVE_TOLERANCE = 1e-4  # of an output's spread: what float32 runtimes may differ by through rounding


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input.

    Attributes:
        shape: sizes; a name is a free axis, equal names are equal sizes.
        dtype: numpy's name.
        high: values lie in [0, high), integers and floats; 0 means floats of any sign.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    high: float = 0

    def sized(self, free: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every free axis replaced by its size."""
        return tuple(free[side] if isinstance(side, str) else side for side in self.shape)

    def example(self, free: Mapping[str, int], generator: np.random.Generator) -> np.ndarray:
        """Synthetic values: uniform in range, or standard normal. Never for calibration."""
        shape = self.sized(free)
        if np.dtype(self.dtype).kind == "i":
            return generator.integers(0, int(self.high), shape, self.dtype)
        if self.high:
            return (generator.random(shape, np.float32) * np.float32(self.high)).astype(self.dtype)
        return generator.standard_normal(shape, np.float32).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Interface:
    """Inputs in the order of `forward`, and names of the outputs in order.

    Attributes:
        tolerance: outputs that float32 rounding moves further than `RELATIVE_TOLERANCE` of their spread, and how far.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def free_axes(self) -> tuple[str, ...]:
        """Names of the free axes, in order of appearance."""
        return tuple(dict.fromkeys(side for spec in self.inputs for side in spec.shape if isinstance(side, str)))

    @property
    def is_classifier(self) -> bool:
        """One picture in, logits out: what calibration on pictures and the accuracy gate are for."""
        return [spec.name for spec in self.inputs] == [IMAGE] and self.outputs == (LOGITS,)

    def examples(self, free: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
        """Synthetic inputs by name; `free` gives the size of every free axis."""
        generator = np.random.default_rng(seed)
        return {spec.name: spec.example(free, generator) for spec in self.inputs}


def classifier_interface(size: tuple[int | str, int | str]) -> Interface:
    """`image` (batch, 3, H, W) to `logits`."""
    return Interface((TensorSpec(IMAGE, (BATCH, 3, *size)),), (LOGITS,))


def interface_of(model: Any) -> Interface:
    """The model's own `interface`, or a classifier's of its preprocessing's size.

    Raises:
        UsageError: the model has neither.
    """
    own = getattr(model, "interface", None)
    if isinstance(own, Interface):
        return own
    preprocessing = getattr(model, "preprocessing", None)
    if preprocessing is None:
        raise UsageError(
            f"{type(model).__name__} has no `preprocessing`; set model.preprocessing = edgeattn.data.preprocessing."
            "Preprocessing(size=(H, W), ...) so that pictures can be prepared the way it was trained, or "
            "model.interface = edgeattn.data.interface.Interface(...) if it is not a classifier."
        )
    return classifier_interface(preprocessing.size)
