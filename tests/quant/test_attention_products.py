import hashlib
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import RecipeError
from edgeattn.export.onnx_model import to_onnx
from edgeattn.quant.ablation import prefixes
from edgeattn.quant.attention_products import ATTENTION, SPLITS, split_attention
from edgeattn.quant.graph import aten, calls, finish, module_path
from edgeattn.quant.methods import softmax
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import load_recipe
from edgeattn.quant.steps import AttentionProducts
from tests.quant.outliers import assert_same, captured, images, plain_deit, sqnr_db
from tests.quant.test_exactness import run_all

KINDS = [
    ("uniform", 8), pytest.param("uniform", 3, marks=pytest.mark.slow),
    ("log2", 4), pytest.param("log2", 8, marks=pytest.mark.slow),
    ("twin", 4), pytest.param("twin", 8, marks=pytest.mark.slow),
]  # fmt: skip


def with_step(softmax="uniform", bits=None, **changes):
    step = {"step": "attention_products", "softmax": softmax, "bits": bits}
    return {"name": "r", "calibration": {"images": 12}, "steps": [step]} | changes


def said(result):
    return [note for note in result.notes if "attentions" in note]


def on_the_grid(p, kind, bits, split=None):
    """What the published functions make of probabilities."""
    if kind == "uniform":
        step = torch.tensor(1 / (2**bits - 1))
        return torch.round(p / step) * step
    if kind == "log2":
        return softmax.log2_decode(*softmax.log2_encode(p, bits))
    return softmax.twin_decode(softmax.twin_encode(p, split, bits), split, bits)


def splits(result):
    (note,) = [note for note in result.notes if note.startswith("probabilities split")]
    return [float(part.rpartition(": ")[2]) for part in note.split(", ")]


@pytest.mark.parametrize("kind, bits", KINDS)
def test_the_runtime_computes_what_is_simulated(kind, bits, pictures):
    model = plain_deit()
    result = quantize(model, with_step(kind, bits), pictures)
    x = images(model, pictures[:4])
    written = to_onnx(result.graph, result.interface)
    seen = {name: torch.from_numpy(value) for name, value in run_all(written, x.numpy()).items()}
    products = [node for node in written.graph.node if node.op_type == "MatMul"]
    makers = {node.output[0]: node for node in written.graph.node}
    probabilities = [node.output[0] for node in written.graph.node if node.op_type == "Softmax"]
    assert len(products) == 4 and len(probabilities) == 2, "two blocks; linear layers are Gemm"
    for i, (p, node) in enumerate(zip(probabilities, products[1::2], strict=True)):
        got, want = seen[node.input[0]], on_the_grid(seen[p], kind, bits, splits(result)[i] if kind == "twin" else None)
        if kind == "log2":  # Log divided by log 2 may differ from log2 by an ulp, which decides a tie
            assert (got != want).float().mean() < 1e-3
        else:
            assert torch.equal(got, want)
    for node in products:
        integers = [makers[name].op_type == "DequantizeLinear" for name in node.input]
        assert integers[1] and integers[0] == (node in products[::2] or kind == "uniform")
    with torch.no_grad():
        simulated = finish(result.graph)(x)
    assert (seen["logits"] - simulated).abs().max() <= 0.05 * simulated.abs().max(), "a code or two"


def test_what_each_kind_costs(pictures):
    model = plain_deit(patch_size=8)  # 65 tokens: most probabilities are below half a step of 1/15
    x = images(model, pictures)
    found = {}
    for kind, bits in [(None, 8), ("uniform", 8), ("uniform", 4), ("log2", 4), ("twin", 8), ("twin", 4)]:
        recipe = with_step(kind, bits) if kind else with_step(steps=[])
        result = quantize(model, recipe, pictures)
        found[kind, bits] = sqnr_db(result.float_graph, result.graph, x)
        assert calls(result.graph, ATTENTION) == [] or kind is None
    plain = found[None, 8]
    assert found["uniform", 8] > plain - 3 and found["twin", 8] > plain - 3, found
    assert found["uniform", 4] + 2 < min(found["twin", 4], found["log2", 4]) < plain, found


def test_summary_and_note_tell_integers_from_simulation(pictures):
    model = plain_deit()
    plain = quantize(model, with_step(steps=[]), pictures).precision
    for kind, values in (("uniform", "int8"), ("log2", "float32, log2 codes simulated")):
        result = quantize(model, with_step(kind), pictures)
        products = [f"attention products: {precision}" for precision in ("int8", values) for _ in range(2)]
        assert result.precision == Counter(plain) + Counter(products)
        bits = 8 if kind == "uniform" else 4
        assert said(result) == [f"quantized the products of 2 attentions (probabilities: {kind}, {bits} bits)"]


def test_symmetric_targets_get_signed_codes(pictures):
    result = quantize(plain_deit(), with_step(activations={"signedness": "int8"}), pictures)
    grids = {name: value for name, value in result.graph.named_buffers() if name.startswith("softmax")}
    assert len(grids) == 4
    for name, value in grids.items():
        want = torch.tensor(1 / 127) if name.endswith("_scale") else torch.tensor(0, dtype=torch.int8)
        assert value.dtype == want.dtype and torch.equal(value, want)


def test_twin_splits_give_the_least_error_of_the_product(pictures):
    model = plain_deit()
    result = quantize(model, with_step("twin", 4), pictures[:12])
    graph, x = captured(model), images(model, pictures[:12])
    split_attention(graph, AttentionProducts(), load_recipe(with_step()))
    values = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Keep(graph).run(x)
    products = calls(graph, aten.matmul.default)[1::2]
    for product, chosen in zip(products, splits(result), strict=True):
        p, v = (values[arg] for arg in product.args)
        error = [float((on_the_grid(p, "twin", 4, s) @ v - p @ v).square().sum()) for s in SPLITS]
        assert chosen == SPLITS[int(np.argmin(error))] and 0 < SPLITS.index(chosen) < len(SPLITS) - 1


class Attending(nn.Module):
    """One attention over 16 tokens of 24 channels, called with whatever `options` gives for (B, 3, 16, 8) heads."""

    def __init__(self, options):
        super().__init__()
        self.preprocessing, self.options = Preprocessing(size=(8, 8)), options
        self.stem, self.inner, self.head = nn.Conv2d(3, 24, 2, 2), nn.Module(), nn.Linear(24, 10)
        self.inner.qkv = nn.Linear(24, 72)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in self.inner.qkv(x).chunk(3, -1))
        o = F.scaled_dot_product_attention(q, k, v, **self.options(x))
        return self.head(o.transpose(1, 2).flatten(2).mean(1))


def mask_like(kind):
    near = (torch.arange(16)[:, None] - torch.arange(16)).abs() < 4
    bias = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"bool": near, "bias": nn.Parameter(bias), "infinite": bias.masked_fill(~near, -torch.inf)}[kind]


@pytest.mark.parametrize("kind", ["bool", "bias", "infinite", "scale"])
def test_constant_masks_and_scales(kind, pictures):
    torch.manual_seed(0)
    options = {"scale": 0.7} if kind == "scale" else {"attn_mask": mask_like(kind)}
    model = Attending(lambda x: options).eval()
    graph = captured(model)
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        want = graph(x)
    split_attention(graph, AttentionProducts(), load_recipe(with_step()))
    assert not calls(graph, ATTENTION)
    assert_same(graph, want, x, 1e-5)
    result = quantize(model, with_step(), pictures)
    written = to_onnx(result.graph, result.interface)
    with torch.no_grad():
        simulated = result.graph(x)
    assert np.abs(run_all(written, x.numpy())["logits"] - simulated.numpy()).max() <= 0.05 * simulated.abs().max()
    assert sqnr_db(result.float_graph, result.graph, x) > 25


@pytest.mark.parametrize(
    "options, reason",
    [
        (lambda x: {"is_causal": True}, "causal, with dropout or with grouped queries"),
        (lambda x: {"attn_mask": x.mean(-1)[:, None, None]}, "its mask depends on the input"),
        (
            lambda x: {"attn_mask": torch.arange(16)[:, None] > torch.arange(16)},
            "a query sees nothing through its mask",
        ),
    ],
    ids=["causal", "mask of the input", "empty row"],
)
def test_other_attention_stays_as_it_is_and_the_note_says_why(options, reason, pictures):
    torch.manual_seed(0)
    result = quantize(Attending(options).eval(), with_step(), pictures)
    assert said(result) == [f"quantized the products of 0 attentions; left those of 1 in float32 (1: {reason})"]
    assert len(calls(result.graph, ATTENTION)) == 1 and "attention products: int8" not in result.precision


def test_a_rule_keeps_attention_float(pictures):
    rules = [{"modules": "blocks.0.attn", "reason": "asked for"}]
    result = quantize(plain_deit(), with_step(rules=rules), pictures)
    assert [module_path(node) for node in calls(result.graph, ATTENTION)] == ["blocks.0.attn"]
    (note,) = said(result)
    assert note.endswith("of 1 attentions (probabilities: uniform, 8 bits); left those of 1 in float32 (1: asked for)")
    assert result.precision["attention products: int8"] == 2
    with pytest.raises(RecipeError, match=r"'blocks.0.atn' matches no module.*Near: blocks.0.attn"):
        quantize(plain_deit(), with_step(rules=[{"modules": "blocks.0.atn"}]), pictures)
    inputs = [{"modules": "blocks.1*", "weights": {"bits": 8}, "activations": "float"}]
    result = quantize(plain_deit(), with_step(rules=inputs), pictures)
    assert [module_path(node) for node in calls(result.graph, ATTENTION)] == ["blocks.1.attn"]


@pytest.mark.parametrize(
    "values, message",
    [
        (
            with_step(activations=None),
            "activations is null, so step attention_products has nothing to help; set it, or",
        ),
        (with_step(bits=1), r"steps\.0\.attention_products\.bits: .*greater than or equal to 2 \(found 1\)"),
        (with_step("twin", 9), r"bits: .*less than or equal to 8 \(found 9\)"),
        (with_step("log3"), r"softmax: .*'uniform', 'log2' or 'twin' \(found 'log3'\)"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(values)


def test_models_with_nothing_to_do_say_so(tiny_model, pictures):
    plain, stepped = (quantize(tiny_model, recipe, pictures) for recipe in (with_step(steps=[]), with_step()))
    want = "quantized the products of 0 attentions; left those of 3 in float32 (3: in an op of edgeattn)"
    assert said(stepped) == [want] and stepped.precision == plain.precision
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.graph(x), stepped.graph(x))
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    convolution.preprocessing = Preprocessing(size=(8, 8))
    found = said(quantize(convolution, with_step(), pictures))
    assert found == ["quantized the products of 0 attentions: none is a call of scaled_dot_product_attention"]


def digest(result):
    return hashlib.sha256(to_onnx(result.graph, result.interface).SerializeToString()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "twin"])
def test_same_bytes_again_and_from_the_stored_recipe(kind, pictures):
    model = plain_deit()
    revert = {"step": "revert", "goal_db": 60, "most": 0.2, "images": 8}
    recipe = with_step(kind)
    recipe["steps"] += [revert, {"step": "bias_correction"}]
    first = quantize(model, recipe, pictures)
    assert any(rule.is_float for rule in first.recipe.rules), "the search found something to revert"
    assert any("goal 60 dB), without the noise of attention products" in note for note in first.notes)
    assert digest(first) == digest(quantize(model, recipe, pictures)) == digest(quantize(model, first.recipe, pictures))


@pytest.mark.slow
def test_rotation_of_the_values_may_come_before_or_after(pictures):
    model = plain_deit()
    x = images(model, pictures)
    for steps in (["rotate", "attention_products"], ["attention_products", "rotate"]):
        result = quantize(model, with_step(steps=[{"step": name} for name in steps]), pictures)
        assert any("rotated the values of 2 attentions" in note for note in result.notes)
        assert result.precision["attention products: int8"] == 4
        assert sqnr_db(result.float_graph, result.graph, x) > 20


def test_explain_names_the_step():
    assert [label for label, _ in prefixes(load_recipe(with_step("log2")))][-1] == "+ attention_products"


@pytest.mark.slow
def test_both_products_run_in_integers(pictures, tmp_path):
    import onnxruntime

    result = quantize(plain_deit(), with_step(), pictures)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(to_onnx(result.graph, result.interface).SerializeToString(), options)
    run = Counter(node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node)
    assert run["MatMulIntegerToFloat"] + run["QLinearMatMul"] == 4 and not run["MatMul"]
