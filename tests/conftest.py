"""Small real models and data that several rooms' tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeattn import cli, create_model
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.runtime_plugins import cpu

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
WEIGHTS = SAMPLES / "efficientvit_m0_eurosat" / "model.safetensors"
CALIB = SAMPLES / "eurosat64" / "calib"
VAL = SAMPLES / "eurosat64" / "val"

needs_plugin = pytest.mark.skipif(cpu.missing_reason() is not None, reason=str(cpu.missing_reason()))

TINY = dict(embed_dim=(32, 48, 64), depth=(1, 1, 1), num_heads=(2, 3, 4), kernels=(5, 3, 3, 3), key_dim=(8, 8, 8))


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights and BatchNorm statistics that leave no branch near zero, as a trained model has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
                module.weight.uniform_(0.3, 0.9, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_(0, 0.5, generator=generator)
    return model.eval()


@pytest.fixture
def tiny_model():
    """An EfficientViT with 2, 3 and 4 heads, 10 classes, 64 px: well under a second to run."""
    torch.manual_seed(0)
    model = randomize(create_model("efficientvit_m0", num_classes=10, img_size=64, **TINY))
    model.preprocessing = Preprocessing(size=(64, 64))
    return model


@pytest.fixture
def pictures():
    """32 smooth random pictures, (64, 64, 3) uint8: not calibration data for anything but these tests."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 255, (32, 8, 8, 3), np.uint8)
    return [np.kron(p, np.ones((8, 8, 1), np.uint8)) for p in small]


@pytest.fixture(scope="session")
def trained_bundle(tmp_path_factory):
    """The shipped model exported once for both targets."""
    from edgeattn.export.pipeline import export

    model = create_model("efficientvit_m0", weights=WEIGHTS)
    return export(model, ["onnxruntime", "openvino"], tmp_path_factory.mktemp("bundles") / "m0", data=CALIB)


@pytest.fixture
def edgeattn(monkeypatch, capsys):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgeattn", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run
