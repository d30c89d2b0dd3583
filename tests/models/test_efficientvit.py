import re
from pathlib import Path

import pytest
import torch

from edgeattn import create_model
from edgeattn.errors import UsageError
from tests.conftest import TINY, randomize
from tests.golden.runner import check_file

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "efficientvit_m0.json"


def test_golden_runner_notices_a_wrong_model(monkeypatch):
    from edgeattn.models.efficientvit import CascadedGroupAttention

    monkeypatch.setattr(CascadedGroupAttention, "expanded_bias", lambda self: torch.zeros(self.num_heads, 1, 1))
    assert any("logits" in problem for problem in check_file(GOLDEN, onnx=False))


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
