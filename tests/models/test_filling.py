"""Initial weights: left out for a checkpoint's, and the same numbers from two threads."""

import threading

import pytest
import torch
from torch import nn

from edgeattn.models import filling
from edgeattn.models.filling import LargeLinear, unfilled


def test_other_threads_still_fill_their_models():
    fillers = [getattr(nn.init, name) for name in filling._FILLERS]
    filled = []
    with unfilled(), unfilled():
        other = threading.Thread(target=lambda: filled.append(nn.Linear(64, 64)))
        other.start()
        other.join()
        here = torch.zeros(64, 64)
        assert not nn.init.trunc_normal_(here).any() and not nn.init.xavier_uniform_(here).any()
    assert filled[0].weight.abs().max() <= 1 / 8 and filled[0].weight.std() > 0.05
    assert [getattr(nn.init, name) for name in filling._FILLERS] == fillers


def test_large_layers_draw_the_distribution_of_linear():
    torch.manual_seed(0)
    layer = LargeLinear(1024, 512)
    for part in (layer.weight, layer.weight[:256], layer.weight[256:]):
        assert part.abs().max() <= 1 / 32
        assert part.std().item() == pytest.approx(1 / 32 / 3**0.5, rel=0.01)
    assert not torch.equal(layer.weight[:256], layer.weight[256:])
    assert layer.bias.abs().max() <= 1 / 32 and layer.bias.std() > 0


def test_large_layers_follow_the_seed():
    layers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layers.append((LargeLinear(1024, 256), LargeLinear(1024, 256)))
    assert torch.equal(layers[0][0].weight, layers[1][0].weight)
    assert torch.equal(layers[0][1].weight, layers[1][1].weight)
    assert not torch.equal(layers[0][0].weight, layers[0][1].weight)
    assert not torch.equal(layers[0][0].weight, layers[2][0].weight)


def test_large_layers_without_random_numbers():
    before = torch.get_rng_state()
    with unfilled():
        LargeLinear(1024, 512)
    assert torch.equal(torch.get_rng_state(), before)
    assert LargeLinear(1024, 512, device="meta").weight.is_meta
