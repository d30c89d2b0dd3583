"""Which model of the zoo a set of weights belongs to: for the message when they do not fit the one that was named."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgeattn.models import catalog, registry
from edgeattn.models.fitting import fit_shape

# The catalog counts heads of 1000 classes and no buffers. Without heads a model of the zoo keeps 72 % or more of its
# parameters, and its buffers add 1 % at most; the margin only decides how many candidates are built.
_SHARE = (0.6, 1.05)


def advice(shapes: Mapping[str, torch.Size], name: str | None) -> str:
    """What to do about weights of these names and shapes that do not fit the model `name`."""
    fitting = fitting_models(shapes)
    if not fitting:
        return "Check that the model name, num_classes and img_size are those the checkpoint was trained with."
    if name in fitting:
        return f"They fit {name!r} as the zoo has it: leave out the arguments that change its architecture."
    return f"These weights fit {' or '.join(map(repr, fitting))}: use that name."


def fitting_models(shapes: Mapping[str, torch.Size]) -> list[str]:
    """The models of the zoo that weights of these names (official or timm's) and shapes load into.

    The number of classes may differ. Models whose tables would have to be resized count only if no other fits.
    """
    numbers = sum(shape.numel() for key, shape in shapes.items() if "head" not in key.split(".")[0])
    low, high = _SHARE
    near = [entry.name for entry in catalog.CATALOG.values() if low <= numbers / entry.parameters <= high]
    known = set(registry.list_models())
    fits = {name: _resized(name, shapes) for name in near if name in known}
    return [name for name, resized in fits.items() if resized == 0] or [
        name for name, resized in fits.items() if resized is not None
    ]


def _resized(name: str, shapes: Mapping[str, torch.Size]) -> int | None:
    """How many tensors would have to be resized to load into the model `name`; None if they do not fit."""
    with torch.device("meta"):  # shapes are all that is needed, and cost no memory
        model = registry.build(name)
        given = {key: torch.empty(shape) for key, shape in shapes.items()}
    convert = getattr(model, "from_timm_key", lambda key: key)
    given = {convert(key): value for key, value in given.items()}
    own = model.state_dict()
    if set(given) - set(own) or set(own) - set(given) - getattr(model, "derived_keys", set)():
        return None
    resized = 0
    for key, value in given.items():
        is_head = key.split(".")[0] in getattr(model, "heads", ("head",))
        if value.shape == own[key].shape or (is_head and value.shape[1:] == own[key].shape[1:]):
            continue
        if fit_shape(model, key, value, own[key]) is None:
            return None
        resized += 1
    return resized
