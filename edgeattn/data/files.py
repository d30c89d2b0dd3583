"""Files that are complete or absent: written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeattn.errors import DeviceError, UsageError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is fsynced and takes that name, on any error it is removed.

    Raises:
        DeviceError: the disk is full or the place cannot be written.
    """
    target = Path(path)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o644)  # mkstemp makes it private; what is written here is made to be read
        try:
            yield temporary
            _fsync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, else is removed.

    Raises:
        UsageError: `path` exists and `overwrite` is off. DeviceError: the disk is full or the place cannot be written.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise UsageError(f"output {target} exists; choose another folder, or pass --overwrite to replace it.")
    if target.exists() and not target.is_dir():
        raise UsageError(f"output {target} is a file; expected a folder name.")
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
        try:
            yield temporary
            for entry in temporary.rglob("*"):
                if entry.is_file():
                    _fsync(entry)
            temporary.chmod(0o755)
            _swap(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; an older folder there is moved aside first and deleted last."""
    if not target.exists():
        temporary.replace(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    target.replace(old / "bundle")
    temporary.replace(target)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """OSErrors about space, quota and permission as errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DeviceError(
                f"no space left while writing {target}; nothing was left behind. "
                "Free some space or choose another disk."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise DeviceError(
                f"cannot write {target}: {error.strerror}. Choose a folder that you may write to."
            ) from error
        raise


def _fsync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
