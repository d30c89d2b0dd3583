"""Calibration: real pictures through a graph once, with observers on the tensors that matter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import ImageSource
from edgeattn.errors import DataError
from edgeattn.quant.recipe import Recipe

Progress = Callable[[str, int, int], None]
Watch = Mapping[fx.Node, list[Callable[[Tensor], None]]]


class Calibrator:
    """Runs graphs over the same pictures.

    Attributes:
        source: the pictures, as many as the recipe wants, spread over all.
        digest: SHA-256 of the pixels after resizing, once a run has seen them.
    """

    def __init__(
        self, source: ImageSource, recipe: Recipe, preprocessing: Preprocessing, progress: Progress | None = None
    ) -> None:
        self.source = source.spread(recipe.calibration.images)
        self.digest = ""
        self.images = 0
        self._batch_size, self._preprocessing, self._progress = (
            recipe.calibration.batch_size,
            preprocessing,
            progress,
        )

    def run(self, graph: fx.GraphModule, watch: Watch, stage: str = "ranges") -> None:
        """Run all pictures through a graph; every watcher sees its node's output of each batch.

        Raises:
            DataError: every picture is of one colour; ranges from them would fit no real picture.
        """
        runner, digest, self.images = _Observing(graph, watch), hashlib.sha256(), 0
        for batch in self._batches(digest):
            runner.run(batch)
            self.images += len(batch)
            if self._progress:
                self._progress(stage, self.images, len(self.source))
        self.digest = digest.hexdigest()

    def sample(self, count: int) -> Tensor:
        """`count` of the pictures (all, where there are fewer), spread over them, as one batch (N, 3, H, W)."""
        return torch.from_numpy(np.stack([self._preprocessing(s.image) for s in self.source.spread(count)]))

    def facts(self, recipe: Recipe) -> dict[str, Any]:
        """What the manifest says about the calibration."""
        settings = recipe.activations.observer.model_dump() if recipe.activations else {"method": "none"}
        return {
            "source": self.source.where, "images": self.images, "skipped": list(self.source.skipped),
            "sha256": self.digest, "observer": settings,
        }  # fmt: skip

    def _batches(self, digest: Any) -> Iterator[Tensor]:
        pictures: list[np.ndarray] = []
        count, shows_something = 0, False
        for sample in self.source:
            pixels = np.asarray(self._preprocessing.resize_and_crop(sample.image))
            count, shows_something = count + 1, shows_something or not is_constant(pixels)
            digest.update(pixels.tobytes())
            pictures.append(self._preprocessing.normalize(pixels))
            if len(pictures) == self._batch_size:
                yield torch.from_numpy(np.stack(pictures))
                pictures = []
        if not shows_something:
            raise DataError(
                f"{self.source.where}: each of the {count} calibration picture(s) is of one colour (all its pixels are "
                "equal), so the ranges would fit no real picture. Give pictures like those the model will see."
            )
        if pictures:
            yield torch.from_numpy(np.stack(pictures))


def is_constant(pixels: np.ndarray) -> bool:
    """Whether all pixels of an (H, W, 3) picture are equal."""
    return bool((pixels == pixels[:1, :1]).all())


class _Observing(fx.Interpreter):
    """Runs a graph and shows chosen nodes' outputs to observers; values are freed as soon as they are not needed."""

    def __init__(self, graph: fx.GraphModule, watch: Watch) -> None:
        super().__init__(graph)
        self._watch = watch

    @torch.no_grad()
    def run(self, *args: Any) -> Any:  # type: ignore[override]
        return super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for see in self._watch.get(n, ()):
            see(value)
        return value
