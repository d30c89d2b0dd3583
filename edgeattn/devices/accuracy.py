"""Accuracy of sessions on the same images: top-1 where there are labels, agreement and noise against a reference."""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgeattn.data.labels import label_indices, label_of
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import ImageSource, Sample
from edgeattn.devices.statistics import (
    Interval,
    cosine,
    difference_interval,
    energy_ratio_db,
    mcnemar_p,
    paired_counts,
    ratio_interval,
    wilson_interval,
)
from edgeattn.errors import NumericError, UsageError
from edgeattn.runtime.session import Session

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class ClassAccuracy:
    """Images of one class and how many of them were right."""

    name: str
    images: int
    correct: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct / self.images


@dataclasses.dataclass(frozen=True)
class PairedAccuracy:
    """A session against the reference on the same labelled images.

    Attributes:
        lost, gained: images that only the reference, only this session got right.
        drop_points: reference top-1 minus this top-1, in percentage points.
        mcnemar_p: exact two-sided p-value that losses and gains are equally likely.
        retained: this top-1 over the reference's, a share; None when the reference is never right.
    """

    lost: int
    gained: int
    drop_points: float
    drop_interval: Interval
    mcnemar_p: float
    retained: float | None
    retained_interval: Interval | None


@dataclasses.dataclass(frozen=True)
class AccuracyResult:
    """One session on all images. Fields are None where there are no labels, or where this is the reference itself.

    Attributes:
        top1, top1_interval: percent.
        agreement, agreement_interval: percent of images with the reference's first answer.
        sqnr_db: of all logits together against the reference's. cosine: mean over images.
        per_class: classes that occur in the labels.
    """

    session: str
    images: int
    top1: float | None
    top1_interval: Interval | None
    agreement: float | None
    agreement_interval: Interval | None
    sqnr_db: float | None
    cosine: float | None
    paired: PairedAccuracy | None
    per_class: tuple[ClassAccuracy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


class _Tally:
    """What is kept of a session's outputs: four bytes for each image, and sums."""

    def __init__(self) -> None:
        self.answers = array("i")
        self.signal = self.noise = self.cosines = 0.0

    def add(self, logits: np.ndarray, reference: np.ndarray) -> None:
        self.answers.extend(logits.argmax(axis=1).tolist())
        wanted = reference.astype(float)
        self.signal += float(np.square(wanted).sum())
        self.noise += float(np.square(wanted - logits).sum())
        self.cosines += sum(cosine(a, b) for a, b in zip(reference, logits, strict=True))


def evaluate(
    sessions: Mapping[str, Session],
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    input_name: str,
    output_name: str,
    class_names: Sequence[str] | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, AccuracyResult]:
    """Run every session on every image; memory does not grow with the images beyond a few bytes each.

    Args:
        sessions: by name; the first is the reference.
        class_names: the model's, in the order of its outputs; a source's classes are found in them by name.

    Raises:
        NumericError: NaN or infinity in an output; the session and the image are named.
        DataError: labels that do not fit the model. UsageError: outputs that are not (batch, classes).
    """
    _check_arguments(sessions, batch_size)
    reference = next(iter(sessions))
    tallies, labels = {name: _Tally() for name in sessions}, array("i")
    total = len(source)
    index: Callable[[int, str], int] | None = None
    outputs = 0
    for samples in _batches(iter(source), batch_size):
        batch = np.stack([preprocessing(sample.image) for sample in samples])
        logits = {
            name: _logits(session.run({input_name: batch}), output_name, name, samples)
            for name, session in sessions.items()
        }
        outputs = _check_widths(logits, reference)
        for name, tally in tallies.items():
            tally.add(logits[name], logits[reference])
        if source.labelled:
            index = index or label_indices(source, class_names, outputs)
            labels.extend(index(label_of(sample), sample.name) for sample in samples)
        if progress:
            progress("accuracy", len(tallies[reference].answers), total)
    names = list(class_names) if class_names else [str(i) for i in range(outputs)]
    return _results(tallies, labels, reference, names)


def _check_arguments(sessions: Mapping[str, Session], batch_size: int) -> None:
    if not sessions:
        raise UsageError("no session to evaluate; give at least one.")
    if batch_size < 1:
        raise UsageError(f"batch size is {batch_size}; it must be at least 1.")


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def _logits(outputs: Mapping[str, np.ndarray], output_name: str, session: str, samples: list[Sample]) -> np.ndarray:
    if output_name not in outputs:
        raise UsageError(f"session {session} gives {', '.join(outputs)}; expected an output named {output_name!r}.")
    logits = np.asarray(outputs[output_name])
    if logits.ndim != 2 or len(logits) != len(samples):
        raise UsageError(
            f"session {session}: output {output_name!r} has shape {logits.shape}; expected ({len(samples)}, classes)."
        )
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        count = int((~np.isfinite(logits[bad])).sum())
        raise NumericError(
            f"session {session} gives {count} NaN or infinite of {logits.shape[1]} logits for image "
            f"{samples[bad].name}; expected finite numbers. If float32 does it too, the weights or the image are at "
            "fault; if only quantized does, its calibration: use more typical images, or keep the last layers in float."
        )
    return logits


def _check_widths(logits: Mapping[str, np.ndarray], reference: str) -> int:
    width = logits[reference].shape[1]
    for name, values in logits.items():
        if values.shape[1] != width:
            raise UsageError(
                f"session {name} has {values.shape[1]} classes and the reference {reference} has {width}; "
                "compare artefacts of the same model."
            )
    return width


def _results(
    tallies: Mapping[str, _Tally], labels: array[int], reference: str, class_names: list[str]
) -> dict[str, AccuracyResult]:
    truth = np.array(labels) if labels else None
    return {
        name: _result(name, tally, None if name == reference else tallies[reference], truth, class_names)
        for name, tally in tallies.items()
    }


def _result(
    name: str, tally: _Tally, reference: _Tally | None, labels: np.ndarray | None, class_names: list[str]
) -> AccuracyResult:
    answers = np.array(tally.answers)
    images = len(answers)
    correct = None if labels is None else answers == labels
    top1 = None if correct is None else 100 * float(correct.mean())
    top1_interval = None if correct is None else wilson_interval(int(correct.sum()), images).scaled(100)
    per_class = () if labels is None or correct is None else _per_class(labels, correct, class_names)
    if reference is None:
        return AccuracyResult(name, images, top1, top1_interval, None, None, None, None, None, per_class)
    theirs = np.array(reference.answers)
    same = int((answers == theirs).sum())
    paired = None if correct is None or labels is None else pair_accuracy(theirs == labels, correct)
    return AccuracyResult(
        name, images, top1, top1_interval, 100 * same / images, wilson_interval(same, images).scaled(100),
        energy_ratio_db(tally.signal, tally.noise), tally.cosines / images, paired, per_class,
    )  # fmt: skip


def pair_accuracy(reference: np.ndarray, candidate: np.ndarray) -> PairedAccuracy:
    """Comparison of two boolean arrays (n,), n > 0: was this image right?"""
    counts = paired_counts(reference, candidate)
    ratio = ratio_interval(counts)
    return PairedAccuracy(
        lost=int(counts.lost), gained=int(counts.gained), drop_points=100 * (counts.lost - counts.gained) / counts.n,
        drop_interval=difference_interval(counts).scaled(100),
        mcnemar_p=mcnemar_p(int(counts.lost), int(counts.gained)),
        retained=ratio and ratio[0], retained_interval=ratio and ratio[1],
    )  # fmt: skip


def _per_class(labels: np.ndarray, correct: np.ndarray, class_names: list[str]) -> tuple[ClassAccuracy, ...]:
    images = np.bincount(labels, minlength=len(class_names))
    right = np.bincount(labels[correct], minlength=len(class_names))
    return tuple(ClassAccuracy(class_names[i], int(images[i]), int(right[i])) for i in np.flatnonzero(images).tolist())
