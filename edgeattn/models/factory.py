"""`create_model`: a name or file, weights and overrides to a ready model in evaluation mode."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import CheckpointError, UsageError
from edgeattn.models import checkpoint, registry, sources, timm_model
from edgeattn.models.filling import unfilled
from edgeattn.models.identify import advice

logger = logging.getLogger(__name__)


def carries_weights(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is the path of an ONNX file, which has its weights in it."""
    return os.fspath(name).lower().endswith(".onnx")


def create_model(
    name: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    img_size: int | Sequence[int] | None = None,
    progress: sources.Progress | None = None,
    **config: Any,
) -> torch.nn.Module:
    """Build a model of the zoo, of timm or by calling `module:callable`, and load a checkpoint strictly; or read ONNX.

    The result is in evaluation mode and carries `name`, `config`, `preprocessing`, `class_names` (or None) and `notes`:
    one line for everything that was decided for the caller. Without `weights` the parameters are random.

    Args:
        name: a name from `list_models()`; `timm:NAME`; `package.module:callable`; or the path of an `.onnx` file, which
            has its weights and classes in it (see `from_onnx.file.load_onnx`).
        weights: path of a `.pth` or `.safetensors` file, official or timm names; or what `sources.locate` fetches: an
            address with its digest, a hub id (`hf-hub:`, `timm:`), `official`.
        num_classes: None takes the checkpoint's; another number re-initialises the head, which is noted.
        img_size: input side or (height, width) in pixels; None takes the checkpoint's, else the model's default.
        progress: called with ("download", bytes so far, bytes in all) if the weights have to be fetched.
        config: overrides of the architecture's own arguments.

    Raises:
        UsageError: unknown name, key or size. CheckpointError: the file does not fit. NumericError: NaN in weights.
    """
    name = os.fspath(name)
    if carries_weights(name):
        # Here, because reading such a file needs onnx and onnxruntime.
        from edgeattn.models.from_onnx.file import load_onnx

        return load_onnx(name, img_size=img_size, weights=weights, num_classes=num_classes, **config)
    state: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    where = str(weights)
    if weights is not None:
        path = sources.locate(weights, name, progress=progress)
        state, metadata = checkpoint.read_checkpoint(path)
        where = str(path) if weights == sources.OFFICIAL else where
    if "quantization" in metadata:
        raise CheckpointError(
            f"{where} holds a network with trained quantizers (`edgeattn train --qat`), which create_model does not "
            "make; load it with edgeattn.quant.qat.stored.load_trained. `edgeattn export` takes the file as it is."
        )
    if metadata and metadata.get("model") not in (None, name):
        raise CheckpointError(f"{where} was written for {metadata['model']!r}, not {name!r}; name that model.")
    chosen: dict[str, Any] = {**metadata.get("config", {}), **config}
    if img_size is not None:
        chosen["img_size"] = img_size
    stored_classes = timm_model.stored_classes(name, state) if _is_timm(name) else _head_classes(state)
    if num_classes is not None or stored_classes is not None:
        chosen["num_classes"] = num_classes if num_classes is not None else stored_classes
    is_new_head = stored_classes not in (None, chosen.get("num_classes"))
    try:
        # Weights that the checkpoint replaces anyway need no random values; those of a new head do.
        with unfilled() if state and ":" not in name and not is_new_head else contextlib.nullcontext():
            model = _call(name, chosen)
    except UsageError as error:
        if num_classes is None and "'num_classes'" in str(error):
            raise _not_a_classifier(name, state, where) from error
        raise
    notes: list[str] = list(getattr(model, "notes", ()))
    if state:
        if is_new_head:
            notes.append(_keep_new_head(model, state, stored_classes))
        notes += checkpoint.load_state(model, state, where, None if ":" in name else name)
    _attach(model, name, chosen, metadata, img_size)
    model.notes = notes  # type: ignore[assignment]
    return model.eval()


def _is_timm(name: str) -> bool:
    return name.startswith(timm_model.PREFIX)


def _call(name: str, chosen: dict[str, Any]) -> torch.nn.Module:
    if ":" not in name:
        return registry.build(name, **chosen)
    if _is_timm(name):
        return timm_model.build(name, **chosen)
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


def _not_a_classifier(name: str, state: dict[str, torch.Tensor], where: str) -> CheckpointError:
    shapes = {key: value.shape for key, value in state.items()}
    return CheckpointError(f"{where} holds a classifier, which {name!r} is not. {advice(shapes, name)}")


def _head_classes(state: dict[str, torch.Tensor]) -> int | None:
    for key in ("head.l.weight", "head.linear.weight", "head.fc.weight", "head.weight"):
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
