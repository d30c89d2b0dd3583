"""A list of sensitivities as rows for tables, as CSV, and as a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from edgeattn.data.files import atomic_file
from edgeattn.errors import UsageError
from edgeattn.quant.sensitivity import LayerSensitivity

_WIDTH, _LEFT, _RIGHT, _LINE, _TOP, _AXIS = 900, 250, 90, 18, 34, 30
_COLOURS = {"conv": "#2a6f97", "linear": "#468faf", "add": "#bc6c25", "attention": "#606c38"}


def worst_first(layers: Sequence[LayerSensitivity]) -> list[LayerSensitivity]:
    """Sorted by divergence."""
    return sorted(layers, key=lambda layer: -layer.kl)


def by_block(layers: Sequence[LayerSensitivity]) -> list[dict[str, Any]]:
    """One row for each kind of identical layers, the sum over them, worst first.

    Keys: block, modules (their common name, numbers as #), kind, layers, kl, loss, second_order, size_bytes,
    float_bytes.
    """
    groups: dict[str, list[LayerSensitivity]] = {}
    for layer in layers:
        groups.setdefault(layer.block, []).append(layer)
    rows = [
        {
            "block": block, "modules": _place(group[0].module), "kind": group[0].kind, "layers": len(group),
            "kl": sum(layer.kl for layer in group), "loss": _sum([layer.loss for layer in group]),
            "second_order": _sum([layer.second_order for layer in group]),
            "size_bytes": sum(layer.size_bytes for layer in group),
            "float_bytes": sum(layer.float_bytes for layer in group),
        }
        for block, group in groups.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["kl"])


def _place(module: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in module.split("."))


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def to_csv(layers: Sequence[LayerSensitivity]) -> str:
    """One line for each layer in the order given, with a header; empty fields where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(LayerSensitivity)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(layer.to_dict() for layer in layers)
    return text.getvalue()


def to_svg(layers: Sequence[LayerSensitivity]) -> str:
    """A bar for each layer, in the order given: its divergence on a logarithmic axis."""
    seen = [layer.kl for layer in layers if layer.kl > 0] or [1e-9]
    high = math.ceil(math.log10(max(seen)) + 1e-9)
    # Six decades: what costs a millionth of the worst layer is nothing to look at.
    low = max(high - 6, min(math.floor(math.log10(min(seen))), high - 1))
    height = _TOP + _LINE * len(layers) + _AXIS
    told = ", ".join(f"{layer.module}: {layer.kl:.2e}" for layer in worst_first(layers)[:5])
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="Divergence in nats per picture. Worst: {escape(told)}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>'
        + "".join(_legend(kind, i) for i, kind in enumerate(kinds))
        + "".join(_bar(layer, i, low, high) for i, layer in enumerate(layers))
        + "".join(_tick(power, low, high, height) for power in range(low, high + 1)) + "</svg>\n"
    )  # fmt: skip


def _legend(kind: str, place: int) -> str:
    x = _LEFT + 110 * place
    return (
        f'<rect x="{x}" y="10" width="12" height="12" fill="{_COLOURS[kind]}"/>'
        f'<text x="{x + 17}" y="21">{escape(kind)}</text>'
    )


def _x(power: float, low: int, high: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (power - low) / (high - low)


def _bar(layer: LayerSensitivity, row: int, low: int, high: int) -> str:
    y = _TOP + _LINE * row
    end = _x(max(math.log10(layer.kl), low), low, high) if layer.kl > 0 else _LEFT
    name = layer.module if len(layer.module) <= 36 else "..." + layer.module[-33:]
    return (
        f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="{_LEFT}" y="{y + 3}" width="{max(end - _LEFT, 1):.1f}" height="{_LINE - 6}" '
        f'fill="{_COLOURS[layer.kind]}"><title>{escape(layer.module)}, {escape(layer.weights)} weights</title></rect>'
        f'<text x="{max(end, _LEFT + 1) + 5:.1f}" y="{y + 13}" fill="#555555">{layer.kl:.1e}</text>'
    )


def _tick(power: int, low: int, high: int, height: int) -> str:
    x, y = _x(power, low, high), height - _AXIS
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y + 4}" stroke="#cccccc" stroke-width="0.7"/>'
        f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle" fill="#555555">1e{power}</text>'
    )


def check_suffix(path: Path | None, suffix: str) -> None:
    """Refuse a file name that promises another format.

    Raises:
        UsageError: it does not end in `suffix`.
    """
    if path is not None and path.suffix.lower() != suffix:
        raise UsageError(f"{path}: this writes {suffix[1:].upper()}; give a name that ends in {suffix}.")


def write_text(path: Path | None, text: str) -> None:
    """Write a file whole or not at all; None writes nothing.

    Raises:
        DeviceError: it cannot be written.
    """
    if path is not None:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
