"""What the trainer reads: all pictures at once as uint8, and their random flips."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import open_source
from edgeattn.errors import DataError


@dataclasses.dataclass
class Pixels:
    """Labelled pictures in memory."""

    images: Tensor  # (N, 3, H, W) uint8, already resized and cropped
    labels: Tensor  # (N,) int64
    class_names: tuple[str, ...]


def load_pixels(data: Any, preprocessing: Preprocessing, subset: int = 0) -> Pixels:
    """Pictures of a labelled source, resized and cropped; `subset` of them spread over it, 0 is all.

    Raises:
        DataError: the source has no labels.
    """
    source = open_source(data)
    if not source.labelled:
        raise DataError(
            f"{source.where} has no labels; training needs a folder with one sub-folder per class, "
            "or an NPZ with 'labels'."
        )
    source = source.spread(subset) if subset else source
    images = np.empty((len(source), *preprocessing.size, 3), np.uint8)
    labels = np.empty(len(source), np.int64)
    for i, sample in enumerate(source):
        images[i], labels[i] = np.asarray(preprocessing.resize_and_crop(sample.image)), sample.label or 0
    names = source.class_names or tuple(str(i) for i in range(int(labels.max()) + 1))
    return Pixels(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), names)


def augment(images: Tensor, generator: torch.Generator, transpose: bool) -> Tensor:
    """(B, 3, H, W) with every picture flipped both ways and, square ones, transposed at random."""
    for dims in ([3], [2]):
        chosen = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(dims), images)
    if transpose and images.shape[2] == images.shape[3]:
        chosen = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(chosen[:, None, None, None], images.transpose(2, 3), images)
    return images
