"""Streams of pictures from a folder, an NPZ file or a Python iterable. One picture is in memory at a time."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgeattn.errors import DataError

logger = logging.getLogger(__name__)

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_SPREAD_SEED = 20240229
# Modes that turn into RGB without losing what the picture shows; what changes is reported once per source.
_CONVERTED_MODES = {
    "L": "grey, copied to three channels", "1": "black and white, copied to three channels",
    "LA": "grey with alpha, alpha dropped", "RGBA": "RGBA, alpha dropped", "P": "palette, expanded to RGB",
    "PA": "palette with alpha, alpha dropped", "CMYK": "CMYK, converted to RGB", "YCbCr": "YCbCr, converted to RGB",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sample:
    """One picture: RGB image, where it came from, and its class index if the source has labels."""

    image: Image.Image
    name: str
    label: int | None = None


class ImageSource:
    """A restartable stream of `Sample`. Subclasses yield raw entries; conversion and bad-image policy live here.

    Args:
        skip_bad: leave out pictures that cannot be decoded (each is logged and listed in `skipped`) instead of failing.
    """

    class_names: tuple[str, ...] | None = None
    labelled = False

    def __init__(self, where: str, skip_bad: bool = False) -> None:
        self.where, self.skip_bad = where, skip_bad
        self.skipped: list[str] = []
        self.converted: Counter[str] = Counter()

    def __len__(self) -> int:
        raise NotImplementedError

    def spread(self, limit: int) -> ImageSource:
        """At most `limit` of the pictures, one at random (seeded) from each of as many equal stretches.

        Not the first ones: those of a sorted folder are all of one class. Pictures left out are not decoded. A one-shot
        iterator, whose length is unknown, gives its first ones.
        """
        return self if limit >= len(self) else _Spread(self, limit)

    def _entries(self) -> Iterator[tuple[str, Any, int | None]]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Sample]:
        """Samples in the source's fixed order.

        Raises:
            DataError: a picture cannot be decoded (it is named) and `skip_bad` is off, or none could be.
        """
        self.skipped, self.converted, good = [], Counter(), 0
        for name, raw, label in self._entries():
            try:
                image = self._to_rgb(raw, name)
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
                if not self.skip_bad:
                    raise DataError(
                        f"cannot read image {name}: {error}. Remove or replace it, or pass --skip-bad to leave out "
                        "unreadable images (each is listed)."
                    ) from error
                self.skipped.append(name)
                logger.warning("skipped unreadable image %s: %s", name, error)
                continue
            good += 1
            yield Sample(image, name, label)
        for what, count in self.converted.items():
            logger.warning("%s: %d image(s) were %s", self.where, count, what)
        if not good:
            raise DataError(
                f"{self.where}: none of its {len(self.skipped)} image(s) can be read; expected at least one."
            )

    def _to_rgb(self, raw: Any, name: str) -> Image.Image:
        if isinstance(raw, np.ndarray):
            image = _from_array(raw, name)
        elif isinstance(raw, Image.Image):
            image = raw
        else:
            image = Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw)
            image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if image.mode not in _CONVERTED_MODES:
            raise ValueError(f"pixel mode {image.mode!r} has no 8-bit RGB meaning; convert it to 8-bit RGB first")
        self.converted[_CONVERTED_MODES[image.mode]] += 1
        return image.convert("RGB")


def _from_array(raw: np.ndarray, name: str) -> Image.Image:
    """uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) to a Pillow image."""
    if raw.dtype != np.uint8:
        raise ValueError(f"pixels are {raw.dtype}, expected uint8 in 0..255 (raw pictures, not normalised tensors)")
    if raw.ndim == 3 and raw.shape[2] == 1:
        raw = raw[:, :, 0]
    if raw.ndim not in (2, 3) or (raw.ndim == 3 and raw.shape[2] not in (3, 4)):
        raise ValueError(f"array of shape {raw.shape}, expected (height, width, 3), also grey or RGBA")
    return Image.fromarray(raw)


class FolderSource(ImageSource):
    """Pictures below a folder. Where every picture lies in a sub-folder, the sub-folders' names are the classes."""

    def __init__(self, folder: Path, skip_bad: bool = False) -> None:
        super().__init__(str(folder), skip_bad)
        try:
            self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        except OSError as error:
            raise DataError(f"cannot read folder {folder}: {error}. Check its permissions.") from error
        if not self.files:
            raise DataError(
                f"folder {folder} holds no image (looked for {', '.join(sorted(_SUFFIXES))}, sub-folders included). "
                "Point to a folder with real images; edgeattn never makes up data."
            )
        parents = [p.relative_to(folder).parts for p in self.files]
        self.labelled = all(len(parts) > 1 for parts in parents)
        if self.labelled:
            self.class_names = tuple(sorted({parts[0] for parts in parents}))
            index = {name: i for i, name in enumerate(self.class_names)}
            self._labels: list[int | None] = [index[parts[0]] for parts in parents]
        else:
            self._labels = [None] * len(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def _entries(self) -> Iterator[tuple[str, Any, int | None]]:
        for path, label in zip(self.files, self._labels, strict=True):
            yield str(path), path, label


class NpzSource(ImageSource):
    """An NPZ with `images` (N, H, W, 3) uint8, or `jpeg` bytes end to end with `offsets` (N+1).

    Optional: `labels` (N) integers, `class_names`. Frames are read one by one from the archive, never all at once.
    """

    def __init__(self, path: Path, skip_bad: bool = False) -> None:
        super().__init__(str(path), skip_bad)
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as archive:
                keys = set(archive.files)
                self._labels = archive["labels"] if "labels" in keys else None
                self.class_names = tuple(str(n) for n in archive["class_names"]) if "class_names" in keys else None
                self._offsets = archive["offsets"] if "offsets" in keys else None
            if not {"images"} <= keys and not {"jpeg", "offsets"} <= keys:
                raise DataError(
                    f"{path} has the arrays {', '.join(sorted(keys)) or 'none'}; expected 'images' (N, H, W, 3) uint8, "
                    "or 'jpeg' with 'offsets'."
                )
            self.labelled = self._labels is not None
            self._member = "images" if "images" in keys else "jpeg"
            with zipfile.ZipFile(path) as archive_file, archive_file.open(f"{self._member}.npy") as stream:
                self._shape, self._dtype = _read_npy_header(stream)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"cannot read {path} as an NPZ file: {error}. Write it again with numpy.savez.") from error
        count = len(self)
        if count == 0:
            raise DataError(f"{path} holds no image; expected at least one.")
        if self._labels is not None and len(self._labels) != count:
            raise DataError(f"{path} has {count} images but {len(self._labels)} labels; expected one label per image.")

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._member == "jpeg" and self._offsets is not None else int(self._shape[0])

    def _entries(self) -> Iterator[tuple[str, Any, int | None]]:
        frame = int(np.prod(self._shape[1:])) * self._dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self._member}.npy") as stream:
            _read_npy_header(stream)
            for i in range(len(self)):
                size = frame if self._offsets is None else int(self._offsets[i + 1] - self._offsets[i])
                data = stream.read(size)
                if len(data) != size:
                    raise DataError(
                        f"{self.path} ends early: image {i} of {len(self)} is cut off. Copy the file again."
                    )
                raw: Any = data
                if self._member == "images":
                    raw = np.frombuffer(data, self._dtype).reshape(self._shape[1:])
                yield f"{self.path}[{i}]", raw, None if self._labels is None else int(self._labels[i])


def _read_npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    major = np.lib.format.read_magic(stream)[0]
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran or dtype.hasobject:
        raise ValueError("array is in Fortran order or holds Python objects; expected a plain C-ordered array")
    return shape, dtype


class _Spread(ImageSource):
    """See `ImageSource.spread`."""

    def __init__(self, parent: ImageSource, limit: int) -> None:
        super().__init__(parent.where, parent.skip_bad)
        self.class_names, self.labelled = parent.class_names, parent.labelled
        self._parent, self._limit = parent, limit

    def __len__(self) -> int:
        return self._limit

    def spread(self, limit: int) -> ImageSource:
        """See `ImageSource.spread`."""
        if isinstance(self._parent, IterableSource) and self._parent.one_shot:  # may hold fewer than the limit
            return _Spread(self._parent, min(limit, self._limit))
        return super().spread(limit)

    def _entries(self) -> Iterator[tuple[str, Any, int | None]]:
        if isinstance(self._parent, IterableSource) and self._parent.one_shot:
            yield from itertools.islice(self._parent._entries(), self._limit)
            return
        edges = np.linspace(0, len(self._parent), self._limit + 1).astype(int)
        chosen = set(np.random.default_rng(_SPREAD_SEED).integers(edges[:-1], edges[1:]).tolist())
        for i, entry in enumerate(itertools.islice(self._parent._entries(), max(chosen) + 1)):
            if i in chosen:
                yield entry


class _Spool:
    """Makes a one-shot iterator of pictures walkable again: what was drawn so far lies in a temporary file."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self._file, self._drawn = items, tempfile.TemporaryFile(), 0  # noqa: SIM115 (closed with self)

    def __iter__(self) -> Iterator[Any]:
        place = index = 0
        while True:
            if index == self._drawn and not self._draw():
                return
            self._file.seek(place)
            picture, label = np.load(self._file), np.load(self._file)
            place, index = self._file.tell(), index + 1
            yield (picture, int(label[0])) if label.size else picture

    def _draw(self) -> bool:
        try:
            item = next(self._items)
        except StopIteration:
            return False
        picture, label = item if isinstance(item, tuple) else (item, None)
        if isinstance(picture, Image.Image) and picture.mode not in ("L", "RGB", "RGBA"):
            picture = picture.convert("RGB")
        self._file.seek(0, os.SEEK_END)
        np.save(self._file, np.asarray(picture), allow_pickle=False)
        np.save(self._file, np.array([] if label is None else [int(label)]), allow_pickle=False)
        self._drawn += 1
        return True


class IterableSource(ImageSource):
    """Pictures (Pillow, uint8 array) or (picture, label) pairs from a Python iterable.

    A one-shot iterator may be endless where a limit applies: it is drawn as far as needed and kept on disk, not in
    memory, for the next pass.
    """

    def __init__(self, items: Iterable[Any], skip_bad: bool = False) -> None:
        super().__init__(f"Python {type(items).__name__}", skip_bad)
        self.one_shot = isinstance(items, Iterator)
        self._items = _Spool(items) if isinstance(items, Iterator) else items
        first = next(iter(self._items), None)
        if first is None:
            raise DataError("the given iterable of images is empty; expected at least one image.")
        self.labelled = isinstance(first, tuple)

    def __len__(self) -> int:
        try:
            return len(self._items)  # type: ignore[arg-type]
        except TypeError:
            return sum(1 for _ in self._items)

    def spread(self, limit: int) -> ImageSource:
        return _Spread(self, limit) if self.one_shot else super().spread(limit)

    def _entries(self) -> Iterator[tuple[str, Any, int | None]]:
        for i, item in enumerate(self._items):
            image, label = item if isinstance(item, tuple) else (item, None)
            yield f"{self.where}[{i}]", image, None if label is None else int(label)


def open_source(data: Any, skip_bad: bool = False) -> ImageSource:
    """The source for a folder, an .npz path, an iterable of pictures, or an `ImageSource` itself.

    Raises:
        DataError: no data was given, or it does not exist, or holds no picture.
    """
    if data is None:
        raise DataError(
            "no images were given; real ones are needed (a folder, an .npz file, or a Python iterable). "
            "edgeattn never calibrates or validates on random data."
        )
    if isinstance(data, ImageSource):
        return data
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir():
            return FolderSource(path, skip_bad)
        if not path.exists():
            raise DataError(f"{path} does not exist; expected a folder of images or an .npz file.")
        if path.suffix == ".npz":
            return NpzSource(path, skip_bad)
        raise DataError(f"{path} is neither a folder nor an .npz file; give one of these.")
    if isinstance(data, Iterable):
        return IterableSource(data, skip_bad)
    raise DataError(f"data is a {type(data).__name__}; expected a folder, an .npz path or an iterable of images.")
