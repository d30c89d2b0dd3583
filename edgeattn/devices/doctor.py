"""`edgeattn doctor`: what is installed, what is missing, and the command that fixes it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from typing import Any

from edgeattn.runtime_plugins import cpu

# Package, what it is for, whether edgeattn works without it, and the extra that brings it.
_PACKAGES = (
    ("torch", "models, quantization, export", True, None),
    ("onnx", "export", True, None),
    ("onnxruntime", "target onnxruntime", True, None),
    ("openvino", "target openvino", False, "openvino"),
    ("coremltools", "target coreml", False, "coreml"),
    ("huggingface_hub", "weights from a hub", False, "hub"),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; `fix` is a command or ""."""

    name: str
    ok: bool
    required: bool
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        mark = "ok     " if self.ok else "MISSING" if self.required else "absent "
        return f"{mark} {self.name}: {self.detail}" + (f"\n        fix: {self.fix}" if self.fix else "")


def diagnose() -> list[Finding]:
    """Interpreter, packages and the CPU plugin."""
    findings = [
        Finding("python", True, True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    ]
    findings += [_package(*entry) for entry in _PACKAGES]
    reason = cpu.missing_reason()
    if reason is None:
        info = cpu.plugin_info()
        detail = (
            f"version {info.version}, ABI {info.abi}, ONNX Runtime API {info.ort_api}, kernels {', '.join(info.isas)}, "
            f"{info.active_isa} in use"
        )
        findings.append(Finding("cpu plugin", True, True, detail))
    else:
        # The reason ends with the command that fixes it.
        findings.append(Finding("cpu plugin", False, True, reason))
    return findings


def _package(name: str, purpose: str, required: bool, extra: str | None) -> Finding:
    try:
        return Finding(name, True, required, f"{importlib.metadata.version(name)} ({purpose})")
    except importlib.metadata.PackageNotFoundError:
        fix = f"pip install 'edgeattn[{extra}]'" if extra else f"pip install {name}"
        return Finding(name, False, required, f"not installed; needed for {purpose}", fix)
