import dataclasses
import json

import pytest
import torch

from edgeattn import create_model
from edgeattn.data.source import open_source
from edgeattn.errors import CheckpointError, DataError, NumericError
from edgeattn.quant.training import TrainConfig, train
from tests.conftest import CALIB

CONFIG = TrainConfig("efficientvit_m0", img_size=32, epochs=3, batch_size=16, ema_decay=0.9)


@pytest.fixture(scope="module")
def data():
    samples = [(s.image, s.label) for s in open_source(CALIB).spread(40)]
    return samples[:32], samples[32:]


class Killed(Exception):
    pass


def kill_after(epoch):
    def progress(record):
        if record["epoch"] == epoch:
            raise Killed

    return progress


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, data):
    train(CONFIG, *data, tmp_path / "whole")
    with pytest.raises(Killed):
        train(CONFIG, *data, tmp_path / "killed", kill_after(1))
    assert (tmp_path / "killed" / "resume.pt").is_file() and not (tmp_path / "killed" / "model.safetensors").exists()
    record = train(CONFIG, *data, tmp_path / "killed")
    assert record["epoch"] == 3 and not (tmp_path / "killed" / "resume.pt").exists()
    models = [create_model("efficientvit_m0", weights=tmp_path / d / "model.safetensors") for d in ("whole", "killed")]
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3] and log[-1]["loss"] < log[0]["loss"]
    assert json.loads((tmp_path / "whole" / "train.json").read_text())["training"]["seed"] == CONFIG.seed


def test_resuming_with_other_settings_is_refused(tmp_path, data):
    with pytest.raises(Killed):
        train(CONFIG, *data, tmp_path, kill_after(1))
    with pytest.raises(CheckpointError, match="belongs to a run with other settings"):
        train(dataclasses.replace(CONFIG, learning_rate=1.0), *data, tmp_path)


def test_a_run_begun_before_there_were_quantizers_goes_on(tmp_path, data):
    with pytest.raises(Killed):
        train(CONFIG, *data, tmp_path, kill_after(1))
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    for key in ("min_learning_rate", "subset", "qat", "weights", "cga_epochs"):
        del state["config"][key]
    del state["oscillation"]
    torch.save(state, tmp_path / "resume.pt")
    assert train(CONFIG, *data, tmp_path)["epoch"] == 3


def test_wrong_data_and_divergence(tmp_path, data):
    with pytest.raises(DataError, match="has no labels"):
        train(CONFIG, [image for image, _ in data[0]], data[1], tmp_path)
    with pytest.raises(DataError, match="32 training images are fewer than one batch of 64"):
        train(dataclasses.replace(CONFIG, batch_size=64), *data, tmp_path)
    with pytest.raises(DataError, match="8 training images are fewer than one batch of 16"):
        train(dataclasses.replace(CONFIG, subset=8), *data, tmp_path)
    with pytest.raises(NumericError, match="loss is nan"):
        train(dataclasses.replace(CONFIG, learning_rate=1e30, warmup_share=0.0, epochs=6), *data, tmp_path)
