"""A small DeiT whose activations have a few channels far larger than the rest, as large trained ones do."""

from __future__ import annotations

import math

import pytest
import torch

from edgeattn import create_model
from edgeattn.data.interface import interface_of
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture

FACTOR = 30.0
CHANNELS = (3, 17, 40)

both_types = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["float32", "float64"]
)


def plain_deit(**config):
    """DeiT, 64 wide, 2 heads, 2 blocks, 17 tokens: random weights, and LayerNorms that are not the identity."""
    torch.manual_seed(0)
    given = dict(img_size=64, num_classes=10, embed_dim=64, depth=2, num_heads=2) | config
    model = create_model("deit_tiny", **given).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model


def deit_with_outliers(**config):
    """The same function as `plain_deit`: channels behind every LayerNorm, and of the values, are 30 times as large."""
    model = plain_deit(**config)
    width = model.norm.weight.shape[0]
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                for channel in CHANNELS:
                    norm.weight[channel] *= FACTOR
                    norm.bias[channel] *= FACTOR
                    layer.weight[:, channel] /= FACTOR
            for channel in CHANNELS:
                block.attn.qkv.weight[2 * width + channel] *= FACTOR
                block.attn.qkv.bias[2 * width + channel] *= FACTOR
                block.attn.proj.weight[:, channel] /= FACTOR
    return model


def captured(model, dtype=torch.float32):
    """The folded graph of a model, its weights in a type."""
    graph = capture(model, interface_of(model))
    fold(graph)
    return graph.to(dtype)


def images(model, pictures, dtype=torch.float32):
    """Pictures as the model wants them, (N, 3, H, W)."""
    return torch.stack([torch.from_numpy(model.preprocessing.normalize(p)) for p in pictures]).to(dtype)


@torch.no_grad()
def sqnr_db(plain, noisy, x):
    """Of the logits of two graphs."""
    want, got = plain(x).double(), noisy(x).double()
    return 10 * math.log10(float(want.square().sum() / (got - want).square().sum()))


@torch.no_grad()
def assert_same(graph, want, x, tolerance):
    """The graph still gives `want`, to a share of its largest value."""
    assert float((graph(x) - want).abs().max()) <= tolerance * float(want.abs().max())
