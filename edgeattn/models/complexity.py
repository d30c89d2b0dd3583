"""Parameters and multiply-accumulates of a model, counted from shapes alone: no weight is read, nothing is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What one call costs."""

    parameters: int
    macs: int


def count(model: nn.Module, *inputs: Tensor) -> Complexity:
    """Cost of `model(*inputs)` in evaluation mode; the model may lie on any device and is not touched.

    Counted are convolutions, linear layers and matrix products, where papers count them: attention as its two products,
    a deformable convolution as its convolution without the sampling, nothing elementwise.
    """
    weights: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in weights.items()}
    # On "meta" scaled_dot_product_attention becomes its two products; the kernel of a CPU is unknown to the counter.
    counter = FlopCounterMode(display=False)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), counter:
            functional_call(model, on_meta, tuple(x.to("meta") for x in inputs))
    finally:
        for module, mode in training.items():
            module.training = mode
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
