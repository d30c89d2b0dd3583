"""The bundle: a folder with a manifest. Nothing in it is used before its SHA-256 matches the manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pydantic

from edgeattn.data.files import sha256_of
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import BundleError, UsageError
from edgeattn.runtime.session import Session

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
GOLDEN = "golden.npz"
RESULTS = "results.jsonl"
REPORT = "report.html"
# Written after the bundle was made: appended results and the report drawn from them. Never loaded as code or model.
MUTABLE = (RESULTS, REPORT)
Variant = Literal["float32", "quantized"]

# Target name to the module whose `open_session(model, settings, variant)` runs its artefacts.
_BACKENDS = {
    "onnxruntime": "edgeattn.runtime.onnxruntime_session",
    "openvino": "edgeattn.runtime.openvino_session",
    "tensorrt-rtx": "edgeattn.runtime.tensorrt_session",
}


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())


class FileEntry(_Strict):
    """Digest and size in bytes of one file."""

    sha256: str
    size_bytes: int


class ArtifactEntry(_Strict):
    """One runnable form of the model: which target, which variant, its main file, and the options it runs with.

    `graph` is the key of its golden outputs, tolerance and node counts; targets may have quantized graphs of their own.
    `precision` counts its compute nodes. `not_run` says why it was not run when it was made: a stand-in was checked.
    """

    target: str
    variant: Variant
    model: str
    files: list[str]
    settings: dict[str, Any]
    graph: str = ""
    precision: dict[str, int] = {}
    not_run: str = ""


class PlacementEntry(_Strict):
    """What was measured at export to choose a target's artefact: times as fast as float32, with a 95 % interval.

    `left_float` names what the recipe would quantize and this target runs faster in floating point.
    """

    ships: Variant
    speedup: float | None
    interval: tuple[float, float] | None
    left_float: list[str]
    reason: str


class TensorEntry(_Strict):
    """Name and shape of a model input or output; a name is a free axis."""

    name: str
    shape: list[int | str]
    dtype: str = "float32"


class Manifest(_Strict):
    """`manifest.json`. Paths are relative with forward slashes; times are UTC.

    `margin` is what the recipe asks for: times as fast as float32, None where it is for size;
    `golden_tolerance` is per graph and output; `nodes` counts the ONNX nodes of a graph by op type (graphs: float32,
    quantized, and quantized-TARGET where a target has its own); `precision` is of the first quantized one;
    `placements` is by target, where placement was measured; `steps` is what each part of the recipe gave, where that
    was asked for.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    edgeattn_version: str
    created: str
    model: str
    model_config_: dict[str, Any] = pydantic.Field(alias="model_config")
    parameters: int
    task: Literal["classification", "other"] = "classification"
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    preprocessing: dict[str, Any] | None
    postprocessing: Literal["softmax"] | None = "softmax"
    class_names: list[str] | None = None
    recipe: str
    gate: str = "mlperf99"
    margin: float | None = 1.0
    precision: dict[str, int] = {}
    calibration: dict[str, Any] | None = None
    device_profile: dict[str, Any] | None = None
    tools: dict[str, str]
    golden_tolerance: dict[str, dict[str, float]]
    nodes: dict[str, dict[str, int]] = {}
    artifacts: list[ArtifactEntry]
    placements: dict[str, PlacementEntry] = {}
    notes: list[str] = []
    steps: list[dict[str, Any]] = []
    files: dict[str, FileEntry]


@dataclasses.dataclass(frozen=True)
class Golden:
    """Inputs by name, and the outputs by name that each graph gave for them."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, dict[str, np.ndarray]]

    def write(self, path: Path) -> None:
        """Write an uncompressed `.npz`: `input/NAME`, `GRAPH/NAME`."""
        arrays = {f"input/{name}": value for name, value in self.inputs.items()}
        for graph, values in self.outputs.items():
            arrays.update({f"{graph}/{name}": value for name, value in values.items()})
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Inverse of `write`."""
        groups: dict[str, dict[str, np.ndarray]] = {}
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = archive[key]
        return cls(groups.pop("input"), groups)

    def samples(self) -> Iterator[slice]:
        """One sample at a time: artefacts may have a fixed batch of one."""
        count = len(next(iter(self.inputs.values())))
        yield from (slice(i, i + 1) for i in range(count))


class Bundle:
    """An opened bundle.

    Args of `Bundle.open`:
        path: the folder.

    Raises:
        BundleError: not a bundle, another schema version, or a file that does not match; the file is named.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest and check every file that it lists."""
        path = Path(path)
        bundle = cls(path, _read_manifest(path))
        for name in bundle.manifest.files:
            bundle.file(name)
        return bundle

    def file(self, name: str) -> Path:
        """Path of a listed file, after its digest was checked (once per opened bundle)."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: {name} is not listed in {MANIFEST}; nothing unlisted is loaded.")
        path = self.path / name
        if name not in self._checked:
            _check_file(path, entry)
            self._checked.add(name)
        return path

    def unlisted(self) -> list[str]:
        """Files in the folder that the manifest does not know; they are never loaded."""
        known = {*self.manifest.files, *MUTABLE, MANIFEST, MANIFEST_DIGEST}
        found = (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        return sorted(name for name in found if name not in known)

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns a picture into the model's input; classifiers have it."""
        assert self.manifest.preprocessing is not None
        return Preprocessing.from_dict(self.manifest.preprocessing)

    @property
    def targets(self) -> list[str]:
        """Targets in the order in which they were compiled."""
        return list(dict.fromkeys(entry.target for entry in self.manifest.artifacts))

    def artifact(self, target: str, variant: str) -> ArtifactEntry:
        """The entry for a target and variant.

        Raises:
            UsageError: the bundle has none; what it has is listed.
        """
        for entry in self.manifest.artifacts:
            if (entry.target, entry.variant) == (target, variant):
                return entry
        have = ", ".join(f"{e.target}/{e.variant}" for e in self.manifest.artifacts)
        raise UsageError(f"{self.path} has no {variant} artefact for target {target!r}; it has {have}.")

    def size_bytes(self, target: str, variant: str) -> int:
        """Bytes on disk of one artefact."""
        return sum(self.manifest.files[name].size_bytes for name in self.artifact(target, variant).files)

    def open_session(self, target: str, variant: str = "quantized", **overrides: Any) -> Session:
        """Load an artefact on this machine; `overrides` (threads, plugin) replace its stored settings for this session.

        Raises:
            MissingDependency: the target's runtime is not installed. DeviceError: the runtime refuses the artefact.
        """
        entry = self.artifact(target, variant)
        for name in entry.files:
            self.file(name)
        return open_artifact(target, self.path / entry.model, {**entry.settings, **overrides}, variant)

    def golden(self) -> Golden:
        """Inputs and expected outputs of `golden.npz`."""
        return Golden.read(self.file(GOLDEN))

    def require_classifier(self, what: str, instead: str) -> None:
        """Refuse what only classifiers can do.

        Raises:
            UsageError: the bundle holds another kind of model; `instead` says what to do.
        """
        if self.manifest.task != "classification":
            names = ", ".join(entry.name for entry in self.manifest.inputs)
            raise UsageError(
                f"{self.path} holds {self.manifest.model!r}, which is not a classifier (inputs: {names}); "
                f"{what} takes classifiers only. Instead: {instead}."
            )


def open_artifact(target: str, model: Path, settings: dict[str, Any], variant: str) -> Session:
    """A session of the target's runtime over the file `model`."""
    if target not in _BACKENDS:
        raise UsageError(f"unknown target {target!r}; this version runs {', '.join(_BACKENDS)}.")
    return importlib.import_module(_BACKENDS[target]).open_session(model, settings, variant)


def _read_manifest(path: Path) -> Manifest:
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST}. Make one with `edgeattn export ... -o {path}`."
        )
    text = manifest_path.read_bytes()
    digest_path = path / MANIFEST_DIGEST
    digest = digest_path.read_text().strip() if digest_path.is_file() else "absent"
    if hashlib.sha256(text).hexdigest() != digest:
        raise BundleError(
            f"{manifest_path} was changed after the bundle was written (digest in {MANIFEST_DIGEST}: {digest[:16]}). "
            "Do not use it; export it again or copy it again from its source."
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{manifest_path}: {where}: {first['msg']}. This edgeattn reads schema_version {SCHEMA_VERSION}; "
            "export the model again with this version."
        ) from error
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"{manifest_path} lists {name!r}, which lies outside the bundle; do not use this bundle.")
    return manifest


def _check_file(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle; copy the bundle again or export it again.")
    size = path.stat().st_size
    if size != entry.size_bytes or sha256_of(path) != entry.sha256:
        raise BundleError(
            f"{path} is not the file that was exported ({size} bytes, expected {entry.size_bytes} with SHA-256 "
            f"{entry.sha256[:16]}...). It was tampered with or damaged; copy the bundle again or export it again."
        )
