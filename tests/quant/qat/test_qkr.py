import dataclasses

import pytest
import torch
from torch import nn

from edgeattn import create_model
from edgeattn.errors import RecipeError
from edgeattn.models.transformer import Attention
from edgeattn.quant.qat.convert import prepare
from edgeattn.quant.qat.qkr import QkrAttention, refuse
from edgeattn.quant.qat.settings import preset
from edgeattn.quant.qat.statsq import StatsQuantizer


def attention():
    torch.manual_seed(0)
    made = Attention(12, 3).double()
    nn.init.normal_(made.qkv.bias)
    return made


class Through(nn.Identity):
    """Stands for a grid so fine that it changes nothing."""


def unquantized(old, exact_bias=True):
    value = nn.Linear(12, 12).double()
    value.load_state_dict({"weight": old.qkv.weight[24:], "bias": old.qkv.bias[24:]})
    grids = {name: Through() for name in ("x", "t", "v", "softmax")}
    return QkrAttention(old, Through(), value, old.proj, exact_bias=exact_bias, **grids)


def test_without_grids_it_is_the_float_attention_bias_and_all():
    old, x = attention(), torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(unquantized(old)(x), old(x), atol=1e-12)
        assert (unquantized(old, exact_bias=False)(x) - old(x)).abs().max() > 1e-3


def test_fine_grids_approach_the_float_attention(tiny):
    float_model, x = tiny(), torch.randn(4, 3, 16, 16)
    settings = preset("lsq-w4a4+qkr")
    errors = []
    for bits in (2, 4, 8):
        made = prepare(tiny(), dataclasses.replace(settings, weight_bits=bits, activation_bits=bits))
        made.train()(x)
        with torch.no_grad():
            errors.append(float((made.eval()(x) - float_model(x)).std() / float_model(x).std()))
    assert errors[0] > errors[1] > errors[2]  # only so far: the first scales are not those of 8 bits


def test_frozen_entries_of_the_product_pass_no_gradient(tiny):
    product = tiny("ofq-w2a2").blocks[0].attn.product
    product.freeze_range = 1e-9
    product()[0].square().sum().backward()
    assert product.q.grad.abs().max() == 0 and product.k.grad.abs().max() == 0
    product.freeze_range = None
    product()[0].square().sum().backward()
    assert product.q.grad.abs().max() > 0
    assert isinstance(product.weight_quantizer, StatsQuantizer) and product.source().shape == (32, 16)


@pytest.mark.parametrize(
    "name, kind, reason",
    [
        ("vggt", "vggt_layers.Attention", "a normalisation of q and k and a rotary embedding"),
        ("efficientvit_m0", "efficientvit.CascadedGroupAttention", "a depthwise convolution on q"),
        ("shvit_s1", "shvit.SHSA", "something else"),
    ],
)
def test_refuses_what_has_no_plain_product(name, kind, reason):
    with torch.device("meta"):
        found = [m for m in create_model(name).modules() if f"{type(m).__module__}.{type(m).__name__}".endswith(kind)]
    assert found
    with pytest.raises(RecipeError, match=f"needs attention whose scores are a plain product.*{reason}"):
        refuse(max(found, key=lambda m: len(list(m.parameters()))), "blocks.0.attn")
