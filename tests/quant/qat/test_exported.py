import dataclasses
import re

import pytest
import torch

from edgeattn import create_model
from edgeattn.data.interface import LOGITS
from edgeattn.errors import RecipeError, UsageError
from edgeattn.quant.qat.convert import freeze, prepare, quantized_weights
from edgeattn.quant.qat.exported import TrainedRecipe, integers, recipe_for
from edgeattn.quant.qat.settings import preset
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import PRESETS, load_recipe
from tests.quant.qat.conftest import TINY


def with_weight_bits(name, bits):
    """A tiny DeiT of a preset with weights of other bits."""
    torch.manual_seed(0)
    made = prepare(create_model("deit_tiny", **TINY), dataclasses.replace(preset(name), weight_bits=bits)).train()
    made(torch.randn(8, 3, 16, 16))
    return made.eval()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ["ofq-w2a2", "lsq-w2a2"])
def test_integers_are_the_trained_grid(name, bits):
    made = with_weight_bits(name, bits)
    frozen = dict(freeze(made).named_buffers()) | dict(freeze(made).named_parameters())
    for path, module in quantized_weights(made, edges=True).items():
        stored, has_half = integers(module)
        want = frozen[f"{path}.product" if path.endswith("product") else f"{path}.weight"]
        half = stored.scale.reshape(-1, *[1] * (want.dim() - 1)) / 2 * has_half
        assert torch.allclose(stored.values + half, want, rtol=1e-6, atol=0) and has_half == (
            name == "ofq-w2a2" and bits in (4, 8) and not module.edge
        )
        assert has_half or torch.equal(stored.values, want), path
        limit = 8 if module.edge or bits > 4 else 4
        assert stored.bits == limit and stored.codes.int().abs().max() <= 2 ** (limit - 1) and stored.group is None


@pytest.mark.parametrize("name", ["ofq-w2a2", "ofq-w4a4-qkr", "lsqplus-w3a3"])
def test_both_graphs_compute_what_was_trained(tiny, name):
    made, x = tiny(name, "deit_tiny_distilled"), torch.randn(64, 3, 16, 16)
    result = quantize(made)
    with torch.no_grad():
        want, plain, stored = made(x), result.float_graph(x), result.graph(x)
    assert torch.equal(plain, want)
    # Biases of the heads are rounded to int32 steps; half a step's own rounding can move a value on a tie.
    difference = (stored - want).abs().amax(1) / want.std()
    assert difference.median() < 5e-3 and (difference > 0.02).float().mean() < 0.1
    bits, qkr = preset(name).activation_bits, preset(name).qkr
    assert result.precision == {
        "int8 weights, 8-bit inputs, computed in float32": 1, "int8": 2,
        f"int4 weights, {bits}-bit inputs, computed in float32": 2 * (5 if qkr else 4),
    } | ({"float32": 2} if qkr else {})  # fmt: skip
    assert result.recipe.name == name and result.calibration is None and set(result.interface.tolerance) == {LOGITS}
    assert any("half a step" in note for note in result.notes) == (name == "ofq-w4a4-qkr")
    assert any("not the float model that training started from" in note for note in result.notes)
    assert torch.equal(made(x), want), "the given model still runs"


def test_a_head_whose_bias_does_not_fit_int32_computes_in_float32(tiny):
    made, x = tiny("lsq-w4a4"), torch.randn(9, 3, 16, 16)
    with torch.no_grad():
        made.head.input_quantizer.scale.fill_(1e-5)
        made.head.weight_quantizer.scale.fill_(1e-5)
        made.head.bias.fill_(1.0)
        result = quantize(made)
        assert torch.allclose(result.graph(x), made(x), atol=1e-6)
    assert result.precision["int8 weights, 8-bit inputs, computed in float32"] == 2 and "int8" not in result.precision


def test_what_a_trained_model_takes_for_a_recipe(tiny):
    plain, made = tiny(), tiny("ofq-w2a2")
    assert recipe_for(plain, None) == PRESETS["w8a8"] and recipe_for(plain, "w4a16") == PRESETS["w4a16"]
    own = recipe_for(made, None)
    assert own == TrainedRecipe(name="ofq-w2a2", trained=preset("ofq-w2a2"))
    assert own.has_variant and own.is_float and own.formats == () and own.least_speedup is None
    assert recipe_for(made, "ofq-w2a2") == recipe_for(made, own) == own
    for asked in ("w8a8", load_recipe("w8a8"), {"name": "w8a8"}, recipe_for(tiny("lsq-w2a2"), None)):
        name = re.escape(asked["name"] if isinstance(asked, dict) else getattr(asked, "name", asked))
        with pytest.raises(
            RecipeError,
            match=rf"deit_tiny was trained with 2-bit weights and 2-bit activations \(ofq-w2a2\), and recipe '{name}' "
            r"would quantize it once more\. Leave the recipe out \(--quant\) .* give the float checkpoint",
        ):
            quantize(made, asked)


def test_other_arguments_of_quantize(tiny, pictures):
    made = tiny("lsq-w2a2")
    assert "nothing to explain: what was trained has no steps that could be left out" in quantize(
        made, None, pictures, explain=True
    ).notes  # fmt: skip
    with pytest.raises(UsageError, match="built for one input size"):
        quantize(made, dynamic_size=True)
    with pytest.raises(RecipeError, match="scale was never set"):
        quantize(prepare(create_model("deit_tiny", **TINY), preset("lsq-w2a2")))
