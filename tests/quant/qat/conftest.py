"""A DeiT of a few thousand weights, and batches for it."""

import pytest
import torch

from edgeattn import create_model
from edgeattn.quant.qat.convert import prepare
from edgeattn.quant.qat.settings import preset

TINY = dict(img_size=16, num_classes=3, patch_size=8, embed_dim=16, num_heads=2, depth=2)


@pytest.fixture
def tiny():
    """Makes a tiny DeiT, float, or with the quantizers of a preset after one batch of training."""

    def make(name=None, model="deit_tiny", seed=0):
        torch.manual_seed(seed)
        made = create_model(model, **TINY)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        if name is None:
            return made
        made = prepare(made, preset(name)).train()
        made(torch.randn(8, 3, 16, 16))
        return made.eval()

    return make
