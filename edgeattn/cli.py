"""The command line: parse, call one function, print. Progress and warnings go to stderr, results to stdout."""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeattn import __version__, cli_quant
from edgeattn.cli_common import Json, Limit, Seconds, SkipBad, Targets, Threads, progress_bars, show, size
from edgeattn.errors import (
    EXIT_DEVICE,
    EXIT_INTERRUPTED,
    EXIT_MISSING_DEPENDENCY,
    EXIT_OK,
    EXIT_VERDICT,
    EdgeAttnError,
    UsageError,
)

app = typer.Typer(
    name="edgeattn", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="From a vision-transformer checkpoint to a verified quantized artefact, with one verdict.",
)  # fmt: skip

BundlePath = Annotated[Path, typer.Argument(help="Folder written by `edgeattn export`.")]


@app.command("models")
def models_command(
    pattern: str = typer.Argument("*", help="Shell pattern, e.g. 'efficientvit_*'."), as_json: Json = False
) -> None:
    """The models of the zoo: size, cost, published accuracy, licence and place of the official weights."""
    from edgeattn.models.catalog import matching

    entries = matching(pattern)
    if as_json:
        show([entry.to_dict() for entry in entries], True, None)
    else:
        _print_models(entries)


@app.command("export")
def export_command(
    model: Annotated[
        str,
        typer.Argument(
            help="Name of the zoo (`edgeattn models`), timm:NAME, package.module:callable, or an .onnx file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the bundle to.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint: .pth or .safetensors, official or timm names; https://...#sha256=HEX, hf-hub:OWNER/NAME, "
            "timm:NAME, or `official`."
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Export an untrained model (latency only).")
    ] = False,
    quant: Annotated[
        str | None,
        typer.Option(
            help="Recipe: a preset (w8a8, w8a16, w4a8, w4a16, fp16, float32) or a YAML file; w8a8 by default, or what "
            "`edgeattn train --qat` trained."
        ),
    ] = None,
    calib: Annotated[Path | None, typer.Option(help="Calibration images: a folder or an .npz file.")] = None,
    target: Targets = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Re-initialise the head for this many classes.")
    ] = None,
    img_size: Annotated[str | None, typer.Option(help="Input side, or HEIGHTxWIDTH, in pixels.")] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Leave height and width free, in steps of 32 (SHViT, CARE).")
    ] = False,
    heads: Annotated[str | None, typer.Option(help="VGGT: some of camera,depth,point,track; all by default.")] = None,
    views: Annotated[str | None, typer.Option(help="VGGT: number of views, or `dynamic` (the default).")] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search/--no-search",
            help="Measure here what each target runs faster in int8, leave the rest in float32, and ship float32 where "
            "int8 is no faster; without: quantize what the recipe says.",
        ),
    ] = True,
    search_seconds: Annotated[
        float, typer.Option(min=1.0, help="For the search; the same export goes on where it stopped.")
    ] = 45.0,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Bits per layer for size=1.2MB, latency=0.8ms or drop=0.5 (`edgeattn budget`); repeatable."),
    ] = None,
    compute_capability: Annotated[
        list[int] | None, typer.Option(help="tensorrt-rtx: GPUs to build for, such as 86; repeatable.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Measure what each part of the recipe gives.")] = False,
    work: Annotated[
        Path | None, typer.Option(help="Folder for finished parts of a long step; a killed export goes on there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint and write a verified bundle for the targets."""
    from edgeattn.devices.budget import recipe_for_budget
    from edgeattn.devices.placing import MeasuredPlacer
    from edgeattn.export.pipeline import export
    from edgeattn.models.factory import carries_weights
    from edgeattn.quant.qat.stored import load_model

    if carries_weights(model) and random_weights:
        raise UsageError(f"{model} is an ONNX file, which has its weights in it; leave out --random-weights.")
    if weights is None and not random_weights and not carries_weights(model):
        raise UsageError(
            "no weights: pass --weights FILE, or --random-weights to export an untrained model (latency only)."
        )
    if out.exists() and not overwrite:
        raise UsageError(f"output {out} exists; choose another folder, or pass --overwrite to replace it.")
    targets = target or ["onnxruntime"]
    if compute_capability and "tensorrt-rtx" not in targets:
        raise UsageError(f"--compute-capability is for target tensorrt-rtx; the targets are {', '.join(targets)}.")
    with progress_bars() as progress:
        module = load_model(model, weights=weights, num_classes=num_classes, img_size=size(img_size), progress=progress)
        module = _for_export(module, heads, views)
        recipe = recipe_for_budget(module, calib, targets, budget, recipe=quant, progress=progress) if budget else quant
        bundle = export(
            module, targets, out, recipe=recipe, data=calib, dynamic_size=dynamic_size, overwrite=overwrite,
            skip_bad=skip_bad, work=work, explain=explain, progress=progress,
            placer=MeasuredPlacer(most_seconds=search_seconds, progress=progress) if search else None,
            profile={"compute_capabilities": compute_capability} if compute_capability else None,
        )  # fmt: skip
    show(_manifest(bundle), as_json, lambda: _describe(bundle) + f"\n\nNext: edgeattn check {out} --data VAL_DIR")


@app.command("check")
def check_command(
    bundle: BundlePath,
    data: Annotated[Path, typer.Option(help="Validation images: a folder (sub-folders are classes) or an .npz file.")],
    device: Annotated[str, typer.Option(help="Where to measure.")] = "local",
    gate: Annotated[str | None, typer.Option(help="mlperf99 or mlperf999; by default the recipe's.")] = None,
    target: Targets = None,
    threads: Threads = None,
    limit: Limit = None,
    seconds: Seconds = 20.0,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Accuracy, latency and placement against float32; one verdict, one exit code (0 PASS, 1 no, 5 inconclusive)."""
    from edgeattn.devices.check import check

    with progress_bars() as progress:
        result = check(
            bundle, data, device=device, gate=gate, targets=target, threads=threads, limit=limit,
            seconds=seconds, skip_bad=skip_bad, progress=progress,
        )  # fmt: skip
    _print_result(result, as_json)


@app.command("bench")
def bench_command(
    bundle: BundlePath, target: Targets = None, threads: Threads = None, seconds: Seconds = 20.0, as_json: Json = False
) -> None:
    """Latency of every artefact, interleaved with float32."""
    from edgeattn.devices.check import bench

    with progress_bars() as progress:
        result = bench(bundle, targets=target, threads=threads, seconds=seconds, progress=progress)
    _print_result(result, as_json)


@app.command("eval")
def eval_command(
    bundle: BundlePath,
    data: Annotated[Path, typer.Option(help="Validation images: a folder (sub-folders are classes) or an .npz file.")],
    target: Targets = None,
    threads: Threads = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Accuracy of every artefact on the same images, against float32."""
    from edgeattn.devices.check import evaluate_bundle

    with progress_bars() as progress:
        result = evaluate_bundle(
            bundle, data, targets=target, threads=threads, limit=limit, skip_bad=skip_bad, progress=progress
        )
    _print_result(result, as_json)


@app.command("verify")
def verify_command(bundle: BundlePath, as_json: Json = False) -> None:
    """Re-hash every file of a bundle and re-run its golden inputs."""
    from edgeattn.runtime.verify import verify

    result = verify(bundle)
    show(result.to_dict(), as_json, lambda: str(result))
    if not result.ok:
        raise typer.Exit(EXIT_VERDICT if result.problems else EXIT_MISSING_DEPENDENCY)


@app.command("inspect")
def inspect_command(bundle: BundlePath, as_json: Json = False) -> None:
    """What a bundle holds and how it was made."""
    from edgeattn.runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    show(_manifest(opened), as_json, lambda: _describe(opened))


@app.command("train")
def train_command(
    model: Annotated[str, typer.Argument(help="Name of the zoo.")],
    data: Annotated[Path, typer.Option(help="Labelled training images: class sub-folders or an .npz file.")],
    val: Annotated[Path, typer.Option(help="Labelled validation images.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for weights, recipe and log; a killed run goes on there.")
    ],
    epochs: Annotated[int, typer.Option(min=1)] = 40,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    img_size: Annotated[int | None, typer.Option(min=16, help="112 by default; with --qat the checkpoint's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="2e-3 by default; 5e-4 with --qat.")] = None,
    seed: int = 20261120,
    config: Annotated[
        str, typer.Option(help="Architecture overrides as JSON, for a narrower model: '{\"embed_dim\": 32}'.")
    ] = "{}",
    subset: Annotated[int, typer.Option(min=0, help="Train on this many images, spread over the data; 0: all.")] = 0,
    qat: Annotated[str | None, typer.Option(help="With quantizers (DeiT): ofq-w2a2, lsq-w3a3+statsq, ...")] = None,
    weights: Annotated[
        str | None, typer.Option(help="With --qat: float checkpoint, starting point and teacher.")
    ] = None,
    cga_epochs: Annotated[int | None, typer.Option(min=0, help="With --qat: of annealing; a tenth by default.")] = None,
    as_json: Json = False,
) -> None:
    """Train a classifier (AdamW, one-cycle cosine, label smoothing, flips, EMA); resumes after a kill."""
    from edgeattn.quant.training import train
    from edgeattn.quant.training_config import training_config

    settings = training_config(
        model, qat=qat, weights=weights, cga_epochs=cga_epochs, img_size=img_size, epochs=epochs, subset=subset,
        batch_size=batch_size, learning_rate=learning_rate, seed=seed, model_config=_json_object(config, "--config"),
    )  # fmt: skip
    record = train(settings, data, val, out, lambda line: typer.echo(json.dumps(line), err=True))
    show(record, as_json, lambda: f"{out / 'model.safetensors'}: top-1 {100 * record['val_top1']:.2f} % on {val}")


def _for_export(module: Any, heads: str | None, views: str | None) -> Any:
    """The model with what --heads and --views ask for."""
    if not hasattr(module, "for_export"):
        if heads is not None or views is not None:
            raise UsageError(f"--heads and --views are for vggt; {module.name} has neither. Leave them out.")
        return module
    if views not in (None, "dynamic") and not str(views).isdigit():
        raise UsageError(f"--views {views}: expected a number of views, or dynamic.")
    names = None if heads is None else [name.strip() for name in heads.split(",")]
    return module.for_export(names, None if views in (None, "dynamic") else int(str(views)))


def _json_object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{option} is not JSON: {error}. Example: {option} '{{\"embed_dim\": 32}}'.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{option} is {text}; expected a JSON object of architecture arguments.")
    return value


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """What works here, what is missing, and the command that fixes it."""
    from edgeattn.devices.doctor import diagnose

    findings = diagnose()
    show([f.to_dict() for f in findings], as_json, lambda: "\n".join(map(str, findings)))
    if not all(f.ok for f in findings if f.required):
        raise typer.Exit(EXIT_MISSING_DEPENDENCY)


app.command("calibration")(cli_quant.calibration_command)
app.command("sensitivity")(cli_quant.sensitivity_command)
app.command("budget")(cli_quant.budget_command)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit(EXIT_OK)


def _manifest(bundle: Any) -> dict[str, Any]:
    return json.loads(bundle.manifest.model_dump_json(by_alias=True))


def _describe(bundle: Any) -> str:
    from edgeattn.export.model_card import model_card

    return f"{bundle.path}\n\n{model_card(bundle.manifest)}".rstrip()


def _print_result(result: Any, as_json: bool) -> None:
    from edgeattn.devices.report import summary_rows

    if as_json:
        show({**result.to_dict(), "rows": summary_rows(result), "exit_code": result.exit_code}, True, None)
    else:
        _print_table(summary_rows(result))
        typer.echo("\n".join(filter(None, [f"verdict: {result.verdict}" if result.verdict else "", result.message])))
    raise typer.Exit(result.exit_code)


def _print_models(entries: list[Any], width: int | None = None) -> None:
    """One table per set of weights, under a line that says what is the same for all of it."""
    from rich.console import Console
    from rich.table import Table

    from edgeattn.models.catalog import OBTAIN

    console = Console(width=width if width or sys.stdout.isatty() else 120, highlight=False)
    longest = max(len(entry.name) for entry in entries)
    console.width = max(console.width, longest + 36)  # on anything narrower the terminal wraps; rich would cut off
    groups: dict[tuple[str, ...], list[Any]] = {}
    for entry in entries:
        groups.setdefault((entry.family, entry.paper, entry.licence or "", entry.obtain, entry.page), []).append(entry)
    for (family, paper, licence, obtain, page), variants in groups.items():
        console.print(f"\n[bold]{family}[/bold] (arXiv {paper}), {page}", soft_wrap=True)
        how = OBTAIN[obtain].format(hub=variants[0].hub)
        console.print(f"official weights: {', '.join(filter(None, [licence, how]))}", soft_wrap=True)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("variant", no_wrap=True, min_width=longest)
        for name in ("params", "MACs"):
            table.add_column(name, justify="right", no_wrap=True, min_width=6)
        table.add_column("input", no_wrap=True, min_width=7)
        table.add_column("published" if variants[0].top1 is None else "top-1", overflow="fold")
        for entry in variants:
            height, broad = entry.input_size
            table.add_row(entry.name, _si(entry.parameters), _si(entry.macs), f"{height}x{broad}", entry.published)
        console.print(table)


def _si(number: float) -> str:
    """Three digits and a prefix: 2.35 M."""
    power = max(p for p in (0, 3, 6, 9, 12) if number >= 10**p or p == 0)
    value = number / 10**power
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {' kMGT'[power // 3]}".rstrip()


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    def cell(value: float | None, pattern: str) -> str:
        return "" if value is None else pattern.format(value)

    table = Table("target", "variant")
    for name in ("top-1 %", "agreement %", "SQNR dB", "p50 ms", "p90 ms", "size MB", "speed-up"):
        table.add_column(name, justify="right")
    for row in rows:
        size = row["size_bytes"] / 1e6
        interval = row["speedup_interval"]
        speed = cell(row["speedup"], "{:.2f}") + (
            f" ({interval['low']:.2f}-{interval['high']:.2f})" if interval else ""
        )
        table.add_row(
            row["target"], row["variant"], cell(row["top1"], "{:.2f}"), cell(row["agreement"], "{:.2f}"),
            cell(row["sqnr_db"], "{:.1f}"), cell(row["p50_ms"], "{:.3f}"), cell(row["p90_ms"], "{:.3f}"),
            cell(size, "{:.2f}"), speed,
        )  # fmt: skip
    width = None if sys.stdout.isatty() else 120
    Console(width=width).print(table)


def main() -> None:
    """Entry point: edgeattn errors become one message on stderr (and JSON on stdout with --json) and an exit code."""
    # A polite kill cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # For `package.module:callable` beside the user; last, so that it shadows nothing.
    sys.path.append(str(Path.cwd()))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    # torch's own, whenever it copies a graph; nothing that a user of ours could change.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    try:
        app()
    except SystemExit as stop:
        if stop.code != EXIT_INTERRUPTED:  # Typer turns Ctrl-C into this code without a word
            raise
        _fail("Interrupted", "interrupted; nothing half-written was left behind.", EXIT_INTERRUPTED)
    except EdgeAttnError as error:
        _fail(type(error).__name__, str(error), error.exit_code)
    except (OSError, MemoryError) as error:
        _fail(
            type(error).__name__,
            f"{error}. The operating system refused; nothing half-written was left behind.",
            EXIT_DEVICE,
        )


def _fail(kind: str, message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": kind, "message": message, "exit_code": code}))
    sys.exit(code)


if __name__ == "__main__":
    main()
