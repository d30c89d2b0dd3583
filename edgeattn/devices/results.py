"""`results.jsonl` of a bundle: one JSON record a line, only ever appended to."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeattn import __version__
from edgeattn.errors import DeviceError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ResultsFile:
    """What could be read.

    Attributes:
        records: in the order in which they were appended.
        ignored: one sentence for each line that is damaged or from a newer version.
    """

    records: tuple[dict[str, Any], ...]
    ignored: tuple[str, ...] = ()


def check_writable(path: Path) -> None:
    """Fail before a long measurement and not after it.

    Raises:
        DeviceError: records could not be appended to `path`.
    """
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DeviceError(
            f"cannot write {path}, where results are kept. Copy the bundle to a folder that you may write to."
        )


def append_result(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Add one record with `schema_version` in front; it is on disk when this returns, or not there at all to readers.

    Raises:
        DeviceError: the file cannot be written.
    """
    full = {"schema_version": SCHEMA_VERSION, **record}
    line = json.dumps(full, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        with path.open("ab+", buffering=0) as handle:
            if handle.seek(0, os.SEEK_END) > 0:
                handle.seek(-1, os.SEEK_END)
                # A crash cut the last line off; starting on a new one keeps the damage to that line.
                line = line if handle.read(1) == b"\n" else b"\n" + line
            written = handle.write(line)
            os.fsync(handle.fileno())
    except OSError as error:
        raise DeviceError(
            f"cannot append to {path}: {error.strerror}. Free some space or copy the bundle elsewhere."
        ) from error
    if written != len(line):
        raise DeviceError(
            f"only {written} of {len(line)} bytes could be appended to {path}. Free some space and run again."
        )
    return full


def read_results(path: Path) -> ResultsFile:
    """All records of a file; none if it does not exist. Damaged lines are logged and listed, not fatal."""
    if not path.exists():
        return ResultsFile(())
    records, ignored = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"it holds a {type(record).__name__}")
        except ValueError as error:
            ignored.append(f"{path} line {number} is damaged ({error}), probably cut off by a crash; it was ignored.")
            continue
        if record.get("schema_version") != SCHEMA_VERSION:
            ignored.append(
                f"{path} line {number} has schema_version {record.get('schema_version')}, this edgeattn reads "
                f"{SCHEMA_VERSION}; it was ignored."
            )
            continue
        records.append(record)
    for sentence in ignored:
        logger.warning("%s", sentence)
    return ResultsFile(tuple(records), tuple(ignored))


def utc_now() -> str:
    """Time to the second, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def machine_facts() -> dict[str, Any]:
    """What the numbers depend on besides the bundle; None where the system does not tell."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(), "architecture": platform.machine(), "cpu": _cpu_model(),
        "cores": os.cpu_count(), "usable_cores": usable, "governor": _governor(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(), "edgeattn": __version__,
    }  # fmt: skip


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor() or None
    # Arm boards have no "model name"; the last line ("Model", "Hardware") tells the board.
    for key in ("model name", "Model", "Hardware"):
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return platform.processor() or None


def _governor(path: Path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
