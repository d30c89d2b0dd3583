"""Recipes: what is quantized how, as validated data with a published JSON Schema."""

from __future__ import annotations

import difflib
import fnmatch
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from edgeattn.errors import RecipeError

SCHEMA_VERSION: Literal[1] = 1

# Signedness of per-tensor int8 activations that a target computes in. TensorRT takes symmetric int8 only.
_TARGET_ACTIVATIONS: dict[str, Literal["uint8", "int8"]] = {
    "onnxruntime": "uint8", "openvino": "uint8", "tensorrt": "int8", "coreml": "int8",
}  # fmt: skip


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ObserverSettings(_Strict):
    """How a range is chosen from what calibration saw (reference: quantization conventions, section 5.1)."""

    method: Literal["min_max", "moving_average", "percentile", "mse", "entropy"] = "percentile"
    percentile: float = pydantic.Field(
        default=99.99, gt=50, le=100, description="of |x| when symmetric, of both tails otherwise"
    )
    momentum: float = pydantic.Field(default=0.95, gt=0, lt=1, description="of moving_average, per batch")


class WeightScheme(_Strict):
    """Symmetric int8 weights, one scale per output channel, scale = max|w| / 127."""

    bits: Literal[8] = 8
    granularity: Literal["per_channel"] = "per_channel"


class ActivationScheme(_Strict):
    """Static int8 activations, one scale per tensor. `auto` takes the signedness that the targets compute in."""

    bits: Literal[8] = 8
    granularity: Literal["per_tensor"] = "per_tensor"
    signedness: Literal["auto", "uint8", "int8"] = "auto"
    observer: ObserverSettings = ObserverSettings()


class Calibration(_Strict):
    """How many pictures set the ranges, in the source's order."""

    images: int = pydantic.Field(default=512, ge=1)
    batch_size: int = pydantic.Field(default=16, ge=1)


class Rule(_Strict):
    """Modules (shell pattern on the model's own names) that stay in floating point, and why."""

    modules: str
    precision: Literal["float"] = "float"
    reason: str = ""


class Recipe(_Strict):
    """A quantization recipe. `weights: null` and `activations: null` mean floating point throughout."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    weights: WeightScheme | None = WeightScheme()
    activations: ActivationScheme | None = ActivationScheme()
    calibration: Calibration = Calibration()
    first_layer: Literal["float", "int8"] = pydantic.Field(
        default="float", description="precision of the layers that read the picture; see FIRST_LAYER_REASON"
    )
    rules: tuple[Rule, ...] = ()
    gate: Literal["mlperf99", "mlperf999"] = "mlperf99"

    @pydantic.model_validator(mode="after")
    def _activations_need_weights(self) -> Recipe:
        if (self.weights is None) != (self.activations is None):
            raise ValueError("weights and activations must both be set or both be null in this version")
        return self

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.weights is None

    def rule_for(self, module: str) -> Rule | None:
        """The first rule whose pattern matches a module path."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(module, rule.modules)), None)

    def to_yaml(self) -> str:
        """The recipe as YAML; `load_recipe` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def for_targets(self, targets: list[str]) -> Recipe:
        """The recipe with `signedness: auto` resolved.

        Raises:
            RecipeError: the targets compute in different signedness, or cannot run the one that was asked for.
        """
        if self.activations is None:
            return self
        wanted = {target: _TARGET_ACTIVATIONS[target] for target in targets}
        signedness = self.activations.signedness
        if signedness == "auto":
            if len(set(wanted.values())) > 1:
                raise RecipeError(
                    f"targets want different activation types ({', '.join(f'{t}: {s}' for t, s in wanted.items())}). "
                    "Set activations.signedness to int8 (runs everywhere), or export per target."
                )
            signedness = next(iter(wanted.values()), "uint8")
        elif signedness == "uint8" and "int8" in wanted.values():
            only = [t for t, s in wanted.items() if s == "int8"]
            raise RecipeError(f"target {', '.join(only)} takes symmetric int8 activations only; set signedness: int8.")
        return self.model_copy(update={"activations": self.activations.model_copy(update={"signedness": signedness})})


# Measured on the shipped EfficientViT-M0: of 90 quantized tensors the input costs most (SQNR 29.9 dB alone, the next
# tensor 31.1 dB), and its float convolution is no slower in ONNX Runtime.
FIRST_LAYER_REASON = "reads the picture, which is on an 8-bit grid already; a second grid costs the most accuracy"
_FLOAT_ISLANDS = (
    Rule(
        modules="*.se.*",
        reason="squeeze-excite: sigmoid gates saturate when their range is wrong; under 1 % of compute",
    ),
    Rule(
        modules="*.dconv.conv_offset",
        reason="offsets of a deformable convolution: 8 bits cannot hold a place in the map to a fraction of a pixel",
    ),
    Rule(modules="*.dconv.places", reason="sampling coordinates of a deformable convolution"),
)
PRESETS: dict[str, Recipe] = {
    "w8a8": Recipe(name="w8a8", rules=_FLOAT_ISLANDS),
    "float32": Recipe(name="float32", weights=None, activations=None),
}


def load_recipe(spec: str | Path | Recipe | dict[str, Any]) -> Recipe:
    """A preset by name, a YAML file, a dict, or a recipe itself.

    Raises:
        RecipeError: unknown preset (near names suggested), unreadable file, unknown key or wrong value (each named).
    """
    if isinstance(spec, Recipe):
        return spec
    if isinstance(spec, dict):
        return _validate(spec, "recipe")
    path = Path(spec)
    if str(spec) in PRESETS:
        return PRESETS[str(spec)]
    if path.suffix not in (".yaml", ".yml", ".json") and not path.is_file():
        near = difflib.get_close_matches(str(spec), PRESETS, n=2, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise RecipeError(f"unknown recipe {str(spec)!r}: {hint}Presets: {', '.join(PRESETS)}; or give a .yaml file.")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read recipe {path}: {error}. Expected a YAML file.") from error
    if not isinstance(loaded, dict):
        raise RecipeError(f"recipe {path} holds a {type(loaded).__name__}; expected a mapping with at least 'name'.")
    return _validate(loaded, str(path))


def _validate(values: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from error


def _explain(item: Any) -> str:
    place = ".".join(map(str, item["loc"])) or "recipe"
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg']} (found {item['input']!r})"
    known = _keys_at(item["loc"][:-1])
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"unknown key {place!r}{hint} Known there: {', '.join(known)}"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    """Field names of the model at a place in the recipe."""
    models: dict[str, type[pydantic.BaseModel]] = {
        "weights": WeightScheme, "activations": ActivationScheme, "calibration": Calibration,
        "observer": ObserverSettings, "rules": Rule,
    }  # fmt: skip
    named = [part for part in location if part in models]
    return list((models[named[-1]] if named else Recipe).model_fields)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
