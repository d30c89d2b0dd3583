"""Every golden file, as a torch module and as exported ONNX in ONNX Runtime."""

from pathlib import Path

import pytest

from tests.golden.runner import check_file

FILES = sorted((Path(__file__).parent / "data").glob("*.json"))
QUICK = ("care_s0", "deit_tiny", "efficientvit_m0", "shvit_s1")  # one export takes 5 to 60 s


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_module(path):
    assert check_file(path, onnx=False) == []


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[] if p.stem in QUICK else pytest.mark.slow, id=p.stem) for p in FILES]
)
def test_onnx(path):
    assert check_file(path, module=False) == []
