"""Distributions as an inline SVG: one line for each series, every run a dot, a box for the middle half."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

_WIDTH, _LEFT, _RIGHT, _LINE, _AXIS = 760, 96, 16, 48, 30
_MOST_DOTS = 400


def strip_plot(series: Mapping[str, Sequence[float]]) -> str:
    """SVG of run times in milliseconds; colours come from the page's classes `dot`, `box`, `median` and `axis`."""
    values = np.concatenate([np.asarray(samples, float) for samples in series.values()])
    # A few outliers, told in words, must not squeeze everything else into one pixel.
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    margin = max((high - low) * 0.05, high * 0.01)
    low, high = max(0.0, low - margin), high + margin
    height = _LINE * len(series) + _AXIS
    parts = [_line(name, samples, i, low, high) for i, (name, samples) in enumerate(series.items())]
    told = "; ".join(f"{name}: median {np.median(samples):.3f} ms" for name, samples in series.items())
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Run times. {escape(told)}">'
        + "".join(parts) + _axis(low, high, height) + "</svg>"
    )  # fmt: skip


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)


def _line(name: str, samples: Sequence[float], row: int, low: float, high: float) -> str:
    values = np.asarray(samples, float)
    y = _LINE * row + _LINE / 2
    shown = values[np.linspace(0, len(values) - 1, min(len(values), _MOST_DOTS)).astype(int)]
    # Golden-ratio steps spread dots of equal time evenly, and the same way each time.
    heights = y + (np.arange(len(shown)) * 0.618034 % 1 - 0.5) * _LINE * 0.5
    dots = "".join(
        f'<circle class="dot" cx="{_x(v, low, high):.1f}" cy="{h:.1f}" r="1.6"/>'
        for v, h in zip(shown, heights, strict=True)
        if v <= high
    )
    left, middle, right = (_x(q, low, high) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    beyond = int((values > high).sum())
    told = f"{beyond} beyond, to {values.max():.2f}"
    note = f'<text class="axis" x="{_WIDTH - 4}" y="{y - 14:.1f}" text-anchor="end">{told}</text>'
    return (
        f'<text class="name" x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>{dots}'
        f'<rect class="box" x="{left:.1f}" y="{y - 12:.1f}" width="{max(right - left, 1):.1f}" height="24"/>'
        f'<line class="median" x1="{middle:.1f}" x2="{middle:.1f}" y1="{y - 14:.1f}" y2="{y + 14:.1f}"/>'
        + (note if beyond else "")
    )


def _axis(low: float, high: float, height: int) -> str:
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 8)
    first = math.ceil(low / step)
    ticks = [first * step + i * step for i in range(math.floor(high / step) - first + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    y = height - _AXIS + 2
    marks = "".join(
        f'<line class="axis" x1="{_x(t, low, high):.1f}" x2="{_x(t, low, high):.1f}" y1="{y}" y2="{y + 5}"/>'
        f'<text class="axis" x="{_x(t, low, high):.1f}" y="{y + 18}" text-anchor="middle">{t:.{digits}f}</text>'
        for t in ticks
    )
    return (
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>{marks}'
        f'<text class="axis" x="{_LEFT - 10}" y="{y + 18}" text-anchor="end">ms</text>'
    )
