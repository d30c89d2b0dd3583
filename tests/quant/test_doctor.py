import json

import numpy as np
import pytest
import torch
from PIL import Image

from edgeattn import create_model
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import DataError, NumericError, RecipeError
from edgeattn.quant.doctor import diagnose, settled, special_tokens
from edgeattn.quant.graph import attribute, calls
from edgeattn.quant.quantize import quantize
from edgeattn.quant.quantizer import activation_parameters
from tests.conftest import randomize


class Plain(torch.nn.Module):
    """Two layers whose ranges follow the brightness of the pictures."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.a, self.b = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).mean((2, 3)))


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Plain().eval()


def noise(count, seed=0, top=255):
    return list(np.random.default_rng(seed).integers(0, top, (count, 16, 16, 3), np.uint8))


def kinds(report):
    return {finding.kind: finding for finding in report.findings}


def save(folder, pictures, suffix, first=0):
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{first + i:03}{suffix}")
    return folder


def test_overlap_is_found_by_content(plain, tmp_path):
    pictures = noise(40)
    calib = save(tmp_path / "calib", pictures, ".png")
    val = save(tmp_path / "val", [*pictures[7:9], *noise(6, 1)], ".bmp", first=500)
    report = diagnose(plain, calib, validation=val)
    assert report.verdict == "error" and report.exit_code == 1
    assert set(report.overlap) == {(f"{calib}/{i:03}.png", f"{val}/{493 + i}.bmp") for i in (7, 8)}
    text = kinds(report)["overlap"].text
    assert "2 calibration picture(s) are in the validation data too, pixel for pixel" in text
    assert "007.png" in text and "Take them out of one of the two." in text
    assert json.loads(json.dumps(report.to_dict()))["exit_code"] == 1
    assert diagnose(plain, calib, validation=noise(6, 1)).exit_code == 0


def test_enough_pictures_of_one_kind_and_too_few_of_rare_ones(plain):
    report = diagnose(plain, noise(64))
    assert report.enough == 16 and "16 pictures are enough" in kinds(report)["number"].text
    assert sorted(report.tensors[0].ranges) == [16, 32, 64] and report.verdict == "info"
    few = diagnose(plain, noise(20))
    assert few.enough is None and "20 pictures are too few to see" in kinds(few)["number"].text
    # One picture in eighty is bright. The answer is the first check after it has come, whichever number that is.
    rare = {"name": "max", "activations": {"observer": {"method": "min_max"}}}
    places = [diagnose(plain, _with_one_bright(80, at), recipe=rare) for at in range(0, 80, 8)]
    assert {report.enough for report in places} >= {None, 64}
    late = next(report for report in places if report.enough is None)
    finding = kinds(late)["number"]
    assert finding.severity == "warning" and "still move by more than 5 % at 80 pictures" in finding.text


def _with_one_bright(count, at):
    pictures = noise(count, top=40)
    pictures[at] = noise(1, 9)[0]
    return pictures


@pytest.mark.parametrize("ranges, images", [
    ({16: (0, 1.0), 32: (0, 2.0), 64: (0, 2.01), 80: (0, 2.0)}, 32),
    ({16: (-1, 1.0), 32: (-2, 1.0), 64: (-3, 1.0), 80: (-4, 1.0)}, None),
    ({16: (0, 2.0), 32: (0, 1.0), 64: (0, 2.0)}, None),
    ({16: (0, 0.0), 32: (0, 0.0)}, 16),
])  # fmt: skip
def test_settled(ranges, images):
    assert settled(ranges) == images


def test_constant_pictures(plain):
    flat = [np.full((16, 16, 3), (10 * i, 20, 30), np.uint8) for i in range(8)]
    for refuse in (lambda: diagnose(plain, flat), lambda: quantize(plain, "w8a8", flat)):
        with pytest.raises(
            DataError, match=r"each of the 8 calibration picture\(s\) is of one colour .* Give pictures"
        ):
            refuse()
    report = diagnose(plain, [*flat, *noise(40), noise(1)[0]])
    assert len(report.constant) == 8 and "8 of 49 pictures are of one colour" in kinds(report)["constant"].text
    assert len(report.duplicates) == 1 and "1 of 49 pictures are copies of others" in kinds(report)["duplicates"].text


def test_numbers_of_a_tensor(plain):
    with torch.no_grad():
        plain.a.weight[3] *= 100
    recipe = {"name": "p", "activations": {"observer": {"percentile": 90.0}}}
    report = diagnose(plain, noise(32), recipe=recipe)
    tensor = report.tensors[0]
    assert list(tensor.outlier_channels) == ["3"] and tensor.outlier_channels["3"] > 8
    assert 0.05 < tensor.saturation < 0.2 and 0 < tensor.coverage <= 1 and 0 < tensor.effective_bits <= 8
    assert tensor.high < tensor.largest and "clip more than 1% of the values" in kinds(report)["saturation"].text
    assert "channels beyond 8 times the median" in kinds(report)["outlier channels"].text
    assert tensor.name in str(report)


def test_outlier_tokens_have_names():
    torch.manual_seed(0)
    model = randomize(
        create_model("deit_tiny_distilled", img_size=64, num_classes=10, embed_dim=48, depth=2)
    )  # fmt: skip
    with torch.no_grad():
        model.pos_embed[:, 1] *= 1000
        model.pos_embed[:, 5] *= 1000
    assert special_tokens(model) == ["class token", "distillation token"]
    report = diagnose(model, noise(32))
    assert set(report.tensors[0].outlier_tokens) == {"distillation token", "5"}
    assert "distillation token" in kinds(report)["outlier tokens"].text


def test_ranges_are_those_behind_the_steps_of_the_recipe():
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = create_model("deit_tiny", **sizes).eval()
    model.preprocessing = Preprocessing(size=(16, 16))
    steps = [{"step": "rotate"}, {"step": "equalize"}]
    recipe = {"name": "mine", "activations": {"observer": {"method": "min_max"}}, "steps": steps}
    pictures = noise(24)
    graph = quantize(model, recipe, pictures).graph
    pairs = calls(graph, torch.ops.edgeattn.quantize.default)
    given = [[float(attribute(graph, value)) for value in pair.args[1:]] for pair in pairs]
    found = [activation_parameters(t.low, t.high, "uint8") for t in diagnose(model, pictures, recipe=recipe).tensors]
    assert given == [[float(value) for value in parameters] for parameters in found]
    plain = diagnose(model, pictures, recipe={**recipe, "steps": []}).tensors
    assert [t.high for t in plain] != [t.high for t in diagnose(model, pictures, recipe=recipe).tensors]


def test_nan_names_the_layer_and_the_input(plain):
    with torch.no_grad():
        plain.b.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(NumericError, match=r"layer b holds \d+ NaN or infinite"):
        diagnose(plain, noise(16))
    plain.preprocessing = Preprocessing(size=(16, 16), std=(0.0, 1.0, 1.0))
    with (
        pytest.raises(NumericError, match=r"the model's input \(check the preprocessing\) holds"),
        np.errstate(all="ignore"),
    ):
        diagnose(plain, noise(16))


def test_float_recipes_calibrate_nothing(plain):
    with pytest.raises(RecipeError, match="recipe 'float32' calibrates nothing on pictures"):
        diagnose(plain, noise(4), recipe="float32")


def test_command(edgeattn, tmp_path):
    from tests.conftest import CALIB, WEIGHTS

    recipe = tmp_path / "few.yaml"
    recipe.write_text("name: few\ncalibration: {images: 32}\n")
    arguments = ["calibration", "efficientvit_m0", "--weights", WEIGHTS, "--calib", CALIB, "--quant", recipe]
    code, out, _ = edgeattn(*arguments)
    assert code == 0 and "32 pictures of" in out and "fewest effective bits" in out
    code, out, _ = edgeattn(*arguments, "--val", CALIB, "--json")
    assert code == 1 and json.loads(out)["verdict"] == "error" and len(json.loads(out)["overlap"]) == 32
    code, _, err = edgeattn("calibration", "efficientvit_m0", "--calib", CALIB)
    assert code == 2 and "no weights: pass --weights FILE" in err
