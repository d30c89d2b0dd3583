"""Layers that quantize weight and input in every forward pass; attention with q, k, v and softmax on grids."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.models.transformer import Attention
from edgeattn.quant.qat.lsq import LsqQuantizer
from edgeattn.quant.qat.statsq import StatsQuantizer

WeightQuantizer = StatsQuantizer | LsqQuantizer


class QatLinear(nn.Module):
    """(..., in) to (..., out); takes over the parameters of `linear`.

    Args:
        input_quantizer: None where the input is quantized already.
        edge: one of the 8-bit layers at either end of the network, which annealing leaves alone.
    """

    def __init__(
        self, linear: nn.Linear, weight_quantizer: WeightQuantizer, input_quantizer: LsqQuantizer | None = None,
        edge: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.bias, self.edge = linear.weight, linear.bias, edge
        self.weight_quantizer: nn.Module = weight_quantizer
        self.input_quantizer: nn.Module = nn.Identity() if input_quantizer is None else input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)

    def source(self) -> Tensor:
        """The float tensor that is quantized, (out, in)."""
        return self.weight


class QatConv2d(nn.Module):
    """(B, in, H, W) to (B, out, H', W') without groups or dilation: the patch embedding."""

    def __init__(self, conv: nn.Conv2d, weight_quantizer: LsqQuantizer, input_quantizer: LsqQuantizer) -> None:
        super().__init__()
        self.weight, self.bias, self.edge = conv.weight, conv.bias, True
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.weight_quantizer: nn.Module = weight_quantizer
        self.input_quantizer: nn.Module = input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        return F.conv2d(self.input_quantizer(x), weight, self.bias, self.stride, self.padding)

    def source(self) -> Tensor:
        """The float tensor that is quantized, (out, in, kernel, kernel)."""
        return self.weight


def split_linear(linear: nn.Linear, start: int, stop: int) -> nn.Linear:
    """Rows start to stop of a linear layer as one of its own, with copies of its values."""
    with torch.no_grad():
        part = nn.utils.skip_init(nn.Linear, linear.in_features, stop - start, bias=linear.bias is not None)
        part.weight.copy_(linear.weight[start:stop])
        if linear.bias is not None:
            part.bias.copy_(linear.bias[start:stop])
    return part


class QatAttention(nn.Module):
    """Multi-head attention over (B, N, width), q, k, v and the softmax on grids of their own, before both products.

    Args:
        attention: whose values it takes over; `qkv` and `proj` are its layers with quantizers.
        q, k, v, softmax: quantizers of (B, N, width) thrice and of (B, heads, N, N).
    """

    def __init__(
        self, attention: Attention, qkv: QatLinear, proj: QatLinear, q: LsqQuantizer, k: LsqQuantizer,
        v: LsqQuantizer, softmax: LsqQuantizer,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv, self.proj = qkv, proj
        self.q_quantizer: nn.Module = q
        self.k_quantizer: nn.Module = k
        self.v_quantizer: nn.Module = v
        self.softmax_quantizer: nn.Module = softmax

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, width) to (B, heads, N, head_dim)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (self.heads(part) for part in (self.q_quantizer(q), self.k_quantizer(k), self.v_quantizer(v)))
        shares = torch.softmax((q @ k.transpose(-1, -2)) * self.head_dim**-0.5, -1)
        return self.proj((self.softmax_quantizer(shares) @ v).transpose(1, 2).flatten(2))
