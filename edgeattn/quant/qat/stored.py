"""Loading a model that quantization-aware training saved."""

from __future__ import annotations

import os

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import CheckpointError
from edgeattn.models.checkpoint import load_state, read_checkpoint
from edgeattn.models.deit import DeiT
from edgeattn.models.factory import create_model
from edgeattn.quant.qat.convert import prepare
from edgeattn.quant.qat.settings import QatSettings


def load_trained(path: str | os.PathLike[str]) -> DeiT:
    """The model with its quantizers, in evaluation mode, as `edgeattn train --qat` evaluated it.

    It carries what `create_model` attaches, and `quantization`: its settings. `convert.freeze` makes it exportable.

    Raises:
        CheckpointError: not a file of `edgeattn train --qat`, or one whose tensors do not fit what it says.
    """
    state, metadata = read_checkpoint(path)
    if "quantization" not in metadata:
        raise CheckpointError(
            f"{path} was not written by `edgeattn train --qat`: it has no settings of quantizers in its metadata. "
            "Load a float model with create_model."
        )
    name = metadata["model"]
    model = prepare(create_model(name, **metadata["config"]), QatSettings.from_dict(metadata["quantization"]))
    notes = load_state(model, state, os.fspath(path), name)
    model.notes = [*getattr(model, "notes", []), *notes]  # type: ignore[assignment]
    model.class_names = tuple(metadata["class_names"])  # type: ignore[assignment]
    model.preprocessing = Preprocessing.from_dict(metadata["preprocessing"])
    return model.eval()
