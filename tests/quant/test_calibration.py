import numpy as np
import pytest
import torch

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import open_source
from edgeattn.quant.calibration import Calibrator
from edgeattn.quant.recipe import Recipe

PICTURES = [np.full((8, 8, 3), i, np.uint8) for i in range(40)]


@pytest.mark.parametrize("kind", [list, iter], ids=["list", "iterator"])
@pytest.mark.parametrize("count, got", [(8, 8), (40, 40), (100, 40)])
def test_samples_are_as_many_as_there_are(kind, count, got):
    calibrator = Calibrator(open_source(kind(PICTURES)), Recipe(name="x"), Preprocessing(size=(8, 8)))
    first, again = calibrator.sample(count), calibrator.sample(count)
    assert first.shape == (got, 3, 8, 8) and torch.equal(first, again)
    assert len({float(picture.mean()) for picture in first}) == got, "no picture twice"
