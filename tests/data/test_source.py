import io
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeattn.data.source import open_source
from edgeattn.errors import DataError


def picture(seed=0, size=(10, 8)):
    return np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(picture(i)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_folder_with_classes(folder):
    source = open_source(folder)
    assert source.class_names == ("cat", "dog") and len(source) == 6 and source.labelled
    samples = list(source)
    assert [s.label for s in samples] == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(np.asarray(samples[4].image), picture(1)) and samples[4].name.endswith("dog/1.png")
    assert [s.name for s in source] == [s.name for s in samples], "a source can be walked again"


def test_flat_folder_has_no_labels(folder):
    source = open_source(folder / "cat")
    assert not source.labelled and [s.label for s in source] == [None] * 3


def test_no_data_is_an_error_never_random_data(tmp_path):
    with pytest.raises(DataError, match="never calibrates or validates on random data"):
        open_source(None)
    with pytest.raises(DataError, match=r"holds no image .*never makes up data"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "none")
    with pytest.raises(DataError, match="empty"):
        open_source([])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"neither a folder nor an \.npz"):
        open_source(tmp_path / "a.txt")


def test_corrupt_image_is_named_and_skipped_only_on_request(folder, caplog):
    good = (folder / "cat" / "1.png").read_bytes()
    (folder / "cat" / "1.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"cannot read image .*cat/1\.png.*--skip-bad"):
        list(open_source(folder))
    source = open_source(folder, skip_bad=True)
    assert len(list(source)) == 5 and source.skipped == [str(folder / "cat" / "1.png")]
    assert "skipped unreadable image" in caplog.text


def test_only_corrupt_images_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="none of its 1 image"):
        list(open_source(tmp_path, skip_bad=True))


@pytest.mark.parametrize("mode, said", [("L", "grey"), ("RGBA", "alpha dropped"), ("P", "palette"), ("CMYK", "CMYK")])
def test_other_pixel_modes_become_rgb_and_it_is_said(tmp_path, mode, said, caplog):
    Image.fromarray(picture()).convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    (sample,) = open_source(tmp_path)
    assert sample.image.mode == "RGB" and said in caplog.text


def test_sixteen_bit_grey_is_refused_by_name(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png.*8-bit RGB"):
        list(open_source(tmp_path))


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif)
    assert next(iter(open_source(tmp_path))).image.size == (8, 10)


def test_npz_of_frames_and_of_jpegs(tmp_path):
    frames = np.stack([picture(i) for i in range(5)])
    np.savez_compressed(tmp_path / "f.npz", images=frames, labels=np.arange(5) % 2, class_names=np.array(["a", "b"]))
    source = open_source(tmp_path / "f.npz")
    assert source.class_names == ("a", "b") and [s.label for s in source] == [0, 1, 0, 1, 0]
    assert all(np.array_equal(np.asarray(s.image), f) for s, f in zip(source, frames, strict=True))
    streams = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG")
        streams.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, streams)])
    np.savez(tmp_path / "j.npz", jpeg=np.frombuffer(b"".join(streams), np.uint8), offsets=offsets)
    jpegs = list(open_source(tmp_path / "j.npz"))
    assert len(jpegs) == 5 and jpegs[0].image.size == (10, 8) and jpegs[0].label is None


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"pixels": np.zeros(3)}, "has the arrays pixels; expected 'images'"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)}, "2 images but 3 labels"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no image"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "pixels are float32, expected uint8"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"array of shape \(3, 8, 8\), expected"),
    ],
)
def test_wrong_npz_says_what_is_expected(tmp_path, arrays, said):
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(DataError, match=said):
        list(open_source(tmp_path / "w.npz"))


def test_damaged_npz(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DataError, match=r"w\.npz as an NPZ"):
        open_source(tmp_path / "w.npz")


def test_iterables_with_and_without_labels():
    assert [s.label for s in open_source([(picture(0), 1), (picture(1), 0)])] == [1, 0]
    once = open_source((picture(i), i) for i in range(3))
    assert [s.label for s in once] == [s.label for s in once] == [0, 1, 2]
    assert all(np.array_equal(np.asarray(s.image), picture(i)) for i, s in enumerate(once))
    with pytest.raises(DataError, match=r"Python list\[1\].*float64"):
        list(open_source([picture(), np.zeros((4, 4, 3))]))


def test_endless_iterators_are_drawn_as_far_as_needed():
    source = open_source(Image.fromarray(picture(i)) for i in itertools.count())
    for count in (3, 5, 2):
        walked = [np.asarray(s.image) for _, s in zip(range(count), source, strict=False)]
        assert len(walked) == count and np.array_equal(walked[-1], picture(count - 1))


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_spread_takes_one_from_each_stretch(count, limit):
    source = open_source([(np.zeros((1, 1, 3), np.uint8), i) for i in range(count)]).spread(limit)
    labels = [s.label for s in source]
    assert len(labels) == len(source) == min(count, limit) and labels == sorted(set(labels))
    assert all(abs(label - i * count / len(labels)) <= count / len(labels) + 1 for i, label in enumerate(labels))


def test_npz_streams(tmp_path):
    """Memory while walking does not grow with the number of pictures."""
    peaks = []
    for count in (50, 400):
        np.savez(tmp_path / f"{count}.npz", images=np.zeros((count, 64, 64, 3), np.uint8))
        source = open_source(tmp_path / f"{count}.npz")
        tracemalloc.start()
        assert sum(1 for _ in source) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
