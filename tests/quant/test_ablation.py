import json

import pytest
import torch

from edgeattn.data.source import open_source
from edgeattn.export.pipeline import export
from edgeattn.quant.ablation import held_aside, prefixes
from edgeattn.quant.calibration import Calibrator
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import PRESETS, load_recipe
from tests.quant.test_reconstruct import Small

RECIPE = {
    "name": "r", "weights": {"bits": 4, "granularity": "group", "group_size": "auto"}, "activations": None,
    "calibration": {"images": 12}, "steps": [{"step": "gptq"}],
}  # fmt: skip


def test_prefixes_end_with_the_recipe():
    labels = [label for label, _ in prefixes(PRESETS["w8a8"])]
    assert labels == [
        "rounding only, min-max ranges, every layer", "+ rules and the first layer's precision",
        "+ ranges: percentile 99.99", "+ revert", "+ bias_correction",
    ]  # fmt: skip
    for recipe in (PRESETS["w8a8"], PRESETS["w4a16"]):
        assert list(prefixes(recipe))[-1][1] == recipe
    assert not any("ranges" in label for label, _ in prefixes(PRESETS["w4a16"]))
    names = ["rotate", "reparameterize", "awq", "power_of_two"]
    several = load_recipe({"name": "s", "steps": [{"step": name} for name in names]})
    assert [label for label, _ in prefixes(several)][-4:] == [f"+ {name}" for name in names]
    plain = load_recipe({"name": "p", "activations": {"observer": {"method": "min_max"}}})
    assert len(list(prefixes(plain))) == 2, "nothing is added to min-max ranges"


def test_pictures_are_held_aside_where_there_are_enough(tiny_model, pictures):
    source = open_source(pictures)
    for images, said, count in ((12, "that calibration did not use", 20), (24, "too few others", 32)):
        recipe = load_recipe({"name": "r", "calibration": {"images": images}})
        calibrator = Calibrator(source, recipe, tiny_model.preprocessing)
        aside, note = held_aside(source, calibrator)
        shown, used = {s.name for s in aside}, {s.name for s in calibrator.source}
        assert said in note and len(shown) == count and (count == 32 or not shown & used)
    endless = open_source(picture for _ in range(10**9) for picture in pictures)
    calibrator = Calibrator(endless, recipe, tiny_model.preprocessing)
    assert len(list(held_aside(endless, calibrator)[0])) == 64


def test_steps_are_in_the_result_and_only_when_asked_for(pictures):
    torch.manual_seed(0)
    model = Small().eval()
    stages = []
    result = quantize(model, RECIPE, pictures, explain=True, progress=lambda *report: stages.append(report))
    assert [step["label"] for step in result.steps] == [
        "rounding only, every layer", "+ rules and the first layer's precision", "+ gptq",
        "as written, all calibration pictures",
    ]  # fmt: skip
    first, *_, gptq, final = result.steps
    assert final["sqnr_db"] == pytest.approx(gptq["sqnr_db"]), "the same 12 pictures"
    assert first["sqnr_db"] < gptq["sqnr_db"] and all(0 <= step["agreement"] <= 1 for step in result.steps)
    assert stages[-1] == ("steps", 3, 3) and json.dumps(result.steps)
    assert quantize(model, RECIPE, pictures).steps == ()


def test_a_step_that_finds_nothing_changes_nothing(pictures):
    torch.manual_seed(0)
    recipe = {"name": "r", "calibration": {"images": 12}, "steps": [{"step": "reparameterize"}, {"step": "awq"}]}
    result = quantize(Small().eval(), recipe, pictures, explain=True)
    *_, ranges, reparameterized, awq, final = result.steps
    assert reparameterized["label"] == "+ reparameterize" and reparameterized["sqnr_db"] == ranges["sqnr_db"]
    assert any(note.startswith("reparameterized 0 LayerNorms") for note in result.notes)
    assert awq["sqnr_db"] != ranges["sqnr_db"] and awq["sqnr_db"] == pytest.approx(final["sqnr_db"])


def test_the_bundle_shows_them(pictures, tmp_path):
    torch.manual_seed(0)
    bundle = export(Small().eval(), ["onnxruntime"], tmp_path / "b", recipe=RECIPE, data=pictures, explain=True)
    assert len(bundle.manifest.steps) == 4
    card = (tmp_path / "b" / "README.md").read_text()
    lines = [line for line in card.splitlines() if line.startswith("| + gptq | ")]
    assert len(lines) == 1 and lines[0].count("|") == 5 and "%" in lines[0]
