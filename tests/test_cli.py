"""The commands as a user types them, good and bad input, exit codes and messages."""

import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from edgeattn import cli, create_model, list_models
from edgeattn.models.catalog import matching
from tests.conftest import CALIB, VAL, WEIGHTS


@pytest.fixture
def few(tmp_path):
    """Eight real pictures in class folders."""
    for name in ("Forest", "River"):
        shutil.copytree(CALIB / name, tmp_path / "few" / name, ignore=lambda d, names: sorted(names)[4:])
    return tmp_path / "few"


def export_arguments(out, **changes):
    options = {"--weights": WEIGHTS, "--calib": CALIB, "--quant": "w8a8", "-o": out, **changes}
    given = [x for k, v in options.items() if v is not None for x in (k, v)]
    return ["export", "efficientvit_m0", "--no-search", *given]  # the search for a placement has tests of its own


def clean(folder):
    """No output and no temporary left."""
    return [p.name for p in folder.iterdir() if p.name.startswith((".out", "out"))] == []


def test_help_of_every_command(edgeattn):
    code, out, _ = edgeattn("--help")
    names = [
        "models",
        "export",
        "check",
        "bench",
        "eval",
        "verify",
        "inspect",
        "train",
        "doctor",
        "calibration",
        "sensitivity",
        "budget",
    ]
    assert code == 0 and all(name in out for name in names)
    for name in names:
        code, out, _ = edgeattn(name, "--help")
        assert code == 0 and "--json" in out


def test_export_check_verify_inspect_end_to_end(edgeattn, tmp_path):
    out = tmp_path / "out"
    code, text, _ = edgeattn(*export_arguments(out), "--json")
    manifest = json.loads(text)
    assert code == 0 and manifest["recipe"] == "w8a8" and manifest["artifacts"][0]["target"] == "onnxruntime"
    code, text, _ = edgeattn("verify", out, "--json")
    assert code == 0 and json.loads(text)["ok"]
    code, text, _ = edgeattn("check", out, "--data", VAL, "--limit", 200, "--seconds", 1, "--json")
    result = json.loads(text)
    assert code == result["exit_code"] and result["verdict"] in ("PASS", "SLOWER", "INCONCLUSIVE")
    row = next(r for r in result["rows"] if r["variant"] == "quantized")
    assert row["top1"] > 90 and row["agreement"] > 95 and row["sqnr_db"] > 18 and row["speedup"] > 0
    assert (out / "report.html").is_file() and len((out / "results.jsonl").read_text().splitlines()) == 1
    code, text, _ = edgeattn("inspect", out)
    assert code == 0 and "Calibrated on 400 pictures" in text
    code, text, _ = edgeattn("eval", out, "--data", VAL, "--limit", 50)
    assert code == 0 and "top-1 %" in text
    code, text, _ = edgeattn("bench", out, "--seconds", 0.5, "--json")
    assert code == 0 and json.loads(text)["verdict"] is None
    code, text, error = edgeattn(*export_arguments(out))
    assert code == 2 and f"output {out} exists; choose another folder, or pass --overwrite" in error
    (out / "model.onnx").write_bytes(b"tampered")
    for arguments in (["verify", out], ["inspect", out], ["check", out, "--data", VAL], ["bench", out]):
        code, _, error = edgeattn(*arguments)
        assert code == 2 and "model.onnx is not the file that was exported" in error


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


def bad_checkpoint(kind, folder):
    path = folder / "w.pth"
    state = safetensors.torch.load_file(WEIGHTS)
    if kind == "code":
        path.write_bytes(pickle.dumps(RunsCode()))
    elif kind == "truncated":
        torch.save({"model": state}, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "nan":
        state["blocks3.4.ffn0.m.pw2.bn.weight"][3] = float("nan")
        torch.save({"model": state}, path)
    elif kind == "other":
        torch.save({"model": {"fc.weight": torch.zeros(3)}}, path)
    return path


@pytest.mark.parametrize(
    "kind, said",
    [
        ("code", "wants to run code when loaded"), ("truncated", "truncated or corrupt"), ("absent", "does not exist"),
        ("nan", "blocks3.4.ffn0.m.pw2.bn.weight holds 1 NaN"), ("other", "unexpected: fc.weight"),
    ],
)  # fmt: skip
def test_bad_checkpoints(edgeattn, tmp_path, monkeypatch, kind, said):
    monkeypatch.chdir(tmp_path)
    options = {"--weights": bad_checkpoint(kind, tmp_path), "--img-size": "112"}
    code, out, error = edgeattn(*export_arguments(tmp_path / "out", **options), "--json")
    assert code == 2 and said in error and clean(tmp_path) and not (tmp_path / "executed").exists()
    assert json.loads(out)["exit_code"] == 2 and said in " ".join(json.loads(out)["message"].split())


def test_bad_calibration_data(edgeattn, tmp_path, few):
    (tmp_path / "empty").mkdir()
    for calib, said in ((None, "never calibrates or validates on random data"), ("empty", "holds no image"),
                        ("nowhere", "does not exist")):  # fmt: skip
        options = {"--calib": calib and tmp_path / calib}
        code, _, error = edgeattn(*export_arguments(tmp_path / "out", **options))
        assert code == 2 and said in error and clean(tmp_path)
    good = (few / "River" / "001.jpg").read_bytes()
    (few / "River" / "001.jpg").write_bytes(good[:300])
    code, _, error = edgeattn(*export_arguments(tmp_path / "out", **{"--calib": few}))
    assert code == 2 and "River/001.jpg" in error and "--skip-bad" in error and clean(tmp_path)
    code, out, error = edgeattn(*export_arguments(tmp_path / "out", **{"--calib": few}), "--skip-bad", "--json")
    assert code == 0 and json.loads(out)["calibration"]["skipped"] == [str(few / "River" / "001.jpg")]


@pytest.mark.slow
def test_grey_and_rgba_pictures_are_used_and_it_is_said(edgeattn, tmp_path, few, caplog):
    Image.open(few / "River" / "000.jpg").convert("L").save(few / "River" / "000.jpg")
    Image.open(few / "River" / "001.jpg").convert("RGBA").save(few / "River" / "rgba.png")
    code, _, _ = edgeattn(*export_arguments(tmp_path / "out", **{"--calib": few}))
    assert code == 0 and "1 image(s) were grey" in caplog.text and "RGBA, alpha dropped" in caplog.text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["export", "eficientvit_m0", "-o", "out", "--random-weights"], "did you mean efficientvit_m0"),
        (["export", "efficientvit_m0", "-o", "out"], "no weights: pass --weights FILE"),
        (["export", "efficientvit_m0", "-o", "out", "--random-weights", "--img-size", "100"], "multiples of 16"),
        (
            ["export", "efficientvit_m0", "-o", "out", "--random-weights", "--img-size", "axb"],
            "expected one side such as",
        ),
        (
            ["export", "efficientvit_m0", "-o", "out", "--random-weights", "-t", "onnxrutime"],
            "did you mean onnxruntime",
        ),
        (["export", "efficientvit_m0", "-o", "out", "--random-weights", "--quant", "w8a9"], "did you mean w8a8"),
        (
            ["export", "efficientvit_m0", "-o", "out", "--random-weights", "--budget", "size=abc"],
            "budget 'size=abc': expected size=1.2MB",
        ),
        (
            ["export", "efficientvit_m0", "-o", "out", "--random-weights", "--budget", "size=2MB"],
            "never calibrates or validates on random data",
        ),
        (
            ["export", "efficientvit_m0", "-o", "out", "--random-weights", "--compute-capability", "86"],
            "--compute-capability is for target tensorrt-rtx; the targets are onnxruntime",
        ),
        (["check", "nowhere", "--data", "x"], "x does not exist"),
        (["verify", "nowhere"], "is not a bundle"),
        (["frobnicate"], "No such command"),
        (["check"], "Missing argument"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_usage_errors(edgeattn, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, _, error = edgeattn(*arguments)
    assert code == 2 and said in error and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_budget_for_size_is_kept_and_promises_no_speed(edgeattn, tmp_path):
    out = tmp_path / "out"
    options = {"--quant": None, "--budget": "size=2.5MB", "--target": "onnxruntime"}
    code, text, _ = edgeattn(*(x for x in export_arguments(out, **options) if x != "--no-search"), "--json")
    manifest = json.loads(text)
    assert code == 0 and manifest["margin"] is None and manifest["placements"] == {}
    assert 1.5e6 < (out / "model.onnx").stat().st_size <= 2.5e6
    code, text, _ = edgeattn("check", out, "--data", VAL, "--seconds", 1, "--json")
    result = json.loads(text)
    assert result["verdict"] in ("PASS", "INCONCLUSIVE") and "SLOWER" not in result["message"]
    assert next(row for row in result["rows"] if row["variant"] == "quantized")["agreement"] > 97


@pytest.mark.slow
def test_a_killed_export_goes_on_in_its_work_folder(edgeattn, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("{name: mine, weights: {bits: 4}, activations: null, calibration: {images: 32}, "
                      "steps: [{step: reconstruct, iterations: 3, images: 32}]}")  # fmt: skip
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = export_arguments(out, **{"--quant": recipe, "--work": work})
    command = [sys.executable, "-c", "from edgeattn.cli import main; main()", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(work.rglob("*.npz"))) < 5:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not out.exists()
    finished = len(list(work.rglob("*.npz")))
    code, text, _ = edgeattn(*arguments, "--json")
    assert code == 0 and f"layers ({finished} by an earlier run)" in " ".join(json.loads(text)["notes"])


@pytest.mark.slow
def test_own_model_in_the_working_folder(tmp_path):
    """With the installed script, as a user runs it: the working folder is not on its path by itself."""
    (tmp_path / "mynet.py").write_text(
        "import torch\nfrom edgeattn.data.preprocessing import Preprocessing\n\n"
        "def build():\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),\n"
        "                              torch.nn.Conv2d(8, 8, 3, 1, 1), torch.nn.AdaptiveAvgPool2d(1),\n"
        "                              torch.nn.Flatten(), torch.nn.Linear(8, 10))\n"
        "    net.preprocessing = Preprocessing(size=(32, 32))\n"
        "    return net\n"
    )
    script = Path(sys.executable).with_name("edgeattn")
    if not script.is_file():
        pytest.skip("edgeattn is not installed in this environment")
    arguments = ["export", "mynet:build", "--random-weights", "--calib", CALIB, "-o", "out", "--no-search"]
    done = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "out" / "model.onnx").is_file(), done.stderr


def test_unknown_recipe_key(edgeattn, tmp_path):
    (tmp_path / "r.yaml").write_text("name: mine\nactivation: {}\n")
    code, _, error = edgeattn(*export_arguments(tmp_path / "out", **{"--quant": tmp_path / "r.yaml"}))
    assert code == 2 and "unknown key 'activation', did you mean 'activations'" in error and clean(tmp_path)


def test_models_table_and_json(edgeattn):
    code, out, _ = edgeattn("models")
    assert code == 0 and all(name in out for name in list_models())
    code, out, _ = edgeattn("models", "deit_tiny")
    row = next(line for line in out.splitlines() if line.startswith("deit_tiny"))
    assert row.split() == ["deit_tiny", "5.72", "M", "1.25", "G", "224x224", "72.2", "%"]
    assert "DeiT (arXiv 2012.12877), https://" in out and "official weights: Apache-2.0, --weights official" in out
    code, out, _ = edgeattn("models", "dit_*", "--json")
    (largest,) = (entry for entry in json.loads(out) if entry["name"] == "dit_xl_2")
    assert largest["parameters"] == 675_129_632 and largest["licence"] == "CC BY-NC 4.0" and largest["top1"] is None
    assert largest["input_size"] == [32, 32] and largest["url"].endswith("DiT-XL-2-256x256.pt")


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_models_table_loses_nothing_in_a_narrow_terminal(capsys, width):
    entries = matching("[dv]*")
    cli._print_models(entries, width)
    lines = capsys.readouterr().out.splitlines()
    for entry in entries:
        row = next(line for line in lines if line.split()[:1] == [entry.name])
        assert f"{entry.input_size[0]}x{entry.input_size[1]}" in row and "…" not in row
        assert len(row.rstrip()) <= max(width, 59)


def test_models_needs_no_torch():
    script = "import sys; sys.argv = ['edgeattn', 'models']; from edgeattn import cli\ntry: cli.main()\n"
    script += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False\n"), done.stderr


def test_models_that_do_not_exist(edgeattn):
    code, _, error = edgeattn("models", "efficentvit_*")
    assert code == 2 and "no model matches 'efficentvit_*': did you mean efficientvit_m" in error


@pytest.mark.parametrize(
    "weights, said",
    [
        ("https://example.org/w.pth", "Pass 'https://example.org/w.pth#sha256=DIGEST'"),
        ("official", "the SHA-256 of this file is not known"),
        ("hf-hub:net", "expected hf-hub:OWNER/NAME"),
    ],
)
def test_weights_that_cannot_be_fetched(edgeattn, tmp_path, weights, said):
    code, out, error = edgeattn(*export_arguments(tmp_path / "out", **{"--weights": weights}), "--json")
    assert code == 2 and said in error and clean(tmp_path) and json.loads(out)["error"] == "CheckpointError"


def test_weights_of_another_model(edgeattn, tmp_path):
    torch.save(create_model("efficientvit_m1").state_dict(), tmp_path / "m1.pth")
    code, _, error = edgeattn(*export_arguments(tmp_path / "out", **{"--weights": tmp_path / "m1.pth"}))
    assert code == 2 and "These weights fit 'efficientvit_m1': use that name." in error and clean(tmp_path)


def test_doctor_names_the_missing_plugin_and_the_fix(edgeattn, monkeypatch):
    monkeypatch.setenv("EDGEATTN_ORT_PLUGIN", "/nonexistent.so")
    code, out, _ = edgeattn("doctor")
    assert code == 3 and "MISSING cpu plugin" in out and "unset it" in out


@pytest.mark.slow
def test_missing_openvino_is_exit_code_3(edgeattn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, _, error = edgeattn(*export_arguments(tmp_path / "out"), "-t", "openvino")
    assert code == 3 and "pip install 'edgeattn[openvino]'" in error and clean(tmp_path)


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("shvit_s1", ["--views", "2"], "--heads and --views are for vggt; shvit_s1 has neither"),
        ("deit_tiny", ["--dynamic-size", "--quant", "float32"], "deit_tiny is built for one input size"),
        ("litv2_s", ["--img-size", "100"], "Nearest: 96x96"),
        ("dit_s_8", ["--quant", "w8a8"], "this version quantizes classifiers only"),
    ],
)
def test_export_options_that_do_not_fit_the_model(edgeattn, tmp_path, model, options, message):
    out = tmp_path / "out"
    code, _, error = edgeattn("export", model, "--random-weights", "-o", str(out), "--calib", str(CALIB), *options)
    assert code == 2 and message in error and not out.exists()


@pytest.mark.slow
def test_denoiser_from_the_command_line(edgeattn, tmp_path):
    out = str(tmp_path / "out")
    code, text, error = edgeattn("export", "dit_s_8", "--random-weights", "--quant", "float32", "-o", out)
    assert code == 0 and "12 Attention" in text and "`model_output`" in text, error
    code, _, error = edgeattn("check", out, "--data", str(VAL))
    assert code == 2 and "is not a classifier" in error and "edgeattn verify" in error


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupt_in_mid_export_leaves_nothing(tmp_path, how):
    command = [sys.executable, "-m", "edgeattn", *map(str, export_arguments(tmp_path / "out"))]
    # A job in the background of a shell ignores SIGINT, and so would its child.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 120
    while clean(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    time.sleep(1.0)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    # A shell reads both as 130; Python itself dies of the signal when it strikes inside an import.
    assert process.returncode in (130, -signal.SIGINT), error
    assert "interrupted; nothing half-written" in error and clean(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="a full disk needs root to mount a small one")
def test_full_disk_in_mid_export(edgeattn, tmp_path):
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for target in ("onnxruntime", "openvino"):
            code, _, error = edgeattn(*export_arguments(tmp_path / "small" / "out"), "-t", target)
            assert code == 4 and "no space left while writing" in error and clean(tmp_path / "small")
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)
