"""Model registry: names to builders, filled by `register_model`, family modules imported on first use."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edgeattn.errors import UsageError

if TYPE_CHECKING:
    import torch

# Modules that register models; each is imported (and torch with it) on the first call that needs a model.
_FAMILIES = ("efficientvit", "shvit", "care", "litv2", "deit", "dit", "vggt")
_BUILDERS: dict[str, Callable[..., torch.nn.Module]] = {}


def register_model(name: str) -> Callable[[Callable[..., torch.nn.Module]], Callable[..., torch.nn.Module]]:
    """Decorator: make `builder(**config) -> Module` known as `name`.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(builder: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
        if name in _BUILDERS:
            raise ValueError(f"model {name!r} is registered twice: {_BUILDERS[name]} and {builder}")
        _BUILDERS[name] = builder
        return builder

    return decorate


def register_variants(model: Callable[..., torch.nn.Module], variants: Mapping[str, dict[str, Any]]) -> None:
    """Register each name as the model with that configuration; keyword arguments of the caller win."""

    def register(name: str, variant: dict[str, Any]) -> None:
        register_model(name)(lambda **config: model(**{**variant, **config}))

    for name, variant in variants.items():
        register(name, variant)


def _load_families() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"edgeattn.models.{family}")


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo that match a shell pattern, sorted."""
    _load_families()
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def builder_of(name: str) -> Callable[..., torch.nn.Module]:
    """The builder registered as `name`.

    Raises:
        UsageError: no such model; near names are suggested.
    """
    _load_families()
    if name in _BUILDERS:
        return _BUILDERS[name]
    near = difflib.get_close_matches(name, _BUILDERS, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"the zoo has {', '.join(sorted(_BUILDERS))}."
    raise UsageError(
        f"unknown model {name!r}: {hint} Also accepted: a path of an .onnx file, 'timm:NAME', 'module:callable'. "
        "`edgeattn models` lists the zoo."
    )


def build(name: str, **config: Any) -> torch.nn.Module:
    """Call the builder of `name`; unknown configuration keys are a UsageError that names them."""
    builder = builder_of(name)
    try:
        return builder(**config)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise UsageError(f"model {name!r}: {error}") from error
        raise
