"""Loading a model that quantization-aware training saved."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import CheckpointError
from edgeattn.models import sources
from edgeattn.models.checkpoint import load_state, read_checkpoint, read_metadata
from edgeattn.models.deit import DeiT
from edgeattn.models.factory import carries_weights, create_model
from edgeattn.models.sizes import as_pair
from edgeattn.quant.qat.convert import prepare
from edgeattn.quant.qat.settings import QatSettings

_KEY = "quantization"  # of the metadata, see `QatSession.metadata`


def load_model(
    name: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    img_size: int | Sequence[int] | None = None,
    progress: sources.Progress | None = None,
) -> nn.Module:
    """`create_model`, or `load_trained` where the weights are a file of `edgeattn train --qat`.

    Raises:
        CheckpointError: see both; or such a file of another model, classes or size than asked for.
    """
    if weights is not None and not carries_weights(name):
        path = sources.locate(weights, os.fspath(name), progress=progress)
        if path.is_file() and _KEY in read_metadata(path):
            model = load_trained(path)
            _check(model, str(path), os.fspath(name), num_classes, img_size)
            return model
    return create_model(name, weights=weights, num_classes=num_classes, img_size=img_size, progress=progress)


def _check(model: DeiT, where: str, name: str, num_classes: int | None, img_size: int | Sequence[int] | None) -> None:
    """Refuse what a trained model cannot be changed to."""
    if model.name != name:
        raise CheckpointError(f"{where} was written for {model.name!r}, not {name!r}; name that model.")
    size, trained = model.preprocessing.size, "was trained with its quantizers"
    if num_classes not in (None, model.num_classes):
        raise CheckpointError(
            f"{where} {trained} for {model.num_classes} classes, not {num_classes}. Leave the number out, or train a "
            "float model with that many classes and start quantization-aware training from it."
        )
    if img_size is not None and tuple(as_pair(img_size)) != tuple(size):
        raise CheckpointError(
            f"{where} {trained} on pictures of {size[0]}x{size[1]}, not {'x'.join(map(str, as_pair(img_size)))}: its "
            "scales belong to the places of that size. Leave the size out, or train again at the other."
        )


def load_trained(path: str | os.PathLike[str]) -> DeiT:
    """The model with its quantizers, in evaluation mode, as `edgeattn train --qat` evaluated it.

    It carries what `create_model` attaches, and `quantization`: its settings. `quantize` and `export` take it without
    a recipe; `convert.freeze` makes it a plain float network.

    Raises:
        CheckpointError: not a file of `edgeattn train --qat`, or one whose tensors do not fit what it says.
    """
    state, metadata = read_checkpoint(path)
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by `edgeattn train --qat`: it has no settings of quantizers in its metadata. "
            "Load a float model with create_model."
        )
    name = metadata["model"]
    model = prepare(create_model(name, **metadata["config"]), QatSettings.from_dict(metadata[_KEY]))
    notes = load_state(model, state, os.fspath(path), name)
    model.notes = [*getattr(model, "notes", []), *notes]  # type: ignore[assignment]
    model.class_names = tuple(metadata["class_names"])  # type: ignore[assignment]
    model.preprocessing = Preprocessing.from_dict(metadata["preprocessing"])
    return model.eval()
