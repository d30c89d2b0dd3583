"""`timm:NAME` as a model: built by timm, prepared as timm's data configuration says. Imported on use only."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import MissingDependency, UsageError
from edgeattn.models.sizes import as_pair

PREFIX = "timm:"


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except Exception as error:  # a torchvision that does not match torch fails with a RuntimeError
        raise MissingDependency(
            f"a model named {PREFIX}NAME needs timm, and importing it failed: {error}. Run: pip install timm. It needs "
            f"a torchvision that matches torch {torch.__version__} (the same index and build, CPU or CUDA)."
        ) from error
    return timm


def _known(name: str) -> str:
    """timm's name of the model.

    Raises:
        UsageError: timm has none of that name; near ones are suggested.
    """
    timm, own = _timm(), name.removeprefix(PREFIX)
    if timm.is_model(own.partition(".")[0]):
        return own
    near = difflib.get_close_matches(own, timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(PREFIX + n for n in near)}?" if near else "timm.list_models() has its names."
    raise UsageError(f"timm {timm.__version__} has no model {own!r}: {hint}")


def stored_classes(name: str, state: Mapping[str, torch.Tensor]) -> int | None:
    """Number of classes of a state dict of that model; None if it has no classifier."""
    config = _timm().get_pretrained_cfg(_known(name))
    for head in _heads(getattr(config, "classifier", None)):
        if f"{head}.weight" in state:
            return int(state[f"{head}.weight"].shape[0])
    return None


def _heads(classifier: Any) -> tuple[str, ...]:
    """Module paths of the classifier layers; timm says none, one or several."""
    return () if not classifier else (classifier,) if isinstance(classifier, str) else tuple(classifier)


def build(name: str, *, img_size: int | Sequence[int] | None = None, **config: Any) -> torch.nn.Module:
    """The model without weights, with `preprocessing`, `heads` and `notes`.

    Args:
        img_size: passed on where the model takes it; one that takes any size is only prepared for it.
        config: arguments of timm.create_model.
    """
    timm, own = _timm(), _known(name)
    if config.get("in_chans", 3) != 3:
        raise UsageError(f"model {name!r}: in_chans is {config['in_chans']}; expected 3 (RGB). Leave it out.")
    size = None if img_size is None else as_pair(img_size)
    notes: list[str] = []
    try:
        model = timm.create_model(own, pretrained=False, **config, **({"img_size": size} if size else {}))
    except TypeError as error:
        if size is None or "img_size" not in str(error):
            raise UsageError(f"model {name!r}: {error}. Expected arguments of timm.create_model.") from error
        model = timm.create_model(own, pretrained=False, **config)
        notes.append(f"{name} takes any size; its pictures are prepared as {size[0]}x{size[1]}")
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(f"model {name!r}: timm {timm.__version__} refuses: {error}") from error
    model.preprocessing = _preprocessing(name, timm.data.resolve_model_data_config(model), size, notes)
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    model.heads = tuple(head.split(".")[0] for head in _heads(classifier))
    model.notes = notes
    return model


def _preprocessing(name: str, data: Mapping[str, Any], size: tuple[int, int] | None, notes: list[str]) -> Preprocessing:
    channels, *sides = data["input_size"]
    if channels != 3:
        raise UsageError(f"model {name!r} takes {channels} channels; expected 3, of RGB pictures. Use another model.")
    if data.get("crop_mode", "center") != "center":
        notes.append(f"{name} crops with {data['crop_mode']!r}; the centre is taken")
    values: dict[str, Any] = {
        "size": size or tuple(sides), "crop_fraction": data["crop_pct"], "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
    }  # fmt: skip
    try:
        return Preprocessing(**values, interpolation=data["interpolation"])
    except UsageError as error:
        notes.append(f"{name}: {error} Taken: bicubic")
        return Preprocessing(**values)
