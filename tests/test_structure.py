"""What keeps the rooms apart: imports point one way, the package is light, doors are links."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgeattn"
BASE = {"models", "ops", "data", "runtime"}
# Room to the rooms that it may import. models may use ops and data, runtime may load plugins.
ALLOWED = {
    "ops": set(), "data": set(), "runtime_plugins": {"ops"}, "models": {"ops", "data"},
    "runtime": {"ops", "data", "runtime_plugins"}, "quant": BASE, "export": BASE | {"quant", "runtime_plugins"},
    "devices": BASE | {"quant", "export", "runtime_plugins"},
}  # fmt: skip


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "edgeattn" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                yield parts[1]


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room):
    for path in (PACKAGE / room).rglob("*.py"):
        wrong = set(imported_rooms(path)) - ALLOWED[room] - {room}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}; {room} may import {ALLOWED[room] or 'no room'}"


def test_every_room_is_listed():
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()} == set(ALLOWED)


@pytest.mark.parametrize("code", ["import edgeattn", "import edgeattn.cli", "from edgeattn.devices import check"])
def test_import_is_light(code):
    heavy = {"torch", "onnx", "onnxruntime", "openvino", "onnxscript", "coremltools"}
    script = f"import sys; {code}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)


def test_doors_are_links_and_the_checkout_runs():
    for name in ("quant", "export", "runtime_plugins", "devices", "cli.py"):
        assert (ROOT / name).is_symlink() and (ROOT / name).resolve() == PACKAGE / name
    command = [sys.executable, "cli.py", "--version"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_entry_points():
    import edgeattn

    for name in edgeattn.__all__:
        assert getattr(edgeattn, name)
    assert callable(edgeattn.export) and callable(edgeattn.check)
    with pytest.raises(AttributeError, match="it has __version__, check"):
        edgeattn.nothing  # noqa: B018


def test_files_stay_readable():
    long = {p: n for p in PACKAGE.rglob("*") if p.suffix in {".py", ".cpp", ".h", ".inl"}
            and (n := len(p.read_text().splitlines())) > 420}  # fmt: skip
    assert not long
