"""`python -m tests.golden DIR...`: check every golden file in the folders: models as a torch module and as exported
ONNX, quantization cases (a JSON with "method" and an .npz beside it) through the library's methods.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.golden.quant.check import check_quant_file, is_quant_case
from tests.golden.runner import check_file


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path(__file__).parent / "data", Path(__file__).parent / "quant"]
    )
    parser.add_argument("--no-onnx", action="store_true", help="check the torch module of models only")
    arguments = parser.parse_args()
    files = sorted(p for f in arguments.folders for p in ([f] if f.is_file() else f.glob("*.json")))
    failed = 0
    for path in files:
        problems = check_quant_file(path) if is_quant_case(path) else check_file(path, onnx=not arguments.no_onnx)
        failed += bool(problems)
        print(f"{'FAIL' if problems else 'ok  '} {path.name}", *problems, sep="\n     ")
    print(f"{len(files) - failed} passed, {failed} failed")
    if not files:
        print(f"no golden file (*.json) in {', '.join(map(str, arguments.folders))}", file=sys.stderr)
    return 0 if files and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
