"""Point tracker of VGGT: where the query points of the first view are in the other views.

Wang et al. (arXiv 2503.11651), section 3.3, after CoTracker (Karaev et al., arXiv 2307.07635), section 3: correlation
with a feature pyramid around the present estimate, and a transformer over views and tracks that corrects it.
Coordinates and angles stay in float32 whatever the weights are: a sine here turns by up to 1000 rad per pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.errors import UsageError
from edgeattn.models.transformer import MLP
from edgeattn.models.vggt_heads import DPTHead
from edgeattn.models.vggt_layers import DEFAULTS, check_heads, configured, constant, of_views

_FASTEST = 1000.0  # rad per pixel, upper end of the motion embedding
_PLACE_BASE = 10000.0
_MLP_RATIO = 4


@functools.lru_cache(maxsize=16)
def motion_rates(channels: int) -> np.ndarray:
    """(channels / 2,) float32 frequencies of the motion embedding, in rad per feature pixel."""
    return (np.arange(0, channels, 2) * (_FASTEST / channels)).astype(np.float32)


@functools.lru_cache(maxsize=16)
def place_table(size: int, channels: int) -> np.ndarray:
    """(1, channels, 1, size) float32: sin then cos of position * 10000^(-j / (channels / 2)) along one axis."""
    half = channels // 2
    angles = _PLACE_BASE ** (-np.arange(half) / half)[:, None] * np.arange(size)
    return np.concatenate([np.sin(angles), np.cos(angles)])[None, :, None].astype(np.float32)


def offset_grid(radius: int) -> np.ndarray:
    """(2r + 1, 2r + 1, 2) float32 window; upstream's quirk: the first (slow) axis moves x, the second y."""
    steps = np.arange(-radius, radius + 1, dtype=np.float32)
    return np.stack(np.meshgrid(steps, steps, indexing="ij"), -1)


def bilinear(maps: Tensor, points: Tensor, padding: str) -> Tensor:
    """(V, C, h, w) maps at (V, m, n, 2) pixel positions (x, y), corners aligned: (V, C, m, n)."""
    sides = np.asarray([max(int(side) - 1, 1) for side in (maps.shape[3], maps.shape[2])], np.float32)
    return F.grid_sample(maps, points * constant(2 / sides, maps) - 1, padding_mode=padding, align_corners=True)


class MultiheadAttention(nn.Module):
    """(B, N, width) attends to itself or to (B, M, width); parameter names are torch.nn.MultiheadAttention's."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, (num_heads, width // num_heads)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            sizes = [self.width, 2 * self.width]
            (to_q, to_kv), (bias_q, bias_kv) = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
            parts = (F.linear(x, to_q, bias_q), *F.linear(context, to_kv, bias_kv).chunk(2, -1))
        q, k, v = (part.unflatten(-1, self.heads).transpose(1, 2) for part in parts)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SelfBlock(nn.Module):
    """Transformer block whose first residual starts from the normed tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = MultiheadAttention(width, num_heads)
        self.mlp = MLP(width, _MLP_RATIO * width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """As `SelfBlock`, attending to a context."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = MultiheadAttention(width, num_heads)
        self.mlp = MLP(width, _MLP_RATIO * width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.norm1(x)
        x = x + self.cross_attn(x, self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class UpdateTransformer(nn.Module):
    """Tokens (B, N, S, width_in) of N tracks in S views to updates (B, N, S, width_out).

    Per depth: attention over the views of each track, then over the tracks of each view by way of virtual tracks.
    """

    def __init__(self, width_in: int, width: int, width_out: int, depth: int, num_heads: int, virtual: int) -> None:
        super().__init__()
        self.virtual = virtual
        self.virual_tracks = nn.Parameter(torch.randn(1, virtual, 1, width))  # sic: the published key
        self.input_norm = nn.LayerNorm(width_in)
        self.input_transform = nn.Linear(width_in, width)
        self.output_norm = nn.LayerNorm(width)
        self.flow_head = nn.Linear(width, width_out)
        self.time_blocks = nn.ModuleList(SelfBlock(width, num_heads) for _ in range(depth))
        self.space_virtual_blocks = nn.ModuleList(SelfBlock(width, num_heads) for _ in range(depth))
        self.space_point2virtual_blocks = nn.ModuleList(CrossBlock(width, num_heads) for _ in range(depth))
        self.space_virtual2point_blocks = nn.ModuleList(CrossBlock(width, num_heads) for _ in range(depth))
        nn.init.trunc_normal_(self.flow_head.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        start = self.input_transform(self.input_norm(x))
        batch, tracks, views, _ = start.shape
        x = torch.cat([start, self.virual_tracks.expand(batch, -1, views, -1)], 1)
        blocks = zip(
            self.time_blocks, self.space_virtual_blocks, self.space_point2virtual_blocks,
            self.space_virtual2point_blocks, strict=True,
        )  # fmt: skip
        for time, among_virtual, point_to_virtual, virtual_to_point in blocks:
            x = time(x.flatten(0, 1)).unflatten(0, (batch, tracks + self.virtual))
            points, virtual = x.transpose(1, 2).flatten(0, 1).split([tracks, self.virtual], 1)
            virtual = among_virtual(virtual_to_point(virtual, points))
            points = point_to_virtual(points, virtual)
            x = torch.cat([points, virtual], 1).unflatten(0, (batch, views)).transpose(1, 2)
        return self.flow_head(self.output_norm(x[:, :tracks] + start))


class Tracker(nn.Module):
    """Feature maps (B, S, C, h, w) and query points (B, N, 2), in pixels of view 0, to tracks, visibility, confidence.

    Args:
        stride: image pixels per pixel of the feature maps.
        corr_levels, corr_radius: levels of the pyramid, and reach of the window sampled in each.
        max_scale: image side in pixels that scales the flow among the inputs.
    """

    def __init__(
        self,
        latent_dim: int = 128,
        stride: int = 2,
        corr_levels: int = 7,
        corr_radius: int = 4,
        hidden_size: int = 384,
        depth: int = 6,
        num_virtual_tracks: int = 64,
        num_heads: int = 8,
        max_scale: int = 518,
    ) -> None:
        super().__init__()
        check_heads("track_head.tracker", hidden_size, num_heads)
        if latent_dim % 4:
            raise UsageError(f"track_head.tracker: latent_dim {latent_dim} must be a multiple of 4 (its sine tables).")
        self.stride, self.levels, self.radius, self.max_scale = stride, corr_levels, corr_radius, max_scale
        self.latent, width = latent_dim, 3 * latent_dim + 4
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, width))
        self.corr_mlp = MLP(corr_levels * (2 * corr_radius + 1) ** 2, hidden_size, latent_dim)
        self.updateformer = UpdateTransformer(width, hidden_size, latent_dim + 2, depth, num_heads, num_virtual_tracks)
        self.fmap_norm = nn.LayerNorm(latent_dim)
        self.ffeat_norm = nn.LayerNorm(latent_dim)  # upstream: GroupNorm with one group on vectors, the same function
        self.ffeat_updater = nn.Sequential(nn.Linear(latent_dim, latent_dim), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(latent_dim, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(latent_dim, 1))

    def forward(self, maps: Tensor, query: Tensor, iters: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Tracks (B, S, N, 2) in pixels after each iteration; visibility and confidence (B, S, N) in [0, 1]."""
        maps = self.fmap_norm(maps.movedim(2, -1)).movedim(-1, 2)
        views, pyramid = maps.shape[1], self._pyramid(maps)
        start = (query.float() / self.stride)[:, None]  # (B, 1, N, 2)
        coords = start.expand(-1, views, -1, -1)
        features = bilinear(maps[:, 0].float(), start, "border").permute(0, 2, 3, 1).to(maps.dtype)
        features = features.expand(-1, views, -1, -1)
        fixed = (self._places(start, maps) + of_views(self.query_ref_token, views)[:, :, None]).to(maps.dtype)
        moves = torch.arange(views, device=maps.device).clamp(max=1)[None, :, None, None].float()  # view 0 stays
        tracks = []
        for _ in range(iters):
            tokens = torch.cat(
                [self._motion(coords, maps.dtype), self._correlation(pyramid, features, coords), features], -1
            )
            delta = self.updateformer((tokens + fixed).transpose(1, 2)).transpose(1, 2)
            features = features + self.ffeat_updater(self.ffeat_norm(delta[..., 2:]))
            coords = coords + delta[..., :2].float() * moves
            tracks.append(coords * self.stride)
        visibility, confidence = (
            head(features).squeeze(-1).float().sigmoid() for head in (self.vis_predictor, self.conf_predictor)
        )
        return tracks, visibility, confidence

    def _pyramid(self, maps: Tensor) -> list[Tensor]:
        """Each level (B, S, C, h, w), halved by 2x2 averages."""
        batch, views = maps.shape[:2]
        levels = [maps]
        for _ in range(self.levels - 1):
            levels.append(F.avg_pool2d(levels[-1].flatten(0, 1), 2).unflatten(0, (batch, views)))
        return levels

    def _correlation(self, pyramid: Sequence[Tensor], features: Tensor, coords: Tensor) -> Tensor:
        """(B, S, N, C): each track's feature against a window of each level, then an MLP."""
        window = constant(offset_grid(self.radius), coords)
        centres = coords.flatten(0, 2)[:, None, None]
        samples = []
        for i, level in enumerate(pyramid):
            scores = (features @ level.flatten(3)).float() / self.latent**0.5
            scores = scores.flatten(0, 2).unflatten(1, (1, *level.shape[3:]))
            samples.append(bilinear(scores, centres / 2**i + window, "zeros").flatten(1))
        return self.corr_mlp(torch.cat(samples, 1).to(features.dtype)).unflatten(0, coords.shape[:3])

    def _motion(self, coords: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, S, N, C + 4): sines of the offset from view 0, sin and cos interleaved, x before y; the offset twice."""
        flow = coords - coords[:, :1]
        angles = flow[..., None] * constant(motion_rates(self.latent // 2), coords)
        embedded = torch.stack([angles.sin(), angles.cos()], -1).flatten(3)
        return torch.cat([embedded, flow / self.max_scale, flow / self.max_scale], -1).to(dtype)

    def _places(self, start: Tensor, maps: Tensor) -> Tensor:
        """(B, 1, N, width): sine table of the positions in view 0, its x half by column and its y half by row."""
        channels, (height, width) = (3 * self.latent + 4) // 2, maps.shape[3:]
        points = start.flatten(0, 2)[None, None]  # (1, 1, B * N, 2)
        parts = [
            bilinear(constant(place_table(int(size), channels), points), torch.stack([axis, axis * 0], -1), "border")
            for size, axis in ((width, points[..., 0]), (height, points[..., 1]))
        ]
        return torch.cat(parts, 1)[0, :, 0].transpose(0, 1).unflatten(0, start.shape[:3])


class TrackHead(nn.Module):
    """Feature maps by DPT, then the tracker.

    Raises:
        UsageError: settings that do not fit each other.
    """

    def __init__(
        self,
        dim_in: int,
        patch: int,
        feature_extractor: Mapping[str, Any] = DEFAULTS,
        tracker: Mapping[str, Any] = DEFAULTS,
        iters: int = 4,
    ) -> None:
        super().__init__()
        if iters < 1:
            raise UsageError(f"track_head: iters is {iters}; at least one is needed.")
        where = "track_head.feature_extractor"
        defaults = dict(dim_in=dim_in, features=128, feature_only=True, down_ratio=2, pos_embed=False)
        self.iters = iters
        self.feature_extractor = configured(where, DPTHead, feature_extractor, defaults, where=where, patch=patch)
        features = self.feature_extractor.scratch.output_conv1.out_channels
        self.tracker = configured("track_head.tracker", Tracker, tracker, {"latent_dim": features})
        if not self.feature_extractor.feature_only or self.tracker.latent != features:
            raise UsageError(
                f"track_head: the tracker needs maps (feature_only) of latent_dim {self.tracker.latent} channels; its "
                f"feature_extractor makes {features}, feature_only {self.feature_extractor.feature_only}. "
                "Make them agree."
            )

    def forward(
        self, layers: Mapping[int, Tensor], size: tuple[int, int], query: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        self._check_size(size)
        return self.tracker(self.feature_extractor(layers, size), query, self.iters)

    def _check_size(self, size: tuple[int, int]) -> None:
        """The coarsest level of the pyramid needs a pixel."""
        patch, ratio = self.feature_extractor.patch, self.feature_extractor.down_ratio
        smallest = 2 ** (self.tracker.levels - 1) * ratio
        if min(size) // ratio * ratio < smallest:
            raise UsageError(
                f"images of {size[0]}x{size[1]} are too small to track points: {self.tracker.levels} pyramid levels "
                f"need sides of at least {-(-smallest // patch) * patch} px. Enlarge them, or pass no query_points."
            )
