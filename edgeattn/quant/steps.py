"""The steps of a recipe: methods beyond rounding, as validated data."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import pydantic


class Strict(pydantic.BaseModel):
    """Plain data that refuses unknown keys and changes."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Equalize(Strict):
    """Cross-layer equalisation of convolutions with nothing or a ReLU in between (reference section 5.7)."""

    step: Literal["equalize"] = "equalize"


class Smooth(Strict):
    """SmoothQuant: activation outliers of linear layers moved into their weights through the LayerNorm in front."""

    step: Literal["smooth"] = "smooth"
    alpha: float = pydantic.Field(default=0.5, ge=0, le=1)


class Awq(Strict):
    """AWQ: channels with large activations get finer steps in the weights, through the layer or LayerNorm in front."""

    step: Literal["awq"] = "awq"


class Reparameterize(Strict):
    """RepQ-ViT: one scale and zero point that fit every channel of a LayerNorm, by it and the linear layers behind it.

    For quantized activations. Factors are free, unlike those of `power_of_two`, and offsets are evened out too.
    """

    step: Literal["reparameterize"] = "reparameterize"


class PowerOfTwo(Strict):
    """FQ-ViT: factors of 1, 2, 4 or 8 between a LayerNorm's channels, moved into the linear layers behind it.

    For quantized activations.
    """

    step: Literal["power_of_two"] = "power_of_two"


class Rotate(Strict):
    """QuaRot: outliers spread over all channels by Hadamard rotations that merge into the weights on both sides.

    Of the values of attention, head by head; and of the residual stream of pre-norm transformers, whose LayerNorms
    lose their affine to the layers behind. So it comes before the steps that change it.
    """

    step: Literal["rotate"] = "rotate"


class AttentionProducts(Strict):
    """The two matrix products inside attention on int8 queries, keys and values, and on codes of the probabilities.

    Of every call of scaled_dot_product_attention. Probabilities: `uniform`, steps of 1 / (2^bits - 1), which runtimes
    compute with; `log2` (FQ-ViT), powers of two; `twin` (PTQ4ViT), one uniform grid for small and one for large ones.
    The last two are simulated in float32.
    """

    step: Literal["attention_products"] = "attention_products"
    softmax: Literal["uniform", "log2", "twin"] = "uniform"
    bits: int | None = pydantic.Field(
        default=None, ge=2, le=8, description="of the probabilities' codes; null: 4 for log2, else 8"
    )

    @property
    def code_bits(self) -> int:
        """`bits` with null resolved."""
        return self.bits or (4 if self.softmax == "log2" else 8)


class BiasCorrection(Strict):
    """The mean error that rounded weights make, taken out of the bias."""

    step: Literal["bias_correction"] = "bias_correction"


class Gptq(Strict):
    """Weights rounded one column after the other, each making up for the errors of those before."""

    step: Literal["gptq"] = "gptq"
    act_order: bool = False
    percdamp: float = pydantic.Field(default=0.01, gt=0)


class Reconstruct(Strict):
    """Rounding of weights learned on pictures, so that a layer or residual block gives what it gives in float32.

    Takes the place of gptq, and of bias_correction: that looks at float inputs, and takes back what rounding made up
    for of earlier layers' errors. `images` of the calibration pictures are used; `iterations` are per layer or block.
    """

    step: Literal["reconstruct"] = "reconstruct"
    unit: Literal["layer", "block"] = "layer"
    iterations: int = pydantic.Field(default=500, ge=1)
    learning_rate: float = pydantic.Field(default=0.2, gt=0)
    images: int = pydantic.Field(default=128, ge=1)
    batch_size: int = pydantic.Field(default=16, ge=1)


class Prescale(Strict):
    """SmoothQuant by a multiplication of its own, where no layer in front can take the scale (a concatenation, say)."""

    step: Literal["prescale"] = "prescale"
    alpha: float = pydantic.Field(default=0.75, ge=0, le=1)
    imbalance: float = pydantic.Field(default=0.5, gt=0, le=1, description="1 scales every such tensor")


class Revert(Strict):
    """More bits for what costs most accuracy, until the logits are `goal_db` above their quantization noise.

    On the pictures' logits, in the sum of norms. First the steps named `otherwise` are taken; then, one at a time,
    what helps most: a layer gets 8 bits in place of 4 or floating point in place of 8, or all residual additions
    floating point. At most the share `most` of the layers is reverted, and nothing that helps less than `least`.
    """

    step: Literal["revert"] = "revert"
    goal_db: float = 27.0
    least: float = pydantic.Field(default=0.02, gt=0, lt=1)
    most: float = pydantic.Field(default=0.1, ge=0, le=1)
    images: int = pydantic.Field(default=32, ge=1)
    otherwise: tuple[Prescale, ...] = (Prescale(),)


Step = Annotated[
    Equalize | Smooth | Prescale | Awq | Reparameterize | PowerOfTwo | Rotate
    | AttentionProducts | BiasCorrection | Gptq | Reconstruct | Revert,
    pydantic.Field(discriminator="step"),
]  # fmt: skip
STEPS: dict[str, type[Strict]] = {kind.model_fields["step"].default: kind for kind in get_args(get_args(Step)[0])}
# Change nothing but how activations are held.
ACTIVATION_STEPS = frozenset({"reparameterize", "power_of_two", "attention_products"})
# Change what LayerNorms multiply with.
NORM_STEPS = frozenset({"reparameterize", "power_of_two", "smooth", "awq"})
WEIGHT_STEPS = ACTIVATION_STEPS | {"awq", "rotate"}
