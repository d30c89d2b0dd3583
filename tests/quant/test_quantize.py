import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeattn import create_model
from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import DataError, NumericError, RecipeError, UsageError
from edgeattn.export.onnx_model import save_onnx
from edgeattn.models.folding import fuse_attention
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import aten, calls, capture, module_path
from edgeattn.quant.quantize import quantize
from edgeattn.quant.quantizer import quantize_bias, quantize_weight, weight_scale_floor
from edgeattn.quant.recipe import load_recipe
from tests.conftest import CALIB, ROOT, randomize


@pytest.mark.parametrize("distillation", [False, True])
@pytest.mark.parametrize(
    "name, size", [("efficientvit_m0", 112), ("efficientvit_m2", 240), ("efficientvit_m5", (64, 96))]
)
def test_folding_keeps_the_function(name, size, distillation):
    torch.manual_seed(0)
    model = randomize(create_model(name, img_size=size, num_classes=11, distillation=distillation))
    x = torch.randn(2, 3, *model.preprocessing.size)
    graph = capture(fuse_attention(model), classifier_interface(x.shape[2:]))
    counts = fold(graph)
    with torch.no_grad():
        want, got = model(x), graph(x)
    assert (want - got).abs().max() < 1e-4 * want.std()
    assert not calls(graph, aten.batch_norm.default) and counts["residual_depthwise"] >= 10
    assert model.state_dict().keys() == create_model(name, distillation=distillation).state_dict().keys()


class Awkward(torch.nn.Module):
    """What must not fold: a convolution used twice, a residual that is not depthwise, a depthwise one used twice."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(8, 8))
        self.a, self.bn = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)
        self.dw = torch.nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.full = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.out = torch.nn.Linear(3, 5)

    def forward(self, x):
        y = self.a(x)
        y = self.bn(y) + y
        y = y + self.full(y)
        z = self.dw(y)
        return self.out((y + z + z.mean()).mean((2, 3)))


def test_only_exact_patterns_fold():
    model = randomize(Awkward())
    graph = capture(model, classifier_interface((8, 8)))
    assert fold(graph) == {
        "constants": 0, "conv_bn": 0, "bn_conv": 0, "bn_linear": 0, "residual_depthwise": 0
    }  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(graph(x), model(x), atol=1e-6)


class Padded(torch.nn.Module):
    """BatchNorm in front of a convolution: folds into one without padding, not into one with it or a grouped one."""

    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(4) for _ in range(3))
        self.plain, self.padded = torch.nn.Conv2d(4, 4, 2, 2), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.grouped = torch.nn.Conv2d(4, 4, 1, groups=2, bias=False)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        x = x.repeat(1, 2, 1, 1)[:, :4] * (self.table * 2 + torch.arange(4)).sqrt()[:, None, None]
        x = self.plain(self.norms[0](x)).relu()
        return self.grouped(self.norms[2](self.padded(self.norms[1](x)).relu())).mean((2, 3))


def test_what_folds_forward_and_constants():
    torch.manual_seed(0)
    model = randomize(Padded())
    graph = capture(model, classifier_interface((8, 8)))
    counts = fold(graph)
    assert (counts["constants"], counts["bn_conv"], counts["conv_bn"]) == (1, 1, 0)
    assert len(calls(graph, aten.batch_norm.default)) == 2, "in front of the padded and of the grouped one"
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(graph(x), model(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, config", [
    ("litv2_s", dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))),
    ("deit_tiny", dict(embed_dim=48, depth=2)),
    ("care_s0", dict(
        depths=(1, 1, 2, 2), feat_dims=(12, 24, 48, 96), mem_dims=(4, 8, 16, 32), att_head_dim=(1, 1, 8, 16)
    )),
], ids=["litv2", "deit", "care"])  # fmt: skip
def test_families_quantize_and_run_as_simulated(name, config, pictures, tmp_path):
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    model = randomize(create_model(name, img_size=64, num_classes=10, **config))
    result = quantize(model, "w8a8", pictures)
    x = torch.stack([torch.from_numpy(model.preprocessing.normalize(p)) for p in pictures])
    with torch.no_grad():
        plain, simulated = result.float_graph(x), result.graph(x)
    nodes = save_onnx(result.graph, result.interface, tmp_path / "m.onnx").nodes
    assert "MatMul" not in nodes, "linear layers over tokens are Gemm"
    floats = [n for n in result.notes if n.startswith("float32: ")]
    assert any("conv_offset" in n for n in floats) == (name == "litv2_s")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "o.onnx")
    got = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options).run(None, {"image": x.numpy()})[0]
    assert (torch.from_numpy(got) - simulated).abs().max() <= (simulated - plain).abs().max()
    run = [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node]
    assert run.count("QLinearConv") + run.count("QGemm") == result.precision["int8"] - run.count("QLinearAdd")


def test_quantized_graph_is_close_and_counts_its_precisions(tiny_model, pictures):
    result = quantize(tiny_model, "w8a8", pictures)
    x = torch.stack([torch.from_numpy(tiny_model.preprocessing.normalize(p)) for p in pictures])
    with torch.no_grad():
        a, b = result.float_graph(x), result.graph(x)
    assert 10 * torch.log10((a**2).sum() / ((a - b) ** 2).sum()) > 15
    assert result.precision["attention: int8 weights, float32 activations"] == 3 and result.precision["int8"] > 40
    assert result.calibration["images"] == 32 and any("calibrated on 32 images only" in n for n in result.notes)
    assert torch.equal(tiny_model(x), tiny_model(x)), "the given model still runs"


def test_same_data_gives_the_same_numbers(tiny_model, pictures):
    first, second = (quantize(tiny_model, "w8a8", iter(pictures)) for _ in range(2))
    assert first.calibration["sha256"] == second.calibration["sha256"]
    for (name, a), (_, b) in zip(first.graph.named_buffers(), second.graph.named_buffers(), strict=True):
        assert torch.equal(a, b), name


class Mixed(torch.nn.Module):
    """A convolution, a residual block on the map, and attention over its tokens, all wide enough for 4 bits."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(32, 32))
        self.stem, self.point = torch.nn.Conv2d(3, 32, 8, 8), torch.nn.Conv2d(32, 32, 1)
        self.norm, self.qkv, self.head = torch.nn.BatchNorm2d(32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.norm(self.point(x))
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2))[:, None].chunk(3, -1)
        return self.head(torch.nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def exported_digests():
    """SHA-256 of the ONNX that w8a8 and w4a16 (with GPTQ) make of a small model and real pictures."""
    digests = []
    for name in ("w8a8", "w4a16"):
        torch.manual_seed(0)
        model = randomize(Mixed())
        recipe = {**load_recipe(name).model_dump(), "calibration": {"images": 12, "batch_size": 5}}
        result = quantize(model, recipe, CALIB)
        with tempfile.TemporaryDirectory() as folder:
            save_onnx(result.graph, result.interface, Path(folder) / "m.onnx")
            digests.append(hashlib.sha256((Path(folder) / "m.onnx").read_bytes()).hexdigest())
    return digests


def test_same_seed_recipe_and_pictures_give_the_same_bytes():
    first = exported_digests()
    assert exported_digests() == first and len(set(first)) == 2
    code = "from tests.quant.test_quantize import exported_digests; print(*exported_digests())"
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    assert run.stdout.split() == first, "another process with other hashes"


def test_int8_activations_are_symmetric_for_targets_that_want_it(tiny_model, pictures):
    recipe = load_recipe({"name": "s", "activations": {"signedness": "int8"}})
    graph = quantize(tiny_model, recipe, pictures).graph
    points = [b for n, b in graph.named_buffers() if n.endswith("zero_point")]
    assert points and all((p == 0).all() for p in points) and {p.dtype for p in points} <= {torch.int8, torch.int32}


def test_rules_keep_layers_float_and_say_why(tiny_model, pictures):
    rules = [{"modules": "blocks2.*", "reason": "test"}, {"modules": "head*"}]
    result = quantize(tiny_model, {"name": "r", "rules": rules, "first_layer": "int8"}, pictures)
    kept = [n for n in calls(result.graph, aten.conv2d.default, aten.linear.default) if n.args[1].op == "get_attr"]
    assert {module_path(n).split(".")[0] for n in kept} == {"blocks2", "head"}
    assert any(note.startswith("float32: blocks2.0.0.m.c (test)") for note in result.notes)
    with pytest.raises(RecipeError, match="quantizes no layer"):
        quantize(tiny_model, {"name": "none", "rules": [{"modules": "*"}]}, pictures)


def test_float_recipe_needs_no_data(tiny_model):
    result = quantize(tiny_model, "float32")
    assert result.graph is result.float_graph and result.calibration is None


def test_no_data_and_models_without_preprocessing(tiny_model):
    with pytest.raises(DataError, match="never calibrates or validates on random data"):
        quantize(tiny_model, "w8a8")
    with pytest.raises(UsageError, match="Linear has no `preprocessing`"):
        quantize(torch.nn.Linear(3, 3), "float32")


def test_nan_in_activations_names_the_layer(tiny_model, pictures):
    with torch.no_grad():
        tiny_model.blocks2[1].conv1.bn.running_var.fill_(-1.0)
    with pytest.raises(NumericError, match=r"blocks2\.1\."):
        quantize(tiny_model, "w8a8", pictures)


def test_own_model_takes_the_same_path(pictures):
    result = quantize(randomize(Awkward()), "w8a8", pictures)
    assert result.precision["int8"] >= 4 and result.graph(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


class Returning(torch.nn.Module):
    """The output is read by a layer too, and one addition is scaled."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(8, 8))
        self.a, self.b, self.c = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        y = self.b(self.a(x))
        return torch.add(y, self.c(y), alpha=0.5).mean((2, 3)) * 0 + y.mean((2, 3))


def test_scaled_additions_stay_float_and_any_reader_gets_its_scale(pictures):
    result = quantize(randomize(Returning()), "w8a8", pictures)
    (add,) = [n for n in calls(result.graph, aten.add.Tensor) if n.kwargs]
    # b, c and the plain addition; a reads the picture.
    assert add.kwargs == {"alpha": 0.5} and result.precision["int8"] == 3
    assert torch.isfinite(result.graph(torch.randn(2, 3, 8, 8))).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["min_max", "moving_average", "percentile", "mse", "entropy"])
def test_every_observer_serves_a_recipe(tiny_model, pictures, method):
    recipe = {"name": method, "activations": {"observer": {"method": method}}}
    graph = quantize(tiny_model, recipe, pictures[:8]).graph
    assert torch.isfinite(graph(torch.randn(2, 3, 64, 64))).all()


def test_dead_channels_keep_their_bias():
    weight = torch.randn(4, 3, 1, 1)
    weight[1] = 0
    bias, input_scale = torch.tensor([0.5, -0.75, 1e4, 0.0]), torch.tensor(0.01)
    codes, scale = quantize_weight(weight, weight_scale_floor(bias, input_scale))
    bias_codes, bias_scale = quantize_bias(bias, input_scale, scale)
    assert (codes[1] == 0).all() and bias_codes.abs().max() <= 2**30
    assert torch.allclose(bias_codes * bias_scale, bias, atol=1e-2, rtol=1e-6)


def test_config_is_plain_data(tiny_model, pictures):
    result = quantize(tiny_model, "w8a8", np.stack(pictures))
    assert json.dumps([result.config, result.calibration, result.precision])
