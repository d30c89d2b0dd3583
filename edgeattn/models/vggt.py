"""VGGT-1B: cameras, depth, points and tracks of a scene from one or more views, in one pass.

Wang et al., "VGGT: Visual Geometry Grounded Transformer", CVPR 2025 (arXiv 2503.11651). State-dict names are those of
the official release (facebookresearch/vggt).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from edgeattn.data.interface import BATCH, Interface, TensorSpec
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import UsageError
from edgeattn.models.registry import register_variants
from edgeattn.models.sizes import multiple_of
from edgeattn.models.vggt_heads import CameraHead, DPTHead
from edgeattn.models.vggt_layers import DEFAULTS, Aggregator, configured
from edgeattn.models.vggt_tracker import TrackHead

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]
HEADS = ("camera", "depth", "point", "track")
# Of an output's spread: exponentials at the end of the dense heads, and a tracker whose sines turn up to 1000 rad per
# feature pixel, amplify the rounding of float32.
_TOLERANCE = {
    "pose_enc": 5e-4, "depth": 5e-4, "depth_conf": 5e-4, "world_points": 5e-4, "world_points_conf": 5e-4,
    "track": 1e-3, "vis": 1e-2, "conf": 5e-2,
}  # fmt: skip


class VGGT(nn.Module):
    """Images (B, S, 3, H, W) in [0, 1] of S views, and query points (B, N, 2), to a dict of tensors.

    H and W are multiples of the patch (14). A missing batch dimension is added. Query points are (x, y) in pixels of
    the first view; without them nothing is tracked. Normalisation is inside the model. See `output_names` for the
    results. Every setting that is not given is that of VGGT-1B.

    Args:
        aggregator, camera_head, point_head, depth_head, track_head: settings of the parts; None leaves a head out.
        img_size: side, or (height, width), that the preprocessing makes; the weights fit any. None: the aggregator's.

    Raises:
        UsageError: unknown or contradicting settings, or a size that the patch does not divide.
    """

    task = "geometry"
    # Also return what golden files check; off in exports: the graph is smaller, and the views may then be a free axis
    # from 2 on (`track_delta` is one view shorter, which torch.export would keep from being 1).
    diagnostics = True
    views: int | None = None  # of an export; None: a free axis

    def __init__(
        self,
        aggregator: Config = DEFAULTS,
        camera_head: Config | None = DEFAULTS,
        point_head: Config | None = DEFAULTS,
        depth_head: Config | None = DEFAULTS,
        track_head: Config | None = DEFAULTS,
        img_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.aggregator = configured("aggregator", Aggregator, aggregator, DEFAULTS)
        self.patch, width = self.aggregator.patch, 2 * self.aggregator.embed_dim

        def head(where: str, builder: Any, config: Config | None, /, defaults: Config, **fixed: Any) -> Any:
            return None if config is None else configured(where, builder, config, defaults, **fixed)

        points, depth = {"dim_in": width, "output_dim": 4}, {"dim_in": width, "output_dim": 2, "activation": "exp"}
        self.camera_head = head("camera_head", CameraHead, camera_head, {"dim_in": width})
        self.point_head = head("point_head", DPTHead, point_head, points, where="point_head", patch=self.patch)
        self.depth_head = head("depth_head", DPTHead, depth_head, depth, where="depth_head", patch=self.patch)
        self.track_head = head("track_head", TrackHead, track_head, {}, dim_in=width, patch=self.patch)
        self._check_heads(width)
        size = multiple_of("VGGT", img_size or self.aggregator.img_size, self.patch, "the patch")
        self.preprocessing = Preprocessing(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def _check_heads(self, width: int) -> None:
        """Raise a UsageError unless every head fits the aggregator."""
        extractor = None if self.track_head is None else self.track_head.feature_extractor
        dense = {
            "point_head": self.point_head,
            "depth_head": self.depth_head,
            "track_head.feature_extractor": extractor,
        }
        depth = self.aggregator.depth
        norms = {} if self.camera_head is None else {"camera_head": self.camera_head.token_norm}
        for name, head in dense.items():
            if head is None:
                continue
            norms[name] = head.norm
            if not all(0 <= i < depth for i in head.layer_indices):
                raise UsageError(
                    f"{name}: intermediate_layer_idx {list(head.layer_indices)} is out of range; the aggregator has "
                    f"rounds 0 to {depth - 1}."
                )
            if head.feature_only and name != "track_head.feature_extractor":
                raise UsageError(f"{name}: feature_only is for the track head; remove it here.")
        for name, norm in norms.items():
            if norm.normalized_shape != (width,):
                raise UsageError(
                    f"{name}: dim_in is {norm.normalized_shape[0]}; expected {width}, twice the aggregator's embed_dim."
                )
        if not norms:
            raise UsageError("VGGT without any head computes nothing; keep at least one head.")

    def output_names(self, tracks: bool = True) -> tuple[str, ...]:
        """Names of the results, in order; `tracks`: with query points.

        `pose_enc` is translation 3, quaternion 4 (x y z w), vertical and horizontal field of view; `diagnostics` adds
        results after the first iteration (`iter0`), and `track_delta`, how far tracks in views 1.. are from the query.
        """
        names: list[str] = []
        names += ["pose_enc"] if self.camera_head is not None else []
        names += ["depth", "depth_conf"] if self.depth_head is not None else []
        names += ["world_points", "world_points_conf"] if self.point_head is not None else []
        tracks = tracks and self.track_head is not None
        names += ["track", "vis", "conf"] if tracks else []
        if self.diagnostics:
            names += ["pose_enc_iter0"] if self.camera_head is not None else []
            names += ["track_delta", "track_delta_iter0"] if tracks else []
        return tuple(names)

    @property
    def interface(self) -> Interface:
        """Inputs and outputs of the exported model, at the size of the preprocessing."""
        size = self.preprocessing.size
        inputs = [TensorSpec("images", (BATCH, self.views or "views", 3, *size), high=1)]
        if self.track_head is not None:
            inputs.append(TensorSpec("query_points", (BATCH, "points", 2), high=min(size)))
        return Interface(tuple(inputs), self.output_names(), _TOLERANCE)

    def for_export(self, heads: Sequence[str] | None = None, views: int | None = None) -> VGGT:
        """This model, sharing its weights, with some of its heads and the results of a deployment.

        Args:
            heads: of camera, depth, point, track; None keeps all.
            views: number of views; None keeps what was chosen before, at first free from 2 on.

        Raises:
            UsageError: a head that does not exist.
        """
        have = [name for name in HEADS if getattr(self, f"{name}_head") is not None]
        wanted = list(heads) if heads is not None else have
        unknown = sorted(set(wanted) - set(have))
        if unknown or not wanted:
            raise UsageError(
                f"heads {', '.join(unknown) or '(none)'}: this VGGT has {', '.join(have)}; name some of them."
            )
        if views is not None and views < 1:
            raise UsageError(f"views {views}: a scene has at least one view.")
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        for name in set(have) - set(wanted):
            setattr(twin, f"{name}_head", None)
        twin.diagnostics, twin.views = False, views or self.views
        return twin

    @property
    def absent_parts(self) -> tuple[str, ...]:
        """Heads that were left out: a checkpoint may hold them."""
        return tuple(f"{name}_head" for name in HEADS if getattr(self, f"{name}_head") is None)

    def forward(self, images: Tensor, query_points: Tensor | None = None) -> dict[str, Tensor]:
        """(B, S, 3, H, W) and optionally (B, N, 2) to the results of `output_names`."""
        images, query_points = self._checked(images, query_points)
        size = int(images.shape[-2]), int(images.shape[-1])
        layers = self.aggregator(images, self._rounds(query_points is not None))
        found: dict[str, Tensor] = {}
        if self.camera_head is not None:
            poses = self.camera_head(layers[self.aggregator.depth - 1])
            found |= {"pose_enc": poses[-1], "pose_enc_iter0": poses[0]}
        if self.depth_head is not None:
            found["depth"], found["depth_conf"] = self.depth_head.activate(self.depth_head(layers, size))
        if self.point_head is not None:
            found["world_points"], found["world_points_conf"] = self.point_head.activate(self.point_head(layers, size))
        if query_points is not None:
            tracks, found["vis"], found["conf"] = self.track_head(layers, size, query_points)
            found["track"] = tracks[-1]
            if self.diagnostics:
                start = query_points[:, None].float()
                found["track_delta"], found["track_delta_iter0"] = ((tracks[i] - start)[:, 1:] for i in (-1, 0))
        return {name: found[name] for name in self.output_names(query_points is not None)}

    def _rounds(self, tracks: bool) -> set[int]:
        """The aggregator's rounds that the heads read."""
        rounds = set() if self.camera_head is None else {self.aggregator.depth - 1}
        extractor = self.track_head.feature_extractor if tracks else None
        for head in (self.point_head, self.depth_head, extractor):
            rounds |= set() if head is None else set(head.layer_indices)
        return rounds

    def _checked(self, images: Tensor, query_points: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both inputs with their batch dimension; query points only where a head reads them."""
        if images.dim() == 4:
            images = images[None]
        if images.dim() != 5 or images.shape[2] != 3:
            raise UsageError(
                f"images of {tuple(images.shape)}: expected (batch, views, 3, height, width), or without the batch."
            )
        if not images.is_floating_point():
            raise UsageError(f"images are {images.dtype}; expected floats in [0, 1]: divide 8-bit pixels by 255.")
        multiple_of("VGGT", (int(images.shape[-2]), int(images.shape[-1])), self.patch, "the patch")
        if query_points is None:
            return images, None
        if self.track_head is None:
            logger.warning("query_points are ignored: this VGGT was built without a track head.")
            return images, None
        if query_points.dim() == 2:
            query_points = query_points[None]
        if query_points.dim() != 3 or query_points.shape[2] != 2 or query_points.shape[0] != images.shape[0]:
            raise UsageError(
                f"query_points of {tuple(query_points.shape)} for {images.shape[0]} scene(s): expected (batch, points, "
                "2), x and y in pixels of the first view."
            )
        return images, query_points


_VARIANTS: dict[str, dict[str, Any]] = {"vggt": {}, "vggt_1b": {}}
register_variants(VGGT, _VARIANTS)
