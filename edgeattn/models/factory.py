"""`create_model`: a name (or module:callable), weights and overrides to a ready model in evaluation mode."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import CheckpointError, UsageError
from edgeattn.models import checkpoint, registry

logger = logging.getLogger(__name__)


def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    img_size: int | Sequence[int] | None = None,
    **config: Any,
) -> torch.nn.Module:
    """Build a model of the zoo, or call `module:callable`, and load a checkpoint strictly.

    The result is in evaluation mode and carries `name`, `config`, `preprocessing`, `class_names` (or None) and `notes`:
    one line for everything that was decided for the caller. Without `weights` the parameters are random.

    Args:
        name: a name from `list_models()`, or `package.module:callable`.
        weights: path of a `.pth` or `.safetensors` file, official or timm names; or a hub id (`hf-hub:`, `timm:`).
        num_classes: None takes the checkpoint's; another number re-initialises the head, which is noted.
        img_size: input side or (height, width) in pixels; None takes the checkpoint's, else the model's default.
        config: overrides of the architecture's own arguments.

    Raises:
        UsageError: unknown name, key or size. CheckpointError: the file does not fit. NumericError: NaN in weights.
    """
    state, metadata = checkpoint.read_checkpoint(weights) if weights is not None else ({}, {})
    if metadata and metadata.get("model") not in (None, name):
        raise CheckpointError(f"{weights} was written for {metadata['model']!r}, not {name!r}; name that model.")
    chosen: dict[str, Any] = {**metadata.get("config", {}), **config}
    if img_size is not None:
        chosen["img_size"] = img_size
    stored_classes = _head_classes(state)
    if num_classes is not None or stored_classes is not None:
        chosen["num_classes"] = num_classes if num_classes is not None else stored_classes
    model = _call(name, chosen)
    notes: list[str] = []
    if state:
        if stored_classes not in (None, chosen.get("num_classes")):
            notes.append(_keep_new_head(model, state, stored_classes))
        notes += checkpoint.load_state(model, state, str(weights))
    _attach(model, name, chosen, metadata, img_size)
    model.notes = notes  # type: ignore[assignment]
    return model.eval()


def _call(name: str, chosen: dict[str, Any]) -> torch.nn.Module:
    if ":" not in name:
        return registry.build(name, **chosen)
    module_name, _, attribute = name.partition(":")
    try:
        builder = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"model {name!r}: {error}. Expected 'package.module:callable' that can be imported."
        ) from error
    model = builder(**chosen)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"model {name!r} returned a {type(model).__name__}; expected a torch.nn.Module.")
    return model


def _head_classes(state: dict[str, torch.Tensor]) -> int | None:
    for key in ("head.l.weight", "head.linear.weight", "head.weight"):
        if key in state:
            return int(state[key].shape[0])
    return None


def _keep_new_head(model: torch.nn.Module, state: dict[str, torch.Tensor], stored: int | None) -> str:
    """Overwrite the checkpoint's classifier layers in `state` by the model's fresh ones."""
    own = model.state_dict()
    convert = getattr(model, "from_timm_key", lambda key: key)
    for key in list(state):
        official = convert(key)
        in_head = official in own and official.split(".")[0] in getattr(model, "heads", ("head",))
        if in_head and own[official].shape != state[key].shape:
            state[key] = own[official]
    note = (
        f"classifier re-initialised: the checkpoint has {stored} classes, the model {model.num_classes}; "
        "train it before use"
    )
    logger.warning(note)
    return note


def _attach(
    model: Any, name: str, chosen: dict[str, Any], metadata: dict[str, Any], img_size: int | Sequence[int] | None
) -> None:
    model.name, model.config = name, chosen
    names = metadata.get("class_names")
    model.class_names = tuple(names) if names and len(names) == getattr(model, "num_classes", len(names)) else None
    stored = metadata.get("preprocessing")
    if stored:
        preprocessing = Preprocessing.from_dict(stored)
        if img_size is not None:
            preprocessing = Preprocessing.from_dict({**stored, "size": list(model.preprocessing.size)})
        model.preprocessing = preprocessing
