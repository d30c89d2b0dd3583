"""Reading checkpoints: official `.pth`, timm names, safetensors. Strict, and never running code from a file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from edgeattn.errors import CheckpointError, NumericError
from edgeattn.models.fitting import fit_shape

logger = logging.getLogger(__name__)

_WRAPPERS = ("ema", "model", "state_dict_ema", "state_dict", "model_ema")
METADATA_KEY = "edgeattn"
_MAPPED_BYTES = 16 << 20


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a file and the metadata that edgeattn wrote into it (empty for foreign files).

    `.safetensors` is read as such, everything else with torch's weights-only unpickler. A top-level `model`,
    `state_dict` or `state_dict_ema` entry is unwrapped and a `module.` prefix removed. Nothing else in the file (an
    optimizer's state) is held in memory, where the file's format allows.

    Raises:
        CheckpointError: missing, truncated, corrupt, or a pickle that asks to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is not a file; expected .pth, .pt or .safetensors.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not zipfile.is_zipfile(path):  # torch's format before 1.6, or damaged: cannot be mapped
        return _unwrap(_read_pickle(path, mapped=False), path), {}
    return _own_copies(lambda: _unwrap(_read_pickle(path, mapped=True), path)), {}


def _own_copies(open_state: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of tensors that `open_state` maps from a file, at most an eighth of them mapped and copied at a time.

    Mapped tensors themselves will not do as weights: saving over the file would change or kill the model. Pages of the
    file that were read count as memory of this process until they are unmapped, so the file is opened several times.
    """
    mapped = open_state()
    limit = max(_MAPPED_BYTES, sum(value.nbytes for value in mapped.values()) // 8)
    copies: dict[str, Tensor] = {}
    read = 0
    for key in list(mapped):
        copies[key] = mapped[key].clone(memory_format=torch.contiguous_format)
        read += copies[key].nbytes
        if read > limit:
            mapped, read = {}, 0
            mapped = open_state()
    return copies


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that edgeattn wrote into a file, without its tensors; empty for foreign files and other formats.

    Raises:
        CheckpointError: missing or corrupt.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return {}
    with _reading(path), safetensors.safe_open(path, framework="pt") as handle:
        metadata = (handle.metadata() or {}).get(METADATA_KEY)
        return json.loads(metadata) if metadata else {}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the library says of a damaged file as an error that says what to do."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors: {error}. Is it complete? Copy it again.") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with _reading(path):
        state = _own_copies(lambda: _map_safetensors(path))
    return state, read_metadata(path)


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)


def _read_pickle(path: Path, mapped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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
    state = {
        str(key).removeprefix("module."): value.detach() for key, value in loaded.items() if isinstance(value, Tensor)
    }
    if not state:
        raise CheckpointError(
            f"{path} holds no tensors (keys: {', '.join(map(str, list(loaded)[:5])) or 'none'}); expected a state dict."
        )
    return state


def load_state(model: torch.nn.Module, state: dict[str, Tensor], where: str, name: str | None = None) -> list[str]:
    """Load `state` strictly after converting timm names and fitting tables; returns one line per thing changed.

    Empties `state` on the way, so that tensors which are converted are not held twice.

    Args:
        where: the file, for messages.
        name: the zoo's name of the model. The tensors then become its parameters, otherwise they are copied into them.

    Raises:
        CheckpointError: keys are missing, unexpected or mis-shaped; all are named.
        NumericError: a weight holds NaN or infinity; its key is named.
    """
    convert = getattr(model, "from_timm_key", lambda key: key)
    shapes = {key: value.shape for key, value in state.items()}
    given = {convert(key): state.pop(key) for key in list(state)}
    own, notes = model.state_dict(), []
    for part in getattr(model, "absent_parts", ()):
        spare = [key for key in given if key.startswith(f"{part}.")]
        if spare:
            notes.append(f"{len(spare)} weights of {part} left out: the model was built without it")
        for key in spare:
            del given[key]
    for key in sorted(getattr(model, "derived_keys", set)()):
        given.setdefault(key, own[key])
    for key, value in list(given.items()):
        if key in own and value.shape != own[key].shape:
            fitted = fit_shape(model, key, value, own[key])
            if fitted is not None:
                given[key], note = fitted
                notes.append(note)
    _check_keys(given, own, where, shapes, name)
    ready = {key: _ready(key, given.pop(key), own[key], where) for key in list(given)}
    has_ties = len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False)))
    assign = name is not None and not has_ties
    if assign:
        _separate(ready)
    model.load_state_dict(ready, strict=True, assign=assign)
    for note in notes:
        logger.warning(note)
    return notes


def _ready(key: str, value: Tensor, own: Tensor, where: str) -> Tensor:
    """`value` as the model needs it: of its type, on its device, finite."""
    if value.is_floating_point() and not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise NumericError(
            f"{where}: weight {key} holds {bad} NaN or infinite value(s) of {value.numel()}. "
            "The training that made it diverged, or the file is damaged; use another checkpoint."
        )
    return value.to(own.device, own.dtype).contiguous()


def _separate(state: dict[str, Tensor]) -> None:
    """Give every tensor memory of its own: two names of one tensor in a file are two parameters of the model."""
    seen: set[int] = set()
    for key, value in state.items():
        if value.untyped_storage().data_ptr() in seen:
            state[key] = value.clone()
        seen.add(value.untyped_storage().data_ptr())


def _check_keys(
    state: dict[str, Tensor],
    own: dict[str, Tensor],
    where: str,
    shapes: dict[str, torch.Size],
    name: str | None,
) -> None:
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    misshaped = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(found)} {what}: {'; '.join(found[:8])}{' ...' if len(found) > 8 else ''}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if found
    ]
    if problems:
        # Here, because what it imports imports this module.
        from edgeattn.models.identify import advice

        raise CheckpointError(f"{where} does not fit the model. {'. '.join(problems)}. {advice(shapes, name)}")
