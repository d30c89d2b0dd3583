"""What the simulation computes is what ONNX Runtime computes, tensor by tensor, for every preset, on real pictures."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgeattn import create_model
from edgeattn.data.source import open_source
from edgeattn.export.onnx_model import to_onnx
from edgeattn.quant.graph import finish
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import PRESETS, load_recipe

SAMPLES = Path(__file__).parents[2] / "samples"
QUANTIZE, DEQUANTIZE, INT4 = (
    getattr(torch.ops.edgeattn, name).default for name in ("quantize", "dequantize", "dequantize_int4")
)
INTEGER = [name for name, recipe in PRESETS.items() if not recipe.is_float]


def run_all(model, image):
    """Every tensor of an ONNX model as the runtime computes it node by node, without fusions."""
    model = onnx.shape_inference.infer_shapes(model)
    named = {v.name for v in (*model.graph.output, *model.graph.initializer)}
    model.graph.output.extend(v for v in model.graph.value_info if v.name not in named)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image}), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("preset", INTEGER)
@pytest.mark.parametrize("name, folder", [("deit_tiny", "deit_eurosat"), ("care_s0", "care_eurosat")])
def test_simulation_is_the_runtime(name, folder, preset):
    model = create_model(name, weights=SAMPLES / folder / "model.safetensors")
    recipe = {**load_recipe(preset).model_dump(), "calibration": {"images": 32}}
    result = quantize(model, recipe, SAMPLES / "eurosat64" / "calib")
    image = np.stack([model.preprocessing(s.image) for s in open_source(SAMPLES / "eurosat64" / "val").spread(2)])
    written = to_onnx(result.graph, result.interface)
    seen = run_all(written, image)
    nodes = {n.output[0]: n for n in written.graph.node}
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in written.graph.initializer}
    checked = 0
    for output, node in nodes.items():
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or output not in seen:
            continue
        arrays = [np.array(constants[i] if i in constants else seen[i]) for i in node.input[:3]]
        values = [torch.from_numpy(a if a.dtype.isbuiltin == 1 else a.astype(np.int8)) for a in arrays]
        got = torch.from_numpy(seen[output])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "QuantizeLinear":
            want = QUANTIZE(*values)
        elif attributes.get("block_size"):
            want = INT4(values[0], values[1], attributes["axis"], attributes["block_size"])
        else:
            want = DEQUANTIZE(*values)
        assert torch.equal(got, want), f"{node.name}: {(got.float() - want.float()).abs().max()}"
        checked += 1
    assert checked > 20
    with torch.no_grad():
        simulated = finish(result.graph)(torch.from_numpy(image))
    step = 2e-5 if result.recipe.activations is None else 0.05
    difference = np.abs(seen["logits"] - simulated.numpy()).max()
    assert difference <= step * simulated.abs().max().item(), "beyond a code or two that float rounding moved"
