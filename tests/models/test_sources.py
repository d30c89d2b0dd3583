"""Fetching weights from a real server on this machine, in good order and in every bad one."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgeattn import create_model
from edgeattn.data.files import sha256_of
from edgeattn.errors import CheckpointError, DeviceError, MissingDependency
from edgeattn.models import catalog, sources
from tests.conftest import WEIGHTS

DATA = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(DATA).hexdigest()
HALF = len(DATA) // 2
STALL_S = 1.0


class Files(http.server.BaseHTTPRequestHandler):
    """The first folder of the path says how the server behaves."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        behaviour = self.path.split("/")[1]
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers and behaviour != "norange" else 0
        if behaviour == "none":
            return self.send_error(404)
        if behaviour == "moved":
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/good/w.pth")
            return self.end_headers()
        if start >= len(DATA):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if behaviour != "chunks":
            self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        is_first = len(self.server.requests) == 1
        breaks = behaviour == "cut" or (behaviour in ("break", "norange") and is_first)
        self.wfile.write(DATA[start : HALF if breaks or behaviour == "stall" else None])
        if behaviour == "stall":
            self.wfile.flush()
            self.server.go_on.wait(20)
        return None

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(handler):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.requests, server.url, server.go_on = [], f"http://127.0.0.1:{server.server_port}", threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


@pytest.fixture
def server():
    with serving(Files) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "EDGEATTN_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fetch(server, behaviour, digest=DIGEST, **options):
    address = f"{server.url}/{behaviour}/w.pth"
    return sources.locate(f"{address}#sha256={digest}" if digest else address, stall_s=STALL_S, **options)


def files(cache):
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.mark.parametrize("behaviour", ["good", "moved", "chunks"])
def test_download_then_cache(server, cache, behaviour, capfd):
    told = []
    path = fetch(server, behaviour, progress=lambda *step: told.append(step))
    assert path.read_bytes() == DATA and path.name == "w.pth" and cache in path.parents and files(cache) == ["w.pth"]
    assert told[-1] == ("download", len(DATA), len(DATA))
    asked = len(server.requests)
    assert fetch(server, behaviour) == path and len(server.requests) == asked
    assert capfd.readouterr() == ("", "")


def test_damaged_cache_is_fetched_again_and_it_is_said(server, caplog):
    path = fetch(server, "good")
    path.write_bytes(b"rot")
    assert fetch(server, "good").read_bytes() == DATA and "is damaged" in caplog.text


@pytest.mark.parametrize(
    "behaviour, said",
    [
        ("none", "the server answers 404 Not Found. Check the address"),
        ("cut", f"the connection ended early after {HALF} of {len(DATA)} bytes. They are kept: run the same again"),
        ("stall", f"nothing arrived for 1 s after {HALF} of {len(DATA)} bytes"),
    ],
)
def test_bad_servers(server, cache, behaviour, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        fetch(server, behaviour)
    assert f"{server.url}/{behaviour}/w.pth" in str(caught.value)
    assert files(cache) == ([] if behaviour == "none" else ["w.pth.part"])


def test_nobody_answers():
    with serving(Files) as gone:
        address = f"{gone.url}/good/w.pth"
    with pytest.raises(
        CheckpointError, match=r"cannot fetch http.*: .*refused.* download it elsewhere and pass its path"
    ):
        sources.locate(f"{address}#sha256={DIGEST}")


def test_an_open_connection_without_an_answer(server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/w.pth#sha256={DIGEST}"
        with pytest.raises(CheckpointError, match=r"no answer within 0\.5 s"):
            sources.locate(address, stall_s=0.5)


def test_wrong_digest_names_both_and_leaves_nothing(server, cache):
    with pytest.raises(CheckpointError) as caught:
        fetch(server, "good", "0" * 64)
    assert DIGEST in str(caught.value) and "0" * 64 in str(caught.value) and "It was deleted" in str(caught.value)
    assert files(cache) == []


@pytest.mark.parametrize("behaviour", ["break", "norange"])
def test_a_broken_download_goes_on(server, behaviour):
    """Where it stopped; from the start, without asking again, if the server ignores that."""
    with pytest.raises(CheckpointError, match="ended early"):
        fetch(server, behaviour)
    assert fetch(server, behaviour).read_bytes() == DATA
    assert [part for _, part in server.requests] == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("left", [b"of another file" * 10, DATA + b"more", DATA], ids=["other", "longer", "whole"])
def test_what_an_earlier_run_left(server, cache, left):
    path = fetch(server, "good")
    path.unlink()
    path.with_name("w.pth.part").write_bytes(left)
    assert fetch(server, "good").read_bytes() == DATA and files(cache) == ["w.pth"]


def test_offline(server, monkeypatch):
    path = fetch(server, "good")
    asked = len(server.requests)
    for name in ("EDGEATTN_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
        assert fetch(server, "good") == path
        path.rename(path.with_name("away"))
        with pytest.raises(CheckpointError, match=rf"{name} keeps this offline.*put the file at {path}") as caught:
            fetch(server, "good")
        assert "is not in the cache" in str(caught.value)
        path.with_name("away").rename(path)
        monkeypatch.delenv(name)
    assert len(server.requests) == asked


@pytest.mark.parametrize("how", ["processes", "threads"])
def test_two_at_once(server, cache, how):
    address = f"{server.url}/good/w.pth#sha256={DIGEST}"
    if how == "processes":
        command = [sys.executable, "-c", f"from edgeattn.models import sources; print(sources.locate({address!r}))"]
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        paths = [run.communicate(timeout=100)[0].strip() for run in runs]
    else:
        paths = []
        runs = [threading.Thread(target=lambda: paths.append(str(sources.locate(address)))) for _ in range(4)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
    assert len(set(paths)) == 1 and Path(paths[0]).read_bytes() == DATA
    assert len(server.requests) == 1 and files(cache) == ["w.pth"]


def test_a_digest_is_needed_and_has_64_digits(server):
    with pytest.raises(
        CheckpointError, match=r"a download that cannot be checked is not loaded\. Pass '.*#sha256=DIGEST'"
    ):
        fetch(server, "good", None)
    for digest in (DIGEST[:8], "x" * 64):
        with pytest.raises(CheckpointError, match="expected #sha256= and 64 hexadecimal digits"):
            fetch(server, "good", digest)
    with pytest.raises(CheckpointError, match="expected #sha256="):
        sources.locate(f"{server.url}/good/w.pth#md5=abc")
    assert server.requests == []


def test_cache_folder_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match="set EDGEATTN_CACHE to another folder"):
        fetch(server, "good")


def test_cache_folder_by_environment(monkeypatch, tmp_path):
    assert sources.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("EDGEATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_folder() == tmp_path / "edgeattn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_folder() == Path.home() / ".cache" / "edgeattn"


@pytest.fixture
def entry(server, monkeypatch):
    """The catalogue's own rules with an address on this machine."""

    def change(**changes):
        address = f"{server.url}/good/deit_tiny-{DIGEST[:8]}.pth"
        changed = {"url": address, "sha256_prefix": DIGEST[:8], **changes}
        new = dataclasses.replace(catalog.CATALOG["deit_tiny"], **changed)
        monkeypatch.setitem(catalog.CATALOG, "deit_tiny", new)
        return new

    return change


def test_official_with_the_digits_in_the_name(entry):
    address = entry().url
    assert sources.locate("official", "deit_tiny").read_bytes() == DATA
    assert sources.locate(address).read_bytes() == DATA
    assert sources.locate(f"{address}#sha256={DIGEST[:12]}").read_bytes() == DATA


def test_official_that_is_not_the_file_of_the_catalogue(entry, server):
    other = f"{server.url}/good/deit_tiny-00000000.pth"
    entry(url=other, sha256_prefix="00000000")
    with pytest.raises(CheckpointError, match=f"its SHA-256 is {DIGEST}, expected 00000000"):
        sources.locate("official", "deit_tiny")


@pytest.mark.parametrize(
    "model, said",
    [
        ("efficientvit_m0", "efficientvit_m0.pth: the SHA-256 .* is not known.*'timm:efficientvit_m0.r224_in1k'"),
        ("litv2_s", "Pass 'https://.*/litv2_s.pth#sha256=DIGEST'"),
        ("care_s0", "no direct address of the weights of care_s0 is known. Download them from https://"),
        ("dit_s_2", "no weights of dit_s_2 were published"),
        ("mynet:build", "'mynet:build' is not a model of the zoo"),
    ],
)
def test_official_without_a_file_that_can_be_checked(model, said):
    with pytest.raises(CheckpointError, match=said):
        create_model(model, weights="official")


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's client asks of a server: metadata in the headers of HEAD, then the file."""

    def do_HEAD(self):
        prefix = "/someone/net/resolve/main/"
        data = WEIGHTS.read_bytes() if self.path == f"{prefix}model.safetensors" else None
        self.send_response(200 if data else 404)
        for name, value in {"ETag": '"1"', "X-Repo-Commit": "a" * 40, "Content-Length": len(data or b"")}.items():
            self.send_header(name, str(value))
        self.end_headers()
        return io.BytesIO(data or b"")

    def do_GET(self):
        self.wfile.write(self.do_HEAD().read())

    def log_message(self, *_):
        pass


@pytest.fixture
def ask_hub(tmp_path):
    """Create models in a process of its own, as the client reads its endpoint at import; returns what is said."""
    pytest.importorskip("huggingface_hub", reason="extra [hub] is not installed")

    def ask(*weights, **environment):
        script = (
            "import edgeattn\n"
            f"for weights in {weights!r}:\n"
            "    try: print(edgeattn.create_model('efficientvit_m0', weights=weights).num_classes)\n"
            "    except edgeattn.errors.CheckpointError as e: print(e)"
        )
        variables = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), **environment}
        done = subprocess.run(
            [sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=120
        )
        return done.stdout.strip() or done.stderr

    with serving(Hub) as hub:
        yield ask


def test_weights_from_a_hub_and_offline(ask_hub):
    assert ask_hub("hf-hub:someone/net") == "10"
    for name in ("HF_HUB_OFFLINE", "EDGEATTN_OFFLINE"):
        here, said = ask_hub("hf-hub:someone/net", "hf-hub:someone/net/other.safetensors", **{name: "1"}).splitlines()
        assert here == "10"
        assert "are not in the hub's cache (" in said and f"{name} keeps this offline. Unset it, or fetch" in said
        assert "other.safetensors of someone/net elsewhere and pass its path" in said


def test_a_model_from_an_address():
    with serving(Hub) as server:
        address = f"{server.url}/someone/net/resolve/main/model.safetensors#sha256={sha256_of(WEIGHTS)}"
        told = []
        model = create_model("efficientvit_m0", weights=address, progress=lambda *step: told.append(step))
    assert model.num_classes == 10 and told[-1] == ("download", WEIGHTS.stat().st_size, WEIGHTS.stat().st_size)


def test_a_hub_without_the_file(ask_hub):
    said = ask_hub("hf-hub:someone/none")
    assert "cannot fetch model.safetensors of someone/none from the hub" in said and "pass its path" in said


@pytest.mark.parametrize("spec", ["hf-hub:net", "hf-hub:/net", "hf-hub:me/"])
def test_hub_ids_need_an_owner_and_a_name(spec):
    with pytest.raises(CheckpointError, match="expected hf-hub:OWNER/NAME"):
        sources.locate(spec)


def test_missing_hub_client_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match=r"pip install 'edgeattn\[hub\]'"):
        create_model("efficientvit_m0", weights="timm:efficientvit_m0")


def test_paths_are_paths(tmp_path):
    assert sources.locate(tmp_path / "w.pth") == tmp_path / "w.pth" and sources.locate("./official") == Path("official")
