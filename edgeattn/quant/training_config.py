"""From what the command line gives to a `TrainConfig`, in float or with quantizers."""

from __future__ import annotations

import dataclasses
from typing import Any

from edgeattn.errors import CheckpointError, UsageError
from edgeattn.models import sources
from edgeattn.models.checkpoint import read_checkpoint
from edgeattn.quant.qat.settings import preset
from edgeattn.quant.training import TrainConfig

_IMG_SIZE, _LEARNING_RATE = 112, 2e-3
_QAT_LEARNING_RATE, _QAT_LAST_LEARNING_RATE = 5e-4, 1e-5  # OFQ for DeiT-T: 5.47e-4 at batch 560, cosine to 1e-5
_ANNEALED_SHARE = 10  # one epoch of annealing in ten of training: the paper's 30 after 300


def training_config(
    model: str,
    *,
    qat: str | None = None,
    weights: str | None = None,
    cga_epochs: int | None = None,
    img_size: int | None = None,
    learning_rate: float | None = None,
    model_config: dict[str, Any] | None = None,
    **given: Any,
) -> TrainConfig:
    """The configuration of a run; None means the default.

    Args:
        qat: a preset with parts switched off and on, such as ofq-w2a2 or lsq-w3a3+statsq; None trains in float.
        weights: with qat, checkpoint of the float model that the run starts from and that teaches it.
        cga_epochs: with qat, of annealing, after the others; None is a tenth of them where the preset has it.
        img_size: None is 112; with qat the checkpoint's.
        learning_rate: None is 2e-3; with qat 5e-4.
        given: other fields of `TrainConfig`.

    Raises:
        UsageError: a contradiction, no checkpoint, or an unknown image size. RecipeError: unknown preset or part.
        CheckpointError: the checkpoint has quantizers already, or cannot be read.
    """
    if qat is not None:
        return _with_quantizers(model, qat, weights, cga_epochs, img_size, learning_rate, model_config, given)
    if weights or cga_epochs is not None:
        raise UsageError("--weights and --cga-epochs are for --qat PRESET; leave them out, or name a preset.")
    return TrainConfig(
        model, img_size=img_size or _IMG_SIZE, learning_rate=_LEARNING_RATE if learning_rate is None else learning_rate,
        model_config=model_config or {}, **given,
    )  # fmt: skip


def _with_quantizers(
    model: str, qat: str, weights: str | None, cga_epochs: int | None, img_size: int | None,
    learning_rate: float | None, model_config: dict[str, Any] | None, given: dict[str, Any],
) -> TrainConfig:  # fmt: skip
    settings = preset(qat)
    if not weights:
        raise UsageError(
            f"--qat {qat} starts from a trained float model, which also teaches: pass --weights CHECKPOINT "
            "(`edgeattn train` without --qat makes one)."
        )
    if cga_epochs and not settings.cga:
        raise UsageError(f"--cga-epochs {cga_epochs} without annealing in {qat}; write --qat {qat}+cga.")
    if model_config:
        raise UsageError("--config with --qat: the architecture is the checkpoint's; leave --config out.")
    metadata = read_checkpoint(sources.locate(weights, model))[1]
    if "quantization" in metadata:
        raise CheckpointError(f"{weights} has quantizers already; start from the float model that it was made from.")
    size = img_size or metadata.get("config", {}).get("img_size")
    if not isinstance(size, int):
        raise UsageError(f"{weights} does not say its image size, or is not square ({size}); pass --img-size.")
    config = TrainConfig(
        model, img_size=size, learning_rate=_QAT_LEARNING_RATE if learning_rate is None else learning_rate,
        min_learning_rate=_QAT_LAST_LEARNING_RATE, qat=settings.to_dict(), weights=weights, **given,
    )  # fmt: skip
    if cga_epochs is None:
        cga_epochs = -(-config.epochs // _ANNEALED_SHARE) if settings.cga else 0
    return dataclasses.replace(config, cga_epochs=cga_epochs)
