import os
import pickle
import re

import pytest
import safetensors.torch
import torch

from edgeattn import create_model
from edgeattn.errors import CheckpointError, NumericError, UsageError
from tests.conftest import TINY, WEIGHTS, randomize


@pytest.fixture
def model():
    torch.manual_seed(1)
    return randomize(create_model("efficientvit_m0", img_size=64, num_classes=10, **TINY))


def reload(path, **config):
    return create_model("efficientvit_m0", weights=path, **{"img_size": 64, **TINY, **config})


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def to_timm(key):
    """The timm name of an official key, written independently of the conversion under test."""
    key = re.sub(r"^patch_embed\.(\d)\.", lambda m: f"patch_embed.conv{int(m[1]) // 2 + 1}.", key)
    stage = re.match(r"^blocks(\d)\.(\d+)\.", key)
    if stage:
        s, b = int(stage[1]), int(stage[2])
        names = {0: "downsample.res1", 1: "downsample.patchmerge", 2: "downsample.res2"}
        place = f"blocks.{b}" if s == 1 else names.get(b, f"blocks.{b - 3}")
        key = f"stages.{s - 1}.{place}." + key[stage.end() :]
    return re.sub(r"^head\.l\.", "head.linear.", re.sub(r"\.c\.weight$", ".conv.weight", key))


@pytest.mark.parametrize("wrap", ["model", "state_dict", "bare", "ddp"])
def test_official_pth_layouts(model, tmp_path, wrap):
    state = model.state_dict()
    if wrap == "ddp":
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save(state if wrap in ("bare", "ddp") else {wrap: state, "epoch": 3}, tmp_path / "m.pth")
    assert same(model, reload(tmp_path / "m.pth"))


def test_timm_names_without_index_buffers(model, tmp_path):
    state = {to_timm(k): v for k, v in model.state_dict().items() if not k.endswith("attention_bias_idxs")}
    assert "stages.1.downsample.patchmerge.conv1.conv.weight" in state and "patch_embed.conv4.bn.bias" in state
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    assert same(model, reload(tmp_path / "m.safetensors"))


def test_two_dimensional_matrices_load_as_1x1_convolutions(model, tmp_path):
    state = {k: v.flatten(1) if v.dim() == 4 and v.shape[2:] == (1, 1) else v for k, v in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "m.pth")
    loaded = reload(tmp_path / "m.pth")
    assert same(model, loaded) and any("2-D matrix" in note for note in loaded.notes)


def test_half_precision_weights_load_as_float32(model, tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, tmp_path / "m.pth")
    assert {p.dtype for p in reload(tmp_path / "m.pth").parameters()} == {torch.float32}


def test_wrong_file_names_missing_unexpected_and_misshaped_keys(model, tmp_path):
    state = model.state_dict()
    del state["blocks1.0.dw0.m.c.weight"]
    state["something.else"] = torch.zeros(1)
    state["patch_embed.0.c.weight"] = torch.zeros(9, 3, 3, 3)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as caught:
        reload(tmp_path / "m.pth")
    text = str(caught.value)
    assert "1 missing: blocks1.0.dw0.m.c.weight" in text and "1 unexpected: something.else" in text
    assert "patch_embed.0.c.weight is [9, 3, 3, 3], expected [4, 3, 3, 3]" in text and str(tmp_path / "m.pth") in text


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_pickle_that_wants_to_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": RunsCode()}, "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": RunsCode()}))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="wants to run code when loaded, which edgeattn refuses"):
            reload(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "noise"])
def test_damaged_files_are_refused(model, tmp_path, suffix, damage):
    path = tmp_path / f"m{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "noise": b"\x93noise" * 100}[damage])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        reload(path)


def test_missing_file_and_wrong_content(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        reload(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list; expected a state dict"):
        reload(tmp_path / "list.pth")


def test_nan_weight_is_named(model, tmp_path):
    state = model.state_dict()
    state["blocks2.3.ffn0.m.pw1.c.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(NumericError, match=r"blocks2\.3\.ffn0\.m\.pw1\.c\.weight holds 1 NaN"):
        reload(tmp_path / "m.pth")


def test_classes_come_from_the_checkpoint_and_another_number_reinitialises_the_head(model, tmp_path, caplog):
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
    assert reload(tmp_path / "m.pth").num_classes == 10
    other = reload(tmp_path / "m.pth", num_classes=3)
    assert other.head.l.weight.shape[0] == 3 and "classifier re-initialised" in caplog.text
    assert torch.equal(other.blocks1.state_dict()["0.dw0.m.c.weight"], model.blocks1.state_dict()["0.dw0.m.c.weight"])


def test_bias_tables_resize_to_another_input_and_say_so(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
    other = reload(tmp_path / "m.pth", img_size=96)
    assert any("resized from 4x4 to 6x6 (bicubic)" in note for note in other.notes)
    assert other(torch.zeros(1, 3, 96, 96)).shape == (1, 10)


def test_shipped_weights_carry_their_classes_and_preprocessing():
    model = create_model("efficientvit_m0", weights=WEIGHTS)
    assert model.class_names[:2] == ("AnnualCrop", "Forest") and model.preprocessing.size == (112, 112)
    with pytest.raises(CheckpointError, match="written for 'efficientvit_m0', not 'efficientvit_m1'"):
        create_model("efficientvit_m1", weights=WEIGHTS)


def test_unknown_model_suggests_near_names():
    with pytest.raises(UsageError, match="unknown model 'eficientvit_m5': did you mean efficientvit_m5"):
        create_model("eficientvit_m5")


def test_own_callable():
    assert create_model("edgeattn.models.efficientvit:EfficientViT", img_size=32, num_classes=4).num_classes == 4
    with pytest.raises(UsageError, match=r"package\.module:callable"):
        create_model("no_such_module:build")
