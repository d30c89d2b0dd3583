"""`report.html`: the latest result of a bundle and its history, in one file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edgeattn.data.files import atomic_file
from edgeattn.devices.outcome import CheckResult
from edgeattn.devices.results import ResultsFile
from edgeattn.devices.strip_plot import strip_plot
from edgeattn.errors import UsageError
from edgeattn.runtime.bundle import REPORT, Bundle

_TEMPLATE = Path(__file__).with_name("templates") / "report.html.j2"
# Beyond this many, only the classes that lost or gained most are told; results.jsonl has all.
_CLASSES_SHOWN = 40
_HISTORY_SHOWN = 50


def summary_rows(result: CheckResult | Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each target and variant; None where it was not measured.

    Keys: target, variant, verdict (of the target), top1, agreement (percent), sqnr_db, p50_ms, p90_ms, size_bytes,
    speedup (of quantized over float32), and the intervals top1_interval, speedup_interval as {low, high}.
    """
    record: Mapping[str, Any] = result if isinstance(result, Mapping) else result.to_dict()
    return [_row(target, variant) for target in record["targets"] for variant in target["size_bytes"]]


def _row(target: Mapping[str, Any], variant: str) -> dict[str, Any]:
    accuracy = target["accuracy"].get(variant) or {}
    summary = (target["latency"].get(variant) or {}).get("summary") or {}
    speedup = (target["speedup"] or {}) if variant == "quantized" else {}
    return {
        "target": target["target"], "variant": variant, "verdict": target["verdict"],
        "top1": accuracy.get("top1"), "top1_interval": accuracy.get("top1_interval"),
        "agreement": accuracy.get("agreement"), "sqnr_db": accuracy.get("sqnr_db"),
        "p50_ms": summary.get("p50_ms"), "p90_ms": summary.get("p90_ms"), "size_bytes": target["size_bytes"][variant],
        "speedup": speedup.get("ratio"), "speedup_interval": speedup.get("interval"),
    }  # fmt: skip


def write_report(bundle: Bundle, results: ResultsFile) -> Path:
    """Write the report of the latest check (or, without one, of the latest result) into the bundle; returns its path.

    Raises:
        UsageError: there is no result yet. DeviceError: the file cannot be written.
    """
    html = render_report(bundle, results)
    path = bundle.path / REPORT
    with atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def render_report(bundle: Bundle, results: ResultsFile) -> str:
    """The report as HTML; every value from the bundle and the results is escaped."""
    if not results.records:
        raise UsageError(f"{bundle.path} has no result yet; run `edgeattn check {bundle.path} --data DIR` first.")
    checks = [record for record in results.records if record["kind"] == "check"]
    record = (checks or list(results.records))[-1]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=_number, interval=_interval, megabytes=_megabytes, plain=_plain)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        record=record, manifest=bundle.manifest, rows=summary_rows(record), settings=_settings_table(record),
        plots=[(t["target"], Markup(strip_plot(_samples(t)))) for t in record["targets"] if t["latency"]],
        placements=_placement_rows(record), classes=_class_tables(record), ignored=results.ignored,
        history=[_history_row(old) for old in reversed(results.records[-_HISTORY_SHOWN:])],
    )  # fmt: skip


def _samples(target: Mapping[str, Any]) -> dict[str, list[float]]:
    return {
        variant: [sample for block in latency["samples_ms"] for sample in block]
        for variant, latency in target["latency"].items()
    }


def _settings_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """Columns (target, variant) and one row for each option."""
    columns = [
        (t["target"], variant, settings) for t in record["targets"] for variant, settings in t["settings"].items()
    ]
    names = sorted({name for _, _, settings in columns for name in settings})
    return {
        "columns": [f"{target} {variant}" for target, variant, _ in columns],
        "rows": [(name, [settings.get(name) for _, _, settings in columns]) for name in names],
    }


def _placement_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for target in record["targets"]:
        for variant, placement in target["placement"].items():
            nodes = sorted(placement["nodes"].items(), key=lambda item: (-item[1], item[0]))
            told = ", ".join(f"{name} {count}" for name, count in nodes)
            rows.append({**placement, "target": target["target"], "variant": variant, "nodes": told})
    return rows


def _class_tables(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per target: classes by how much they changed, the largest loss first."""
    tables = []
    for target in record["targets"]:
        classes = {
            variant: target["accuracy"].get(variant, {}).get("per_class", []) for variant in ("float32", "quantized")
        }
        if not classes["quantized"]:
            continue  # nothing to compare with
        rows = [
            {"name": old["name"], "images": old["images"], "float32": 100 * old["correct"] / old["images"],
             "quantized": 100 * new["correct"] / new["images"]}
            for old, new in zip(classes["float32"], classes["quantized"], strict=True)
        ]  # fmt: skip
        rows.sort(key=lambda row: row["quantized"] - row["float32"])
        half = _CLASSES_SHOWN // 2
        shown = rows if len(rows) <= _CLASSES_SHOWN else rows[:half] + rows[-half:]
        if rows:
            tables.append({"target": target["target"], "rows": shown, "total": len(rows)})
    return tables


def _history_row(record: Mapping[str, Any]) -> dict[str, Any]:
    details = []
    for row in summary_rows(record):
        if row["variant"] == "quantized":
            parts = [f"top-1 {row['top1']:.2f} %"] if row["top1"] is not None else []
            parts += [f"agreement {row['agreement']:.2f} %"] if row["agreement"] is not None else []
            parts += [f"{row['speedup']:.2f}x"] if row["speedup"] is not None else []
            details.append(f"{row['target']}: {', '.join(parts)}")
    return {**record, "details": "; ".join(details)}


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001


def _interval(value: Mapping[str, float] | None, digits: int = 2) -> str:
    return "" if value is None else f"[{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.2f}"


def _plain(value: Any) -> str:
    """A setting or fact as text."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(item) for item in value)
    return str(value)
