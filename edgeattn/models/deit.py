"""DeiT tiny, small and base, plain and distilled, 224 and 384 px.

Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021
(arXiv 2012.12877), sections 3 and 4. State-dict names are those of the official release, which timm shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UsageError
from edgeattn.models.registry import register_variants
from edgeattn.models.sizes import multiple_of
from edgeattn.models.transformer import MLP, Attention, PatchEmbed


class Block(nn.Module):
    """Pre-norm transformer block; (B, N, width) to the same shape."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, epsilon: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.attn = Attention(width, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DeiT(nn.Module):
    """DeiT classifier: (B, 3, H, W) float image of the size given here to (B, num_classes) logits.

    Args:
        img_size: input side, or (height, width), in pixels; multiples of the patch. It fixes the position table, which
            is resized bicubically when a checkpoint of another size is loaded.
        distilled: add the distillation token and its head `head_dist`; evaluation averages both heads.

    Raises:
        UsageError: a size that the architecture does not allow.
    """

    heads = ("head", "head_dist")

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_norm_eps: float = 1e-6,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise UsageError(
                f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; heads share it evenly."
            )
        size = multiple_of("DeiT", img_size, patch_size, "the patch size")
        self.num_classes, self.grid = num_classes, (size[0] // patch_size, size[1] // patch_size)
        # The official evaluation resizes to 256 for a crop of 224 and keeps everything at 384.
        self.preprocessing = Preprocessing(size=size, crop_fraction=0.875 if max(size) <= 224 else 1.0)
        self.prefix_tokens = 2 if distilled else 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix_tokens + self.grid[0] * self.grid[1], embed_dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(3, embed_dim, patch_size)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, layer_norm_eps) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() in (2, 3):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Any:
        """(B, 3, H, W) to (B, num_classes); in training with distillation, the pair of both heads' logits."""
        patch = self.patch_embed.proj.kernel_size[0]
        expected = self.grid[0] * patch, self.grid[1] * patch
        if tuple(x.shape[2:]) != expected:
            raise UsageError(
                f"image of {x.shape[2]}x{x.shape[3]}: this DeiT was built for {expected[0]}x{expected[1]}. "
                "Resize the image, or build the model with that img_size."
            )
        tokens: list[Tensor] = [self.cls_token] if self.head_dist is None else [self.cls_token, self.dist_token]
        prefix = torch.cat(tokens, 1).expand(x.shape[0], -1, -1)
        x = torch.cat([prefix, self.patch_embed(x)], 1) + self.pos_embed
        x = self.norm(self.blocks(x))
        if self.head_dist is None:
            return self.head(x[:, 0])
        logits = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return logits if self.training else (logits[0] + logits[1]) / 2

    def fit_tensor(self, key: str, value: Tensor) -> tuple[Tensor, str] | None:
        """The position table of a checkpoint of another square size, resized bicubically; None for anything else."""
        if key != "pos_embed" or value.dim() != 3 or value.shape[1] <= self.prefix_tokens:
            return None
        side = round((value.shape[1] - self.prefix_tokens) ** 0.5)
        if value.shape[1] != self.prefix_tokens + side**2:
            return None
        prefix, table = value.float().split([self.prefix_tokens, side**2], 1)
        table = table.transpose(1, 2).unflatten(2, (side, side))
        table = nn.functional.interpolate(table, self.grid, mode="bicubic", align_corners=False)
        note = f"pos_embed: position table resized from {side}x{side} to {self.grid[0]}x{self.grid[1]} (bicubic)"
        return torch.cat([prefix, table.flatten(2).transpose(1, 2)], 1), note


_WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_VARIANTS: dict[str, dict[str, Any]] = {
    f"deit_{name}{'_distilled' if distilled else ''}{'' if side == 224 else f'_{side}'}": dict(
        embed_dim=width, num_heads=heads, distilled=distilled, img_size=side
    )
    for name, (width, heads) in _WIDTHS.items()
    for distilled in (False, True)
    for side in ((224, 384) if name == "base" else (224,))
}
register_variants(DeiT, _VARIANTS)
