"""Parts of the plain vision transformers (DeiT, DiT, VGGT): patch embedding, multi-head attention, MLP.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929), section 3.1. Attention calls torch's
scaled_dot_product_attention, which exports as one standard ONNX Attention from opset 23.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.models.filling import LargeLinear


class PatchEmbed(nn.Module):
    """(B, in_channels, H, W) to (B, H/patch * W/patch, width) tokens, row by row."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, width); `qkv` rows are ordered q, k, v, each head by head."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv = LargeLinear(width, 3 * width, bias=qkv_bias)
        self.proj = LargeLinear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, width) to (B, heads, N, head_dim)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (erf, or its tanh approximation), Linear: (..., width) to (..., out)."""

    def __init__(self, width: int, hidden: int, out: int | None = None, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = LargeLinear(width, hidden)
        self.act = nn.GELU(approximate)
        self.fc2 = LargeLinear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def sincos_table(width: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, width) float32 position table: sin and cos of the column, then of the row.

    Each half is sin then cos of position * 10000^(-j / (width / 4)) (DiT section 3.1, from MAE), made in float64.
    """
    rate = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.flatten()[:, None] * rate for position in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).float()
