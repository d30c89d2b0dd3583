"""A small honest classifier trainer: AdamW, one-cycle cosine, label smoothing, flips, EMA, resume after a kill."""

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
from edgeattn.data.source import open_source
from edgeattn.errors import CheckpointError, DataError, NumericError
from edgeattn.models.checkpoint import METADATA_KEY
from edgeattn.models.factory import create_model

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run; stored beside the weights.

    Attributes:
        learning_rate: peak of the one-cycle schedule (linear warm-up, then cosine to 0).
        ema_decay: decay of the exponential moving average of the weights, which is what is evaluated and saved.
        transpose: also transpose pictures at random (aerial views have no up).
        model_config: overrides of the architecture, for a narrower model than the named one.
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

    def create(self, num_classes: int) -> nn.Module:
        """The untrained model."""
        return create_model(self.model, num_classes=num_classes, img_size=self.img_size, **self.model_config)


@dataclasses.dataclass
class _Pixels:
    images: Tensor  # (N, 3, H, W) uint8, already resized and cropped
    labels: Tensor  # (N,) int64
    class_names: tuple[str, ...]


def _load_pixels(data: Any, preprocessing: Preprocessing) -> _Pixels:
    source = open_source(data)
    if not source.labelled:
        raise DataError(
            f"{source.where} has no labels; training needs a folder with one sub-folder per class, "
            "or an NPZ with 'labels'."
        )
    images = np.empty((len(source), *preprocessing.size, 3), np.uint8)
    labels = np.empty(len(source), np.int64)
    for i, sample in enumerate(source):
        images[i], labels[i] = np.asarray(preprocessing.resize_and_crop(sample.image)), sample.label or 0
    names = source.class_names or tuple(str(i) for i in range(int(labels.max()) + 1))
    return _Pixels(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), names)


def _augment(images: Tensor, generator: torch.Generator, transpose: bool) -> Tensor:
    for dims in ([3], [2]):
        chosen = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(dims), images)
    if transpose and images.shape[2] == images.shape[3]:
        chosen = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(chosen[:, None, None, None], images.transpose(2, 3), images)
    return images


class _Trainer:
    """State of one run; everything that a resumed run needs is in `state()`."""

    def __init__(self, config: TrainConfig, train: _Pixels, preprocessing: Preprocessing) -> None:
        self.config, self.train, self.epoch, self.step = config, train, 0, 0
        torch.manual_seed(config.seed)
        self.model = config.create(len(train.class_names))
        self.ema = config.create(len(train.class_names))
        self.ema.load_state_dict(self.model.state_dict())
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
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
        warmup = max(1, int(self.config.warmup_share * self.total_steps))
        if self.step < warmup:
            return self.config.learning_rate * (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.total_steps - warmup)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def normalize(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def loss(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Cross entropy; a model with two heads gives a pair in training, and both learn from the labels."""
        heads = logits if isinstance(logits, tuple) else (logits,)
        smoothing = self.config.label_smoothing
        losses = [nn.functional.cross_entropy(h.float(), labels, label_smoothing=smoothing) for h in heads]
        return torch.stack(losses).mean()

    def run_epoch(self) -> float:
        """One pass over the data; returns the mean loss."""
        self.model.train()
        order = torch.randperm(len(self.train.labels), generator=self.generator)
        losses = []
        for i in range(self.steps_per_epoch):
            index = order[i * self.config.batch_size : (i + 1) * self.config.batch_size]
            images = _augment(self.train.images[index], self.generator, self.config.transpose)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
                logits = self.model(self.normalize(images))
            loss = self.loss(logits, self.train.labels[index])
            if not torch.isfinite(loss):
                raise NumericError(f"loss is {loss.item()} in epoch {self.epoch + 1}; lower --learning-rate.")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()
            self.step += 1
            self._update_ema()
            losses.append(loss.item())
        self.epoch += 1
        return float(np.mean(losses))

    @torch.no_grad()
    def _update_ema(self) -> None:
        # The decay ramps up so that the average forgets the random start quickly.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        own = self.model.state_dict()
        for key, average in self.ema.state_dict().items():
            if average.is_floating_point():
                average.lerp_(own[key], 1 - decay)
            else:
                average.copy_(own[key])

    @torch.no_grad()
    def evaluate(self, data: _Pixels) -> float:
        """Top-1 accuracy of the averaged weights in float32."""
        self.ema.eval()
        hits = 0
        for images, labels in zip(data.images.split(256), data.labels.split(256), strict=True):
            hits += int((self.ema(self.normalize(images)).argmax(1) == labels).sum())
        return hits / len(data.labels)

    def state(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config), "epoch": self.epoch, "step": self.step,
            "model": self.model.state_dict(), "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any], path: Path) -> None:
        if state["config"] != dataclasses.asdict(self.config):
            raise CheckpointError(
                f"{path} belongs to a run with other settings ({state['config']}); "
                "give those, or another output folder."
            )
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
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
    """Train a classifier and write `model.safetensors` (float16), `train.json` and `log.jsonl` into `out`.

    A run that was killed goes on from its last finished epoch when started again with the same arguments.

    Args:
        data, validation: labelled sources (see `edgeattn.data.source.open_source`). Validation picks nothing: the
            last averaged weights are saved.
        progress: called after each epoch with its log record.

    Returns:
        The record of the last epoch: epoch, loss, val_top1, seconds.

    Raises:
        DataError: no labels, or fewer images than one batch. NumericError: the loss is not finite.
    """
    out = Path(out)
    preprocessing = Preprocessing(size=(config.img_size, config.img_size))
    pixels, held_out = _load_pixels(data, preprocessing), _load_pixels(validation, preprocessing)
    trainer = _Trainer(config, pixels, preprocessing)
    resume, log = out / "resume.pt", out / "log.jsonl"
    if resume.exists():
        trainer.restore(torch.load(resume, weights_only=True), resume)
        logger.warning("going on after epoch %d of %s", trainer.epoch, resume)
    record: dict[str, Any] = {"epoch": trainer.epoch}
    while trainer.epoch < config.epochs:
        started = time.monotonic()
        loss = trainer.run_epoch()
        record = {"epoch": trainer.epoch, "loss": round(loss, 5), "val_top1": trainer.evaluate(held_out)}
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
    metadata = {
        "model": trainer.config.model,
        "config": {
            **trainer.config.model_config,
            "img_size": trainer.config.img_size,
            "num_classes": len(trainer.train.class_names),
        },
        "class_names": list(trainer.train.class_names),
        "preprocessing": preprocessing.to_dict(),
        "training": dataclasses.asdict(trainer.config),
    }
    state = {k: v.half() if v.is_floating_point() else v for k, v in trainer.ema.state_dict().items()}
    with atomic_file(out / "model.safetensors") as path:
        safetensors.torch.save_file(state, path, metadata={METADATA_KEY: json.dumps(metadata)})
    with atomic_file(out / "train.json") as path:
        path.write_text(json.dumps(metadata, indent=2) + "\n")
