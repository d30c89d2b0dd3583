"""scripts/fetch-ort-headers in a copy of the checkout, without the network: apt-get and dpkg are small fakes."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch-ort-headers"
HEADER = "onnxruntime_cxx_api.h"

TOOLS = [
    "sh",
    "sed",
    "awk",
    "grep",
    "cp",
    "mv",
    "rm",
    "mkdir",
    "mktemp",
    "dirname",
    "cat",
    "chmod",
    "id",
    "tail",
    "touch",
]

FAKE_APT_GET = """#!/bin/sh
while [ $# -gt 0 ]; do case $1 in -c) conf=$2; shift ;; -*) ;; *) verb=$1; break ;; esac; shift; done
work=$(dirname "$conf")
[ "$verb" = update ] && cat "$work/sources.list" >>"$FAKE_LOG"
if [ -n "$FAKE_ONLY" ] && ! grep -q "$FAKE_ONLY" "$work/sources.list"; then echo "E: no such mirror" ; exit 100; fi
[ "$verb" = update ] || touch libonnxruntime-dev_1_any.deb
"""
FAKE_DPKG = """#!/bin/sh
mkdir -p "$3/usr/include/onnxruntime"
echo header >"$3/usr/include/onnxruntime/onnxruntime_cxx_api.h"
"""
DEB822 = """# comment
Types: deb deb-src
URIs: http://mirror.invalid/debian
 http://second.invalid/debian
Suites: bookworm
Components: main contrib

Types: deb
URIs: http://mirror.invalid/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://disabled.invalid/debian
Suites: bookworm
Components: main
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "checkout" / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "checkout" / "scripts")
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found
        (tmp_path / "bin" / name).symlink_to(found)
    (tmp_path / "apt" / "sources.list.d").mkdir(parents=True)
    return tmp_path / "checkout"


def add_apt(checkout: Path) -> None:
    for name, text in (("apt-get", FAKE_APT_GET), ("dpkg", FAKE_DPKG)):
        path = checkout.parent / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fetch(checkout: Path, *arguments: str, only: str = "") -> subprocess.CompletedProcess[str]:
    top = checkout.parent
    environment = {
        "PATH": str(top / "bin"),
        "EDGEATTN_APT_ETC": str(top / "apt"),
        "FAKE_LOG": str(top / "log"),
        "FAKE_ONLY": only,
        "TMPDIR": str(top),
    }
    command = [str(top / "bin" / "sh"), str(checkout / "scripts" / "fetch-ort-headers"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=top)


def asked_mirrors(checkout: Path) -> list[str]:
    return [line.split()[-3] for line in (checkout.parent / "log").read_text().splitlines()]


@pytest.mark.parametrize("below", ["", "include", "include/onnxruntime"])
def test_copies_from_a_folder(checkout: Path, below: str) -> None:
    given = checkout.parent / "given"
    (given / below).mkdir(parents=True)
    (given / below / HEADER).write_text("mine")
    done = fetch(checkout, str(given))
    assert done.returncode == 0, done.stderr
    assert (checkout / "build/ort-headers/include" / HEADER).read_text() == "mine"
    assert [p.name for p in (checkout / "build").iterdir()] == ["ort-headers"]


def test_a_folder_without_headers(checkout: Path) -> None:
    done = fetch(checkout, str(checkout))
    assert done.returncode == 1
    assert f"no {HEADER} in {checkout}" in done.stderr
    assert not (checkout / "build").exists()


def test_no_apt_here(checkout: Path) -> None:
    done = fetch(checkout)
    assert done.returncode == 3
    assert "this machine has no apt-get and dpkg. Give a folder with the headers instead" in done.stderr


def test_reads_deb822_sources_and_is_idempotent(checkout: Path) -> None:
    add_apt(checkout)
    (checkout.parent / "apt/sources.list.d/debian.sources").write_text(DEB822)
    assert fetch(checkout).returncode == 0
    assert asked_mirrors(checkout) == ["http://mirror.invalid/debian"]
    assert "trixie main" in (checkout.parent / "log").read_text()
    assert (checkout / "build/ort-headers/include" / HEADER).is_file()
    assert [p.name for p in (checkout / "build").iterdir()] == ["ort-headers"]
    again = fetch(checkout)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert len(asked_mirrors(checkout)) == 1


def test_reads_one_line_sources_and_tries_the_next_mirror(checkout: Path) -> None:
    add_apt(checkout)
    (checkout.parent / "apt/sources.list").write_text(
        "# deb http://comment.invalid/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://first.invalid/debian bookworm main contrib\n"
        "deb http://first.invalid/debian bookworm-updates main\n"
        "deb http://other.invalid/debian bookworm contrib\n"
        "deb-src http://source.invalid/debian bookworm main\n"
    )
    (checkout.parent / "apt/sources.list.d/more.list").write_text("deb http://last.invalid/debian bookworm main\n")
    assert fetch(checkout, only="last").returncode == 0
    assert asked_mirrors(checkout) == ["http://first.invalid/debian", "http://last.invalid/debian"]


def test_no_mirror_has_it(checkout: Path) -> None:
    add_apt(checkout)
    (checkout.parent / "apt/sources.list.d/debian.sources").write_text(DEB822)
    done = fetch(checkout, only="nowhere")
    assert done.returncode == 1
    assert asked_mirrors(checkout) == ["http://mirror.invalid/debian", "http://second.invalid/debian"]
    assert "E: no such mirror" in done.stderr and "Give a folder with the headers instead" in done.stderr
    assert not list((checkout / "build").iterdir())


def test_no_debian_sources(checkout: Path) -> None:
    add_apt(checkout)
    done = fetch(checkout)
    assert done.returncode == 1
    assert "no Debian archive with component main" in done.stderr


def test_no_host_is_written_into_the_script() -> None:
    assert "://" not in SCRIPT.read_text()
