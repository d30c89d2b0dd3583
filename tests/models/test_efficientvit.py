import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeattn import create_model, list_models
from edgeattn.errors import UsageError
from tests.conftest import TINY, randomize
from tests.golden.runner import check_file

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "data").glob("efficientvit_*.json"))

# Parameters and million multiply-adds at 224, from the instantiated upstream models.
PUBLISHED = {
    "efficientvit_m0": (2_349_436, 79.2), "efficientvit_m1": (2_980_560, 167.1), "efficientvit_m2": (4_187_554, 201.0),
    "efficientvit_m3": (6_900_722, 262.7),
    "efficientvit_m4": (8_804_228, 299.3), "efficientvit_m5": (12_473_772, 521.6),
}  # fmt: skip


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_module_and_onnx(path):
    assert check_file(path) == []


def test_golden_runner_notices_a_wrong_model(monkeypatch):
    from edgeattn.models.efficientvit import CascadedGroupAttention

    monkeypatch.setattr(CascadedGroupAttention, "expanded_bias", lambda self: torch.zeros(self.num_heads, 1, 1))
    assert any("logits" in problem for problem in check_file(GOLDEN[0], onnx=False))


def test_zoo_has_the_published_variants():
    assert list_models("efficientvit_m*") == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_match_the_published_table(name):
    model = create_model(name)
    parameters, mega_macs = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e6 == pytest.approx(mega_macs, abs=0.1)


@pytest.mark.parametrize("size", [16, 48, 112, 208, 256, (64, 160), (224, 96)], ids=str)
def test_any_multiple_of_16_runs(size):
    model = create_model("efficientvit_m0", img_size=size, num_classes=7, **TINY)
    height, width = (size, size) if isinstance(size, int) else size
    assert model(torch.zeros(2, 3, height, width)).shape == (2, 7)
    assert model.preprocessing.size == (height, width)


@pytest.mark.parametrize("size, near", [(100, "96x96"), (0, "16x16"), ((224, 230), "224x224")])
def test_other_sizes_are_refused_with_the_nearest(size, near):
    with pytest.raises(UsageError, match=f"multiples of 16.*Nearest: {near}"):
        create_model("efficientvit_m0", img_size=size)


def test_unknown_patch_size_and_config_key_are_named():
    with pytest.raises(UsageError, match="stride 16 and no other"):
        create_model("efficientvit_m0", patch_size=8)
    with pytest.raises(UsageError, match="heads_count"):
        create_model("efficientvit_m0", heads_count=3)


def test_batchnorm_epsilon_is_the_papers():
    # The golden vectors cannot tell 1e-6 from 1e-5.
    assert {m.eps for m in create_model("efficientvit_m0").modules() if hasattr(m, "eps")} == {1e-5}


def test_distillation_head_averages_in_evaluation_and_splits_in_training():
    model = randomize(create_model("efficientvit_m0", img_size=64, distillation=True, num_classes=5, **TINY))
    x = torch.randn(2, 3, 64, 64)
    keys = [key for key in model.state_dict() if key.startswith("head_dist.")]
    assert {re.sub("head_dist", "head", key) for key in keys} <= set(model.state_dict())
    assert model(x).shape == (2, 5)
    both = model.train()(x)
    assert isinstance(both, tuple) and both[0].shape == both[1].shape == (2, 5)
