"""LITv2 S, M and B: convolutional MLP blocks early, HiLo attention late, deformable patch merging between stages.

Pan et al., "Fast Vision Transformers with HiLo Attention", NeurIPS 2022 (arXiv 2205.13213), section 4; the deformable
downsampling is that of LITv1 (Pan et al., "Less is More", AAAI 2022, arXiv 2105.14217), section 3.4. State-dict names
are those of the official release (ziplab/LITv2); timm does not have the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UsageError
from edgeattn.models.registry import register_variants
from edgeattn.models.sizes import multiple_of
from edgeattn.ops.hilo_attention import hi_attention, hilo_attention, lo_attention

_SIDE = 2  # of the deformable kernels, and their stride
Grid = tuple[int, int]  # height and width of the map that a row of tokens stands for


def to_map(x: Tensor, grid: Grid) -> Tensor:
    """(B, H * W, C) tokens to a (B, C, H, W) map."""
    return x.transpose(1, 2).unflatten(2, grid)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) map to (B, H * W, C) tokens."""
    return x.flatten(2).transpose(1, 2)


class PatchEmbed(nn.Module):
    """(B, 3, H, W) to (B, H/patch * W/patch, width) normalised tokens."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(to_tokens(self.proj(x)))


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution on tokens; it is what tells the network where a token is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return to_tokens(self.dwconv(to_map(x, grid)))


class ConvMLP(nn.Module):
    """Linear, depthwise convolution, GELU, Linear; (B, N, width) to the same shape."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x), grid)))


class HiLo(nn.Module):
    """HiLo attention over (B, N, width): the share alpha of the heads looks at a pooled map, the rest inside windows.

    A window of 1 leaves nothing to pool: then all heads are Lo heads, which is plain multi-head attention.
    """

    def __init__(self, width: int, num_heads: int, window: int, alpha: float, qkv_bias: bool) -> None:
        super().__init__()
        if width % num_heads:
            raise UsageError(f"LITv2: width {width} is not a multiple of num_heads {num_heads}; heads share it evenly.")
        self.head_dim, self.window = width // num_heads, window
        self.scale = self.head_dim**-0.5
        self.lo = num_heads * self.head_dim if window == 1 else int(num_heads * alpha) * self.head_dim
        self.hi = width - self.lo
        if self.lo:
            self.l_q = nn.Linear(width, self.lo, bias=qkv_bias)
            self.l_kv = nn.Linear(width, 2 * self.lo, bias=qkv_bias)
            self.l_proj = nn.Linear(self.lo, self.lo)
        if self.hi:
            self.h_qkv = nn.Linear(width, 3 * self.hi, bias=qkv_bias)
            self.h_proj = nn.Linear(self.hi, self.hi)

    def pooled_kv(self, x: Tensor, grid: Grid) -> Tensor:
        """Keys and values of the Lo heads, (B, N / window^2, 2 * lo)."""
        if self.window > 1:
            x = to_tokens(F.avg_pool2d(to_map(x, grid), self.window))
        return self.l_kv(x)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        parts = []
        if self.hi:
            parts.append(self.h_proj(hi_attention(self.h_qkv(x), grid, self.window, self.head_dim, self.scale)))
        if self.lo:
            low = lo_attention(self.l_q(x), self.pooled_kv(x, grid), self.head_dim, self.scale)
            parts.append(self.l_proj(low))
        return torch.cat(parts, 2)

    def to_fused(self) -> nn.Module:
        """The same function with one `edgeattn::HiLoAttention`; itself where one part is all there is."""
        return FusedHiLo(self) if self.hi and self.lo else self


class FusedHiLo(nn.Module):
    """Inference form of `HiLo`."""

    def __init__(self, source: HiLo) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        s = self.source
        mixed = hilo_attention(
            s.l_q(x), s.pooled_kv(x, grid), s.h_qkv(x), list(grid), s.window, s.head_dim, s.scale
        )  # fmt: skip
        high, low = mixed.split([s.hi, s.lo], 2)
        return torch.cat([s.h_proj(high), s.l_proj(low)], 2)


class Block(nn.Module):
    """x + attention(norm(x)) where the stage has attention, then x + mlp(norm(x))."""

    def __init__(self, width: int, hidden: int, attention: HiLo | None) -> None:
        super().__init__()
        self.norm1 = None if attention is None else nn.LayerNorm(width, eps=1e-5)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = ConvMLP(width, hidden)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.attn is not None and self.norm1 is not None:
            x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x), grid)


class SamplePlaces(nn.Module):
    """Where the taps of a deformable convolution read, in grid_sample's units and float32 whatever comes in.

    Offsets (B, 8, H/2, W/2), dy and dx tap by tap, to places (B, H, W, 2), x and y.
    """

    def forward(self, offset: Tensor, grid: Grid) -> Tensor:
        height, width = grid
        offset = offset.float().unflatten(1, (_SIDE, _SIDE, 2)).permute(0, 4, 1, 5, 2, 3)
        offset = offset.flatten(3, 4).flatten(1, 2).flip(-1)
        size = np.array([width, height], np.float32)
        still = (2 * np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1) + 1) / size - 1
        return torch.from_numpy(still).to(offset) + offset * torch.from_numpy(2 / size).to(offset)


class DeformableConv(nn.Module):
    """Deformable 2x2 convolution of stride 2 (Dai et al., ICCV 2017, arXiv 1703.06211, section 2.1), no mask.

    (B, C, H, W), both even, to (B, out, H/2, W/2). Each tap reads the map where it stands plus a learnt offset,
    bilinear, zero outside. As the taps of a 2x2 stride-2 convolution tile the map, that is an ordinary convolution of a
    resampled map: GridSample and Conv, which every runtime has and which quantizes like any other convolution
    (`scripts/compare_deform_conv.py` measures it against ONNX Runtime's standard DeformConv).
    """

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_ch, in_ch, _SIDE, _SIDE))
        self.bias = nn.Parameter(torch.zeros(out_ch))
        self.conv_offset = nn.Conv2d(in_ch, 2 * _SIDE**2, _SIDE, _SIDE)
        self.places = SamplePlaces()
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)  # starts as an ordinary convolution

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(self.conv_offset(x), (x.shape[2], x.shape[3]))
        # Places stay float32 under autocast and in half precision: 8 bits of mantissa cannot tell pixels apart.
        sampled = F.grid_sample(x.float(), places, padding_mode="zeros", align_corners=False)
        return F.conv2d(sampled.to(x.dtype), self.weight, self.bias, stride=_SIDE)


class PatchMerging(nn.Module):
    """Tokens of an H x W grid to those of an H/2 x W/2 grid, twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dconv = DeformableConv(width, 2 * width)
        self.norm_layer = nn.BatchNorm2d(2 * width)
        self.act = nn.GELU()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return to_tokens(self.act(self.norm_layer(self.dconv(to_map(x, grid)))))


class Stage(nn.Module):
    """Blocks, then the halving of the grid except in the last stage."""

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        for block in self.blocks:
            x = block(x, grid)
        return x if self.downsample is None else self.downsample(x, grid)


class LITv2(nn.Module):
    """LITv2 classifier: (B, 3, H, W) float image, sides multiples of 32, to (B, num_classes) logits.

    Args:
        img_size: input side, or (height, width), in pixels; it sets the preprocessing, the weights fit any.
        alpha: share of the heads that take the low-frequency part; 0 and 1 leave one part only.
        local_ws: window of the high-frequency part per stage; 1 makes a stage plain multi-head attention.
        has_msa: which stages have attention.

    Raises:
        UsageError: a size that the architecture does not allow.
    """

    heads = ("head",)

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        alpha: float = 0.9,
        local_ws: Sequence[int] = (0, 0, 2, 1),
        has_msa: Sequence[int] = (0, 0, 1, 1),
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha {alpha}: expected the share of low-frequency heads, from 0 to 1.")
        if any(attends and window < 1 for attends, window in zip(has_msa, local_ws, strict=True)):
            raise UsageError(f"local_ws {list(local_ws)}: a stage with attention needs a window of at least 1.")
        strides = [patch_size * 2**s for s in range(len(depths))]
        windows = [window if attends else 1 for window, attends in zip(local_ws, has_msa, strict=True)]
        self.stride = math.lcm(*(stride * window for stride, window in zip(strides, windows, strict=True)))
        self.num_classes, self.patch_size = num_classes, patch_size
        self.preprocessing = Preprocessing(size=self._checked(img_size), crop_fraction=0.875)
        self.patch_embed = PatchEmbed(embed_dim, patch_size)
        stages = []
        for s, depth in enumerate(depths):
            width = embed_dim * 2**s
            attention = [
                HiLo(width, num_heads[s], local_ws[s], alpha, qkv_bias) if has_msa[s] else None for _ in range(depth)
            ]
            blocks = [Block(width, int(width * mlp_ratio), a) for a in attention]
            stages.append(Stage(blocks, PatchMerging(width) if s + 1 < len(depths) else None))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, num_classes)

    def _checked(self, size: int | Sequence[int]) -> Grid:
        return multiple_of("LITv2", size, self.stride, "its coarsest map and windows")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, num_classes)."""
        height, width = self._checked((x.shape[2], x.shape[3]))
        grid = height // self.patch_size, width // self.patch_size
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x, grid)
            grid = grid[0] // 2, grid[1] // 2
        return self.head(self.norm(x).mean(1))


_VARIANTS: dict[str, dict[str, Any]] = {
    "litv2_s": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "litv2_m": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "litv2_b": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "litv2_b_384": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), img_size=384),
}
register_variants(LITv2, _VARIANTS)
