"""Commands about quantization that write nothing; `edgeattn.cli` imports this module, which adds them to its app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.cli import Json, SkipBad, Targets, _print, _progress, _size, app
from edgeattn.errors import UsageError


@app.command("calibration")
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
    with _progress() as progress:
        module = create_model(model, weights=weights, img_size=_size(img_size), progress=progress)
        report = diagnose(
            module, calib, validation=val, recipe=quant, targets=target, skip_bad=skip_bad, progress=progress
        )
    _print(report.to_dict(), as_json, lambda: str(report))
    raise typer.Exit(report.exit_code)
