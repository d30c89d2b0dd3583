"""What quantization-aware training adds to a run of `quant.training`: student, teacher, loss, annealing, oscillation.

OFQ (arXiv 2302.02210), training recipe: cross-entropy with the label on the class head plus KL to the same float
architecture (soft, no temperature) on the distillation head, or on the same logits where there is one head; weight 1
each. Then annealing at the schedule's last learning rate.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.data.files import sha256_of
from edgeattn.errors import UsageError
from edgeattn.models import sources
from edgeattn.models.factory import create_model
from edgeattn.quant.qat.cga import Annealer
from edgeattn.quant.qat.convert import prepare, quantized_weights
from edgeattn.quant.qat.oscillation import OscillationTracker
from edgeattn.quant.qat.qkr import QueryKeyProduct
from edgeattn.quant.qat.settings import QatSettings


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of (B, classes) logits, mean over the batch, temperature 1."""
    student, target = nn.functional.log_softmax(logits.float(), 1), nn.functional.log_softmax(teacher.float(), 1)
    return nn.functional.kl_div(student, target, reduction="batchmean", log_target=True)


def load_teacher(model: str, weights: str, img_size: int) -> nn.Module:
    """The float model of a checkpoint, which also says how pictures are prepared; `origin` is the file and its digest.

    Raises:
        CheckpointError: unreadable, or not of this model.
    """
    path = sources.locate(weights, model)
    teacher = create_model(model, weights=path, img_size=img_size)
    teacher.origin = f"{path.name} (sha256 {sha256_of(path)})"  # type: ignore[assignment]
    return teacher


class QatSession:
    """State of quantization-aware training beside the optimizer's.

    Args:
        teacher: see `load_teacher`; the student starts from it.
        class_names: of the training data.

    Raises:
        UsageError: the teacher has other classes. RecipeError: not a model that QAT treats.
    """

    def __init__(self, teacher: nn.Module, settings: QatSettings, class_names: tuple[str, ...]) -> None:
        self.settings, self.origin = settings, str(teacher.origin)
        _check_classes(teacher, class_names)
        self.model_config: dict[str, Any] = dict(teacher.config)  # type: ignore[arg-type]
        self.student = prepare(copy.deepcopy(teacher), settings)
        self.teacher = teacher.eval().requires_grad_(False)
        layers = quantized_weights(self.student)
        self.tracker = OscillationTracker(layers)
        plain = [module for module in layers.values() if not isinstance(module, QueryKeyProduct)]
        pairs: Any = [(module.weight, module.weight_quantizer) for module in plain]
        self.annealer = Annealer(pairs, settings.boundary_range)
        self.annealing = False
        self._free: list[float] = []

    def start_epoch(self, annealing: bool) -> None:
        """Switch annealing on or off for an epoch."""
        self.annealing, self._free = annealing, []
        freeze_range = self.settings.boundary_range if annealing and self.settings.product_space else None
        for module in self.student.modules():
            if isinstance(module, QueryKeyProduct):
                module.freeze_range = freeze_range

    def loss(self, logits: Tensor | tuple[Tensor, ...], images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Of normalised images and what the student made of them."""
        heads = logits if isinstance(logits, tuple) else (logits,)
        with torch.no_grad():
            target = self.teacher(images)
        hard = nn.functional.cross_entropy(heads[0].float(), labels, label_smoothing=smoothing)
        return hard + distillation_loss(heads[-1], target)

    def before_step(self) -> None:
        """After backward, before gradients are clipped."""
        if self.annealing:
            self._free.append(self.annealer.before_step())

    def after_step(self) -> None:
        """After the optimizer's step."""
        if self.annealing:
            self.annealer.after_step()
        self.tracker.update()

    def record(self) -> dict[str, Any]:
        """What an epoch adds to the log."""
        values: dict[str, Any] = {"phase": "anneal" if self.annealing else "train"}
        values |= {key: round(value, 6) for key, value in self.tracker.summary().items()}
        if self._free:
            values["free"] = round(sum(self._free) / len(self._free), 6)
        return values

    def metadata(self) -> dict[str, Any]:
        """What the saved file says beside its tensors; `stored.load_trained` reads it."""
        return {"quantization": self.settings.to_dict(), "teacher": self.origin}


def _check_classes(teacher: nn.Module, names: tuple[str, ...]) -> None:
    own: Any = teacher.class_names
    unnamed = names == tuple(str(i) for i in range(len(names)))
    if teacher.num_classes == len(names) and (own is None or unnamed or own == names):
        return
    differ = "in another order or with other names" if teacher.num_classes == len(names) else f"{len(names)}"
    raise UsageError(
        f"{teacher.origin} has {teacher.num_classes} classes, the data {differ}; quantization-aware training starts "
        "from a float model trained on the same classes: train one first (`edgeattn train`)."
    )
