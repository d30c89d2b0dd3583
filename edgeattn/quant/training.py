"""A small honest classifier trainer: AdamW, one-cycle cosine, label smoothing, flips, EMA, resume after a kill.

With `TrainConfig.qat` the network has quantizers (see `quant.qat`). There is no EMA then: an average of weights lies on
no grid and its codes were never trained, so the raw weights are evaluated and saved, in float32, since rounding to
float16 would move codes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from edgeattn.data.files import atomic_file
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import CheckpointError, DataError, NumericError
from edgeattn.models.checkpoint import METADATA_KEY
from edgeattn.models.factory import create_model
from edgeattn.quant.qat.convert import quantizer_parameters
from edgeattn.quant.qat.session import QatSession, load_teacher
from edgeattn.quant.qat.settings import QatSettings
from edgeattn.quant.training_data import Pixels, augment, load_pixels

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run; stored beside the weights.

    Attributes:
        learning_rate: peak of the one-cycle schedule (linear warm-up, then cosine to min_learning_rate).
        ema_decay: decay of the exponential moving average of the weights, which is what is evaluated and saved.
        transpose: also transpose pictures at random (aerial views have no up).
        model_config: overrides of the architecture, for a narrower model than the named one.
        subset: number of training images, spread over the data; 0 is all.
        qat: settings of quantizers (`QatSettings.to_dict`); None trains in float.
        weights: with qat, checkpoint of the float model, starting point and teacher.
        cga_epochs: with qat, epochs of annealing after the others, at min_learning_rate.
    """

    model: str
    img_size: int = 112
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    warmup_share: float = 0.1
    ema_decay: float = 0.998
    transpose: bool = True
    bf16: bool = True
    seed: int = 20261120
    model_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    min_learning_rate: float = 0.0
    subset: int = 0
    qat: dict[str, Any] | None = None
    weights: str = ""
    cga_epochs: int = 0

    def create(self, num_classes: int) -> nn.Module:
        """The untrained model."""
        return create_model(self.model, num_classes=num_classes, img_size=self.img_size, **self.model_config)


class _Trainer:
    """State of one run; everything that a resumed run needs is in `state()`."""

    def __init__(
        self, config: TrainConfig, train: Pixels, preprocessing: Preprocessing, teacher: nn.Module | None = None
    ) -> None:
        self.config, self.train, self.epoch, self.step = config, train, 0, 0
        torch.manual_seed(config.seed)
        self.qat, self.ema = None, None
        if config.qat is not None and teacher is not None:
            self.qat = QatSession(teacher, QatSettings.from_dict(config.qat), train.class_names)
            self.model: nn.Module = self.qat.student
        else:
            self.model, self.ema = (config.create(len(train.class_names)) for _ in range(2))
            self.ema.load_state_dict(self.model.state_dict())
        undecayed = quantizer_parameters(self.model)
        decay = [p for p in self.model.parameters() if p.dim() > 1 and id(p) not in undecayed]
        plain = [p for p in self.model.parameters() if p.dim() <= 1 or id(p) in undecayed]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.learning_rate,
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.mean = torch.tensor(preprocessing.mean)[:, None, None] * 255
        self.std = torch.tensor(preprocessing.std)[:, None, None] * 255
        self.steps_per_epoch = len(train.labels) // config.batch_size
        if not self.steps_per_epoch:
            raise DataError(
                f"{len(train.labels)} training images are fewer than one batch of {config.batch_size}; "
                "lower --batch-size."
            )
        self.total_steps = config.epochs * self.steps_per_epoch

    def learning_rate(self) -> float:
        lowest = self.config.min_learning_rate
        if self.step >= self.total_steps:
            return lowest
        warmup = max(1, int(self.config.warmup_share * self.total_steps))
        if self.step < warmup:
            return self.config.learning_rate * (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.total_steps - warmup)
        return lowest + (self.config.learning_rate - lowest) * 0.5 * (1 + math.cos(math.pi * progress))

    def normalize(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy; a model with two heads gives a pair in training, and both learn from the labels."""
        smoothing = self.config.label_smoothing
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            logits = self.model(images)
            if self.qat:
                return self.qat.loss(logits, images, labels, smoothing)
        heads = logits if isinstance(logits, tuple) else (logits,)
        losses = [nn.functional.cross_entropy(h.float(), labels, label_smoothing=smoothing) for h in heads]
        return torch.stack(losses).mean()

    def run_epoch(self) -> float:
        """One pass over the data; returns the mean loss."""
        self.model.train()
        if self.qat:
            self.qat.start_epoch(annealing=self.epoch >= self.config.epochs)
        order = torch.randperm(len(self.train.labels), generator=self.generator)
        losses = []
        for i in range(self.steps_per_epoch):
            index = order[i * self.config.batch_size : (i + 1) * self.config.batch_size]
            images = augment(self.train.images[index], self.generator, self.config.transpose)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            loss = self.loss(self.normalize(images), self.train.labels[index])
            if not torch.isfinite(loss):
                raise NumericError(f"loss is {loss.item()} in epoch {self.epoch + 1}; lower --learning-rate.")
            self.optimizer.zero_grad()
            loss.backward()
            if self.qat:
                self.qat.before_step()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()
            self.step += 1
            if self.qat:
                self.qat.after_step()
            self._update_ema()
            losses.append(loss.item())
        self.epoch += 1
        return float(np.mean(losses))

    @torch.no_grad()
    def _update_ema(self) -> None:
        # The decay ramps up so that the average forgets the random start quickly.
        if self.ema is None:
            return
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        own = self.model.state_dict()
        for key, average in self.ema.state_dict().items():
            if average.is_floating_point():
                average.lerp_(own[key], 1 - decay)
            else:
                average.copy_(own[key])

    @property
    def result(self) -> nn.Module:
        """What the run is for."""
        return self.model if self.ema is None else self.ema

    @torch.no_grad()
    def evaluate(self, data: Pixels) -> float:
        """Top-1 accuracy in float32 of what is saved: the averaged weights, or the raw ones with quantizers."""
        result = self.result.eval()
        hits = 0
        for images, labels in zip(data.images.split(256), data.labels.split(256), strict=True):
            hits += int((result(self.normalize(images)).argmax(1) == labels).sum())
        return hits / len(data.labels)

    def state(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config), "epoch": self.epoch, "step": self.step,
            "model": self.model.state_dict(), "ema": self.ema.state_dict() if self.ema else None,
            "oscillation": self.qat.tracker.state_dict() if self.qat else None,
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any], path: Path) -> None:
        if TrainConfig(**state["config"]) != self.config:
            raise CheckpointError(
                f"{path} belongs to a run with other settings ({state['config']}); "
                "give those, or another output folder."
            )
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.qat:
            self.qat.tracker.load_state_dict(state["oscillation"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.epoch, self.step = state["epoch"], state["step"]


def train(
    config: TrainConfig,
    data: Any,
    validation: Any,
    out: str | Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train a classifier and write `model.safetensors`, `train.json` and `log.jsonl` into `out`.

    The weights are float16, or float32 with quantizers; those `quant.qat.stored.load_trained` reads back.

    A run that was killed goes on from its last finished epoch when started again with the same arguments.

    Args:
        data, validation: labelled sources (see `edgeattn.data.source.open_source`). Validation picks nothing: the
            last (averaged) weights are saved.
        progress: called after each epoch with its log record.

    Returns:
        The record of the last epoch: epoch, loss, val_top1, seconds; with quantizers also phase and the shares of
        weights that are oscillating and near_boundary (`OscillationTracker.summary`), free while annealing.

    Raises:
        DataError: no labels, or fewer images than one batch. NumericError: the loss is not finite.
        UsageError, RecipeError, CheckpointError: a float checkpoint or model that QAT cannot start from.
    """
    out = Path(out)
    teacher = None if config.qat is None else load_teacher(config.model, config.weights, config.img_size)
    preprocessing: Any = Preprocessing(size=(config.img_size,) * 2) if teacher is None else teacher.preprocessing
    pixels, held_out = load_pixels(data, preprocessing, config.subset), load_pixels(validation, preprocessing)
    trainer = _Trainer(config, pixels, preprocessing, teacher)
    resume, log = out / "resume.pt", out / "log.jsonl"
    if resume.exists():
        trainer.restore(torch.load(resume, weights_only=True), resume)
        logger.warning("going on after epoch %d of %s", trainer.epoch, resume)
    record: dict[str, Any] = {"epoch": trainer.epoch}
    while trainer.epoch < config.epochs + config.cga_epochs:
        started = time.monotonic()
        loss = trainer.run_epoch()
        record = {"epoch": trainer.epoch, "loss": round(loss, 5), "val_top1": trainer.evaluate(held_out)}
        record |= trainer.qat.record() if trainer.qat else {}
        record["seconds"] = round(time.monotonic() - started, 1)
        with atomic_file(resume) as path:
            torch.save(trainer.state(), path)
        with log.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        if progress:
            progress(record)
    _save(trainer, preprocessing, out)
    resume.unlink(missing_ok=True)
    return record


def _save(trainer: _Trainer, preprocessing: Preprocessing, out: Path) -> None:
    metadata: dict[str, Any] = {
        "model": trainer.config.model,
        "config": {
            **(trainer.qat.model_config if trainer.qat else trainer.config.model_config),
            "img_size": trainer.config.img_size,
            "num_classes": len(trainer.train.class_names),
        },
        "class_names": list(trainer.train.class_names),
        "preprocessing": preprocessing.to_dict(),
        "training": dataclasses.asdict(trainer.config),
    }
    state = trainer.result.state_dict()
    if trainer.qat:
        metadata |= trainer.qat.metadata()
        metadata["training"]["weights"] = metadata["teacher"]  # the file's name and digest, not where it lay
    else:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    with atomic_file(out / "model.safetensors") as path:
        safetensors.torch.save_file(state, path, metadata={METADATA_KEY: json.dumps(metadata)})
    with atomic_file(out / "train.json") as path:
        path.write_text(json.dumps(metadata, indent=2) + "\n")
