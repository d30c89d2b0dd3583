"""Fakes for the measurement tests: a session on a simulated clock, and a real bundle folder whose runtime is a fake."""

import dataclasses
import hashlib
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.runtime import bundle as bundle_module
from edgeattn.runtime.bundle import Golden
from edgeattn.runtime.session import Placement

CLASSES = 4


class Clock:
    """Nanoseconds that only pass when a session runs."""

    def __init__(self):
        self.now_ns = 0

    def __call__(self):
        return self.now_ns

    def pass_ms(self, milliseconds):
        self.now_ns += round(milliseconds * 1e6)


class FakeSession:
    """Answers from `logits(batch, calls)`; each run takes `cost(run number)` milliseconds of the clock."""

    target = "fake"

    def __init__(self, variant="float32", cost=1.0, logits=None, clock=None, placement=None, settings=None):
        self.variant, self.load_ms, self.settings = variant, 7.0, {"threads": 2, **(settings or {})}
        self.clock, self.runs, self.closed, self.log = clock, 0, False, None
        self._cost = cost if callable(cost) else lambda run: cost
        self._logits = logits or brightness_logits
        self._placement = placement or Placement(0, 0, {"Conv": 3})

    def run(self, inputs):
        if self.log is not None:
            self.log.append(self.variant)
        if self.clock is not None:
            self.clock.pass_ms(self._cost(self.runs))
        self.runs += 1
        return {"logits": self._logits(inputs["image"])}

    def placement(self):
        return self._placement

    def close(self):
        self.closed = True


def brightness_logits(batch, shift=0.0):
    """Class = quarter of the brightness range in which the picture's mean lies."""
    mean = batch.mean(axis=(1, 2, 3), keepdims=False)[:, None]
    return -np.abs((np.arange(CLASSES) + 0.5) / CLASSES - mean - shift).astype(np.float32) * 10


def grey(level):
    return Image.new("RGB", (6, 6), (level, level, level))


PREPROCESSING = Preprocessing((4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclasses.dataclass
class Rig:
    """What the fake runtime opens, by variant: keyword arguments of FakeSession."""

    bundle: object
    variants: dict
    opened: list


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_session():
    return FakeSession


@pytest.fixture
def brightness():
    return brightness_logits


@pytest.fixture
def preprocessing():
    return PREPROCESSING


@pytest.fixture
def image_folder(tmp_path):
    """A function that writes pictures: {class name or None: grey levels}."""

    def write(levels_by_class):
        root = tmp_path / "photos"
        for name, levels in levels_by_class.items():
            folder = root / name if name else root
            folder.mkdir(parents=True, exist_ok=True)
            for i, level in enumerate(levels):
                grey(level).save(folder / f"{i:04}.png")
        return root

    return write


@pytest.fixture
def labelled_images():
    """A function that makes n (picture, label) pairs that the brightness model gets right."""

    def make(n):
        levels = ((np.arange(n) + 0.5) / n * 255).astype(int)
        return [(grey(int(level)), int(level / 255 * CLASSES)) for level in levels]

    return make


@pytest.fixture
def rig(tmp_path, monkeypatch, clock):
    """A real bundle of the targets `fake` and `other` whose runtime opens FakeSessions on the simulated clock."""
    variants = {"float32": dict(cost=2.0), "quantized": dict(cost=1.0)}
    made = Rig(None, variants, [])

    def open_session(model, settings, variant):
        session = FakeSession(variant, clock=clock, settings=settings, **made.variants[variant])
        made.opened.append(session)
        return session

    module = types.ModuleType("fake_runtime")
    module.open_session = open_session
    monkeypatch.setitem(sys.modules, "fake_runtime", module)
    monkeypatch.setitem(bundle_module._BACKENDS, "fake", "fake_runtime")
    monkeypatch.setitem(bundle_module._BACKENDS, "other", "fake_runtime")
    made.bundle = bundle_module.Bundle.open(write_bundle(tmp_path / "bundle"))
    return made


def write_bundle(path, targets=("fake", "other"), class_names=("<b>dark</b>", "dim", "light", "white")):
    """A bundle folder with a manifest that matches its files."""
    path.mkdir()
    entries, files = [], ["golden.npz"]
    for target in targets:
        for variant in ("float32", "quantized"):
            name = f"{target}-{variant}.onnx"
            (path / name).write_bytes(name.encode() * (40 if variant == "float32" else 10))
            files.append(name)
            entries.append(dict(target=target, variant=variant, model=name, files=[name], settings={"threads": None}))
    Golden({"image": np.full((2, 3, 4, 4), 0.4, np.float32)}, {}).write(path / "golden.npz")
    manifest = dict(
        schema_version=1, edgeattn_version="0.1.0", created="2026-01-01T00:00:00Z", model="tiny", model_config={},
        parameters=10,
        inputs=[dict(name="image", shape=["batch", 3, 4, 4])], outputs=[dict(name="logits", shape=["batch", CLASSES])],
        preprocessing=PREPROCESSING.to_dict(), class_names=list(class_names), recipe="w8a8", precision={"int8": 3},
        calibration={"images": 32}, tools={"torch": "2"}, golden_tolerance={"float32": {"logits": 1e-3}},
        artifacts=entries,
        notes=["softmax stays in <float>"],
        files={
            name: dict(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
            for name, content in ((name, (path / name).read_bytes()) for name in files)
        },
    )  # fmt: skip
    text = json.dumps(manifest)
    (path / "manifest.json").write_text(text)
    (path / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
    return path
