import json

import pytest

from edgeattn import create_model
from edgeattn.devices.check import bench
from edgeattn.devices.placing import MeasuredPlacer
from edgeattn.errors import DeviceError, UnsupportedOp, UsageError
from edgeattn.export.pipeline import export
from edgeattn.export.targets import tensorrt
from edgeattn.runtime.tensorrt_session import cannot_run, open_session
from edgeattn.runtime.verify import verify
from tests.conftest import SAMPLES

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'edgeattn[tensorrt]'")
RTX = "tensorrt-rtx"
without_gpu = pytest.mark.skipif(not cannot_run(), reason="engines run here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "cache"))


@without_gpu
def test_an_engine_beside_onnx_runtime(tiny_model, pictures, tmp_path):
    bundle = export(tiny_model, ["onnxruntime", RTX], tmp_path / "out", recipe=recipe(), data=pictures)
    built = {entry.variant: entry for entry in bundle.manifest.artifacts if entry.target == RTX}
    for entry in built.values():
        assert [name.rpartition(".")[2] for name in entry.files] == ["engine", "onnx", "json"]
        assert bundle.file(entry.model).stat().st_size > 50_000 and "NVIDIA" in entry.not_run
        key = json.loads(bundle.file(entry.files[2]).read_text())
        assert key["version"] == trt.__version__ and key["compute_capabilities"] == [80, 86, 89, 120]
    assert any("tensorrt-rtx was built and not run: " in note for note in bundle.manifest.notes)
    found = verify(bundle.path)
    assert found.ok and list(found.checked) == ["onnxruntime/float32", "onnxruntime/quantized"]
    assert len(found.skipped) == 2 and all(
        "cannot run: no NVIDIA" in line or "driver" in line for line in found.skipped
    )
    assert {result.target for result in bench(bundle, seconds=0.2).targets} == {"onnxruntime"}


def recipe():
    return {"name": "mine", "activations": {"signedness": "int8"}}


@without_gpu
def test_what_cannot_run_here_is_not_searched(tiny_model, pictures, tmp_path):
    bundle = export(tiny_model, [RTX], tmp_path / "out", recipe=recipe(), data=pictures, placer=MeasuredPlacer())
    assert bundle.manifest.placements == {} and len(bundle.manifest.artifacts) == 2


def test_the_second_build_comes_from_the_cache(tiny_model, tmp_path, monkeypatch, caplog):
    first = export(tiny_model, [RTX], tmp_path / "a", recipe="float32")

    def refuse(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(tensorrt, "_build", refuse)
    again = export(tiny_model, [RTX], tmp_path / "b", recipe="float32")
    name = f"{RTX}/float32.engine"
    assert first.file(name).read_bytes() == again.file(name).read_bytes()
    (cached,) = (tmp_path / "cache" / "engines").iterdir()
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="built again"):
        export(tiny_model, [RTX], tmp_path / "d", recipe="float32")
    assert "is damaged; the engine is built again" in caplog.text
    with pytest.raises(AssertionError, match="built again"):
        export(tiny_model, [RTX], tmp_path / "c", recipe="float32", profile={"compute_capabilities": [89]})


@pytest.mark.parametrize(
    "capabilities, said",
    [
        ([87], r"compute capability 87 is not one that .* builds for: 75, 80, .*Orin"), ([], "give one or more"),
        ([75, 86], "75 only alone"), ([72, 90], "72, 90 is not one"),
    ],
)  # fmt: skip
def test_gpus_that_it_does_not_build_for(tiny_model, tmp_path, capabilities, said):
    with pytest.raises(UsageError, match=said):
        export(tiny_model, [RTX], tmp_path / "out", recipe="float32", profile={"compute_capabilities": capabilities})
    assert not (tmp_path / "out").exists()


def test_turing_in_float32_keeps_the_builders_reason(tiny_model, tmp_path):
    with pytest.raises(UnsupportedOp, match=r"builds no engine for compute capability 75: .*FP32 GEMM"):
        export(tiny_model, [RTX], tmp_path / "out", recipe="float32", profile={"compute_capabilities": [75]})


def test_free_sizes_are_refused(tmp_path):
    model = create_model("shvit_s1", num_classes=4)
    with pytest.raises(UsageError, match="fixed sizes, and height, width is free"):
        export(model, [RTX], tmp_path / "out", recipe="float32", dynamic_size=True)


@without_gpu
def test_engines_that_are_not_opened(tiny_model, tmp_path):
    bundle = export(tiny_model, [RTX], tmp_path / "out", recipe="float32")
    with pytest.raises(DeviceError, match=r"float32\.engine cannot run: "):
        bundle.open_session(RTX, "float32")
    with pytest.raises(DeviceError, match=r"was built by tensorrt_rtx 1\.0, and this is .* Export again"):
        open_session(bundle.path / "x.engine", {"version": "1.0"}, "float32")
    with pytest.raises(DeviceError, match=r"nothing in it runs on this machine \(tensorrt-rtx: "):
        bench(bundle)


@pytest.mark.slow
@pytest.mark.parametrize("name, weights", [
    ("shvit_s1", None), ("care_s0", None), ("deit_tiny", None),
    ("litv2_s", SAMPLES / "litv2_eurosat" / "model.safetensors"),  # untrained, its float16 form overflows
])  # fmt: skip
@pytest.mark.parametrize("quant", ["fp16", "w8a8"])
def test_families(name, weights, quant, pictures, tmp_path):
    bundle = export(create_model(name, weights=weights), [RTX], tmp_path / "out", recipe=quant, data=pictures)
    assert {entry.variant for entry in bundle.manifest.artifacts} == {"float32", "quantized"}
