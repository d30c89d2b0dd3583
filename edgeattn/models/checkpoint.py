"""Reading checkpoints: official `.pth`, timm names, safetensors. Strict, and never running code from a file."""

from __future__ import annotations

import json
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from edgeattn.errors import CheckpointError, MissingDependency, NumericError

logger = logging.getLogger(__name__)

_WRAPPERS = ("model", "state_dict_ema", "state_dict", "model_ema")
METADATA_KEY = "edgeattn"
_HUB_PREFIXES = ("hf-hub:", "timm:")


def _from_hub(spec: str) -> Path:
    """A file of a hub repository: `hf-hub:OWNER/NAME` (model.safetensors) or `hf-hub:OWNER/NAME/FILE`; `timm:NAME`.

    Raises:
        MissingDependency: huggingface_hub is not installed. CheckpointError: it cannot be fetched; the reason is kept.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependency(f"weights {spec!r} need huggingface_hub: pip install 'edgeattn[hub]'.") from error
    kind, _, rest = spec.partition(":")
    parts = (f"timm/{rest}" if kind == "timm" else rest).split("/")
    if len(parts) < 2:
        raise CheckpointError(f"weights {spec!r}: expected hf-hub:OWNER/NAME, hf-hub:OWNER/NAME/FILE or timm:NAME.")
    repository, name = "/".join(parts[:2]), "/".join(parts[2:]) or "model.safetensors"
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:  # network, authorisation, no such repository or file: many classes, one meaning here
        raise CheckpointError(
            f"cannot fetch {name} of {repository} from the hub: {error}. Download it elsewhere and pass its path."
        ) from error


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a file and the metadata that edgeattn wrote into it (empty for foreign files).

    `hf-hub:` and `timm:` ids are fetched first. `.safetensors` is read as such, everything else with torch's
    weights-only unpickler. A top-level `model`, `state_dict` or `state_dict_ema` entry is unwrapped and a `module.`
    prefix removed.

    Raises:
        CheckpointError: missing, truncated, corrupt, or a pickle that asks to run code.
    """
    path = _from_hub(str(path)) if str(path).startswith(_HUB_PREFIXES) else Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is not a file; expected .pth, .pt or .safetensors.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _unwrap(_read_pickle(path), path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
            metadata = (handle.metadata() or {}).get(METADATA_KEY)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors: {error}. Is it complete? Copy it again.") from error
    return state, json.loads(metadata) if metadata else {}


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if (
            "GLOBAL" in text
            or "Unsupported" in text
            or ("weights_only" in text.lower() and "Unsupported operand" in text)
        ):
            wanted = next((line.strip() for line in text.splitlines() if "GLOBAL" in line), text.splitlines()[0])
            raise CheckpointError(
                f"{path} is a pickle that wants to run code when loaded, which edgeattn refuses ({wanted}). "
                "Load it where you trust it and save the plain state dict: "
                "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
            ) from error
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {text.splitlines()[0]}. Is it complete?"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({path.stat().st_size} bytes): {reason}. "
            "It is truncated or corrupt, or not a torch file; copy or download it again."
        ) from error


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a state dict (names to tensors).")
    state = {str(key).removeprefix("module."): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(
            f"{path} holds no tensors (keys: {', '.join(map(str, list(loaded)[:5])) or 'none'}); expected a state dict."
        )
    return state


def load_state(model: torch.nn.Module, state: dict[str, Tensor], where: str) -> list[str]:
    """Load `state` strictly after converting timm names and fitting bias tables; returns one line per thing changed.

    Raises:
        CheckpointError: keys are missing, unexpected or mis-shaped; all are named.
        NumericError: a weight holds NaN or infinity; its key is named.
    """
    convert = getattr(model, "from_timm_key", lambda key: key)
    state = {convert(key): value for key, value in state.items()}
    own, notes = model.state_dict(), []
    for key in sorted(getattr(model, "derived_keys", set)()):
        state.setdefault(key, own[key])
    for key, value in list(state.items()):
        if key in own and value.shape != own[key].shape:
            fitted = _fit_shape(key, value, own[key])
            if fitted is not None:
                state[key], note = fitted
                notes.append(note)
    _check_keys(state, own, where)
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise NumericError(
                f"{where}: weight {key} holds {bad} NaN or infinite value(s) of {value.numel()}. "
                "The training that made it diverged, or the file is damaged; use another checkpoint."
            )
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()}, strict=True)
    for note in notes:
        logger.warning(note)
    return notes


def _fit_shape(key: str, value: Tensor, own: Tensor) -> tuple[Tensor, str] | None:
    """A tensor that fits `own`, where the architecture defines how: 2-D matrices of 1x1 convolutions, bias tables."""
    if own.dim() == 4 and value.dim() == 2 and own.shape == (*value.shape, 1, 1):
        return value[:, :, None, None], f"{key}: 2-D matrix used as a 1x1 convolution"
    if key.endswith("attention_bias_idxs"):
        return own.clone(), f"{key}: rebuilt for the new window"
    old_side, new_side = round(value.shape[-1] ** 0.5), round(own.shape[-1] ** 0.5)
    if not key.endswith("attention_biases") or value.dim() != 2 or value.shape[0] != own.shape[0]:
        return None
    if old_side**2 != value.shape[-1] or new_side**2 != own.shape[-1]:
        return None
    table = value.float().reshape(1, -1, old_side, old_side)
    table = torch.nn.functional.interpolate(table, (new_side, new_side), mode="bicubic", align_corners=False)
    return (
        table.reshape(own.shape),
        f"{key}: bias table resized from {old_side}x{old_side} to {new_side}x{new_side} (bicubic) for this img_size",
    )


def _check_keys(state: dict[str, Tensor], own: dict[str, Tensor], where: str) -> None:
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(found)} {what}: {'; '.join(found[:8])}{' ...' if len(found) > 8 else ''}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{where} does not fit the model. " + ". ".join(problems) + ". "
            "Check that the model name, num_classes and img_size are those the checkpoint was trained with."
        )
