"""Parts that EfficientViT and SHViT share: conv+BN, residual, FFN, squeeze-excite, stem, transition, head."""

from __future__ import annotations

import itertools
import re
from typing import Any

from torch import Tensor, nn


class ConvBN(nn.Module):
    """Bias-free convolution followed by BatchNorm (eps 1e-5), stored as `c` and `bn`."""

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_ch, out_ch, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_ch)
        nn.init.constant_(self.bn.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class FFN(nn.Module):
    """Pointwise expansion, ReLU, pointwise projection; (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(channels, hidden)
        self.act = nn.ReLU()
        self.pw2 = ConvBN(hidden, channels, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class SqueezeExcite(nn.Module):
    """Channel gate: spatial mean, `fc1`, ReLU, `fc2`, sigmoid, multiply. Reduced width rounds to a multiple of 8."""

    def __init__(self, channels: int, ratio: float = 0.25) -> None:
        super().__init__()
        reduced = max(8, int(channels * ratio + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(pooled))))


class PatchMerging(nn.Module):
    """Halves the grid: (B, C_in, H, W) to (B, C_out, ceil(H/2), ceil(W/2))."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        hidden = 4 * in_ch
        self.conv1 = ConvBN(in_ch, hidden)
        self.act = nn.ReLU()
        self.conv2 = ConvBN(hidden, hidden, 3, 2, 1, groups=hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvBN(hidden, out_ch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(x))
        return self.conv3(self.se(self.act(self.conv2(x))))


class BNLinear(nn.Module):
    """Classifier head: BatchNorm1d then Linear, stored as `bn` and `l`; (B, C) to (B, classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)
        self.l = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))


def transition(channels: int, ratio: int) -> nn.Sequential:
    return nn.Sequential(
        Residual(ConvBN(channels, channels, 3, 1, 1, groups=channels)), Residual(FFN(channels, int(channels * ratio)))
    )


def stem(channels: int) -> nn.Sequential:
    """Four stride-2 3x3 convolutions, ReLU between them: (B, 3, H, W) to (B, channels, H/16, W/16)."""
    widths = [3, channels // 8, channels // 4, channels // 2, channels]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [ConvBN(before, after, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def classify(model: Any, x: Tensor) -> Any:
    """Stem, stages `blocks1`.., spatial mean and head: (B, 3, H, W) to (B, classes).

    With `head_dist` the logits of both heads are averaged; in training they come as a pair.
    """
    x = model.patch_embed(x)
    for stage in range(1, model.num_stages + 1):
        x = getattr(model, f"blocks{stage}")(x)
    features = x.mean((2, 3))
    if model.head_dist is None:
        return model.head(features)
    logits = model.head(features), model.head_dist(features)
    return logits if model.training else (logits[0] + logits[1]) / 2


def official_block_key(key: str) -> str:
    """timm's `stages.S.blocks.B.` as the release's `blocksS.B.`, which counts the three transition items in front."""
    return re.sub(
        r"^stages\.(\d)\.blocks\.(\d+)\.",
        lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + (3 if int(m[1]) else 0)}.",
        key,
    )
