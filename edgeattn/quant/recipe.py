"""Recipes: what is quantized how, as validated data with a published JSON Schema."""

from __future__ import annotations

import difflib
import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from edgeattn.errors import RecipeError
from edgeattn.quant.steps import (
    ACTIVATION_STEPS,
    NORM_STEPS,
    STEPS,
    WEIGHT_STEPS,
    BiasCorrection,
    Gptq,
    Revert,
    Step,
    Strict,
)

SCHEMA_VERSION: Literal[1] = 1

# Signedness of per-tensor int8 activations that a target computes in. TensorRT takes symmetric int8 only.
_TARGET_ACTIVATIONS: dict[str, Literal["uint8", "int8"]] = {
    "onnxruntime": "uint8", "openvino": "uint8", "tensorrt": "int8", "tensorrt-rtx": "int8",
    "coreml": "int8",
}  # fmt: skip
# Bits of weights and activations that a target runs; 16 stands for floating point.
_TARGET_FORMATS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("w8a8", "w8a16", "w4a8", "w4a16"), "openvino": ("w8a8", "w8a16", "w4a8", "w4a16"),
    "tensorrt": ("w8a8", "w4a16"), "tensorrt-rtx": ("w8a8", "w4a16"), "coreml": ("w8a8", "w8a16", "w4a16"),
}  # fmt: skip


class ObserverSettings(Strict):
    """How a range is chosen from what calibration saw (reference: quantization conventions, section 5.1)."""

    method: Literal["min_max", "moving_average", "percentile", "mse", "entropy"] = "percentile"
    percentile: float = pydantic.Field(
        default=99.99, gt=50, le=100, description="of |x| when symmetric, of both tails otherwise"
    )
    momentum: float = pydantic.Field(default=0.95, gt=0, lt=1, description="of moving_average, per batch")


class WeightScheme(Strict):
    """Symmetric weights: scale = max|w| / (2^(bits - 1) - 1), one per output channel or per group of inputs.

    `group_size: auto` is 32 or 16, whichever divides a layer's inputs; else the layer stays at 8 bits per channel, as
    do convolutions that are not 1x1. A number must divide the inputs of every layer that it is for.
    """

    bits: Literal[4, 8] = 8
    granularity: Literal["per_channel", "group"] = "per_channel"
    group_size: int | Literal["auto"] | None = None

    @pydantic.model_validator(mode="after")
    def _groups_have_a_size(self) -> WeightScheme:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("granularity: group needs a group_size, per_channel takes none")
        if isinstance(self.group_size, int) and self.group_size < 2:
            raise ValueError(f"group_size {self.group_size} is less than 2")
        if self.granularity == "group" and self.bits != 4:
            raise ValueError("groups are for 4-bit weights; no runtime takes 8-bit ones in groups")
        return self


class ActivationScheme(Strict):
    """Static int8 activations, one scale per tensor. `auto` takes the signedness that the targets compute in."""

    bits: Literal[8] = 8
    granularity: Literal["per_tensor"] = "per_tensor"
    signedness: Literal["auto", "uint8", "int8"] = "auto"
    observer: ObserverSettings = ObserverSettings()


class Calibration(Strict):
    """How many pictures set the ranges, in the source's order."""

    images: int = pydantic.Field(default=512, ge=1)
    batch_size: int = pydantic.Field(default=16, ge=1)


class Rule(Strict):
    """Modules (shell pattern on the model's own names) that are treated differently, and why.

    The first rule that matches decides. `precision: float` leaves them in floating point; `weights` replaces the
    recipe's weight scheme (a rule without either means float), and `activations: float` leaves the inputs of these
    layers in floating point. A pattern that matches nothing is an error unless it is `optional`.
    """

    modules: str
    precision: Literal["float"] | None = None
    weights: WeightScheme | None = None
    activations: Literal["inherit", "float"] = "inherit"
    reason: str = ""
    optional: bool = False

    @pydantic.model_validator(mode="after")
    def _says_one_thing(self) -> Rule:
        if self.precision is not None and self.weights is not None:
            raise ValueError("a rule sets precision: float or weights, not both")
        return self

    @property
    def is_float(self) -> bool:
        """Whether the modules stay in floating point: the rule gives them no weight scheme."""
        return self.weights is None


class Recipe(Strict):
    """A quantization recipe.

    `activations: null` quantizes weights only; `weights: null` as well means floating point throughout.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    weights: WeightScheme | None = WeightScheme()
    activations: ActivationScheme | None = ActivationScheme()
    calibration: Calibration = Calibration()
    first_layer: Literal["float", "int8"] = pydantic.Field(
        default="float", description="precision of the layers that read the picture; see FIRST_LAYER_REASON"
    )
    residual: Literal["int8", "float"] = pydantic.Field(default="int8", description="precision of residual additions")
    rules: tuple[Rule, ...] = ()
    float_type: Literal["float32", "float16"] = pydantic.Field(
        default="float32",
        description="of what is not quantized; float16 takes weights: null, and keeps float32 islands",
    )
    steps: tuple[Step, ...] = pydantic.Field(default=(), description="methods beyond rounding, in this order")
    gate: Literal["mlperf99", "mlperf999"] = "mlperf99"
    margin: Annotated[float, pydantic.Field(gt=0)] | Literal["auto"] | None = pydantic.Field(
        default="auto",
        description="times as fast as float32 that a target must run the quantized model, at the low end of the "
        "interval, or it gets float32; null: kept for its size, whatever its speed; auto: 1 for int8, else null",
    )

    @pydantic.model_validator(mode="after")
    def _activations_need_weights(self) -> Recipe:
        if self.weights is None and self.activations is not None:
            raise ValueError("activations cannot be quantized without weights; set weights, or activations: null")
        if self.weights is not None and self.float_type == "float16":
            raise ValueError("float_type float16 is for models without integers; set weights and activations to null")
        names = {step.step for step in self.steps}
        if {"gptq", "reconstruct"} <= names:
            raise ValueError("steps gptq and reconstruct both round the weights; name one of them")
        if self.weights is None and (idle := sorted(names & WEIGHT_STEPS)):
            raise ValueError(f"weights is null, so step {idle[0]} has nothing to help; set weights, or drop the step")
        if self.activations is None and (idle := sorted(names & ACTIVATION_STEPS)):
            raise ValueError(f"activations is null, so step {idle[0]} has nothing to help; set it, or drop the step")
        order = [step.step for step in self.steps]
        if "rotate" in names and (undone := [name for name in order[: order.index("rotate")] if name in NORM_STEPS]):
            raise ValueError(
                f"step rotate takes LayerNorms apart, which undoes {undone[0]} before it; put rotate first"
            )
        return self

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized to integers."""
        return self.weights is None

    @property
    def has_variant(self) -> bool:
        """Whether there is something to make beside the float32 model: a quantized or a float16 one."""
        return not self.is_float or self.float_type == "float16"

    @property
    def least_speedup(self) -> float | None:
        """`margin` with auto resolved."""
        if self.margin != "auto":
            return self.margin
        return 1.0 if self.weights is not None and self.weights.bits == 8 and self.activations is not None else None

    @property
    def formats(self) -> tuple[str, ...]:
        """Bits of weights and activations in use, as w8a8; 16 stands for floating point."""
        schemes = [(self.weights, "inherit"), *((rule.weights, rule.activations) for rule in self.rules)]
        wide = self.activations is None
        found = {(w.bits, 16 if wide or inputs == "float" else 8) for w, inputs in schemes if w is not None}
        return () if self.is_float else tuple(f"w{weights}a{inputs}" for weights, inputs in sorted(found))

    def rule_for(self, module: str) -> Rule | None:
        """The first rule whose pattern matches a module path."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(module, rule.modules)), None)

    def to_yaml(self) -> str:
        """The recipe as YAML; `load_recipe` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def for_targets(self, targets: list[str]) -> Recipe:
        """The recipe with `signedness: auto` resolved.

        Raises:
            RecipeError: a target cannot run the bits or the signedness that was asked for, or two targets differ in it.
        """
        for target in targets:
            for name in self.formats:
                if name not in _TARGET_FORMATS[target]:
                    raise RecipeError(
                        f"recipe {self.name!r} has {name} (bits of weights and activations, 16: float), which target "
                        f"{target} cannot run. It runs {', '.join(_TARGET_FORMATS[target])}."
                    )
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
        modules="*.se.*", precision="float", optional=True,
        reason="squeeze-excite: sigmoid gates saturate when their range is wrong; under 1 % of compute",
    ),
    Rule(
        modules="*.dconv.conv_offset", precision="float", optional=True,
        reason="offsets of a deformable convolution: 8 bits cannot hold a place in the map to a fraction of a pixel",
    ),
    Rule(
        modules="*.dconv.places", precision="float", optional=True,
        reason="sampling coordinates of a deformable convolution",
    ),
)  # fmt: skip
_INT4 = WeightScheme(bits=4, granularity="group", group_size="auto")
_PRESETS = (
    Recipe(name="w8a8", rules=_FLOAT_ISLANDS, steps=(Revert(), BiasCorrection())),
    Recipe(name="w8a16", rules=_FLOAT_ISLANDS, activations=None, steps=(BiasCorrection(),)),
    Recipe(name="w4a8", rules=_FLOAT_ISLANDS, weights=_INT4, steps=(Revert(), Gptq(), BiasCorrection())),
    Recipe(
        name="w4a16", rules=_FLOAT_ISLANDS, weights=_INT4, activations=None, steps=(Revert(), Gptq(), BiasCorrection())
    ),
    Recipe(name="fp16", weights=None, activations=None, float_type="float16"),
    Recipe(name="float32", weights=None, activations=None),
)
PRESETS: dict[str, Recipe] = {recipe.name: recipe for recipe in _PRESETS}


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
        "observer": ObserverSettings, "rules": Rule, **STEPS,
    }  # fmt: skip
    named = [part for part in location if part in models]
    return list((models[named[-1]] if named else Recipe).model_fields)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
