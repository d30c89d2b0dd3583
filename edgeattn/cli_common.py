"""What the commands share: options, printing, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from edgeattn.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read; each is listed.")]
Targets = Annotated[list[str] | None, typer.Option("--target", "-t", help="onnxruntime, openvino; repeat for several.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; all processors by default.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Time budget of the latency measurement per target.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use this many images, spread over the data.")]


def size(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdigit() for p in parts):
        raise UsageError(f"--img-size {text!r}: expected one side such as 224, or HEIGHTxWIDTH such as 224x320.")
    sides = [int(p) for p in parts]
    return sides[0] if len(sides) == 1 else sides


def show(data: Any, as_json: bool, text: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False) if as_json else text())


@contextmanager
def progress_bars() -> Iterator[Any]:
    """A progress bar on stderr: one line per stage."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: float, total: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            # No refresh thread: it would disturb latency measurements.
            bars.update(tasks[stage], completed=done, total=total, refresh=True)

        yield report
