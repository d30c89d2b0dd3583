import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from edgeattn import create_model
from edgeattn.data.source import open_source
from edgeattn.errors import CheckpointError, NumericError, RecipeError, UsageError
from edgeattn.quant.qat.session import QatSession, distillation_loss, load_teacher
from edgeattn.quant.qat.settings import preset
from edgeattn.quant.qat.stored import load_trained
from edgeattn.quant.training import TrainConfig, train
from edgeattn.quant.training_config import training_config
from tests.conftest import SAMPLES
from tests.quant.qat.conftest import TINY

NAMES = ("red", "green", "blue")
SHAPE = {key: value for key, value in TINY.items() if key not in ("img_size", "num_classes")}


def pictures(count, seed):
    """Three classes of smooth noise, each brighter in another channel."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = generator.integers(0, 120, (count, 16, 16, 3))
    images[np.arange(count), :, :, labels] += 100
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train.npz, val.npz and float.safetensors of a tiny DeiT trained on them."""
    root = tmp_path_factory.mktemp("qat")
    for name, count, seed in (("train", 48, 0), ("val", 21, 1)):
        images, labels = pictures(count, seed)
        np.savez(root / f"{name}.npz", images=images, labels=labels, class_names=np.array(NAMES))
    config = TrainConfig("deit_tiny", img_size=16, epochs=6, batch_size=16, ema_decay=0.5, model_config=SHAPE)
    train(config, root / "train.npz", root / "val.npz", root / "float")
    (root / "float" / "model.safetensors").rename(root / "float.safetensors")
    return root


def qat_config(folder, name="ofq-w2a2", **given):
    given = {"epochs": 2, "cga_epochs": 1 if preset(name).cga else None, "batch_size": 16, **given}
    return training_config("deit_tiny", qat=name, weights=str(folder / "float.safetensors"), **given)


def teacher(folder):
    return load_teacher("deit_tiny", str(folder / "float.safetensors"), 16)


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["ofq-w2a2", "lsq-w3a3", "lsqplus-w4a4"])
def test_a_killed_run_goes_on_to_the_same_weights_and_log(tmp_path, folder, name):
    def kill(record):
        raise Killed

    config, data = qat_config(folder, name), (folder / "train.npz", folder / "val.npz")
    whole = train(config, *data, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, *data, tmp_path / "killed", kill)
    again = train(config, *data, tmp_path / "killed")
    assert {**whole, "seconds": 0} == {**again, "seconds": 0}
    states = [safetensors.torch.load_file(tmp_path / d / "model.safetensors") for d in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in log] == ["train", "train"] + ["anneal"] * preset(name).cga
    assert all(0 <= line["oscillating"] <= 1 and 0 <= line["near_boundary"] <= 1 for line in log)
    assert ("free" in log[-1]) == preset(name).cga


def test_annealing_moves_only_few_weights(tmp_path, folder):
    data = folder / "train.npz", folder / "val.npz"
    for name, epochs in (("before", 0), ("after", 1)):
        train(qat_config(folder, cga_epochs=epochs, learning_rate=1e-2), *data, tmp_path / name)
    before, after = (load_trained(tmp_path / name / "model.safetensors").state_dict() for name in ("before", "after"))
    assert not torch.equal(before["head.weight"], after["head.weight"])
    for key in ("blocks.0.mlp.fc1.weight", "blocks.1.attn.value.weight"):
        assert (before[key] != after[key]).float().mean() < 0.2, key


def test_saved_file_gives_the_model_back_at_any_batch_size(tmp_path, folder):
    record = train(qat_config(folder), folder / "train.npz", folder / "val.npz", tmp_path)
    model = load_trained(tmp_path / "model.safetensors")
    assert (model.name, model.class_names) == ("deit_tiny", NAMES)
    assert model.quantization == preset("ofq-w2a2") and not model.training
    samples = list(open_source(folder / "val.npz"))
    images = torch.from_numpy(np.stack([model.preprocessing(sample.image) for sample in samples])).double()
    labels, model = torch.tensor([sample.label for sample in samples]), model.double()
    with torch.no_grad():
        results = [torch.cat([model(part) for part in images.split(size)]) for size in (1, 4, 21)]
    assert torch.allclose(results[0], results[1]) and torch.allclose(results[0], results[2])
    # Float64 here, float32 there: one of 21 pictures may differ.
    assert (results[0].argmax(1) == labels).float().mean() == pytest.approx(record["val_top1"], abs=1.1 / 21)
    metadata = json.loads((tmp_path / "train.json").read_text())
    assert metadata["quantization"]["name"] == "ofq-w2a2" and str(folder) not in json.dumps(metadata)
    assert metadata["teacher"].startswith("float.safetensors (sha256 ")
    with pytest.raises(CheckpointError, match=r"load it with edgeattn\.quant\.qat\.stored\.load_trained"):
        create_model("deit_tiny", weights=tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has quantizers already; start from the float model"):
        training_config("deit_tiny", qat="ofq-w2a2", weights=str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="was not written by `edgeattn train --qat`"):
        load_trained(folder / "float.safetensors")


def test_training_brings_accuracy_back(tmp_path, folder):
    config = qat_config(folder, "ofq-w4a4-cga", epochs=4, learning_rate=3e-3)
    assert train(config, folder / "train.npz", folder / "val.npz", tmp_path)["val_top1"] > 0.8


def test_loss_of_one_and_of_two_heads(folder):
    session = QatSession(teacher(folder), preset("lsq-w4a4"), NAMES)
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1])
    hard, soft = torch.randn(5, 3), torch.randn(5, 3)
    with torch.no_grad():
        target = session.teacher(images)
    entropy = torch.nn.functional.cross_entropy(hard, labels)
    shares = target.softmax(1)
    kl = (shares * (shares.log() - soft.log_softmax(1))).sum(1).mean()
    assert torch.allclose(session.loss((hard, soft), images, labels, 0.0), entropy + kl)
    assert torch.allclose(session.loss(hard, images, labels, 0.0), entropy + distillation_loss(hard, target))
    assert distillation_loss(target, target).abs() < 1e-6


def test_annealing_in_the_product_space_is_an_option(folder):
    for wanted in (False, True):
        settings = dataclasses.replace(preset("ofq-w2a2"), product_space=wanted)
        session = QatSession(teacher(folder), settings, NAMES)
        session.start_epoch(annealing=True)
        assert session.student.blocks[0].attn.product.freeze_range == (0.005 if wanted else None)
        session.start_epoch(annealing=False)
        assert session.student.blocks[0].attn.product.freeze_range is None


def test_distilled_models(tmp_path, folder):
    data = folder / "train.npz", folder / "val.npz"
    config = TrainConfig("deit_tiny_distilled", img_size=16, epochs=1, batch_size=16, model_config=SHAPE)
    train(config, *data, tmp_path / "float")
    weights = str(tmp_path / "float" / "model.safetensors")
    config = training_config("deit_tiny_distilled", qat="ofq-w2a2", weights=weights, epochs=1, batch_size=16)
    assert train(config, *data, tmp_path / "out")["phase"] == "anneal"
    assert load_trained(tmp_path / "out" / "model.safetensors").head_dist.edge


def test_refusals(folder, tmp_path):
    data = folder / "train.npz", folder / "val.npz"
    with pytest.raises(UsageError, match="pass --weights CHECKPOINT"):
        training_config("deit_tiny", qat="ofq-w2a2")
    with pytest.raises(UsageError, match="--cga-epochs are for --qat PRESET"):
        training_config("deit_tiny", cga_epochs=3)
    with pytest.raises(UsageError, match=r"--cga-epochs 3 without annealing in lsq-w2a2; write --qat lsq-w2a2\+cga"):
        qat_config(folder, "lsq-w2a2", cga_epochs=3)
    with pytest.raises(UsageError, match="the architecture is the checkpoint's"):
        qat_config(folder, model_config={"depth": 2})
    wrong = SAMPLES / "deit_eurosat" / "model.safetensors"
    config = training_config("deit_tiny", qat="ofq-w2a2", weights=str(wrong), batch_size=16, epochs=1)
    with pytest.raises(UsageError, match="has 10 classes, the data 3"):
        train(config, *data, tmp_path)
    m0 = SAMPLES / "efficientvit_m0_eurosat" / "model.safetensors"
    with pytest.raises(RecipeError, match="QAT takes DeiT"):
        QatSession(other := load_teacher("efficientvit_m0", str(m0), 112), preset("ofq-w2a2"), other.class_names)
    with pytest.raises(UsageError, match="has 3 classes, the data in another order or with other names"):
        QatSession(teacher(folder), preset("ofq-w2a2"), NAMES[::-1])
    assert QatSession(teacher(folder), preset("ofq-w2a2"), ("0", "1", "2")).student  # data without names
    with pytest.raises(NumericError, match="loss is nan"):
        train(qat_config(folder, epochs=6, learning_rate=1e30, warmup_share=0.0), *data, tmp_path / "nan")


def test_settings_of_stored_runs_are_still_read():
    for path in SAMPLES.glob("*/train.json"):
        stored = json.loads(path.read_text())["training"]
        assert dataclasses.asdict(TrainConfig(**stored)).items() >= stored.items()


def test_defaults_of_a_run(folder):
    config = training_config("deit_tiny", qat="ofq-w2a2", weights=str(folder / "float.safetensors"), epochs=25)
    assert (config.img_size, config.cga_epochs, config.learning_rate) == (16, 3, 5e-4)
    assert config.min_learning_rate == 1e-5
    assert training_config("deit_tiny") == TrainConfig("deit_tiny")


def test_command_line(folder, tmp_path, edgeattn):
    command = [
        "train",
        "deit_tiny",
        "--data",
        folder / "train.npz",
        "--val",
        folder / "val.npz",
        "-o",
        tmp_path / "out",
    ]
    quantized = ["--qat", "ofq-w2a2", "--weights", folder / "float.safetensors"]
    code, out, err = edgeattn(
        *command, *quantized, "--epochs", 1, "--cga-epochs", 1, "--batch-size", 8, "--subset", 24, "--json"
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["epoch"] == 2 and record["phase"] == "anneal" and (tmp_path / "out" / "model.safetensors").is_file()
    code, _, err = edgeattn(*command, "--qat", "ofq-w2b2", "--weights", folder / "float.safetensors")
    assert code == 2 and "unknown QAT preset 'ofq-w2b2': did you mean ofq-w2a2" in err
    code, _, err = edgeattn(*command, "--qat", "ofq-w2a2")
    assert code == 2 and "pass --weights CHECKPOINT" in err
