"""EfficientViT M0-M5 with cascaded group attention.

Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", CVPR 2023
(arXiv 2305.07027), sections 2.2 and 3. State-dict names are those of the official release
(microsoft/Cream, EfficientViT/classification); timm's names are converted on load (`from_timm_key`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UsageError
from edgeattn.models.blocks import (
    FFN,
    BNLinear,
    ConvBN,
    PatchMerging,
    Residual,
    classify,
    official_block_key,
    stem,
    transition,
)
from edgeattn.models.folding import fold_conv_bn
from edgeattn.models.registry import register_variants
from edgeattn.models.sizes import multiple_of
from edgeattn.ops.cascaded_group_attention import cascaded_group_attention

_FUSED_TENSORS = (
    "qkv_weight", "qkv_bias", "dw_weight", "dw_bias", "attention_bias", "proj_weight", "proj_bias",
)  # fmt: skip
_STRIDE = 16  # of the stem: four stride-2 convolutions


def attention_bias_index(height: int, width: int) -> Tensor:
    """(N, N) int64, N = height * width: which table entry |dy| * width + |dx| the pair (query, key) uses."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y[None, :]).abs() * width + (x[:, None] - x[None, :]).abs()


class CascadedGroupAttention(nn.Module):
    """Cascaded group attention on one window: (B, C, h, w) to the same shape (paper section 2.2, equations 3-5)."""

    attention_bias_idxs: Tensor

    def __init__(
        self, channels: int, key_dim: int, num_heads: int, window: tuple[int, int], kernels: Sequence[int]
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise UsageError(
                f"cascaded group attention splits channels evenly over heads: {channels} channels, {num_heads} heads. "
                "Choose an embed_dim that num_heads divides."
            )
        if len(kernels) < num_heads:
            raise UsageError(f"kernels has one entry per head: {num_heads} heads, {len(kernels)} kernels given.")
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, channels // num_heads
        self.scale = key_dim**-0.5
        width = 2 * key_dim + self.value_dim
        self.qkvs = nn.ModuleList(ConvBN(self.value_dim, width) for _ in range(num_heads))
        self.dws = nn.ModuleList(
            ConvBN(key_dim, key_dim, k, 1, k // 2, groups=key_dim) for k in list(kernels)[:num_heads]
        )
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(channels, channels, gain=0.0))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window[0] * window[1]))
        self.register_buffer("attention_bias_idxs", attention_bias_index(*window))

    def expanded_bias(self) -> Tensor:
        """(heads, N, N): one additive logit per head and (query, key) pair."""
        return self.attention_biases[:, self.attention_bias_idxs]

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        bias = self.expanded_bias()
        outputs: list[Tensor] = []
        for i, chunk in enumerate(x.chunk(self.num_heads, dim=1)):
            head_in = chunk if i == 0 else chunk + outputs[-1]
            q, k, v = self.qkvs[i](head_in).split([self.key_dim, self.key_dim, self.value_dim], dim=1)
            q = self.dws[i](q).flatten(2)
            logits = q.transpose(1, 2) @ k.flatten(2) * self.scale + bias[i]
            head_out = v.flatten(2) @ logits.softmax(-1).transpose(1, 2)
            outputs.append(head_out.reshape(batch, self.value_dim, height, width))
        return self.proj(torch.cat(outputs, 1))


class LocalWindowAttention(nn.Module):
    """Attention per window: the grid is zero-padded at bottom and right; padded positions are not masked."""

    def __init__(
        self,
        channels: int,
        key_dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int,
        kernels: Sequence[int],
    ) -> None:
        super().__init__()
        self.window = (min(window_size, grid[0]), min(window_size, grid[1]))
        self.attn = CascadedGroupAttention(channels, key_dim, num_heads, self.window, kernels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        win_h, win_w = self.window
        if (height, width) == (win_h, win_w):
            return self.attn(x)
        rows, cols = -(-height // win_h), -(-width // win_w)
        x = nn.functional.pad(x, (0, cols * win_w - width, 0, rows * win_h - height))
        x = x.reshape(batch, channels, rows, win_h, cols, win_w).permute(0, 2, 4, 1, 3, 5)
        x = self.attn(x.reshape(-1, channels, win_h, win_w))
        x = x.reshape(batch, rows, cols, channels, win_h, win_w).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(batch, channels, rows * win_h, cols * win_w)[:, :, :height, :width]

    def to_fused(self) -> nn.Module:
        """The same function as one `edgeattn::CascadedGroupAttention` op, BatchNorm folded."""
        return FusedWindowAttention(self)


class FusedWindowAttention(nn.Module):
    """Inference form of `LocalWindowAttention`; kernels of the heads are zero-padded to the largest."""

    def __init__(self, source: LocalWindowAttention) -> None:
        super().__init__()
        attn: Any = source.attn
        self.window = list(source.window)
        self.num_heads, self.key_dim, self.scale = attn.num_heads, attn.key_dim, attn.scale
        side = max(dw.c.kernel_size[0] for dw in attn.dws)
        qkv = [fold_conv_bn(m.c, m.bn) for m in attn.qkvs]
        dws = [fold_conv_bn(m.c, m.bn) for m in attn.dws]
        padded = [nn.functional.pad(w, ((side - w.shape[-1]) // 2,) * 4) for w, _ in dws]
        proj_weight, proj_bias = fold_conv_bn(attn.proj[1].c, attn.proj[1].bn)
        values = {
            "qkv_weight": torch.cat([w for w, _ in qkv]), "qkv_bias": torch.cat([b for _, b in qkv]),
            "dw_weight": torch.cat(padded), "dw_bias": torch.cat([b for _, b in dws]),
            "attention_bias": attn.expanded_bias().detach(), "proj_weight": proj_weight, "proj_bias": proj_bias,
        }  # fmt: skip
        for name, value in values.items():
            self.register_buffer(name, value.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, name) for name in _FUSED_TENSORS]
        return cascaded_group_attention(x, *tensors, self.num_heads, self.key_dim, self.window, self.scale)


class EfficientViTBlock(nn.Module):
    """Sandwich of paper section 2.1: depthwise, FFN, attention, depthwise, FFN, each residual."""

    def __init__(
        self,
        channels: int,
        key_dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window: int,
        kernels: Sequence[int],
        ratio: int,
    ) -> None:
        super().__init__()
        self.dw0 = Residual(ConvBN(channels, channels, 3, 1, 1, groups=channels, gain=0.0))
        self.ffn0 = Residual(FFN(channels, int(channels * ratio)))
        self.mixer = Residual(LocalWindowAttention(channels, key_dim, num_heads, grid, window, kernels))
        self.dw1 = Residual(ConvBN(channels, channels, 3, 1, 1, groups=channels, gain=0.0))
        self.ffn1 = Residual(FFN(channels, int(channels * ratio)))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))


class EfficientViT(nn.Module):
    """EfficientViT classifier: (B, 3, H, W) float image to (B, num_classes) logits.

    Args:
        img_size: input side, or (height, width), in pixels; multiples of 16. It fixes the size of the bias tables.
        embed_dim, depth, num_heads, key_dim, window_size: one entry per stage.
        kernels: depthwise kernel on q, one entry per head (not per stage).
        ffn_ratio: hidden width of an FFN over its input width.
        distillation: add the second head `head_dist`; evaluation averages both.

    Raises:
        UsageError: a size that the architecture does not allow.
    """

    heads = ("head", "head_dist")

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = _STRIDE,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 128, 192),
        depth: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        kernels: Sequence[int] = (5, 5, 5, 5),
        key_dim: Sequence[int] = (16, 16, 16),
        window_size: Sequence[int] = (7, 7, 7),
        ffn_ratio: int = 2,
        distillation: bool = False,
    ) -> None:
        super().__init__()
        if patch_size != _STRIDE:
            raise UsageError(f"patch_size {patch_size}: the stem of EfficientViT has stride {_STRIDE} and no other.")
        size = multiple_of("EfficientViT", img_size, _STRIDE, "the stem's stride")
        grid = size[0] // _STRIDE, size[1] // _STRIDE
        self.num_classes = num_classes
        self.preprocessing = Preprocessing(size=size, crop_fraction=0.875)
        self.patch_embed = stem(embed_dim[0])
        for stage, channels in enumerate(embed_dim):
            blocks: list[nn.Module] = []
            if stage:
                blocks += [
                    transition(embed_dim[stage - 1], ffn_ratio),
                    PatchMerging(embed_dim[stage - 1], channels),
                    transition(channels, ffn_ratio),
                ]
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
            blocks += [
                EfficientViTBlock(
                    channels, key_dim[stage], num_heads[stage], grid, window_size[stage], kernels, ffn_ratio
                )
                for _ in range(depth[stage])
            ]
            setattr(self, f"blocks{stage + 1}", nn.Sequential(*blocks))
        self.num_stages = len(embed_dim)
        self.head = BNLinear(embed_dim[-1], num_classes)
        self.head_dist = BNLinear(embed_dim[-1], num_classes) if distillation else None

    def forward(self, x: Tensor) -> Any:
        """(B, 3, H, W) to (B, num_classes); in training with distillation, the pair of both heads' logits."""
        return classify(self, x)

    @staticmethod
    def from_timm_key(key: str) -> str:
        """The official name of a timm parameter; official names pass unchanged."""
        key = re.sub(r"^patch_embed\.conv(\d)\.", lambda m: f"patch_embed.{2 * (int(m[1]) - 1)}.", key)
        key = official_block_key(key)
        parts = {"res1": 0, "patchmerge": 1, "res2": 2}
        key = re.sub(
            r"^stages\.(\d)\.downsample\.(res1|patchmerge|res2)\.",
            lambda m: f"blocks{int(m[1]) + 1}.{parts[m[2]]}.",
            key,
        )
        key = re.sub(r"\.conv\.(weight|bias)$", r".c.\1", key)
        return re.sub(r"^(head|head_dist)\.linear\.", r"\1.l.", key)

    def derived_keys(self) -> set[str]:
        """State-dict keys that the model computes itself; a checkpoint (timm's) may lack them."""
        return {key for key in self.state_dict() if key.endswith("attention_bias_idxs")}


_VARIANTS: dict[str, dict[str, Any]] = {
    "efficientvit_m0": dict(embed_dim=(64, 128, 192), depth=(1, 2, 3), num_heads=(4, 4, 4), kernels=(5, 5, 5, 5)),
    "efficientvit_m1": dict(embed_dim=(128, 144, 192), depth=(1, 2, 3), num_heads=(2, 3, 3), kernels=(7, 5, 3, 3)),
    "efficientvit_m2": dict(embed_dim=(128, 192, 224), depth=(1, 2, 3), num_heads=(4, 3, 2), kernels=(7, 5, 3, 3)),
    "efficientvit_m3": dict(embed_dim=(128, 240, 320), depth=(1, 2, 3), num_heads=(4, 3, 4), kernels=(5, 5, 5, 5)),
    "efficientvit_m4": dict(embed_dim=(128, 256, 384), depth=(1, 2, 3), num_heads=(4, 4, 4), kernels=(7, 5, 3, 3)),
    "efficientvit_m5": dict(embed_dim=(192, 288, 384), depth=(1, 3, 4), num_heads=(3, 3, 4), kernels=(7, 5, 3, 3)),
}
register_variants(EfficientViT, _VARIANTS)
