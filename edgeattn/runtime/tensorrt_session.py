"""The TensorRT-RTX package, and what this machine can do with the engines that it builds."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from edgeattn.errors import DeviceError, MissingDependency

_DRIVER = "libcuda.so.1"


def import_tensorrt_rtx() -> Any:
    """The tensorrt_rtx package.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise MissingDependency(
            f"target tensorrt-rtx needs the package tensorrt_rtx: {error}. Install it: pip install "
            "'edgeattn[tensorrt]'."
        ) from error
    return tensorrt_rtx


def cannot_run() -> str:
    """Why engines do not run here: no driver, no GPU, or that this version only builds them."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        return f"no NVIDIA driver here ({error})"
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return f"the NVIDIA driver finds no GPU (status {status}, {count.value} devices)"
    return "this version builds engines and does not run them"


def open_session(model: Path, settings: Mapping[str, Any], variant: str) -> NoReturn:
    """Refuse an engine: one of another version by name, others because this version does not run them.

    Raises:
        MissingDependency: the package is not installed. DeviceError: always otherwise.
    """
    trt = import_tensorrt_rtx()
    built = settings.get("version")
    if built != trt.__version__:
        raise DeviceError(
            f"{model} was built by tensorrt_rtx {built}, and this is {trt.__version__}: an engine runs with the "
            "version that built it. Export again, or build from the ONNX file beside it."
        )
    raise DeviceError(f"{model} cannot run: {cannot_run()}. Load it in the application that embeds TensorRT-RTX.")
