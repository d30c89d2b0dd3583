import pytest
import torch
from torch import nn

from edgeattn.errors import RecipeError
from edgeattn.quant.qat.cga import Annealer, frozen_mask
from edgeattn.quant.qat.statsq import StatsQuantizer

RANGE = 0.05


def test_mask_of_hand_made_positions():
    position = torch.tensor([-2.5, -1.52, -1.44, -0.5, 0.4, 0.46, 1.48, 0.9])  # codes -2 .. 1
    free = [False, True, False, True, False, True, False, False]
    assert (~frozen_mask(position, RANGE)).tolist() == free  # 1.48 would be a boundary to code 2, which nobody uses
    assert frozen_mask(torch.tensor([0.1, 0.45]), RANGE).all()  # one code only: no boundary


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
@pytest.mark.parametrize("scaler", [None, 2.0**10], ids=["plain", "loss scaler"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_frozen_weights_stay_bit_for_bit(optimizer, scaler, bf16):
    torch.manual_seed(0)
    layer, quantizer = nn.Linear(32, 16), StatsQuantizer(2)
    start = layer.weight.detach().clone()
    made = {
        "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.5),
        "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.5),
    }[optimizer](layer.parameters())
    scale = torch.amp.GradScaler("cpu", init_scale=scaler or 1.0, enabled=scaler is not None)
    for step in range(4):
        annealer = Annealer([(layer.weight, quantizer)] if step else [], RANGE)  # first a step that fills the momentum
        frozen = frozen_mask(quantizer.position(layer.weight), RANGE)
        before = layer.weight.detach().clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = nn.functional.linear(torch.randn(8, 32), quantizer(layer.weight), layer.bias)
        made.zero_grad()
        scale.scale(y.float().square().mean()).backward()
        annealer.before_step()
        scale.step(made)
        scale.update()
        annealer.after_step()
        if step:
            moved = layer.weight != before
            assert not moved[frozen].any() and moved[~frozen].any() and 0 < (~frozen).sum() < frozen.sum()
    assert not torch.equal(start, layer.weight)


def test_gradients_that_overflowed_do_not_reach_frozen_weights():
    weight = nn.Parameter(torch.linspace(-1, 1, 64).reshape(2, 32))
    weight.grad = torch.full_like(weight, torch.inf)
    share = Annealer([(weight, StatsQuantizer(2))], RANGE).before_step()
    frozen = frozen_mask(StatsQuantizer(2).position(weight), RANGE)
    assert (weight.grad[frozen] == 0).all() and share == pytest.approx(float((~frozen).float().mean()))


def test_a_range_that_means_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"boundary range 0.5: expected over 0 and under 0.5; 0.005 is the paper's"):
        frozen_mask(torch.zeros(3), 0.5)
