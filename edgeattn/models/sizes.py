"""Input sizes: one number or a pair, and what a family says about a size that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from edgeattn.errors import UsageError


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a side or a pair.

    Raises:
        UsageError: neither a whole number nor two of them.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise UsageError(f"size {size!r}: expected one side in pixels, or (height, width).")
    return sides[0], sides[1]


def multiple_of(family: str, size: int | Sequence[int], stride: int, why: str) -> tuple[int, int]:
    """The (height, width) in pixels, both positive multiples of `stride`.

    Raises:
        UsageError: they are not; the nearest size that works is named.
    """
    height, width = as_pair(size)
    if min(height, width) < stride or height % stride or width % stride:
        near = tuple(max(stride, round(side / stride) * stride) for side in (height, width))
        raise UsageError(
            f"img_size {height}x{width} does not fit {family}: both sides must be positive multiples of {stride} "
            f"({why}). Nearest: {near[0]}x{near[1]}."
        )
    return height, width


def at_least(family: str, size: int | Sequence[int], smallest: int) -> tuple[int, int]:
    """The (height, width) in pixels, both at least `smallest`.

    Raises:
        UsageError: they are not.
    """
    height, width = as_pair(size)
    if min(height, width) < smallest:
        raise UsageError(
            f"img_size {height}x{width} is too small for {family}; both sides must be at least {smallest}."
        )
    return height, width
