"""CARE Transformer S0-S2: linear attention and convolutions side by side, mixed by a dual interaction.

Zhou et al., "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction", CVPR 2025
(arXiv 2411.16170), sections 3.2 (asymmetrical decoupling) and 3.3 (dual interaction). State-dict names are those of the
official release; timm does not have the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UsageError
from edgeattn.models.registry import register_variants
from edgeattn.models.sizes import at_least
from edgeattn.ops.elu_linear_attention import EPSILON, elu_linear_attention, linear_attention_formula

_STRIDE = 32  # of the whole network; a side that it does not divide loses its last pixels to the strided convolutions


def _depthwise(channels: int, height: int, width: int) -> nn.Conv2d:
    """Depthwise convolution that keeps the grid."""
    return nn.Conv2d(channels, channels, (height, width), padding=(height // 2, width // 2), groups=channels)


class LinearAttention(nn.Module):
    """Kernelised attention over the whole map, v untouched: qk (B, 2C, H, W), v (B, C, H, W) to (B, C, H, W).

    With phi(x) = elu(x) + 1 per head: phi(q) (phi(k)^T v / N) / (phi(q) . mean(phi(k)) + 1e-6) (section 3.1).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, qk: Tensor, v: Tensor) -> Tensor:
        return linear_attention_formula(qk, v, self.num_heads)

    def to_fused(self) -> nn.Module:
        """The same function as one `edgeattn::EluLinearAttention` op."""
        return FusedLinearAttention(self.num_heads)


class FusedLinearAttention(LinearAttention):
    """Inference form of `LinearAttention`."""

    def forward(self, qk: Tensor, v: Tensor) -> Tensor:
        return elu_linear_attention(qk, v.contiguous(), self.num_heads, EPSILON)


class TokenMixer(nn.Module):
    """Three feature parts, each with its own mixer; the memory part passes (section 3.2).

    x (B, mem + 3 * part, H, W) to the memory (B, mem, H, W) and the features (B, 3 * part, H, W).
    """

    def __init__(self, mem: int, part: int, head_dim: int | None) -> None:
        super().__init__()
        self.sizes = [mem, part, part, part]
        if head_dim is None:
            self.dwconvatt_1 = _depthwise(part, 11, 1)
            self.dwconvatt_2 = _depthwise(part, 1, 11)
        self.dwconv1 = _depthwise(part, 3, 3)
        self.dwconv2 = _depthwise(part, 7, 7)
        self.attend = None
        if head_dim is not None:
            if part % head_dim:
                raise UsageError(f"att_head_dim {head_dim} does not divide the {part} channels of the attention part.")
            self.qk = nn.Conv2d(part, 2 * part, 1)
            self.attend = LinearAttention(part // head_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory, a, near, far = x.split(self.sizes, 1)
        mixed = self.dwconvatt_1(a) + self.dwconvatt_2(a) if self.attend is None else self.attend(self.qk(a), a)
        return memory, torch.cat([mixed, self.dwconv1(near), self.dwconv2(far)], 1)


class Interaction(nn.Module):
    """Two inverted bottlenecks: within the features, then between features and memory (section 3.3).

    The last block of the network (`is_last`) ends after the second depthwise convolution, without a residual.
    """

    inter1_norm: nn.BatchNorm2d
    inter1_fc1: nn.Conv2d
    inter1_conv: nn.Conv2d
    inter1_fc2: nn.Conv2d
    inter2_norm: nn.BatchNorm2d
    inter2_fc1: nn.Conv2d
    inter2_conv: nn.Conv2d
    inter2_fc2: nn.Conv2d

    def __init__(self, mem: int, features: int, ratios: Sequence[int], is_last: bool) -> None:
        super().__init__()
        width = mem + features
        self._bottleneck("inter1", features, ratios[0] * features, True)
        self._bottleneck("inter2", width, ratios[1] * width, not is_last)
        self.act = nn.GELU()
        self.is_last = is_last

    def _bottleneck(self, name: str, width: int, hidden: int, has_end: bool) -> None:
        setattr(self, f"{name}_norm", nn.BatchNorm2d(width))
        setattr(self, f"{name}_fc1", nn.Conv2d(width, hidden, 1))
        setattr(self, f"{name}_conv", _depthwise(hidden, 3, 3))
        if has_end:
            setattr(self, f"{name}_fc2", nn.Conv2d(hidden, width, 1))

    def forward(self, memory: Tensor, features: Tensor) -> Tensor:
        """(B, mem, H, W) and (B, features, H, W) to (B, mem + features, H, W), or the wide map in the last block."""
        wide = self.inter1_conv(self.act(self.inter1_fc1(self.inter1_norm(features))))
        x = torch.cat([memory, features + self.inter1_fc2(wide)], 1)
        wide = self.inter2_conv(self.act(self.inter2_fc1(self.inter2_norm(x))))
        return wide if self.is_last else x + self.inter2_fc2(wide)


class Block(nn.Module):
    """x + gamma * interaction(mixer(x)); the last block of the network has neither gamma nor shortcut."""

    def __init__(
        self, mem: int, features: int, ratios: Sequence[int], head_dim: int | None, is_last: bool
    ) -> None:  # fmt: skip
        super().__init__()
        if not is_last:
            self.gamma = nn.Parameter(torch.full((mem + features,), 1e-6))
        self.is_last = is_last
        self.token_mixer = TokenMixer(mem, features // 3, head_dim)
        self.inter_layer = Interaction(mem, features, ratios, is_last)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inter_layer(*self.token_mixer(x))
        return y if self.is_last else x + self.gamma[:, None, None] * y


class Stage(nn.Module):
    """Optional halving of the grid (`before` is the width it comes from), then blocks."""

    def __init__(self, before: int | None, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.downsample = (
            nn.Identity() if before is None else nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, width, 2, 2))
        )
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    """Spatial mean, GELU, LayerNorm, Linear: (B, C, H, W) to (B, classes)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.act(x.mean((2, 3)))))


class CARE(nn.Module):
    """CARE classifier: (B, 3, H, W) float image, any H and W from 32, to (B, num_classes) logits.

    Args:
        img_size: input side, or (height, width), in pixels; it sets the preprocessing, the weights fit any. Pixels
            beyond the last multiple of 32 do not reach the last stage.
        feat_dims, mem_dims: channels of the three feature parts together, and of the memory part, per stage.
        ratios: expansion of the two interactions per stage.
        att_head_dim: width of an attention head per stage; used in `attention_stages` (0-based).
        cls_dim: width of the last block's map, ratios[-1][1] times the width of the last stage.

    Raises:
        UsageError: sizes that do not fit each other.
    """

    heads = ("head", "dist_head")
    any_size = True

    def __init__(
        self,
        img_size: int | Sequence[int] | None = None,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 4, 8, 4),
        feat_dims: Sequence[int] = (24, 48, 96, 192),
        mem_dims: Sequence[int] = (8, 16, 32, 64),
        ratios: Sequence[Sequence[int]] = ((2, 2), (2, 4), (4, 4), (4, 4)),
        att_head_dim: Sequence[int] = (1, 1, 16, 32),
        attention_stages: Sequence[int] = (2, 3),
        cls_dim: int | None = None,
        default_resolution: int = 224,
    ) -> None:
        super().__init__()
        widths = [f + m for f, m in zip(feat_dims, mem_dims, strict=True)]
        if any(f % 3 for f in feat_dims):
            raise UsageError(f"feat_dims {list(feat_dims)}: each is three equal parts, so a multiple of 3.")
        wide = ratios[-1][1] * widths[-1]
        if cls_dim not in (None, wide):
            raise UsageError(f"cls_dim {cls_dim}: the last block gives ratio {ratios[-1][1]} x {widths[-1]} = {wide}.")
        self.num_classes = num_classes
        size = at_least("CARE", img_size or default_resolution, _STRIDE)
        self.preprocessing = Preprocessing(size=size, crop_fraction=0.875)
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), nn.BatchNorm2d(widths[0]))
        stages = []
        for s, width in enumerate(widths):
            head_dim = att_head_dim[s] if s in attention_stages else None
            is_end = [s == len(widths) - 1 and i == depths[s] - 1 for i in range(depths[s])]
            blocks = [Block(mem_dims[s], feat_dims[s], ratios[s], head_dim, last) for last in is_end]
            stages.append(Stage(widths[s - 1] if s else None, blocks, width))
        self.stages = nn.Sequential(*stages)
        self.head = Head(wide, num_classes)
        self.dist_head = Head(wide, num_classes)

    def forward(self, x: Tensor) -> Any:
        """(B, 3, H, W) to (B, num_classes), the mean of both heads; in training the pair of their logits."""
        x = self.stages(self.stem(x))
        logits = self.head(x), self.dist_head(x)
        return logits if self.training else (logits[0] + logits[1]) / 2


_RATIOS = {"s0": ((2, 2), (2, 4), (4, 4), (4, 4)), "s1": ((2, 4), (2, 4), (4, 4), (4, 4)), "s2": ((4, 4),) * 4}
_VARIANTS: dict[str, dict[str, Any]] = {
    "care_s0": dict(depths=(2, 4, 8, 4), ratios=_RATIOS["s0"]),
    "care_s1": dict(depths=(3, 6, 10, 6), ratios=_RATIOS["s1"]),
    "care_s2": dict(depths=(3, 6, 10, 6), ratios=_RATIOS["s2"], feat_dims=(24, 48, 144, 288), mem_dims=(8, 16, 48, 96)),
}
register_variants(CARE, _VARIANTS)
