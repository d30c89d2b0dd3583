"""Labels of pictures as indices of a model's outputs, for losses and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeattn.data.source import ImageSource, Sample
from edgeattn.errors import DataError


def label_tensor(
    source: ImageSource, samples: Sequence[Sample], names: Sequence[str] | None, classes: int
) -> Tensor | None:
    """Indices (N,) of the outputs, by name where the model and the pictures have names; None without labels.

    Raises:
        DataError: a label that is no class of the model; the picture is named.
    """
    if not source.labelled:
        return None
    theirs = source.class_names if names and source.class_names else range(classes)
    index = {label: i for i, label in enumerate(names if names and source.class_names else range(classes))}
    found = []
    for sample in samples:
        label = sample.label
        if label is None or not 0 <= label < len(theirs) or theirs[label] not in index:
            what = label if label is None or label >= len(theirs) else repr(theirs[label])
            raise DataError(
                f"{sample.name} has label {what}, which is none of the model's {classes} classes. The labels belong to "
                "another model, or count from 1: correct them in the data."
            )
        found.append(index[theirs[label]])
    return torch.tensor(found)
