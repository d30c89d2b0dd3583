"""Encoder of VGGT: DINOv2 patch features, then alternating attention within each view and over all views.

Wang et al., "VGGT: Visual Geometry Grounded Transformer", CVPR 2025 (arXiv 2503.11651), section 3.2; the patch encoder
is DINOv2 with registers (arXiv 2304.07193, 2309.16588). Tables that depend on the image size are made in float64 with
NumPy: eager code shares them, and torch.export stores them as constants instead of tracing how they are made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from edgeattn.errors import UsageError
from edgeattn.models.transformer import MLP, PatchEmbed

Rotary = tuple[Tensor, Tensor]  # cos and signed sin, each (tokens of a view, head width)
T = TypeVar("T")

# Official name to width, depth and heads of the patch encoder.
_ENCODERS = {"dinov2_vits14_reg": (384, 12, 6), "dinov2_vitb14_reg": (768, 12, 12), "dinov2_vitl14_reg": (1024, 24, 16)}
_CONV = "conv"
DEFAULTS: Mapping[str, Any] = MappingProxyType({})  # every setting as in VGGT-1B
_ENCODER_EPS = 1e-6


def configured(
    where: str, builder: Callable[..., T], config: Mapping[str, Any], defaults: Mapping[str, Any], /, **fixed: Any
) -> T:
    """`builder(**fixed, **config)`, with `defaults` for what `config` leaves open.

    Raises:
        UsageError: `config` is no mapping, or has a key that the builder does not take.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"{where} is {config!r}; expected a dict of settings (or None to leave a head out).")
    known = [name for name in inspect.signature(builder).parameters if name not in fixed]
    unknown = [key for key in config if key not in known]
    if unknown:
        raise UsageError(f"{where}: unknown setting {', '.join(map(repr, unknown))}; it takes {', '.join(known)}.")
    return builder(**fixed, **{**defaults, **config})


def one_of(what: str, value: str, allowed: Iterable[str]) -> str:
    """The value, if it is allowed; else a UsageError that lists what is."""
    if value not in tuple(allowed):
        raise UsageError(f"{what} {value!r} is not known; use one of {', '.join(allowed)}.")
    return value


def check_heads(where: str, width: int, num_heads: int) -> None:
    """Raise a UsageError unless the heads share the width evenly."""
    if num_heads < 1 or width % num_heads:
        raise UsageError(
            f"{where}: {num_heads} heads cannot share {width} channels evenly; num_heads must divide them."
        )


def constant(values: np.ndarray, like: Tensor) -> Tensor:
    """A table on the device of `like`, in its own dtype."""
    return torch.from_numpy(values).to(like.device)


def of_views(pair: Tensor, views: int) -> Tensor:
    """(1, 2, ...) to (1, views, ...): slot 0 for the first view, slot 1 for all others, for any number of views."""
    return pair.index_select(1, torch.arange(views, device=pair.device).clamp(max=1))


@functools.lru_cache(maxsize=16)
def rotary_table(rows: int, columns: int, specials: int, width: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and signed sin, each (specials + rows * columns, width) float32.

    The first half of a head turns with the row, the second with the column, both counted from 1; special tokens are at
    (0, 0), which is no rotation. A half of features [x1, x2] becomes [x1 cos - x2 sin, x2 cos + x1 sin]; the sign is in
    the table.
    """
    rate = base ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(1, rows + 1), np.arange(1, columns + 1), indexing="ij")
    places = np.stack([row.ravel(), column.ravel()], 1)
    places = np.concatenate([np.zeros((specials, 2), np.int64), places])
    angles = places[:, :, None] * rate
    cos = np.concatenate([np.cos(angles)] * 2, 2).reshape(-1, width)
    sin = np.concatenate([-np.sin(angles), np.sin(angles)], 2).reshape(-1, width)
    return cos.astype(np.float32), sin.astype(np.float32)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate (B, heads, N, width); N is a whole number of views. Always in float32: half would round the angles."""
    cos, sin = rotary
    views = x.float().unflatten(2, (-1, cos.shape[0]))
    a, b, c, d = views.chunk(4, -1)
    return (views * cos + torch.cat([b, a, d, c], -1) * sin).flatten(2, 3).to(x.dtype)


@functools.lru_cache(maxsize=16)
def resize_matrix(before: int, after: int) -> np.ndarray:
    """(after, before) float32: one axis of the antialiased bicubic resize (a = -0.5) as a linear map.

    As two matrix products the resize of the position table follows the weights and exports everywhere; Resize with
    antialiasing does neither.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(after)[:, None] + 0.5)
    first = np.maximum((centre - 2 * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 2 * stretch + 0.5).astype(np.int64), before)
    place = np.arange(before)[None]
    x = np.abs((place - centre + 0.5) / stretch)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * ((place >= first) & (place < last))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


class LayerScale(nn.Module):
    """x * gamma, one gain per channel."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, width), with optional LayerNorm of q and k and optional rotation."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = (num_heads, width // num_heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.heads[1]) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.heads[1]) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, self.heads).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block; a layer scale of None leaves the gains out."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 0.01,
        qk_norm: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, qk_norm)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotary))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoEncoder(nn.Module):
    """DINOv2 with registers: (V, 3, H, W) to the normed patch tokens (V, H/patch * W/patch, width)."""

    def __init__(self, width: int, depth: int, num_heads: int, patch: int, side: int, num_registers: int) -> None:
        super().__init__()
        self.patch, self.side, self.specials = patch, side, 1 + num_registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of DINOv2's training; kept for the checkpoint
        self.patch_embed = PatchEmbed(3, width, patch)
        self.blocks = nn.ModuleList(Block(width, num_heads, layer_scale=1.0, eps=_ENCODER_EPS) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_ENCODER_EPS)

    def position(self, rows: int, columns: int) -> Tensor:
        """(1, rows * columns, width): the table of the patches, resized from the trained grid if that is another."""
        table = self.pos_embed[:, 1:]
        if (rows, columns) == (self.side, self.side):
            return table
        grid = table.float().unflatten(1, (self.side, self.side))[0]
        grid = (constant(resize_matrix(self.side, rows), grid) @ grid.flatten(1)).unflatten(1, (self.side, -1))
        grid = constant(resize_matrix(self.side, columns), grid) @ grid
        return grid.flatten(0, 1)[None].to(table.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = int(x.shape[2]) // self.patch, int(x.shape[3]) // self.patch
        patches = self.patch_embed(x) + self.position(rows, columns)
        # Registers come after the position table was added, so they have no place of their own.
        specials = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], 1)
        x = torch.cat([specials.expand(patches.shape[0], -1, -1), patches], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.specials :]


class Aggregator(nn.Module):
    """Alternating attention: images (B, S, 3, H, W) in [0, 1] to tokens of chosen rounds, by round.

    Each is (B, S, P, 2 * embed_dim): the frame block's output beside the global block's. A view has one camera token,
    the registers, then its patches row by row.

    Args:
        img_size: side in pixels of the trained position table; the input may have any size.
        patch_embed: "conv", or the official name of a DINOv2 encoder.
        aa_block_size: frame blocks in a row before as many global blocks.
        rope_freq: base of the rotation angles; 0 or None is no rotation.
        init_values: initial layer scale; 0 or None leaves the layer scales out.

    Raises:
        UsageError: settings that do not fit each other.
    """

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        patch_embed: str = "dinov2_vitl14_reg",
        aa_block_size: int = 1,
        mlp_ratio: float = 4.0,
        num_register_tokens: int = 4,
        qk_norm: bool = True,
        rope_freq: float | None = 100,
        init_values: float | None = 0.01,
    ) -> None:
        super().__init__()
        one_of("aggregator.patch_embed", patch_embed, (_CONV, *_ENCODERS))
        check_heads("aggregator", embed_dim, num_heads)
        if rope_freq and embed_dim // num_heads % 4:
            raise UsageError(
                f"aggregator: heads of {embed_dim // num_heads} features cannot be rotated by row and column; "
                f"embed_dim {embed_dim} over num_heads {num_heads} must be a multiple of 4, or rope_freq 0."
            )
        if aa_block_size < 1 or depth % aa_block_size:
            raise UsageError(
                f"aggregator: aa_block_size {aa_block_size} does not divide depth {depth}; choose a divisor."
            )
        self.patch, self.embed_dim, self.depth, self.aa_block_size = patch_size, embed_dim, depth, aa_block_size
        self.img_size = img_size
        self.specials, self.head_dim, self.rope_freq = 1 + num_register_tokens, embed_dim // num_heads, rope_freq
        self.camera_token = nn.Parameter(0.02 * torch.randn(1, 2, 1, embed_dim))
        self.register_token = nn.Parameter(0.02 * torch.randn(1, 2, num_register_tokens, embed_dim))
        self.patch_embed = _patch_encoder(patch_embed, embed_dim, patch_size, img_size, num_register_tokens)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, init_values, qk_norm) for _ in range(depth))

        self.frame_blocks, self.global_blocks = blocks(), blocks()

    def forward(self, images: Tensor, wanted: Collection[int]) -> dict[int, Tensor]:
        """Tokens of the `wanted` rounds only: the others are dropped as soon as they were used."""
        batch, views, _, height, width = images.shape
        x = self.patch_embed(self._normalised(images).flatten(0, 1))
        x = x.unflatten(0, (batch, views))
        x = torch.cat([self._special_tokens(batch, views), x], 2)
        rotary, kept = self._rotary(int(height) // self.patch, int(width) // self.patch, x), {}
        for start in range(0, self.depth, self.aa_block_size):
            rounds = range(start, start + self.aa_block_size)
            frames: dict[int, Tensor] = {}
            for i in rounds:
                x = self.frame_blocks[i](x.flatten(0, 1), rotary).unflatten(0, (batch, views))
                frames.update({i: x} if i in wanted else {})
            for i in rounds:
                x = self.global_blocks[i](x.flatten(1, 2), rotary).unflatten(1, (views, -1))
                kept.update({i: torch.cat([frames[i], x], -1)} if i in wanted else {})
        return kept

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (
            constant(np.asarray(values, np.float32).reshape(3, 1, 1), images)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return ((images.float() - mean) / std).to(self.camera_token.dtype)

    def _special_tokens(self, batch: int, views: int) -> Tensor:
        """(B, S, 1 + registers, C): slot 0 of each learned pair for the first view, slot 1 for all others."""
        pair = torch.cat([self.camera_token, self.register_token], 2)
        return of_views(pair, views).expand(batch, -1, -1, -1)

    def _rotary(self, rows: int, columns: int, like: Tensor) -> Rotary | None:
        if not self.rope_freq:
            return None
        cos, sin = rotary_table(rows, columns, self.specials, self.head_dim, float(self.rope_freq))
        return constant(cos, like), constant(sin, like)


def _patch_encoder(name: str, embed_dim: int, patch: int, img_size: int, num_registers: int) -> nn.Module:
    if name == _CONV:
        return PatchEmbed(3, embed_dim, patch)
    width, depth, num_heads = _ENCODERS[name]
    if width != embed_dim:
        raise UsageError(f"aggregator: embed_dim {embed_dim} does not fit patch_embed {name!r}, which has {width}.")
    if img_size < patch or img_size % patch:
        near = max(patch, round(img_size / patch) * patch)
        raise UsageError(f"aggregator: img_size {img_size} is not a multiple of patch_size {patch}. Nearest: {near}.")
    return DinoEncoder(width, depth, num_heads, patch, img_size // patch, num_registers)
