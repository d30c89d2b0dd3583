"""SHViT S1-S4: single-head attention on part of the channels.

Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", CVPR 2024 (arXiv 2401.16456),
sections 3.2 and 3.3. State-dict names are those of the official release (ysj9909/SHViT); timm's are converted on load.
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
from edgeattn.models.sizes import at_least
from edgeattn.ops.single_head_attention import single_head_attention

_SMALLEST = 16  # the stem's stride: smaller pictures are all padding


class SHSA(nn.Module):
    """Single-head self-attention on the first `partial` of `channels`; (B, C, H, W) to the same shape (section 3.2)."""

    def __init__(self, channels: int, key_dim: int, partial: int) -> None:
        super().__init__()
        self.key_dim, self.partial, self.rest = key_dim, partial, channels - partial
        self.scale = key_dim**-0.5
        self.pre_norm = nn.GroupNorm(1, partial)
        self.qkv = ConvBN(partial, 2 * key_dim + partial)
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(channels, channels, gain=0.0))

    def attend(self, x: Tensor) -> Tensor:
        """(B, partial, H, W) to the same shape."""
        q, k, v = self.qkv(self.pre_norm(x)).flatten(2).split([self.key_dim, self.key_dim, self.partial], 1)
        logits = q.transpose(1, 2) @ k * self.scale
        return (v @ logits.softmax(-1).transpose(1, 2)).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        attended, untouched = x.split([self.partial, self.rest], 1)
        return self.proj(torch.cat([self.attend(attended), untouched], 1))

    def to_fused(self) -> nn.Module:
        """The same function with `edgeattn::SingleHeadAttention`, BatchNorm and the norm's affine part folded."""
        return FusedSHSA(self)


class FusedSHSA(nn.Module):
    """Inference form of `SHSA`."""

    qkv_weight: Tensor
    qkv_bias: Tensor

    def __init__(self, source: SHSA) -> None:
        super().__init__()
        self.sizes, self.key_dim, self.scale = [source.partial, source.rest], source.key_dim, source.scale
        self.epsilon = source.pre_norm.eps
        weight, bias = fold_conv_bn(source.qkv.c, source.qkv.bn)
        gain, shift = source.pre_norm.weight.detach(), source.pre_norm.bias.detach()
        self.register_buffer("qkv_weight", weight * gain[None, :, None, None])
        self.register_buffer("qkv_bias", bias + weight[:, :, 0, 0] @ shift)
        self.proj = source.proj

    def forward(self, x: Tensor) -> Tensor:
        attended, untouched = x.split(self.sizes, 1)
        attended = single_head_attention(
            attended.contiguous(), self.qkv_weight, self.qkv_bias, self.key_dim, self.scale, self.epsilon
        )
        return self.proj(torch.cat([attended, untouched], 1))


class SHViTBlock(nn.Module):
    """Residual depthwise convolution, attention (type "s") or nothing (type "i"), residual FFN."""

    def __init__(self, channels: int, key_dim: int, partial: int, kind: str, ratio: int) -> None:
        super().__init__()
        self.conv = Residual(ConvBN(channels, channels, 3, 1, 1, groups=channels, gain=0.0))
        self.mixer = Residual(SHSA(channels, key_dim, partial)) if kind == "s" else nn.Identity()
        self.ffn = Residual(FFN(channels, int(channels * ratio)))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(self.conv(x)))


class SHViT(nn.Module):
    """SHViT classifier: (B, 3, H, W) float image, any H and W, to (B, num_classes) logits.

    Args:
        img_size: input side, or (height, width), in pixels; it sets the preprocessing, the weights fit any.
        embed_dim, depth, partial_dim, qk_dim, types: one entry per stage; types are "s" (attention) or "i" (none).
        distillation: add the second head `head_dist`; evaluation averages both.

    Raises:
        UsageError: a size or type that the architecture does not allow.
    """

    heads = ("head", "head_dist")
    any_size = True

    def __init__(
        self,
        img_size: int | Sequence[int] | None = None,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (128, 224, 320),
        depth: Sequence[int] = (2, 4, 5),
        partial_dim: Sequence[int] = (32, 48, 68),
        types: Sequence[str] = ("i", "s", "s"),
        qk_dim: Sequence[int] = (16, 16, 16),
        ffn_ratio: int = 2,
        distillation: bool = False,
        default_resolution: int = 224,
    ) -> None:
        super().__init__()
        if set(types) - {"s", "i"}:
            raise UsageError(f"types {list(types)}: a stage is 's' (single-head attention) or 'i' (none).")
        self.num_classes = num_classes
        self.preprocessing = Preprocessing(
            size=at_least("SHViT", img_size or default_resolution, _SMALLEST), crop_fraction=0.875
        )
        self.patch_embed = stem(embed_dim[0])
        for stage, channels in enumerate(embed_dim):
            blocks: list[nn.Module] = []
            if stage:
                before = embed_dim[stage - 1]
                blocks = [
                    transition(before, ffn_ratio),
                    PatchMerging(before, channels),
                    transition(channels, ffn_ratio),
                ]
            blocks += [
                SHViTBlock(channels, qk_dim[stage], partial_dim[stage], types[stage], ffn_ratio)
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
        key = official_block_key(key)
        places = ("0.0", "0.1", "1", "2.0", "2.1")
        return re.sub(
            r"^stages\.(\d)\.downsample\.(\d)\.", lambda m: f"blocks{int(m[1]) + 1}.{places[int(m[2])]}.", key
        )


_VARIANTS: dict[str, dict[str, Any]] = {
    "shvit_s1": dict(embed_dim=(128, 224, 320), depth=(2, 4, 5), partial_dim=(32, 48, 68)),
    "shvit_s2": dict(embed_dim=(128, 308, 448), depth=(2, 4, 5), partial_dim=(32, 66, 96)),
    "shvit_s3": dict(embed_dim=(192, 352, 448), depth=(3, 5, 5), partial_dim=(48, 75, 96)),
    "shvit_s4": dict(embed_dim=(224, 336, 448), depth=(4, 7, 6), partial_dim=(48, 72, 96), default_resolution=256),
}
register_variants(SHViT, _VARIANTS)
