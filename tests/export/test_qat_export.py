"""Models that quantization-aware training saved, through the ordinary export, on real pictures."""

import json

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from edgeattn import create_model
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import open_source
from edgeattn.devices.check import evaluate_bundle
from edgeattn.errors import RecipeError
from edgeattn.export.pipeline import export
from edgeattn.models.checkpoint import METADATA_KEY
from edgeattn.quant.qat.convert import prepare
from edgeattn.quant.qat.settings import preset
from edgeattn.quant.qat.stored import load_trained
from edgeattn.runtime.verify import verify
from tests.conftest import CALIB, VAL

CONFIG = dict(img_size=32, num_classes=10, patch_size=8, embed_dim=48, num_heads=3, depth=1)
INT4 = onnx.TensorProto.INT4


def write_trained(path, name, model="deit_tiny"):
    """What `edgeattn train --qat NAME` writes: here the scales have seen one batch of real pictures, no more."""
    torch.manual_seed(0)
    made = create_model(model, **CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    preprocessing, source = Preprocessing(size=(32, 32)), open_source(CALIB)
    made = prepare(made, preset(name)).train()
    with torch.no_grad():
        made(torch.stack([torch.from_numpy(preprocessing(sample.image)) for sample in source.spread(16)]))
    metadata = {
        "model": model, "config": CONFIG, "class_names": list(source.class_names),
        "preprocessing": preprocessing.to_dict(), "quantization": preset(name).to_dict(),
    }  # fmt: skip
    safetensors.torch.save_file(made.state_dict(), path, metadata={METADATA_KEY: json.dumps(metadata)})
    return path


@pytest.fixture(scope="module")
def images():
    """200 pictures as the models want them, (200, 3, 32, 32)."""
    preprocessing = Preprocessing(size=(32, 32))
    return np.stack([preprocessing(sample.image) for sample in open_source(VAL).spread(200)])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Makes (model, bundle for both targets) of a preset, once each."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = load_trained(write_trained(folder / "model.safetensors", name))
            made[name] = model, export(model, ["onnxruntime", "openvino"], folder / "b", data=CALIB)
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ofq-w2a2", "ofq-w4a4"])
def test_runtimes_compute_what_was_trained(exported, images, name):
    model, bundle = exported(name)
    with torch.no_grad():
        want = model(torch.from_numpy(images)).numpy()
    for target in bundle.targets:
        for variant in ("float32", "quantized"):
            got = bundle.open_session(target, variant).run({"image": images})["logits"]
            difference = np.abs(got - want).max(1) / want.std()
            # The bias of the head is rounded to its int32 steps; a value on a rounding tie moves single pictures.
            assert np.median(difference) < (1e-5 if variant == "float32" else 2e-3), (target, variant)
            assert (difference > 5e-3).mean() < 0.08, (target, variant)
            assert (got.argmax(1) == want.argmax(1)).mean() > 0.97, (target, variant)
    assert verify(bundle.path).ok


@pytest.mark.parametrize("name, levels", [("ofq-w2a2", {-3, -1, 1, 3}), ("ofq-w4a4", set(range(-8, 8)))])
def test_the_file_holds_4_bit_codes(exported, name, levels):
    bundle = exported(name)[1]
    tensors = [t for t in onnx.load(bundle.path / "model.onnx").graph.initializer if t.data_type == INT4]
    assert sorted(np.prod(t.dims) for t in tensors) == sorted([3 * 48 * 48, 48 * 48, 48 * 48, 4 * 48 * 48, 4 * 48 * 48])
    assert {int(code) for t in tensors for code in onnx.numpy_helper.to_array(t).ravel()} == levels
    nodes = bundle.open_session("onnxruntime").placement().nodes
    assert nodes["com.microsoft::MatMulNBits"] == len(tensors), "not dequantized in every call"
    floats, small = ((bundle.path / file).stat().st_size for file in ("reference.onnx", "model.onnx"))
    assert small < 0.55 * floats
    assert bundle.file("openvino/quantized.bin").stat().st_size < 0.4 * floats


def test_the_bundle_says_what_it_is(exported):
    bundle = exported("ofq-w2a2")[1]
    manifest, card = bundle.manifest, (bundle.path / "README.md").read_text()
    assert manifest.precision == {
        "int8 weights, 8-bit inputs, computed in float32": 1, "int4 weights, 2-bit inputs, computed in float32": 5,
        "int8": 1, "float32": 1,
    }  # fmt: skip
    assert manifest.recipe == "ofq-w2a2" and manifest.calibration is None
    assert any("2 bits as int4 codes per output channel, the first" in note for note in manifest.notes)
    assert "5 int4 weights, 2-bit inputs, computed in float32" in card and "floating point throughout" not in card
    lock = (bundle.path / "recipe.lock.yaml").read_text()
    assert "trained:\n  name: ofq-w2a2" in lock


def test_a_recipe_is_refused(tmp_path):
    model = load_trained(write_trained(tmp_path / "model.safetensors", "lsq-w4a4"))
    for recipe in ("w8a8", "float32", {"name": "mine"}):
        with pytest.raises(
            RecipeError, match=r"4-bit weights and 4-bit .*\(lsq-w4a4\), and recipe .* once more\. Leave"
        ):
            export(model, ["onnxruntime"], tmp_path / "b", recipe=recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_the_ordinary_command(tmp_path, edgeattn):
    weights = write_trained(tmp_path / "model.safetensors", "ofq-w3a3")
    given = ("export", "deit_tiny", "--weights", weights, "--target", "onnxruntime")
    code, shown, _ = edgeattn(*given, "-o", tmp_path / "b")
    assert code == 0 and "int4 weights, 3-bit inputs, computed in float32" in shown
    code, shown, _ = edgeattn("inspect", tmp_path / "b")
    assert code == 0 and "# deit_tiny, ofq-w3a3" in shown
    result = evaluate_bundle(tmp_path / "b", VAL, limit=40)
    assert {"float32", "quantized"} == set(result.targets[0].accuracy)
    code, _, message = edgeattn(*given, "--quant", "w4a16", "-o", tmp_path / "c")
    assert code == 2 and "recipe 'w4a16' would quantize it once more. Leave the recipe out (--quant)" in message
    code, _, message = edgeattn(*given, "--img-size", 64, "-o", tmp_path / "c")
    assert code == 2 and "was trained with its quantizers on pictures of 32x32, not 64x64" in message
    assert not (tmp_path / "c").exists()
