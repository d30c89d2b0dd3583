import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UsageError


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([0.5, 0.875, 1.0]))
def test_any_picture_gives_the_models_size(width, height, fraction):
    p = Preprocessing(size=(32, 48), crop_fraction=fraction)
    out = p(Image.new("RGB", (width, height), (255, 0, 10)))
    assert out.shape == (3, 32, 48) and out.dtype == np.float32 and out.flags.c_contiguous
    want = (np.array([255, 0, 10]) / 255 - p.mean) / np.array(p.std)
    np.testing.assert_allclose(out[:, 5, 5], want, rtol=1e-5, atol=1e-5)


def test_centre_is_kept():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = 255
    cropped = np.asarray(Preprocessing(size=(40, 20)).resize_and_crop(Image.fromarray(pixels)))
    assert cropped.shape == (40, 20, 3) and (cropped == 255).all()


def test_matching_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    assert np.array_equal(np.asarray(Preprocessing(size=(16, 16)).resize_and_crop(Image.fromarray(pixels))), pixels)


def test_round_trip_and_refusals():
    p = Preprocessing(size=(224, 320), crop_fraction=0.9, interpolation="bilinear")
    assert Preprocessing.from_dict(p.to_dict()) == p
    with pytest.raises(UsageError, match="'cubic' is unknown; use one of nearest, bilinear"):
        Preprocessing(size=(8, 8), interpolation="cubic")
    with pytest.raises(UsageError, match=r"crop_fraction is 1\.5"):
        Preprocessing(size=(8, 8), crop_fraction=1.5)
