"""The worst layers get more bits: found on a real model with one layer made hard to quantize."""

from pathlib import Path

import pytest
import torch

from edgeattn import create_model
from edgeattn.errors import RecipeError
from edgeattn.export.onnx_model import to_onnx
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import load_recipe

SAMPLES = Path(__file__).parents[2] / "samples"
CALIB = SAMPLES / "eurosat64" / "calib"


@pytest.fixture(scope="module")
def model():
    model = create_model("deit_tiny", weights=SAMPLES / "deit_eurosat" / "model.safetensors")
    with torch.no_grad():  # one huge hidden value that hardly matters, and that the range has to hold
        model.blocks[3].mlp.fc1.weight[7] *= 3000
        model.blocks[3].mlp.fc2.weight[:, 7] /= 3000
    return model


def recipe(**step):
    return {
        "name": "r", "calibration": {"images": 64}, "activations": {"observer": {"method": "min_max"}},
        "steps": [{"step": "revert", "otherwise": [], "images": 16, **step}],
    }  # fmt: skip


def signal_to_noise(result, images=32):
    from edgeattn.data.source import open_source

    source = open_source(SAMPLES / "eurosat64" / "val").spread(images)
    x = torch.stack([torch.from_numpy(result.preprocessing(s.image)) for s in source])
    with torch.no_grad():
        plain, got = result.float_graph(x), result.graph(x)
    return 10 * torch.log10(plain.square().sum() / (plain - got).square().sum()).item()


def test_the_layer_that_hurts_is_found(model):
    without = quantize(model, {**recipe(), "steps": []}, CALIB)
    result = quantize(model, recipe(goal_db=40, most=0.05), CALIB)
    assert "blocks.3.mlp.fc2" in [rule.modules for rule in result.recipe.rules]
    assert signal_to_noise(result) > signal_to_noise(without) + 3
    note = next(note for note in result.notes if note.startswith("reverted"))
    assert "dB above their quantization noise" in note and "(goal 40 dB)" in note


def test_the_result_is_a_recipe_that_gives_the_same_again(model):
    result = quantize(model, recipe(goal_db=40, most=0.05), CALIB)
    assert not result.recipe.steps and all(rule.reason for rule in result.recipe.rules)
    again = quantize(model, result.recipe, CALIB)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(result.graph(x), again.graph(x))


@pytest.mark.slow
def test_the_stored_recipe_writes_the_same_file(model):
    """With every kind of rewriting, whose order matters."""
    values = recipe(goal_db=40, most=0.05, otherwise=[{"step": "prescale", "imbalance": 0.9}])
    values["steps"] = [{"step": "smooth"}, *values["steps"], {"step": "bias_correction"}]
    result = quantize(model, values, CALIB)
    assert [step.step for step in result.recipe.steps] == ["smooth", "prescale", "bias_correction"]
    again = quantize(model, result.recipe, CALIB)
    first, second = (to_onnx(q.graph, q.interface).SerializeToString() for q in (result, again))
    assert first == second


def test_nothing_is_reverted_where_the_goal_is_met(model):
    result = quantize(model, recipe(goal_db=-20), CALIB)
    assert not result.recipe.rules and result.recipe.residual == "int8"


def test_four_bits_become_eight(model):
    values = recipe(goal_db=60, most=0.05)
    values |= {"weights": {"bits": 4, "granularity": "group", "group_size": 32}, "activations": None}
    result = quantize(model, values, CALIB)
    assert [rule.weights.bits for rule in result.recipe.rules] == [8]
    assert result.precision["int8 weights, float32 activations"] == 1


def test_rules_must_match_and_groups_must_fit(model):
    with pytest.raises(RecipeError, match=r"'blocks\.3\.mpl\.\*' matches no module .* Near: .*blocks\.3\.mlp"):
        quantize(model, {"name": "x", "rules": [{"modules": "blocks.3.mpl.*"}]}, CALIB)
    scheme = {"bits": 4, "granularity": "group", "group_size": 48}
    with pytest.raises(RecipeError, match=r"group_size 48 does not divide the 128 inputs of layer blocks\.0"):
        quantize(model, {"name": "x", "weights": scheme, "activations": None}, CALIB)


def test_targets_say_what_they_can_run():
    with pytest.raises(RecipeError, match=r"'w4a8' has w4a8 .* tensorrt cannot run\. It runs w8a8, w4a16"):
        load_recipe("w4a8").for_targets(["tensorrt"])
    assert load_recipe("w4a16").for_targets(["onnxruntime", "openvino"]).name == "w4a16"
