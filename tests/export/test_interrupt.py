"""Ctrl-C in the middle of an export: nothing half-written stays, and what was finished is used again."""

import tempfile

import numpy as np
import pytest
import torch

from edgeattn.export.pipeline import export
from edgeattn.quant import reconstruct
from edgeattn.runtime.bundle import Bundle
from edgeattn.runtime.verify import verify
from tests.quant.test_reconstruct import Small, recipe

UNITS = 9  # layers of Small


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def scratch(tmp_path_factory, monkeypatch):
    """Where temporary files go if a folder beside the output is not named for them."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def left(*folders):
    """What is in folders, but for the cache that torch opens once in a process."""
    return [path.name for folder in folders for path in folder.iterdir() if not path.name.startswith("torchinductor")]


def stop_at(stage, count=1):
    """A progress callback that is interrupted at the count-th report of a stage."""
    reports = []

    def progress(reported, done, total):
        reports.extend([reported] * (reported == stage))
        if len(reports) == count:
            raise KeyboardInterrupt

    return progress


def interrupted(pictures, after):
    """Pictures that end in Ctrl-C."""
    yield from pictures[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage, count", [("ranges", 2), ("reconstruct", 3), ("onnx", 2), ("compile", 2)])
def test_nothing_is_left_behind(small, pictures, tmp_path, scratch, stage, count):
    settings = recipe(activations={}, iterations=1) | {"calibration": {"images": 24, "batch_size": 8}}
    with pytest.raises(KeyboardInterrupt):
        export(small, ["onnxruntime"], tmp_path / "b", recipe=settings, data=pictures, progress=stop_at(stage, count))
    assert left(tmp_path, scratch) == []


def test_pictures_may_stop_too(small, pictures, tmp_path, scratch):
    with pytest.raises(KeyboardInterrupt):
        export(small, ["onnxruntime"], tmp_path / "b", data=interrupted(pictures, 20))
    assert left(tmp_path, scratch) == []


def test_an_older_bundle_stays_as_it_was(small, pictures, tmp_path, scratch):
    options = {"recipe": "float32", "data": pictures}
    before = export(small, ["onnxruntime"], tmp_path / "b", **options).manifest.files
    with torch.no_grad():
        small.head.bias.add_(1)
    with pytest.raises(KeyboardInterrupt):
        export(small, ["onnxruntime"], tmp_path / "b", overwrite=True, progress=stop_at("compile"), **options)
    assert left(tmp_path, scratch) == ["b"]
    assert verify(tmp_path / "b").ok and Bundle.open(tmp_path / "b").manifest.files == before


@pytest.mark.parametrize("where", ["learning", "writing"])
def test_the_work_folder_holds_finished_parts_only(small, pictures, tmp_path, scratch, monkeypatch, where):
    settings, calls = recipe(iterations=1), []
    owner, name = (reconstruct, "_learn_layer") if where == "learning" else (np, "savez_compressed")
    original = getattr(owner, name)

    def third_time(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            if where == "writing":
                args[0].write(b"half a file")
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    options = {"recipe": settings, "data": pictures, "work": tmp_path / "work"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, third_time)
        export(small, ["onnxruntime"], tmp_path / "b", **options)
    assert left(tmp_path, scratch) == ["work"]
    kept = sorted(path for path in (tmp_path / "work").rglob("*") if path.is_file())
    assert [path.name for path in kept] == ["0000.npz", "0001.npz"]
    bundle = export(small, ["onnxruntime"], tmp_path / "b", **options)
    assert any(f"reconstructed {UNITS} layers (2 by an earlier run)" in note for note in bundle.manifest.notes)
