"""The CPU kernels: where their libraries are, what they are, and what to do when they are missing.

`libedgeattn_cpu` holds the kernels behind a plain C API; `libedgeattn_ort` the same kernels as ONNX Runtime custom ops.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Any

from edgeattn.errors import MissingDependency

ABI_VERSION = 1  # EDGEATTN_ABI_VERSION in c_api.h
# Ops of ours that the plugin has a kernel for; the others run as their function body.
KERNELS = frozenset({"CascadedGroupAttention", "QCascadedGroupAttention"})
PLUGIN_VARIABLE = "EDGEATTN_ORT_PLUGIN"
ISA_VARIABLE = "EDGEATTN_CPU_ISA"

_HERE = Path(__file__).resolve().parent
_CHECKOUT = _HERE.parents[2]
_SUFFIXES = (".so", ".dylib", ".dll")


@dataclasses.dataclass(frozen=True)
class PluginInfo:
    """What the ONNX Runtime plugin says about itself.

    Attributes:
        abi: of the C API; equals `ABI_VERSION`.
        ort_api: API level of the headers it was built with; older runtimes refuse it.
        isas: instruction sets compiled in, slowest first.
        active_isa: the one that kernels use here: the best, or that of EDGEATTN_CPU_ISA.
        sha256: of the library file.
    """

    path: Path
    version: str
    abi: int
    ort_api: int
    isas: tuple[str, ...]
    active_isa: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path), "isas": list(self.isas)}


def ort_library() -> Path | None:
    """The ONNX Runtime custom-op library, or None; EDGEATTN_ORT_PLUGIN overrides where it is looked for."""
    override = os.environ.get(PLUGIN_VARIABLE)
    if override:
        return Path(override) if Path(override).is_file() else None
    return _find("edgeattn_ort")


def kernels_library() -> Path | None:
    """The library with the plain C API, or None."""
    return _find("edgeattn_cpu")


def plugin_info() -> PluginInfo:
    """Load the plugin and ask it.

    Raises:
        MissingDependency: it is absent, unloadable, or of another ABI; the message has the commands that fix it.
    """
    reason = missing_reason()
    if reason:
        raise MissingDependency(reason)
    path = ort_library()
    assert path is not None
    library = _load(path)
    active = os.environ.get(ISA_VARIABLE) or library.edgeattn_best_isa().decode()
    if not library.edgeattn_runs_here(active.encode()):
        raise MissingDependency(
            f"{ISA_VARIABLE}={active} names no instruction set that {path} has and this machine runs. "
            f"It has {library.edgeattn_compiled_isas().decode()}; unset the variable for the best one."
        )
    stat = path.stat()
    return PluginInfo(
        path=path,
        version=library.edgeattn_version().decode(),
        abi=library.edgeattn_abi_version(),
        ort_api=library.edgeattn_ort_api_version(),
        isas=tuple(library.edgeattn_compiled_isas().decode().split(",")),
        active_isa=active,
        sha256=_sha256(path, stat.st_mtime_ns, stat.st_size),
    )


def missing_reason() -> str | None:
    """Why the ONNX Runtime plugin cannot be used, with the command that fixes it; None if it can."""
    path = ort_library()
    override = os.environ.get(PLUGIN_VARIABLE)
    if path is None and override:
        return (
            f"{PLUGIN_VARIABLE} is {override}, which is not a file. Correct it, or unset it for the installed plugin."
        )
    if path is None and kernels_library() is None:
        return f"The native CPU kernels are not built (no libedgeattn_cpu in {_HERE}). {_fix()}"
    if path is None:
        return f"The ONNX Runtime plugin was left out: edgeattn was built without ONNX Runtime's C++ headers. {_fix()}"
    try:
        abi = _load(path).edgeattn_abi_version()
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded as the ONNX Runtime plugin ({error}). {_fix()}"
    if abi != ABI_VERSION:
        return f"{path} has ABI {abi}, this edgeattn expects {ABI_VERSION}: it is of another build. {_fix()}"
    return None


def _fix() -> str:
    if (_CHECKOUT / "scripts" / "fetch-ort-headers").is_file():
        return f"Run in {_CHECKOUT}: sh scripts/fetch-ort-headers && make install"
    return "Run: EDGEATTN_ORT_INCLUDE=/path/to/headers pip install --no-deps --force-reinstall edgeattn"


def _find(stem: str) -> Path | None:
    # An editable install leaves this file in the checkout and puts the libraries in site-packages; a plain CMake build
    # may be copied next to this file. The newer of the two is the one just built.
    installed = Path(sysconfig.get_path("platlib")) / "edgeattn" / "runtime_plugins" / "cpu"
    candidates = [folder / f"lib{stem}{suffix}" for folder in (_HERE, installed) for suffix in _SUFFIXES]
    return max((path for path in candidates if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("edgeattn_version", "edgeattn_compiled_isas", "edgeattn_best_isa"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@functools.cache
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
