import json
from pathlib import Path

import pytest
import yaml

from edgeattn.errors import RecipeError
from edgeattn.quant.recipe import PRESETS, Recipe, json_schema, load_recipe
from edgeattn.quant.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_yaml(name, tmp_path):
    (tmp_path / "r.yaml").write_text(PRESETS[name].to_yaml())
    assert load_recipe(tmp_path / "r.yaml") == PRESETS[name] == load_recipe(name)


def test_every_step_round_trips_through_yaml(tmp_path):
    steps = [{"step": name} for name in sorted(STEPS, key="rotate".__ne__) if name != "reconstruct"]
    recipe = load_recipe({"name": "all", "steps": steps})
    assert [type(step) for step in recipe.steps] == [STEPS[step["step"]] for step in steps]
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert {"awq", "reparameterize", "power_of_two", "rotate"} <= set(STEPS)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"name": "x", "wieghts": None}, "unknown key 'wieghts', did you mean 'weights'"),
        ({"name": "x", "activations": {"observer": {"percentil": 9}}}, "unknown key 'activations.observer.percentil'"),
        ({"name": "x", "weights": {"bits": 3}}, r"weights\.bits: Input should be 4 or 8 \(found 3\)"),
        ({"name": "x", "weights": {"bits": 4, "granularity": "group"}}, "group needs a group_size"),
        ({"name": "x", "weights": {"bits": 8, "granularity": "group", "group_size": 32}}, "groups are for 4-bit"),
        ({"name": "x", "steps": [{"step": "equalise"}]}, "steps.0.*'equalize', 'smooth', 'prescale'"),
        ({"name": "x", "steps": [{"step": "smooth", "alhpa": 1}]}, "alhpa.*did you mean 'alpha'"),
        ({"name": "x", "steps": [{"step": "rotat"}]}, "'power_of_two', 'rotate'"),
        ({"name": "x", "steps": [{"step": "awq", "grid": 3}]}, "unknown key 'steps.0.awq.grid'.*Known there: step"),
        (
            {"name": "x", "activations": None, "steps": [{"step": "reparameterize"}]},
            "activations is null, so step reparameterize has nothing to help; set it, or drop the step",
        ),
        (
            {"name": "x", "steps": [{"step": "awq"}, {"step": "rotate"}]},
            "step rotate takes LayerNorms apart, which undoes awq before it; put rotate first",
        ),
        ({"name": "x", "activations": None, "steps": [{"step": "power_of_two"}]}, "so step power_of_two has nothing"),
        (
            {"name": "x", "weights": None, "activations": None, "steps": [{"step": "awq"}]},
            "weights is null, so step awq has nothing to help; set weights, or drop the step",
        ),
        ({"name": "x", "weights": None, "activations": None, "steps": [{"step": "rotate"}]}, "so step rotate has"),
        ({"name": "x", "rules": [{"modules": "a", "precision": "float", "weights": {}}]}, "not both"),
        ({}, "name: Field required"),
        ({"name": "x", "schema_version": 2}, "schema_version: Input should be 1"),
        ({"name": "x", "weights": None}, "activations cannot be quantized without weights"),
        ({"name": "x", "calibration": {"images": 0}}, "calibration.images"),
    ],
)
def test_wrong_recipes_name_the_place(values, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(values)


def test_unknown_preset_and_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="unknown recipe 'w8a88': did you mean w8a8"):
        load_recipe("w8a88")
    with pytest.raises(RecipeError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.yaml")
    for text, said in (("[1]", "holds a list"), ("{a: [", "cannot read recipe")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match=said):
            load_recipe(tmp_path / "r.yaml")


def test_signedness_follows_the_targets():
    recipe = PRESETS["w8a8"]
    assert recipe.for_targets(["onnxruntime", "openvino"]).activations.signedness == "uint8"
    assert recipe.for_targets(["tensorrt"]).activations.signedness == "int8"
    with pytest.raises(RecipeError, match=r"onnxruntime: uint8, tensorrt: int8.*signedness to int8"):
        recipe.for_targets(["onnxruntime", "tensorrt"])
    unsigned = load_recipe({"name": "u", "activations": {"signedness": "uint8"}})
    with pytest.raises(RecipeError, match="tensorrt takes symmetric int8"):
        unsigned.for_targets(["tensorrt"])


def test_rules_match_module_names_by_shell_pattern():
    recipe = Recipe(name="x", rules=[{"modules": "blocks2.*.dw?.m.c", "reason": "because"}])
    assert recipe.rule_for("blocks2.3.dw0.m.c").reason == "because" and recipe.rule_for("blocks3.3.dw0.m.c") is None


def test_published_schema_is_current_and_accepts_the_presets():
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == json_schema()
    assert set(yaml.safe_load(PRESETS["w8a8"].to_yaml())) <= set(json_schema()["properties"])
    assert json_schema()["additionalProperties"] is False
