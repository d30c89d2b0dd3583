"""Where weights come from: a path, an address with a digest, a hub id, or the word `official`.

What is downloaded from an address is kept in a cache folder, and its digest is checked each time it is used.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from edgeattn import __version__
from edgeattn.data.files import sha256_of
from edgeattn.errors import CheckpointError, DeviceError, MissingDependency
from edgeattn.models import catalog

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
STALL_S = 30.0
OFFICIAL = "official"
_HUBS = ("hf-hub:", "timm:")
_OFFLINE = ("EDGEATTN_OFFLINE", "HF_HUB_OFFLINE")
_PIECE_BYTES = 1 << 20


def locate(
    weights: str | os.PathLike[str],
    model: str | None = None,
    *,
    stall_s: float = STALL_S,
    progress: Progress | None = None,
) -> Path:
    """The file that `weights` names, downloaded first where it is not a path.

    Args:
        weights: a path; `http(s)://...#sha256=HEX`; `hf-hub:OWNER/NAME[/FILE]`; `timm:NAME`; or `official`, the place
            that the catalog has for `model`.
        stall_s: give up when nothing arrives for this long.
        progress: called with ("download", bytes so far, bytes in all).

    Raises:
        CheckpointError: nothing there, cut short, or not the file of that digest. MissingDependency: no hub client.
        DeviceError: the cache folder cannot be written.
    """
    text = os.fspath(weights)
    if text == OFFICIAL:
        text = _official(model)
    if text.startswith(_HUBS):
        return _from_hub(text)
    if re.match(r"https?://", text):
        return _from_address(text, stall_s, progress)
    return Path(text)


def cache_folder() -> Path:
    """`EDGEATTN_CACHE`, else `edgeattn` in the user's cache folder."""
    named = os.environ.get("EDGEATTN_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(shared) / "edgeattn"


def _offline() -> str | None:
    """The variable that forbids the network, if one does."""
    said = {name: os.environ.get(name, "").lower() for name in _OFFLINE}
    return next((name for name, value in said.items() if value in ("1", "true", "yes", "on")), None)


def _official(model: str | None) -> str:
    entry = catalog.find(model or "")
    if entry is None:
        raise CheckpointError(f"weights 'official': {model!r} is not a model of the zoo. Pass the path of a file.")
    if entry.licence is None:
        raise CheckpointError(f"weights 'official': no weights of {entry.name} were published ({entry.page}).")
    if entry.url is None:
        raise CheckpointError(
            f"weights 'official': no direct address of the weights of {entry.name} is known. "
            f"Download them from {entry.page} and pass the path."
        )
    return entry.url


def _from_hub(spec: str) -> Path:
    """A file of a hub repository; `timm:NAME` is `hf-hub:timm/NAME`, the file is model.safetensors unless named."""
    kind, _, rest = spec.partition(":")
    parts = (f"timm/{rest}" if kind == "timm" else rest).split("/")
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(f"weights {spec!r}: expected hf-hub:OWNER/NAME, hf-hub:OWNER/NAME/FILE or timm:NAME.")
    repository, name = "/".join(parts[:2]), "/".join(parts[2:]) or "model.safetensors"
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependency(f"weights {spec!r} need huggingface_hub: pip install 'edgeattn[hub]'.") from error
    offline = _offline()
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=offline is not None))
    except Exception as error:  # network, authorisation, no such repository or file: many classes, one meaning here
        if offline:
            raise CheckpointError(
                f"weights {spec!r} are not in the hub's cache ({huggingface_hub.constants.HF_HUB_CACHE}), and "
                f"{offline} keeps this offline. Unset it, or fetch {name} of {repository} elsewhere and pass its path."
            ) from error
        raise CheckpointError(
            f"cannot fetch {name} of {repository} from the hub: {' '.join(str(error).split())} "
            "Download it elsewhere and pass its path."
        ) from error


def _from_address(text: str, stall_s: float, progress: Progress | None) -> Path:
    address, _, fragment = text.partition("#")
    digest = _digest(address, fragment)
    name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name
    target = cache_folder() / "weights" / digest / (re.sub(r"[^\w.-]", "_", name).lstrip(".") or "weights")
    if _is_whole(target, digest):
        return target
    offline = _offline()
    if offline:
        raise CheckpointError(
            f"{address} is not in the cache, and {offline} keeps this offline. Unset it, "
            f"put the file at {target}, or pass the path of a copy."
        )
    try:
        with _turn(target):
            if not _is_whole(target, digest):
                _download(address, target, digest, stall_s, progress)
    except OSError as error:
        raise DeviceError(
            f"cannot write the cache folder {target.parent}: {error.strerror or error}. "
            "Free some space, or set EDGEATTN_CACHE to another folder."
        ) from error
    return target


def _digest(address: str, fragment: str) -> str:
    """The SHA-256 that the file must have; its first digits where its publisher gives no more, in the file's name."""
    entry = catalog.find_address(address)
    kind, _, given = fragment.lower().partition("=")
    if fragment:
        prefix = entry.sha256_prefix if entry else None
        if kind == "sha256" and re.fullmatch(r"[0-9a-f]{64}", given):
            return given
        if kind == "sha256" and prefix and re.fullmatch(r"[0-9a-f]+", given) and given.startswith(prefix):
            return given
        raise CheckpointError(
            f"{address}#{fragment}: expected #sha256= and 64 hexadecimal digits after the address (`sha256sum FILE`)."
        )
    known = entry and (entry.sha256 or entry.sha256_prefix)
    if known:
        return known
    mirror = f", or pass {entry.hub!r}: the same weights from the hub" if entry and entry.hub else ""
    raise CheckpointError(
        f"{address}: the SHA-256 of this file is not known, and a download that cannot be checked is not loaded. "
        f"Pass '{address}#sha256=DIGEST' (64 hexadecimal digits), or download it yourself and pass its path{mirror}."
    )


def _is_whole(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    if sha256_of(path).startswith(digest):
        return True
    if path.suffix != ".part":
        logger.warning("%s in the cache is damaged (its SHA-256 is not %s); it is fetched again", path, digest)
    return False


@contextlib.contextmanager
def _turn(target: Path) -> Iterator[None]:
    """One download of a file at a time: whoever waited here finds it finished."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as handle:
        with contextlib.suppress(ImportError, OSError):  # no such locks here: the digest still tells a spoilt file
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(address: str, target: Path, digest: str, stall_s: float, progress: Progress | None) -> None:
    part = target.with_name(f"{target.name}.part")
    logger.info("downloading %s to %s", address, target)
    found = ""
    for _ in range(2):  # a second time from the start if what an earlier run left belongs to another file
        resumed = False if _is_whole(part, digest) else _receive(address, part, stall_s, progress)
        found = sha256_of(part)
        if found.startswith(digest):
            part.replace(target)
            logger.info("%s has SHA-256 %s", target, found)
            return
        part.unlink()
        if not resumed:
            break
    raise CheckpointError(
        f"{address} is not the file that was asked for: its SHA-256 is {found}, expected {digest}. It was deleted. "
        "Check the address and the digest; if both are right, the file was changed on its way or by its owner."
    )


def _receive(address: str, part: Path, stall_s: float, progress: Progress | None) -> bool:
    """Fetch into `part`, going on where it ends if the server can; returns whether it did."""
    held = part.stat().st_size if part.is_file() else 0
    response = _open(address, held, stall_s)
    if response is None:
        return True
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = held if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdigit() else None
        told = done
        with part.open("ab" if resumed else "wb") as file:
            while piece := _next_piece(response, address, done, total, stall_s):
                file.write(piece)
                done += len(piece)
                if progress and done - told >= _PIECE_BYTES:
                    progress("download", done, total or done)
                    told = done
            _flush(file)
        if progress:
            progress("download", done, total or done)
    if total is not None and done < total:
        raise _broken(address, done, total, "the connection ended early")
    return resumed


def _open(address: str, held: int, stall_s: float) -> http.client.HTTPResponse | None:
    """The response from byte `held` on; None if the server says that there is nothing from there."""
    headers = {"User-Agent": f"edgeattn/{__version__}", "Accept-Encoding": "identity"}
    if held:
        headers["Range"] = f"bytes={held}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=stall_s)
    except urllib.error.HTTPError as error:
        error.close()
        if held and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        reason = f"the server answers {error.code} {error.reason}"
    except TimeoutError:
        reason = f"no answer within {stall_s:g} s"
    except urllib.error.URLError as error:
        reason = f"no answer within {stall_s:g} s" if isinstance(error.reason, TimeoutError) else str(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
    raise CheckpointError(
        f"cannot fetch {address}: {reason}. Check the address and the network, or download it elsewhere and pass "
        "its path."
    )


def _next_piece(
    response: http.client.HTTPResponse, address: str, done: int, total: int | None, stall_s: float
) -> bytes:
    try:
        return response.read1(_PIECE_BYTES)
    except TimeoutError as error:
        raise _broken(address, done, total, f"nothing arrived for {stall_s:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise _broken(address, done, total, str(error) or type(error).__name__) from error


def _broken(address: str, done: int, total: int | None, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{address}: {reason} after {done} of {total or 'an unknown number of'} bytes. They are kept: run the same "
        "again to go on from there, or download the file elsewhere and pass its path."
    )


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
