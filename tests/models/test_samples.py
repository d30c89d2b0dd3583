"""The shipped weights: they load, know their classes, and stay accurate when quantized."""

import numpy as np
import pytest
import torch

from edgeattn import create_model
from edgeattn.data.source import open_source
from edgeattn.quant.quantize import quantize
from tests.conftest import CALIB, SAMPLES, VAL

SHIPPED = {"efficientvit_m0_eurosat": "efficientvit_m0", "litv2_eurosat": "litv2_s", "deit_eurosat": "deit_tiny",
           "care_eurosat": "care_s0"}  # fmt: skip


def test_every_folder_with_weights_is_listed_and_small():
    found = {path.parent.name: path.stat().st_size for path in SAMPLES.glob("*/model.safetensors")}
    assert found.keys() == SHIPPED.keys() and sum(found.values()) < 16e6


@pytest.mark.slow
@pytest.mark.parametrize("folder", SHIPPED)
def test_accuracy_and_quantization(folder):
    model = create_model(SHIPPED[folder], weights=SAMPLES / folder / "model.safetensors")
    assert len(model.class_names) == 10
    samples = list(open_source(VAL))
    x = torch.from_numpy(np.stack([model.preprocessing(sample.image) for sample in samples]))
    labels = torch.tensor([sample.label for sample in samples])
    result = quantize(model, "w8a8", CALIB)
    with torch.no_grad():
        plain = torch.cat([result.float_graph(part).argmax(1) for part in x.split(100)])
        codes = torch.cat([result.graph(part).argmax(1) for part in x.split(100)])
    assert (plain == labels).float().mean() > 0.88, "1,000 pictures, compressed once more"
    assert (plain == codes).float().mean() > 0.95
