"""A checkpoint given to the wrong model: the message names the right one."""

import re

import pytest
import torch

from edgeattn import create_model
from edgeattn.errors import CheckpointError
from edgeattn.models import catalog, identify, registry
from tests.conftest import TINY
from tests.models.test_checkpoint import to_timm


def shapes_of(name, timm=False, **config):
    """Names and shapes of a checkpoint of that model, without any weight."""
    with torch.device("meta"):
        model = registry.build(name, **config)
    state = model.state_dict()
    derived = getattr(model, "derived_keys", set)() if timm else set()
    return {to_timm(key) if timm else key: value.shape for key, value in state.items() if key not in derived}


def save(shapes, path):
    torch.save({"model": {key: torch.zeros(shape) for key, shape in shapes.items()}}, path)
    return path


SMALL = [name for name, entry in catalog.CATALOG.items() if entry.parameters < 2e7]
TWINS = [{"vggt", "vggt_1b"}]  # one architecture, two names


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SMALL else pytest.mark.slow) for n in catalog.CATALOG]
)
def test_every_model_of_the_zoo_is_recognised(name):
    alike = next((twins for twins in TWINS if name in twins), {name})
    # litv2_b at 384 px has the weights' names and shapes of litv2_b: any size fits
    alike = {"litv2_b", "litv2_b_384"} if name.startswith("litv2_b") else alike
    assert set(identify.fitting_models(shapes_of(name))) == alike


@pytest.mark.parametrize("name", ["efficientvit_m1", "efficientvit_m4"])
def test_timm_names(name):
    shapes = shapes_of(name, timm=True)
    assert "stages.1.downsample.patchmerge.conv1.conv.weight" in shapes
    assert identify.fitting_models(shapes) == [name]


@pytest.mark.parametrize(
    "name, config",
    [
        ("deit_tiny", {"num_classes": 10}), ("efficientvit_m0", {"num_classes": 21841, "img_size": 288}),
        ("deit_tiny_distilled", {"img_size": 320}), ("care_s0", {"num_classes": 2}),
    ],
)  # fmt: skip
def test_other_classes_and_sizes_still_fit(name, config):
    assert identify.fitting_models(shapes_of(name, **config)) == [name]


@pytest.mark.parametrize("name", ["efficientvit_m0", pytest.param("deit_base", marks=pytest.mark.slow)])
def test_strangers_fit_nothing(name):
    shapes = shapes_of(name)
    assert identify.fitting_models({**shapes, "extra": torch.Size([1])}) == []
    assert identify.fitting_models({f"backbone.{key}": shape for key, shape in shapes.items()}) == []
    assert identify.fitting_models({}) == [] and identify.fitting_models({"fc.weight": torch.Size([3])}) == []


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("deit_tiny_distilled", "deit_tiny"), ("deit_tiny", "deit_tiny_distilled"), ("shvit_s1", "efficientvit_m0"),
        ("efficientvit_m0", "care_s0"), ("care_s0", "shvit_s1"), ("deit_tiny", "dit_s_8"),
    ],
)  # fmt: skip
def test_the_message_names_the_right_model(tmp_path, right, wrong):
    path = save(shapes_of(right), tmp_path / "w.pth")
    said = rf"{re.escape(str(path))} does not fit the model\..* These weights fit '{right}': use that name\."
    with pytest.raises(CheckpointError, match=said):
        create_model(wrong, weights=path)


def test_a_classifier_for_a_model_without_classes(tmp_path):
    path = save(shapes_of("deit_tiny"), tmp_path / "w.pth")
    said = r"holds a classifier, which 'vggt' is not\. These weights fit 'deit_tiny'"
    with pytest.raises(CheckpointError, match=said):
        create_model("vggt", weights=path)


def test_overrides_that_the_weights_do_not_have(tmp_path):
    path = save(shapes_of("efficientvit_m0"), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="They fit 'efficientvit_m0' as the zoo has it: leave out the arguments"):
        create_model("efficientvit_m0", weights=path, **TINY)


def test_nothing_fits(tmp_path):
    path = save({"fc.weight": torch.Size([3])}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: fc\.weight.* Check that the model name, num_classes"):
        create_model("efficientvit_m0", weights=path)


def test_only_models_of_about_that_size_are_built(monkeypatch):
    built = []
    build = registry.build
    monkeypatch.setattr(registry, "build", lambda name, **config: built.append(name) or build(name, **config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "build", build)
        shapes = shapes_of("deit_small")
    assert identify.fitting_models(shapes) == ["deit_small"]
    assert len(built) < 10 and not any(name.startswith(("vggt", "dit_l", "dit_xl", "efficientvit")) for name in built)
