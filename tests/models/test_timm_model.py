"""`timm:NAME` as a model. All tests but the last use a stand-in package of that name with two tiny networks.

It answers the six calls that edgeattn makes as timm 1.0.31 does: timm itself imports only beside a torchvision of the
same build as torch. The last test runs the real one where it imports.
"""

import subprocess
import sys

import pytest
import torch

from edgeattn import create_model
from edgeattn.errors import CheckpointError, MissingDependency, UsageError
from edgeattn.quant.quantize import quantize

STAND_IN = '''
import types
import torch
from torch import nn
from . import data

__version__ = "0.0-stand-in"
CFG = dict(input_size=(3, 32, 32), interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=0.9)


class Net(nn.Module):
    """Takes any size, as convolutional networks of timm do: no img_size argument."""
    def __init__(self, num_classes=1000, in_chans=3, drop_rate=0.0):
        super().__init__()
        self.num_classes, self.pretrained_cfg = num_classes, {**CFG, "classifier": "fc"}
        self.conv, self.bn = nn.Conv2d(in_chans, 8, 3, 2), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class Vit(Net):
    """Its parameters depend on the size."""
    def __init__(self, img_size=32, **options):
        super().__init__(**options)
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        if sides[0] % 8:
            raise AssertionError("img_size must be a multiple of 8")
        self.pretrained_cfg.update(classifier=("fc", "fc_dist"), crop_mode="squash", interpolation="random")
        self.fc_dist, self.pos_embed = nn.Linear(8, self.num_classes), nn.Parameter(torch.zeros(1, 1, *sides))

    def forward(self, x):
        return super().forward(x + self.pos_embed)


MODELS = {"net18": Net, "vit_tiny": Vit}


def is_model(name):
    return name in MODELS


def list_models():
    return sorted(MODELS)


def get_pretrained_cfg(name):
    return types.SimpleNamespace(classifier=MODELS[name.partition(".")[0]]().pretrained_cfg["classifier"])


def create_model(name, pretrained=False, **options):
    assert not pretrained
    return MODELS[name.partition(".")[0]](**options)
'''
DATA = """
def resolve_model_data_config(model):
    return {"crop_mode": "center", **{k: v for k, v in model.pretrained_cfg.items() if k != "classifier"}}
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `timm` that is not timm, for this test."""
    folder = tmp_path / "site" / "timm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(STAND_IN)
    (folder / "data.py").write_text(DATA)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder.parent)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]


def test_preparation_comes_from_timm(stand_in):
    model = create_model("timm:net18.a1_in1k")
    prepared = model.preprocessing
    assert (prepared.size, prepared.crop_fraction, prepared.interpolation) == ((32, 32), 0.9, "bilinear")
    assert prepared.mean == (0.5, 0.5, 0.5) and prepared.std == (0.25, 0.25, 0.25)
    assert model.name == "timm:net18.a1_in1k" and model.notes == [] and not model.training
    assert create_model("timm:net18", drop_rate=0.1, num_classes=7).num_classes == 7


def test_size_is_passed_on_where_the_model_takes_it(stand_in):
    vit = create_model("timm:vit_tiny", img_size=(16, 24))
    assert vit.pos_embed.shape[2:] == (16, 24) and vit.preprocessing.size == (16, 24)
    assert vit.preprocessing.interpolation == "bicubic" and "interpolation 'random' is unknown" in vit.notes[1]
    assert vit.notes[0] == "timm:vit_tiny crops with 'squash'; the centre is taken"
    net = create_model("timm:net18", img_size=48)
    assert net.preprocessing.size == (48, 48)
    assert net.notes == ["timm:net18 takes any size; its pictures are prepared as 48x48"]


@pytest.mark.parametrize("name, heads", [("timm:net18", ("fc",)), ("timm:vit_tiny", ("fc", "fc_dist"))])
def test_weights_set_the_classes_and_a_new_head_is_noted(stand_in, tmp_path, name, heads):
    source = create_model(name, num_classes=6)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = create_model(name, weights=tmp_path / "w.pth")
    x = torch.randn(2, 3, 32, 32)
    assert model.num_classes == 6 and torch.equal(model(x), source(x)) and model.heads == heads
    other = create_model(name, weights=tmp_path / "w.pth", num_classes=4)
    assert other(x).shape == (2, 4) and torch.equal(other.conv.weight, source.conv.weight)
    assert "classifier re-initialised: the checkpoint has 6 classes, the model 4" in other.notes[-1]


def test_weights_of_another_model_are_refused(stand_in, tmp_path):
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the model. 9 missing: .* 1 unexpected: a.weight"):
        create_model("timm:net18", weights=tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"'timm:net18' is not a model of the zoo. Pass the path of a file"):
        create_model("timm:net18", weights="official")


@pytest.mark.parametrize(
    "name, config, said",
    [
        ("timm:net81", {}, "has no model 'net81': did you mean timm:net18"),
        ("timm:net18", {"fooo": 1}, r"unexpected keyword argument 'fooo'. Expected arguments of timm.create_model"),
        ("timm:net18", {"in_chans": 1}, r"in_chans is 1; expected 3 \(RGB\). Leave it out"),
        ("timm:vit_tiny", {"img_size": 20}, "refuses: img_size must be a multiple of 8"),
    ],
)
def test_what_timm_does_not_have(stand_in, name, config, said):
    with pytest.raises(UsageError, match=said):
        create_model(name, **config)


def test_it_is_quantized_like_any_other(stand_in, pictures):
    result = quantize(create_model("timm:net18", num_classes=3), "w8a8", pictures)
    assert result.precision == {"int8": 1, "float32": 1} and result.preprocessing.size == (32, 32)


@pytest.mark.parametrize("error", ["ImportError('No module named timm')", "RuntimeError('torchvision::nms')"])
def test_timm_that_does_not_import_says_what_to_do(tmp_path, monkeypatch, stand_in, error):
    (tmp_path / "site" / "timm" / "__init__.py").write_text(f"raise {error}")
    with pytest.raises(
        MissingDependency, match=r"(No module named timm|nms). Run: pip install timm. It needs a torchvi"
    ):
        create_model("timm:net18")


def test_no_other_model_needs_it():
    script = "import sys, edgeattn; edgeattn.create_model('deit_tiny', depth=1); print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "False"


def reason_real_timm_is_missing():
    """Why timm cannot be used here; "" if it can. In a process of its own: a torchvision that fails leaves traces."""
    command = [sys.executable, "-W", "ignore", "-c", "import timm, timm.data"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it fails"])[-1]


def test_the_real_timm(tmp_path):
    reason = reason_real_timm_is_missing()
    if reason:
        pytest.skip(f"timm does not import here: {reason}")
    source = create_model("timm:resnet10t", num_classes=5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = create_model("timm:resnet10t", weights=tmp_path / "w.pth", img_size=64)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), source(x)) and model.preprocessing.size == (64, 64) and model.heads == ("fc",)
    graph = quantize(model, "float32").float_graph
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
    vit = create_model("timm:vit_tiny_patch16_224", img_size=64)
    assert vit(x).shape == (2, 1000) and vit.preprocessing.size == (64, 64) and vit.preprocessing.mean == (0.5,) * 3
