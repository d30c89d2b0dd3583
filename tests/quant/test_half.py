from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgeattn.data.interface import classifier_interface
from edgeattn.errors import DataError, RecipeError
from edgeattn.export.onnx_model import to_onnx
from edgeattn.export.pipeline import export
from edgeattn.quant.half import to_half
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import PRESETS, load_recipe
from edgeattn.runtime.verify import verify
from tests.quant.test_hazards import (
    CARE,
    DEIT,
    EFFICIENTVIT,
    LITV2,
    SHVIT,
    build,
    prepared,
    scale_queries_and_keys,
)

HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def initializer_types(model):
    return Counter(t.data_type for t in model.graph.initializer if t.data_type in (HALF, FLOAT))


@torch.no_grad()
def expected(graph, x):
    result = graph(x)
    return (result[0] if isinstance(result, tuple) else result).numpy()


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x.numpy()})[0]


def test_the_exported_graph_is_typed_and_its_island_cures_onnx_runtime(pictures):
    model = build("deit_tiny", **DEIT)
    graph, hazards, x = prepared(scale_queries_and_keys(model, model.blocks[1], 1200.0), pictures)
    naive, repaired = (to_onnx(to_half(graph, found).graph, classifier_interface((64, 64))) for found in ([], hazards))
    assert set(initializer_types(naive)) == {HALF}
    assert initializer_types(repaired)[HALF] == initializer_types(naive)[HALF], "the island has no weights"
    for model in (naive, repaired):
        assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [FLOAT, FLOAT]
    casts = [sum(n.op_type == "Cast" for n in m.graph.node) for m in (naive, repaired)]
    assert casts == [2, 2 + 3 + 1], "input and output; and q, k, v in, the result out"
    want = expected(graph, x)
    assert not np.isfinite(run(naive, x)).all()
    assert np.linalg.norm(run(repaired, x) - want) < 0.01 * np.linalg.norm(want)


def test_nodes_of_one_function_body_share_their_type(pictures):
    model = build("shvit_s1", **SHVIT)
    graph, hazards, x = prepared(scale_queries_and_keys(model, model.blocks3[-1], 1000.0), pictures)
    assert [hazard.path for hazard in hazards] == ["blocks3.3.mixer.m"]
    made = to_half(graph, hazards)
    assert made.precision["float32"] == 2
    assert "float32 island: blocks2.3.mixer.m (shares its ONNX function with blocks3.3.mixer.m)" in made.notes
    want = expected(graph, x)
    got = run(to_onnx(made.graph, classifier_interface((64, 64))), x)
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.parametrize("name, config", [
    ("efficientvit_m0", EFFICIENTVIT), ("shvit_s1", SHVIT), ("care_s0", CARE), ("litv2_s", LITV2),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_fp16_bundles_run_everywhere(name, config, pictures, tmp_path):
    model = build(name, **config)
    targets = ["onnxruntime", "openvino"]
    bundle = export(model, targets, tmp_path / "b", recipe="fp16", data=pictures)
    manifest = bundle.manifest
    assert verify(tmp_path / "b").ok and [e.variant for e in manifest.artifacts] == ["float32", "quantized"] * 2
    islands = [note for note in manifest.notes if note.startswith("float32 island: ")]
    assert manifest.precision["float16"] > 20 and not islands
    # The plugin has float32 kernels only; with it ONNX Runtime would refuse the file.
    assert not bundle.artifact("onnxruntime", "quantized").settings["plugin"]
    for target in targets:
        assert any(note.startswith(f"{target}: ") and "float32" in note for note in manifest.notes)
    written = onnx.load(tmp_path / "b" / "model.onnx")
    assert initializer_types(written)[HALF] > initializer_types(written)[FLOAT]
    plain, half = (bundle.size_bytes("onnxruntime", variant) for variant in ("float32", "quantized"))
    assert half < 0.75 * plain


def test_onnx_runtime_computes_float16_nodes_in_float32(pictures, tmp_path):
    """What the manifest's note says: the optimised model multiplies float32 numbers between casts."""
    graph, hazards, _ = prepared(build("deit_tiny", **DEIT), pictures)
    model = to_onnx(to_half(graph, hazards).graph, classifier_interface((64, 64)))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "o.onnx")
    types = {tensor.name: tensor.data_type for tensor in optimised.graph.initializer}
    weighted = [node for node in optimised.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    read = {types[name] for node in weighted for name in node.input if name in types}
    assert len(weighted) >= 5 and read == {FLOAT} and any(n.op_type == "Cast" for n in optimised.graph.node)


def test_rules_keep_modules_in_float32(tiny_model, pictures):
    recipe = {**PRESETS["fp16"].model_dump(), "name": "r", "rules": [{"modules": "head*", "reason": "asked for"}]}
    result = quantize(tiny_model, recipe, pictures, targets=["openvino"])
    assert result.precision["float32"] == 1 and "float32 island: head.l (asked for)" in result.notes
    assert result.graph is not result.float_graph and result.calibration["images"] == 32


def test_the_preset_needs_pictures_and_no_integers(tiny_model):
    recipe = load_recipe("fp16")
    assert recipe.is_float and recipe.has_variant and recipe.formats == () and not load_recipe("float32").has_variant
    with pytest.raises(DataError, match="no images were given"):
        quantize(tiny_model, "fp16")
    with pytest.raises(RecipeError, match="float_type float16 is for models without integers"):
        load_recipe({"name": "mixed", "float_type": "float16"})
