"""Commands about quantization that make no bundle; `edgeattn.cli` adds them to its app."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeattn.cli_common import Json, SkipBad, Targets, Threads, progress_bars, show, size
from edgeattn.errors import UsageError


def calibration_command(
    model: Annotated[str, typer.Argument(help="Name of the zoo (`edgeattn models`), timm:NAME, or an .onnx file.")],
    calib: Annotated[Path, typer.Option(help="Calibration images: a folder or an .npz file.")],
    weights: Annotated[str | None, typer.Option(help="Checkpoint, as for `edgeattn export`.")] = None,
    val: Annotated[Path | None, typer.Option(help="Validation images; none may be among the others.")] = None,
    quant: Annotated[str, typer.Option(help="Recipe: a preset or a YAML file.")] = "w8a8",
    target: Targets = None,
    img_size: Annotated[str | None, typer.Option(help="Input side, or HEIGHTxWIDTH, in pixels.")] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Are these pictures fit to calibrate on? Coverage, clipping, outliers, drift, leaks (exit 1: an error found)."""
    from edgeattn.models.factory import carries_weights, create_model
    from edgeattn.quant.doctor import diagnose

    if weights is None and not carries_weights(model):
        raise UsageError("no weights: pass --weights FILE; ranges of an untrained model say nothing.")
    with progress_bars() as progress:
        module = create_model(model, weights=weights, img_size=size(img_size), progress=progress)
        report = diagnose(
            module, calib, validation=val, recipe=quant, targets=target, skip_bad=skip_bad, progress=progress
        )
    show(report.to_dict(), as_json, lambda: str(report))
    raise typer.Exit(report.exit_code)


def sensitivity_command(
    model: Annotated[str, typer.Argument(help="Name of the zoo (`edgeattn models`), timm:NAME, or an .onnx file.")],
    data: Annotated[Path, typer.Option(help="Calibration images: a folder or an .npz file; labels give the loss too.")],
    weights: Annotated[str | None, typer.Option(help="Checkpoint, as for `edgeattn export`.")] = None,
    quant: Annotated[str, typer.Option(help="Recipe: a preset or a YAML file.")] = "w8a8",
    images: Annotated[int, typer.Option(min=1, help="Images that the effect is measured on, spread over all.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="Also write the chart, as .svg.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the numbers, as .csv.")] = None,
    img_size: Annotated[str | None, typer.Option(help="Input side, or HEIGHTxWIDTH, in pixels.")] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """What does each layer cost when it alone is quantized? Worst first, and summed over identical blocks."""
    from edgeattn.models.factory import carries_weights, create_model
    from edgeattn.quant import sensitivity_report as report
    from edgeattn.quant.sensitivity import sensitivity

    for path, suffix in ((plot, ".svg"), (csv, ".csv")):
        report.check_suffix(path, suffix)
    if weights is None and not carries_weights(model):
        raise UsageError("no weights: pass --weights FILE; an untrained model has no accuracy to lose.")
    with progress_bars() as progress:
        module = create_model(model, weights=weights, img_size=size(img_size), progress=progress)
        layers = sensitivity(module, data, quant, images=images, skip_bad=skip_bad, progress=progress)
    ranked, blocks = report.worst_first(layers), report.by_block(layers)
    report.write_text(plot, report.to_svg(layers))
    report.write_text(csv, report.to_csv(ranked))
    if as_json:
        show({"layers": [layer.to_dict() for layer in ranked], "blocks": blocks}, True, None)
    else:
        _print_table([layer.to_dict() for layer in ranked])
        _print_table(blocks)


def budget_command(
    model: Annotated[str, typer.Argument(help="Name of the zoo (`edgeattn models`), timm:NAME, or an .onnx file.")],
    data: Annotated[Path, typer.Option(help="Calibration images: a folder or an .npz file; a drop needs labels.")],
    budget: Annotated[list[str], typer.Option(help="size=1.2MB, latency=0.8ms or drop=0.5 (points); repeatable.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe to write, as .yaml.")],
    weights: Annotated[str | None, typer.Option(help="Checkpoint, as for `edgeattn export`.")] = None,
    target: Targets = None,
    quant: Annotated[str, typer.Option(help="Recipe that 8-bit layers get: a preset or a YAML file.")] = "w8a8",
    minimise: Annotated[str, typer.Option(help="What a drop alone is spent on: latency or size.")] = "latency",
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time budget of each latency measurement.")] = 3.0,
    images: Annotated[int, typer.Option(min=1, help="Images that the cost of each choice is measured on.")] = 32,
    img_size: Annotated[str | None, typer.Option(help="Input side, or HEIGHTxWIDTH, in pixels.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it exists.")] = False,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Which layers get how many bits so that size, latency or lost accuracy stay within a budget: writes a recipe."""
    from edgeattn.devices.budget import parse_budget, plan_budget
    from edgeattn.models.factory import carries_weights, create_model
    from edgeattn.quant import sensitivity_report as report

    limits = [parse_budget(text) for text in budget]
    report.check_suffix(out, ".yaml")
    if out.exists() and not overwrite:
        raise UsageError(f"output {out} exists; choose another name, or pass --overwrite to replace it.")
    if weights is None and not carries_weights(model):
        raise UsageError("no weights: pass --weights FILE; an untrained model has no accuracy to lose.")
    with progress_bars() as progress:
        module = create_model(model, weights=weights, img_size=size(img_size), progress=progress)
        result = plan_budget(
            module, data, target or ["onnxruntime"], limits, recipe=quant, minimise=minimise, threads=threads,
            seconds=seconds, images=images, skip_bad=skip_bad, progress=progress,
        )  # fmt: skip
    report.write_text(out, result.recipe.to_yaml())
    hint = f"\n\nNext: edgeattn export {model} --weights {weights} --calib {data} --quant {out} -o bundle"
    show(result.to_dict(), as_json, lambda: f"{result}{hint}")


_COLUMNS = {
    "module": ("module", "{}"), "modules": ("modules", "{}"), "layers": ("layers", "{}"), "kind": ("kind", "{}"),
    "block": ("block", "{}"), "sqnr_db": ("SQNR dB", "{:.1f}"), "kl": ("KL nats", "{:.2e}"),
    "loss": ("loss", "{:+.2e}"), "second_order": ("2nd order", "{:.2e}"), "size_bytes": ("bytes", "{}"),
}  # fmt: skip


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    shown = [key for key in _COLUMNS if key in rows[0]]
    for key in shown:
        text = key in ("module", "modules", "kind", "block")
        table.add_column(_COLUMNS[key][0], justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*("" if row[key] is None else _COLUMNS[key][1].format(row[key]) for key in shown))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
