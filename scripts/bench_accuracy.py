"""Accuracy of our int8 and int4 beside ONNX Runtime's own quantizer and NNCF, on the same pictures, in both runtimes.

    python scripts/bench_accuracy.py OUT --calib CALIB --val VAL [--model NAME[=WEIGHTS]] [--recipe w8a8]

Every model of samples/ with its trained weights, or those named. The rivals quantize our float32 ONNX file (our ops
inlined) with their defaults: `quantize_static` after its preprocessing, `nncf.quantize`, and the latter told that the
model is a transformer. Everything is compared with float32 in the same runtime, on the same pictures; the table and
every number go to OUT/accuracy.md and OUT/accuracy.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.inliner import inline_local_functions

from edgeattn import create_model
from edgeattn.data.interface import IMAGE, LOGITS
from edgeattn.data.source import ImageSource, open_source
from edgeattn.devices.accuracy import AccuracyResult, evaluate
from edgeattn.export.pipeline import export
from edgeattn.runtime.bundle import Bundle, open_artifact
from edgeattn.runtime.session import Session

SAMPLES = Path(__file__).parents[1] / "samples"
MODELS = {
    "efficientvit_m0": "efficientvit_m0_eurosat", "care_s0": "care_eurosat", "litv2_s": "litv2_eurosat",
    "deit_tiny": "deit_eurosat",
}  # fmt: skip
TARGETS = ("onnxruntime", "openvino")


def pictures(source: ImageSource, bundle: Bundle) -> Iterator[dict[str, np.ndarray]]:
    for sample in source:
        yield {IMAGE: bundle.preprocessing(sample.image)[None]}


def ort_default(plain: Path, out: Path, calibration: ImageSource, bundle: Bundle) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = pictures(calibration, bundle)

        def get_next(self) -> Any:
            return next(self.items, None)

    prepared, path = out / "prepared.onnx", out / "ort_default.onnx"
    # Its symbolic shape inference fails on constants inside inlined functions; ours are known already.
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(path), Reader())
    return path


def nncf_default(transformer: bool) -> Callable[..., Path]:
    def run(plain: Path, out: Path, calibration: ImageSource, bundle: Bundle) -> Path:
        import nncf
        import openvino

        path = out / f"nncf_{'transformer' if transformer else 'default'}.xml"
        model = openvino.Core().read_model(str(plain))
        model.reshape({IMAGE: [1, 3, *bundle.preprocessing.size]})
        data = nncf.Dataset(list(pictures(calibration, bundle)))
        options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
        quantized = nncf.quantize(model, data, subset_size=len(calibration), **options)
        openvino.save_model(quantized, str(path), compress_to_fp16=False)
        return path

    return run


RIVALS: dict[str, tuple[str, Callable[..., Path]]] = {
    "ONNX Runtime quantize_static": ("onnxruntime", ort_default),
    "NNCF": ("openvino", nncf_default(False)),
    "NNCF transformer": ("openvino", nncf_default(True)),
}


def measure(
    model: str, weights: Path, recipes: list[str], data: tuple[ImageSource, ImageSource], out: Path
) -> Iterator[dict[str, Any]]:
    """One record per quantizer and runtime, float32 first."""
    calibration, validation = data
    bundles = {}
    for recipe in recipes:
        started = time.monotonic()
        bundles[recipe] = export(
            create_model(model, weights=weights), TARGETS, out / recipe, recipe=recipe, data=calibration, overwrite=True
        )
        print(f"{model} {recipe}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    reference = next(iter(bundles.values()))
    plain = out / "plain.onnx"
    onnx.save(inline_local_functions(onnx.load(reference.path / "reference.onnx")), plain)
    for target in TARGETS:
        sessions: dict[str, Session] = {"float32": reference.open_session(target, "float32")}
        for recipe, bundle in bundles.items():
            sessions[f"edgeattn {recipe}"] = bundle.open_session(target, "quantized")
        for name, (runtime, quantizer) in RIVALS.items():
            if runtime == target:
                path = quantizer(plain, out, calibration, reference)
                sessions[name] = open_artifact(target, path, {"outputs": [LOGITS]}, "quantized")
        results = evaluate(
            sessions, validation, reference.preprocessing, input_name=IMAGE, output_name=LOGITS,
            class_names=reference.manifest.class_names,
        )  # fmt: skip
        for name, result in results.items():
            yield {"model": model, "runtime": target, "quantizer": name, **facts(result)}
        for session in sessions.values():
            session.close()


def facts(result: AccuracyResult) -> dict[str, Any]:
    paired = result.paired
    return {
        "images": result.images, "top1": result.top1, "agreement": result.agreement, "sqnr_db": result.sqnr_db,
        "drop_points": paired and paired.drop_points,
        "drop_interval": paired and [paired.drop_interval.low, paired.drop_interval.high],
    }  # fmt: skip


def table(records: list[dict[str, Any]], command: str) -> str:
    lines = [
        f"`{command}`", "",
        "| model | runtime | quantizer | top-1 % | drop, points (95 %) | agreement % | SQNR dB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in records:
        numbers = ("", "", "")
        if r["drop_points"] is not None:
            low, high = r["drop_interval"]
            numbers = (
                f"{r['drop_points']:.2f} ({low:.2f} to {high:.2f})",
                f"{r['agreement']:.2f}",
                f"{r['sqnr_db']:.1f}",
            )
        lines.append(" | ".join([f"| {r['model']}", r["runtime"], r["quantizer"], f"{r['top1']:.2f}", *numbers]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calib", default=SAMPLES / "eurosat64" / "calib")
    parser.add_argument("--val", default=SAMPLES / "eurosat64" / "val")
    parser.add_argument("--model", action="append", help="NAME of a shipped sample, or NAME=WEIGHTS")
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--images", type=int, default=512)
    arguments = parser.parse_args()
    if importlib.util.find_spec("nncf") is None:
        sys.exit("NNCF, one of the rivals, is not installed: pip install -e '.[bench]'.")
    logging.disable(logging.WARNING)
    data = open_source(arguments.calib).spread(arguments.images), open_source(arguments.val)
    records = []
    for given in arguments.model or MODELS:
        model, _, file = given.partition("=")
        weights = Path(file) if file else SAMPLES / MODELS[model] / "model.safetensors"
        folder = arguments.out / model
        folder.mkdir(parents=True, exist_ok=True)
        for record in measure(model, weights, arguments.recipe or ["w8a8"], data, folder):
            print(json.dumps(record), flush=True)
            records.append(record)
    command = "python scripts/bench_accuracy.py " + " ".join(sys.argv[1:])
    (arguments.out / "accuracy.json").write_text(json.dumps({"command": command, "records": records}, indent=2) + "\n")
    (arguments.out / "accuracy.md").write_text(table(records, command))


if __name__ == "__main__":
    main()
