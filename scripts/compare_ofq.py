"""OFQ against LSQ at 2 to 4 bits, and each part of OFQ alone, on the shipped narrow DeiT and EuroSAT; resumable.

LSQ is as published, with one scale per tensor; `+fine` gives it OFQ's scales per row and token.

    python scripts/compare_ofq.py --data FOLDER --out FOLDER [--runs ofq-w2a2:1 lsq-w2a2+statsq:1 ...]

FOLDER holds eurosat64_train.npz, eurosat64_val.npz and eurosat64_test.npz. A run is PRESET:SEED; without --runs the
whole plan, most wanted first. One JSON line per run on stdout; a run that OUT/results.jsonl has is not repeated,
one that was killed goes on after its last epoch. All runs have the same number of epochs: with annealing the last
--cga-epochs of them are annealing. The teacher and starting point is a float model, by default the shipped one, a plain
DeiT with one head, so that labels and teacher act on the same logits; the paper's teachers are distilled models with
two.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from edgeattn import create_model
from edgeattn.data.source import open_source
from edgeattn.quant.qat.settings import preset
from edgeattn.quant.qat.stored import load_trained
from edgeattn.quant.training import train
from edgeattn.quant.training_config import training_config

SHIPPED = Path(__file__).resolve().parent.parent / "samples" / "deit_eurosat" / "model.safetensors"
PARTS = ["lsq-w2a2+fine", *(f"lsq-w2a2+fine+{part}" for part in ("statsq", "shifts", "qkr", "cga"))]
PLAN = [
    *(f"{name}-w2a2:{seed}" for seed in (1, 2, 3) for name in ("ofq", "lsq")),
    *(f"{name}:1" for name in PARTS),
    *(f"{name}-w{bits}a{bits}:1" for bits in (3, 4) for name in ("ofq", "lsq")),
]


@torch.no_grad()
def accuracy(model: torch.nn.Module, source: object) -> float:
    """Top-1 on a labelled source."""
    samples = list(open_source(source))
    labels = torch.tensor([sample.label for sample in samples])
    images = torch.from_numpy(np.stack([model.preprocessing(sample.image) for sample in samples]))
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(250), labels.split(250), strict=True)]
    return int(sum(hits)) / len(labels)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Train one preset with one seed; accuracy is on the test images and after loading the saved file."""
    annealed = options.cga_epochs if preset(name).cga else 0
    config = training_config(
        "deit_tiny", qat=name, weights=str(options.weights), epochs=options.epochs - annealed, seed=seed,
        cga_epochs=annealed or None, subset=options.subset, batch_size=options.batch_size,
    )  # fmt: skip
    out, started = options.out / f"{name}_{seed}", time.monotonic()
    held_out = open_source(options.data / "eurosat64_val.npz").spread(options.val_images)
    train(config, options.data / "eurosat64_train.npz", held_out, out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    before = next(line for line in reversed(log) if line["phase"] == "train")
    return {
        "preset": name, "seed": seed, "epochs": config.epochs, "cga_epochs": annealed, "subset": options.subset,
        "test_top1": accuracy(load_trained(out / "model.safetensors"), options.data / "eurosat64_test.npz"),
        "loss": log[-1]["loss"], "oscillating": log[-1]["oscillating"], "near_boundary": log[-1]["near_boundary"],
        "oscillating_before_annealing": before["oscillating"], "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=PLAN, metavar="PRESET:SEED")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="float DeiT of `edgeattn train`")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cga-epochs", type=int, default=2)
    parser.add_argument("--subset", type=int, default=1280, help="training images; 0 is all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--val-images", type=int, default=250, help="of the validation, which picks nothing")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    missing = [s for s in ("train", "val", "test") if not (options.data / f"eurosat64_{s}.npz").is_file()]
    if missing:
        sys.exit(f"{options.data} has no eurosat64_{missing[0]}.npz: EuroSAT as NPZ with images and labels; not run.")
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(entry["preset"], entry["seed"]) for entry in map(json.loads, lines)}
    for spec in options.runs:
        name, _, seed = spec.partition(":")
        preset(name)  # refuses a name with a spelling mistake before hours of other runs
    if ("float32", 0) not in done:
        model = create_model("deit_tiny", weights=options.weights)
        line = {"preset": "float32", "seed": 0, "test_top1": accuracy(model, options.data / "eurosat64_test.npz")}
        report(line, results)
    for spec in options.runs:
        name, _, seed = spec.partition(":")
        if (name, int(seed or 1)) not in done:
            report(run(name, int(seed or 1), options), results)


def report(line: dict[str, object], results: Path) -> None:
    print(json.dumps(line), flush=True)
    with results.open("a") as handle:
        handle.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
