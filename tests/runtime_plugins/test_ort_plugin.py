"""The ONNX Runtime plugin against the definition of the op and against the same model without the plugin."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cga_cases import Case, assert_close, one_node_model

from edgeattn.errors import MissingDependency
from edgeattn.ops.cascaded_group_attention import q_reference, reference
from edgeattn.runtime_plugins import cpu
from tests.conftest import needs_plugin

ort = pytest.importorskip("onnxruntime")

CASES = {
    "m0-stage1": Case(1, 64, 14, 14, 4, 16, (7, 7), 5),
    "m5-stage3-batch2": Case(2, 384, 4, 4, 4, 16, (4, 4), 7),
    "padded": Case(2, 39, 9, 5, 3, 5, (7, 4), 3),
}


def open_session(model: bytes, *, plugin: bool = True, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if plugin:
        options.register_custom_ops_library(str(cpu.ort_library()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: bytes, feeds: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    return open_session(model, **options).run(None, feeds)[0]


def drawn(case: Case, quantized: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    inputs = case.quantized_inputs() if quantized else case.inputs()
    return inputs, (q_reference if quantized else reference)(*inputs.values(), **case.attributes)[0]


@needs_plugin
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8-weights"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition_and_the_body(name: str, quantized: bool, threads: int) -> None:
    inputs, want = drawn(CASES[name], quantized)
    model = one_node_model(inputs, CASES[name].attributes)
    with_plugin = run(model, {"x": inputs["x"]}, threads=threads)
    assert_close(with_plugin, want)
    assert_close(run(model, {"x": inputs["x"]}, plugin=False, threads=threads), want)


@needs_plugin
def test_the_kernel_is_used_not_the_body(tmp_path: Path) -> None:
    case = CASES["m0-stage1"]
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(cpu.ort_library()))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(one_node_model(case.inputs(), case.attributes), options)
    import onnx

    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert [(n.domain, n.op_type) for n in nodes] == [("edgeattn", "CascadedGroupAttention")]


@needs_plugin
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8-weights"])
@pytest.mark.parametrize("heads", [1, 2, 3, 16])
def test_alias_names(heads: int, quantized: bool) -> None:
    case = Case(1, heads * 8, 6, 6, heads, 8, (6, 6), 3)
    inputs, want = drawn(case, quantized)
    name = ("Q" if quantized else "") + f"CascadedGroupAttention_num_heads{heads}"
    assert_close(run(one_node_model(inputs, case.attributes, name=name), {"x": inputs["x"]}), want)


@needs_plugin
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8-weights"])
def test_weights_as_graph_inputs(quantized: bool) -> None:
    case = CASES["padded"]
    inputs, want = drawn(case, quantized)
    session = open_session(one_node_model(inputs, case.attributes, weights="input"))
    assert_close(session.run(None, inputs)[0], want)
    doubled = {**inputs, "proj_bias": inputs["proj_bias"] * 2}
    assert_close(session.run(None, doubled)[0], want + inputs["proj_bias"][:, None, None])


@needs_plugin
def test_dynamic_batch_and_shape_inference() -> None:
    case = CASES["padded"]
    session = open_session(one_node_model(case.inputs(), case.attributes))
    assert session.get_outputs()[0].shape == ["batch", 39, 9, 5]
    for batch in (1, 3, 0):
        x = np.random.default_rng(batch).normal(size=(batch, 39, 9, 5)).astype(np.float32)
        found = session.run(None, {"x": x})[0]
        assert found.shape == x.shape
        if batch:
            assert_close(found, reference(**{**case.inputs(), "x": x}, **case.attributes)[0])


@needs_plugin
@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_runs_on_one_session(threads: int) -> None:
    case = CASES["m0-stage1"]
    inputs = case.inputs()
    session = open_session(one_node_model(inputs, case.attributes), threads=threads)
    feeds = [np.random.default_rng(i).normal(size=inputs["x"].shape).astype(np.float32) for i in range(8)]
    alone = [session.run(None, {"x": x})[0] for x in feeds]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda x: session.run(None, {"x": x})[0], feeds))
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other)


@needs_plugin
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(qkv_bias=np.zeros(5, np.float32)),
            r"qkv_bias is \(5,\), expected \(192,\) for x \(\?, 64, 14, 14\), 4 heads, key width 16, window \(7, 7\)",
        ),
        (
            dict(attention_bias=np.zeros((4, 49, 48), np.float32)),
            r"attention_bias is \(4, 49, 48\), expected \(4, 49, 49\)",
        ),
        (dict(dw_weight=np.zeros((64, 1, 4, 4), np.float32)), "depthwise kernel side 4 is even; pad it with zeros"),
        (dict(x=np.zeros((1, 66, 14, 14), np.float32)), r"expected \(B, C, H, W\) with C divisible by 4 heads"),
        (dict(x=np.zeros((1, 64, 14), np.float32)), r"x is \(\?, 64, 14\); expected \(B, C, H, W\)"),
    ],
    ids=["qkv_bias", "attention_bias", "even-kernel", "channels", "rank"],
)
def test_wrong_shapes_say_what_was_expected(change: dict[str, np.ndarray], message: str) -> None:
    case = CASES["m0-stage1"]
    with pytest.raises(Exception, match=message):
        open_session(one_node_model({**case.inputs(), **change}, case.attributes))


@needs_plugin
@pytest.mark.parametrize(
    ("attributes", "name", "message"),
    [
        (dict(window=[7]), "", "window has 1 values, expected 2"),
        (dict(key_dim=0), "", "key_dim is 0, expected 1 to 65536"),
        ({}, "CascadedGroupAttention_num_heads2", "num_heads is 4 in a node of type ..._num_heads2"),
        (dict(plugin_version="2"), "", 'plugin_version "2", this plugin is "1"'),
    ],
    ids=["window", "key_dim", "alias", "version"],
)
def test_wrong_attributes_say_what_was_expected(attributes: dict[str, Any], name: str, message: str) -> None:
    case = CASES["m0-stage1"]
    extra = {k: attributes[k] for k in attributes if k == "plugin_version"}
    own = {**case.attributes, **{k: v for k, v in attributes.items() if k not in extra}}
    with pytest.raises(Exception, match=message):
        open_session(one_node_model(case.inputs(), own, name=name, extra=extra))


@needs_plugin
def test_forced_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["padded"]
    inputs, want = drawn(case, False)
    model = one_node_model(inputs, case.attributes)
    for isa in (cpu.plugin_info().isas[0], cpu.plugin_info().active_isa):
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
        assert cpu.plugin_info().active_isa == isa
        assert_close(run(model, {"x": inputs["x"]}), want)
    monkeypatch.setenv(cpu.ISA_VARIABLE, "mmx")
    with pytest.raises(Exception, match='EDGEATTN_CPU_ISA: unknown instruction set "mmx"; this library has: scalar'):
        open_session(model)
    with pytest.raises(MissingDependency, match="EDGEATTN_CPU_ISA=mmx names no instruction set"):
        cpu.plugin_info()


@needs_plugin
def test_plugin_info(monkeypatch: pytest.MonkeyPatch) -> None:
    info = cpu.plugin_info()
    assert info.abi == cpu.ABI_VERSION
    assert info.ort_api >= 21
    assert info.active_isa in info.isas
    assert info.to_dict()["path"] == str(info.path)
    assert len(info.sha256) == 64
    monkeypatch.setattr(cpu, "ABI_VERSION", 99)
    with pytest.raises(MissingDependency, match="has ABI 1, this edgeattn expects 99"):
        cpu.plugin_info()


def test_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cpu.PLUGIN_VARIABLE, str(tmp_path / "lost.so"))
    with pytest.raises(MissingDependency, match=r"EDGEATTN_ORT_PLUGIN is .*lost.so, which is not a file"):
        cpu.plugin_info()
    monkeypatch.setenv(cpu.PLUGIN_VARIABLE, "")
    monkeypatch.setattr(cpu, "_find", lambda stem: tmp_path / "kernels.so" if stem == "edgeattn_cpu" else None)
    assert "built without ONNX Runtime's C++ headers" in str(cpu.missing_reason())
    assert "sh scripts/fetch-ort-headers && make install" in str(cpu.missing_reason())
    monkeypatch.setattr(cpu, "_CHECKOUT", tmp_path)
    assert "EDGEATTN_ORT_INCLUDE=/path/to/headers pip install" in str(cpu.missing_reason())
    monkeypatch.setattr(cpu, "_find", lambda stem: None)
    assert "not built" in str(cpu.missing_reason())


def test_the_newer_of_checkout_and_site_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here, installed = tmp_path / "here", tmp_path / "site" / "edgeattn" / "runtime_plugins" / "cpu"
    monkeypatch.delenv(cpu.PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "_HERE", here)
    monkeypatch.setattr(cpu.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    assert cpu.ort_library() is None
    for age, folder in ((100, installed), (200, here), (300, installed)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "libedgeattn_ort.so").touch()
        os.utime(folder / "libedgeattn_ort.so", (age, age))
        assert cpu.ort_library() == folder / "libedgeattn_ort.so"


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_text("text")
    monkeypatch.setenv(cpu.PLUGIN_VARIABLE, str(tmp_path / "broken.so"))
    with pytest.raises(MissingDependency, match="cannot be loaded as the ONNX Runtime plugin"):
        cpu.plugin_info()


def test_door_imports_no_runtime() -> None:
    heavy = ("torch", "onnxruntime", "numpy")
    code = f"import sys, edgeattn.runtime_plugins.cpu; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
