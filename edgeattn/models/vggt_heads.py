"""Heads of VGGT on the aggregated tokens: camera parameters, and dense maps by DPT.

Wang et al. (arXiv 2503.11651), section 3.3; Ranftl et al., "Vision Transformers for Dense Prediction", ICCV 2021
(arXiv 2103.13413), sections 3.1 and 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.errors import UsageError
from edgeattn.models.transformer import MLP
from edgeattn.models.vggt_layers import Block, check_heads, constant, one_of

_POSE = 9  # translation 3, quaternion 4 (x y z w), vertical and horizontal field of view
_CHUNK = 8  # views that a DPT head holds in memory at once
_HIDDEN = 32  # channels before the last convolution
_UV_BASE, _UV_SHARE = 100.0, 0.1


def _signed_expm1(x: Tensor) -> Tensor:
    return x.sign() * x.abs().expm1()


def _xy_inv_log(x: Tensor) -> Tensor:
    z = _signed_expm1(x[..., 2:])
    return torch.cat([x[..., :2] * z, z], -1)


def _norm_exp(x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return x / length * length.expm1()


_POSE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x, "inv_log": _signed_expm1, "exp": torch.exp, "relu": torch.relu,
}  # fmt: skip
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **_POSE_ACTIVATIONS,
    "sigmoid": torch.sigmoid, "norm": lambda x: x / x.norm(dim=-1, keepdim=True), "norm_exp": _norm_exp,
    "xy_inv_log": _xy_inv_log,
}  # fmt: skip
_CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "expp1": lambda x: 1 + x.exp(), "expp0": torch.exp, "sigmoid": torch.sigmoid,
}  # fmt: skip


class CameraHead(nn.Module):
    """Tokens (B, S, P, dim_in) to the pose of each view, (B, S, 9), after every iteration.

    Args:
        num_iterations: refinements; each starts from the same tokens and the pose so far.
        trans_act, quat_act, fl_act: output activation of translation, quaternion and field of view.
    """

    def __init__(
        self,
        dim_in: int,
        trunk_depth: int = 4,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        init_values: float | None = 0.01,
        num_iterations: int = 4,
        trans_act: str = "linear",
        quat_act: str = "linear",
        fl_act: str = "relu",
    ) -> None:
        super().__init__()
        check_heads("camera_head", dim_in, num_heads)
        if num_iterations < 1:
            raise UsageError(f"camera_head: num_iterations is {num_iterations}; at least one is needed.")
        self.num_iterations = num_iterations
        self.activations = [
            one_of(f"camera_head.{key}", name, _POSE_ACTIVATIONS)
            for key, name in (("trans_act", trans_act), ("quat_act", quat_act), ("fl_act", fl_act))
        ]
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, _POSE))
        self.trunk = nn.Sequential(*(Block(dim_in, num_heads, mlp_ratio, init_values) for _ in range(trunk_depth)))
        self.token_norm = nn.LayerNorm(dim_in)
        self.trunk_norm = nn.LayerNorm(dim_in)
        self.embed_pose = nn.Linear(_POSE, dim_in)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim_in, 3 * dim_in))
        self.adaln_norm = nn.LayerNorm(dim_in, eps=1e-6, elementwise_affine=False)
        self.pose_branch = MLP(dim_in, dim_in // 2, _POSE)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        tokens = self.token_norm(tokens[:, :, 0])
        normed = self.adaln_norm(tokens)
        known = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        pose: Tensor | None = None  # float32: the sum of all deltas
        poses = []
        for _ in range(self.num_iterations):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known)).chunk(3, -1)
            x = self.trunk(gate * (normed * (1 + scale) + shift) + tokens)
            delta = self.pose_branch(self.trunk_norm(x)).float()
            pose = delta if pose is None else pose + delta
            known = pose.to(tokens.dtype)
            poses.append(self._activated(pose))
        return poses

    def _activated(self, pose: Tensor) -> Tensor:
        parts = zip(self.activations, pose.split([3, 4, 2], -1), strict=True)
        return torch.cat([_POSE_ACTIVATIONS[name](part) for name, part in parts], -1)


@functools.lru_cache(maxsize=64)
def uv_embedding(rows: int, columns: int, channels: int, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """(channels, 1, columns) and (channels, rows, 1) float32, whose sum is the embedding of the map's coordinates.

    The first half of the channels depends on the column only, the second on the row only, each sin then cos. Kept
    apart they are small: the sum at 518 px would be a constant of 137 MB per head.
    """
    diagonal = (aspect**2 + 1) ** 0.5
    rate = _UV_BASE ** (-np.arange(channels // 4) / (channels // 4))
    parts = []
    for size, span in ((columns, aspect / diagonal), (rows, 1 / diagonal)):
        end = span * (size - 1) / size
        angles = rate[:, None] * np.linspace(-end, end, size)
        parts.append(_UV_SHARE * np.concatenate([np.sin(angles), np.cos(angles)]))
    u = np.concatenate([parts[0], np.zeros_like(parts[0])])[:, None, :]
    v = np.concatenate([np.zeros_like(parts[1]), parts[1]])[:, :, None]
    return u.astype(np.float32), v.astype(np.float32)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions. The skip adds relu(x), not x: upstream's first ReLU works in place."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return x + self.conv2(self.conv1(x).relu())


class Fusion(nn.Module):
    """Adds a finer level to the map so far (the coarsest has none), refines, resizes and projects."""

    def __init__(self, features: int, has_skip: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        if has_skip:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return self.out_conv(_resized(self.resConfUnit2(x), size))


class Scratch(nn.Module):
    """Four levels, fine to coarse, to one map at twice the finest level's size."""

    refinenet1: Fusion
    refinenet2: Fusion
    refinenet3: Fusion
    refinenet4: Fusion

    def __init__(self, channels: Sequence[int], features: int, output_dim: int | None) -> None:
        super().__init__()
        for i, width in enumerate(channels, 1):
            setattr(self, f"layer{i}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
        for i in range(1, 5):
            setattr(self, f"refinenet{i}", Fusion(features, has_skip=i < 4))
        mapped = features if output_dim is None else features // 2
        self.output_conv1 = nn.Conv2d(features, mapped, 3, padding=1)
        if output_dim is not None:
            self.output_conv2 = nn.Sequential(
                nn.Conv2d(mapped, _HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(_HIDDEN, output_dim, 1)
            )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        maps = [getattr(self, f"layer{i}_rn")(level) for i, level in enumerate(levels, 1)]
        x = self.refinenet4(maps[3], None, _size(maps[2]))
        x = self.refinenet3(x, maps[2], _size(maps[1]))
        x = self.refinenet2(x, maps[1], _size(maps[0]))
        height, width = _size(maps[0])
        return self.output_conv1(self.refinenet1(x, maps[0], (2 * height, 2 * width)))


def _size(x: Tensor) -> tuple[int, int]:
    return int(x.shape[-2]), int(x.shape[-1])


class DPTHead(nn.Module):
    """Patch tokens of four rounds to a dense map (B, S, C, H / down_ratio, W / down_ratio), before any activation.

    C is output_dim, or `features` with feature_only.

    Args:
        out_channels, intermediate_layer_idx: channels and aggregator round (from 0) of the four levels, fine to coarse.
        activation, conf_activation: of the values (all channels but the last) and of the confidence, in `activate`.
        pos_embed: add the embedding of the map's coordinates.
    """

    def __init__(
        self,
        where: str,
        patch: int,
        dim_in: int,
        features: int = 256,
        out_channels: Sequence[int] = (256, 512, 1024, 1024),
        intermediate_layer_idx: Sequence[int] = (4, 11, 17, 23),
        output_dim: int = 4,
        activation: str = "inv_log",
        conf_activation: str = "expp1",
        pos_embed: bool = True,
        feature_only: bool = False,
        down_ratio: int = 1,
    ) -> None:
        super().__init__()
        if len(out_channels) != 4 or len(intermediate_layer_idx) != 4:
            raise UsageError(
                f"{where}: out_channels {list(out_channels)}, intermediate_layer_idx {list(intermediate_layer_idx)}; "
                "expected four levels of each."
            )
        embedded = [*out_channels] + ([] if feature_only else [features // 2])
        if features % 2 or (pos_embed and any(width % 4 for width in embedded)):
            raise UsageError(
                f"{where}: features {features} and out_channels {list(out_channels)}; features must be even, and with "
                "pos_embed out_channels must be multiples of 4 and features of 8."
            )
        self.patch, self.pos_embed, self.down_ratio = patch, pos_embed, down_ratio
        self.layer_indices, self.feature_only = tuple(intermediate_layer_idx), feature_only
        self.activation = one_of(f"{where}.activation", activation, _ACTIVATIONS)
        self.conf_activation = one_of(f"{where}.conf_activation", conf_activation, _CONFIDENCES)
        if activation == "xy_inv_log" and output_dim != 4:
            raise UsageError(f"{where}: activation 'xy_inv_log' is for points; output_dim is {output_dim}, expected 4.")
        first, second, _, fourth = out_channels
        self.norm = nn.LayerNorm(dim_in)
        self.projects = nn.ModuleList(nn.Conv2d(dim_in, width, 1) for width in out_channels)
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(first, first, 4, 4), nn.ConvTranspose2d(second, second, 2, 2), nn.Identity(),
            nn.Conv2d(fourth, fourth, 3, 2, 1),
        ])  # fmt: skip
        self.scratch = Scratch(out_channels, features, None if feature_only else output_dim)

    def forward(self, layers: Mapping[int, Tensor], size: tuple[int, int]) -> Tensor:
        """Tokens (B, S, P, dim_in) by round, and (height, width) of the image in pixels."""
        levels = [layers[i] for i in self.layer_indices]
        views = levels[0].shape[1]
        if torch.compiler.is_compiling() or views <= _CHUNK:  # a traced graph must not depend on the number of views
            return self._maps(levels, size)
        chunks = zip(*(level.split(_CHUNK, 1) for level in levels), strict=True)
        return torch.cat([self._maps(chunk, size) for chunk in chunks], 1)

    def _maps(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        batch, views = levels[0].shape[:2]
        rows, columns = size[0] // self.patch, size[1] // self.patch
        maps = []
        for level, project, resize in zip(levels, self.projects, self.resize_layers, strict=True):
            patches = self.norm(level[:, :, -rows * columns :].flatten(0, 1))
            x = project(patches.transpose(1, 2).unflatten(2, (rows, columns)))
            maps.append(resize(self._embedded(x, size)))
        whole = rows * self.patch // self.down_ratio, columns * self.patch // self.down_ratio
        x = self._embedded(_resized(self.scratch(maps), whole), size)
        x = x if self.feature_only else self.scratch.output_conv2(x)
        return x.unflatten(0, (batch, views))

    def _embedded(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if not self.pos_embed:
            return x
        u, v = uv_embedding(*_size(x), int(x.shape[1]), size[1] / size[0])
        return x + constant(u, x).to(x.dtype) + constant(v, x).to(x.dtype)

    def activate(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B, S, H, W, C - 1) and confidence (B, S, H, W), in float32: the exponentials overflow in half."""
        maps = maps.float().movedim(2, -1)
        return _ACTIVATIONS[self.activation](maps[..., :-1]), _CONFIDENCES[self.conf_activation](maps[..., -1])
