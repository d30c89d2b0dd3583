"""Labels of a data source as indices of a model's outputs: by name where both sides have names, never by guess."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from edgeattn.data.source import ImageSource, Sample
from edgeattn.errors import DataError

_SHOWN = 12


def label_indices(source: ImageSource, class_names: Sequence[str] | None, outputs: int) -> Callable[[int, str], int]:
    """A function from (label, image name) to the index of the output that stands for it.

    Args:
        class_names: the model's, in the order of its `outputs` outputs; None when it has none.

    Raises:
        DataError: here, when names do not match; by the function, for a label out of range. Both sides are named.
    """
    if class_names is not None and len(class_names) != outputs:
        raise DataError(
            f"the model has {outputs} outputs but {len(class_names)} class names; export it again with one name each."
        )
    theirs = source.class_names
    if theirs is None:
        mapping = list(range(outputs))
    elif class_names is None:
        mapping = _by_order(source.where, theirs, outputs)
    else:
        mapping = _by_name(source.where, theirs, class_names)

    def index(label: int, image: str) -> int:
        if not 0 <= label < len(mapping):
            raise DataError(
                f"{image} has label {label}; expected 0 to {len(mapping) - 1} ({len(mapping)} classes). "
                "The labels belong to another model or count from 1: correct them in the data."
            )
        return mapping[label]

    return index


def label_of(sample: Sample) -> int:
    """The label of a picture of a labelled source.

    Raises:
        DataError: it has none.
    """
    if sample.label is None:
        raise DataError(f"{sample.name} has no label but other images have; label all of them or none.")
    return sample.label


def _by_name(where: str, theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    if list(theirs) == list(ours):
        # Some label sets use one name twice (ImageNet: crane, maillot); the same list needs no look-up.
        return list(range(len(ours)))
    index = {name: i for i, name in enumerate(ours)}
    unknown = [name for name in theirs if name not in index]
    if unknown:
        raise DataError(
            f"{where}: the model does not know the class(es) {_listed(unknown)}. It knows {_listed(ours)}. "
            "Rename the folders to the model's names or remove them, or export the model with the names of its classes."
        )
    twice = [name for name in theirs if Counter(ours)[name] > 1]
    if twice:
        raise DataError(
            f"{where}: several outputs of the model are called {_listed(twice)}, so these folders fit more than one. "
            "Export the model with distinct class names."
        )
    return [index[name] for name in theirs]


def _by_order(where: str, theirs: Sequence[str], outputs: int) -> list[int]:
    if len(theirs) != outputs:
        raise DataError(
            f"{where} has {len(theirs)} classes ({_listed(theirs)}), the model has {outputs} outputs and no class "
            "names, so which is which is unknown. Export the model with class names, or give one folder for each class."
        )
    if all(name.isdecimal() for name in theirs) and list(theirs) != sorted(theirs, key=int):
        raise DataError(
            f"{where}: the classes are numbers ({_listed(theirs)}) whose order as text differs from their order as "
            "numbers, and the model has no class names. Export it with class names, or pad the numbers (0007)."
        )
    return list(range(outputs))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
