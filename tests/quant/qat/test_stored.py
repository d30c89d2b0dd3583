import json

import pytest
import safetensors.torch
import torch

from edgeattn.errors import CheckpointError
from edgeattn.models.checkpoint import METADATA_KEY, read_metadata
from edgeattn.quant.qat.stored import load_model
from tests.conftest import SAMPLES
from tests.quant.qat.conftest import TINY

SMALL = SAMPLES / "deit_eurosat" / "model.safetensors"


@pytest.fixture
def trained(tiny, tmp_path):
    """(model, its file as `edgeattn train --qat` writes it)."""
    model = tiny("ofq-w2a2")
    metadata = {
        "model": "deit_tiny", "config": TINY, "class_names": ["a", "b", "c"],
        "preprocessing": model.preprocessing.to_dict(), "quantization": model.quantization.to_dict(),
    }  # fmt: skip
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path, metadata={METADATA_KEY: json.dumps(metadata)})
    return model, path


def test_a_trained_file_is_loaded_with_its_quantizers_any_other_as_ever(trained):
    model, path = trained
    x = torch.randn(2, 3, 16, 16)
    for given in ({}, {"num_classes": 3}, {"img_size": 16}, {"img_size": (16, 16)}):
        loaded = load_model("deit_tiny", weights=path, **given)
        assert loaded.quantization == model.quantization and loaded.class_names == ("a", "b", "c")
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
    plain = load_model("deit_tiny", weights=SMALL, num_classes=7)
    assert not hasattr(plain, "quantization") and plain.num_classes == 7
    assert load_model("deit_tiny", img_size=32).preprocessing.size == (32, 32)


@pytest.mark.parametrize("name, given, message", [
    ("deit_small", {}, "was written for 'deit_tiny', not 'deit_small'; name that model"),
    ("deit_tiny", {"num_classes": 5}, "trained with its quantizers for 3 classes, not 5. Leave the number out, or"),
    ("deit_tiny", {"img_size": 32}, "on pictures of 16x16, not 32x32: its scales belong to the places of that size"),
], ids=["name", "classes", "size"])  # fmt: skip
def test_what_training_fixed_cannot_be_changed(trained, name, given, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(name, weights=trained[1], **given)


def test_metadata_needs_no_tensors(trained, tmp_path):
    assert read_metadata(trained[1])["quantization"]["name"] == "ofq-w2a2"
    assert read_metadata(tmp_path / "other.pth") == {}
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(trained[1].read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot read .*broken\.safetensors as safetensors: .* Copy it again"):
        load_model("deit_tiny", weights=broken)
    with pytest.raises(CheckpointError, match="does not exist or is not a file"):
        load_model("deit_tiny", weights=tmp_path / "none.safetensors")
