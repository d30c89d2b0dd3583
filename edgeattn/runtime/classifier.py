"""`load`: a bundle as something an application calls with a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeattn.data.interface import IMAGE, LOGITS
from edgeattn.data.source import open_source
from edgeattn.runtime.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class Classification:
    """Result for one picture; `label` is the class name, or the index as text when the bundle has no names."""

    index: int
    label: str
    probability: float
    logits: np.ndarray


class Classifier:
    """A session with the bundle's own preprocessing in front and softmax behind."""

    def __init__(self, bundle: Bundle, target: str, variant: str, **settings: Any) -> None:
        self.bundle = bundle
        self.session = bundle.open_session(target, variant, **settings)
        self._preprocess = bundle.preprocessing

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Classification:
        """Classify a picture: a path, a Pillow image, or an (H, W, 3) uint8 array.

        Raises:
            DataError: the picture cannot be read.
        """
        picture = Image.open(image) if isinstance(image, (str, Path)) else image
        sample = next(iter(open_source([picture])))
        logits = self.session.run({IMAGE: self._preprocess(sample.image)[None]})[LOGITS][0]
        weights = np.exp(logits - logits.max())
        index = int(np.argmax(logits))
        names = self.bundle.manifest.class_names
        return Classification(
            index, names[index] if names else str(index), float(weights[index] / weights.sum()), logits
        )


def load(path: str | Path, *, target: str | None = None, variant: str | None = None, **settings: Any) -> Classifier:
    """Open a bundle for use in an application; every file is checked against the manifest first.

    Args:
        target: None takes the first target that the bundle was exported for.
        variant: "quantized" or "float32"; None takes the quantized one where there is one.
        settings: overrides for this session, for example threads=1.

    Raises:
        BundleError: a file does not match its digest. MissingDependency: the target's runtime is not installed.
    """
    bundle = Bundle.open(path)
    bundle.require_classifier("edgeattn.load", "open an artefact with Bundle.open(...).open_session(...)")
    target = target or bundle.targets[0]
    variants = [entry.variant for entry in bundle.manifest.artifacts if entry.target == target]
    return Classifier(bundle, target, variant or (variants[-1] if variants else "quantized"), **settings)
