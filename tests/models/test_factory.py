"""Creating models: what it costs to load weights, and that what is not loaded is random."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from edgeattn import create_model
from tests.conftest import TINY, randomize

WIDE = {"embed_dim": 768, "num_heads": 12, "depth": 5}  # of deit_small: 37 M parameters, 149 MB


@pytest.fixture(scope="module")
def wide_files(tmp_path_factory):
    """The same weights as a plain file, beside an optimizer's state, in half precision, and as safetensors."""
    folder = tmp_path_factory.mktemp("wide")
    state = create_model("deit_small", **WIDE).state_dict()
    torch.save({"model": state}, folder / "plain.pth")
    torch.save({"optimizer": {i: v + 1 for i, v in enumerate(state.values())}, "model": state}, folder / "training.pth")
    torch.save({"model": {key: value.half() for key, value in state.items()}}, folder / "half.pth")
    torch.save({"model": state}, folder / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "plain.safetensors")
    return folder


# Not ru_maxrss: a process starts with that of the one that started it.
PEAK = """
import json, re, sys
from pathlib import Path
from edgeattn import create_model
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
create_model("deit_tiny", depth=1)
before = peak()
model = create_model("deit_small", weights=sys.argv[1], **json.loads(sys.argv[2]))
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize(
    "name", ["plain.pth", *(pytest.param(n, marks=pytest.mark.slow) for n in
             ("training.pth", "half.pth", "old.pth", "plain.safetensors"))]
)  # fmt: skip
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_weights_once(wide_files, name):
    command = [sys.executable, "-c", PEAK, wide_files / name, json.dumps(WIDE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    # Once, and what is mapped or converted at the time: an eighth, or half of the largest part in half precision.
    assert 0.5 < float(done.stdout) < 1.5


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loaded_weights_are_parameters_like_any_other(tmp_path, suffix):
    torch.manual_seed(0)
    source = create_model("dit_s_8", depth=1, hidden_size=64, num_heads=2, num_classes=3)
    nn.init.normal_(source.final_layer.linear.weight)
    path = tmp_path / f"w{suffix}"
    safetensors.torch.save_file(source.state_dict(), path) if suffix != ".pth" else torch.save(
        source.state_dict(), path
    )
    model = create_model("dit_s_8", weights=path, depth=1, hidden_size=64, num_heads=2, num_classes=3)
    inputs = torch.randn(2, 4, 32, 32), torch.tensor([3, 700]), torch.tensor([1, 3])
    expected = source(*inputs)
    assert torch.equal(model(*inputs), expected)
    for (key, parameter), other in zip(model.named_parameters(), source.parameters(), strict=True):
        assert type(parameter) is nn.Parameter and parameter.is_leaf and parameter.dtype == torch.float32
        assert parameter.requires_grad == other.requires_grad == (key != "pos_embed")
    path.write_bytes(b"another file under the same name")
    assert torch.equal(model(*inputs), expected)
    model(*inputs).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert not torch.equal(model(*inputs), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_one_tensor_under_two_names_is_two_parameters(tmp_path, zipped):
    state = create_model("efficientvit_m0", img_size=64, num_classes=10, **TINY).state_dict()
    first, second = "blocks1.0.dw0.m.c.weight", "blocks1.0.dw1.m.c.weight"
    state[second] = state[first]
    state["head.l.weight"] = state["head.l.weight"].t().contiguous().t()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    model = create_model("efficientvit_m0", weights=tmp_path / "w.pth", img_size=64, **TINY)
    one, other = model.get_parameter(first), model.get_parameter(second)
    assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
    assert model.head.l.weight.is_contiguous() and torch.equal(model.head.l.weight, state["head.l.weight"])


def test_tied_parameters_stay_tied(tmp_path, monkeypatch):
    """No model of the zoo has any; one of the user's may."""

    def build(**config):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        net.preprocessing = None
        return net

    monkeypatch.setattr(sys.modules[__name__], "build", build, raising=False)
    torch.save(build().state_dict(), tmp_path / "w.pth")
    model = create_model(f"{__name__}:build", weights=tmp_path / "w.pth")
    assert model[0].weight is model[1].weight


def test_without_weights_a_model_is_random_and_trainable():
    def new(seed):
        torch.manual_seed(seed)
        return create_model("deit_tiny", depth=2, img_size=64, num_classes=4)

    one, same, other = new(1), new(1), new(2)
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad
        assert a.dim() == 1 or not torch.equal(a, c)
    one(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters())


def test_a_new_head_is_random_too(tmp_path):
    source = randomize(create_model("efficientvit_m0", img_size=64, num_classes=10, **TINY))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = create_model("efficientvit_m0", weights=tmp_path / "w.pth", num_classes=200, img_size=64, **TINY)
    assert model.head.l.weight.std().item() == pytest.approx(0.02, rel=0.1) and not model.head.l.bias.any()
