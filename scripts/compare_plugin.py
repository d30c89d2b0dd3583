"""What the plugin and what int8 give in ONNX Runtime, side by side: `python scripts/compare_plugin.py BUNDLE`."""

from __future__ import annotations

import sys

from edgeattn.devices.latency import measure_latency
from edgeattn.runtime.bundle import Bundle
from edgeattn.runtime.session import Session


def main(path: str) -> None:
    bundle = Bundle.open(path)
    image = {name: value[:1] for name, value in bundle.golden().inputs.items()}
    for variant, plugin in (("float32", True), ("quantized", False), ("quantized", True)):
        sessions: dict[str, Session] = {
            "stock float32": bundle.open_session("onnxruntime", "float32", plugin=False),
            f"{variant}, plugin {'on' if plugin else 'off'}": bundle.open_session(
                "onnxruntime", variant, plugin=plugin
            ),
        }
        for speedup in measure_latency(sessions, image).speedups:
            low, high = (speedup.interval.low, speedup.interval.high) if speedup.interval else (0.0, 0.0)
            print(f"{speedup.candidate:24} {speedup.ratio:.2f}x [{low:.2f}, {high:.2f}] of {speedup.baseline}")
        for session in sessions.values():
            session.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
