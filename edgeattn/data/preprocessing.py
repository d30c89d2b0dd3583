"""Image preprocessing of a model: resize, centre crop, normalise. Needs NumPy and Pillow only: apps embed it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image

from edgeattn.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What turns an RGB picture into the model's input.

    Attributes:
        size: (height, width) of the model's input in pixels.
        crop_fraction: share of the resized picture that the centre crop keeps (timm calls it crop_pct).
        mean, std: per-channel statistics on the 0-1 scale.
        interpolation: Pillow filter of the resize: nearest, bilinear, bicubic or lanczos.
    """

    size: tuple[int, int]
    crop_fraction: float = 1.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS:
            raise UsageError(f"interpolation {self.interpolation!r} is unknown; use one of {', '.join(_FILTERS)}.")
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop_fraction is {self.crop_fraction}; expected a share in (0, 1].")

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """RGB picture of any size to an RGB picture of `size`: short side matched, centre cut out."""
        height, width = self.size
        scale = max(height / image.height, width / image.width) / self.crop_fraction
        new_w, new_h = (
            max(width, math.floor(image.width * scale + 0.5)),
            max(height, math.floor(image.height * scale + 0.5)),
        )
        if (new_w, new_h) != image.size:
            image = image.resize((new_w, new_h), _FILTERS[self.interpolation])
        left, top = (new_w - width) // 2, (new_h - height) // 2
        return image.crop((left, top, left + width, top + height))

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """(..., H, W, 3) uint8 to (..., 3, H, W) float32, contiguous."""
        scaled = pixels.astype(np.float32) / np.float32(255)
        normalized = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(np.moveaxis(normalized, -1, -3))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture to (3, H, W) float32."""
        return self.normalize(np.asarray(self.resize_and_crop(image)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Inverse of `to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)
