import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from edgeattn import create_model
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import open_source
from edgeattn.devices import budget_table, recipe_bench
from edgeattn.devices.budget import Limit, parse_budget, plan_budget, recipe_for_budget
from edgeattn.devices.budget_table import CODES, FLOAT, INT4, INT8, Unit, rule_for
from edgeattn.devices.recipe_bench import Bench, TimingCache
from edgeattn.errors import DataError, RecipeError, UsageError
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import Recipe, load_recipe
from tests.conftest import CALIB, SAMPLES

MODULES = ("blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "head")
DEIT = SAMPLES / "deit_eurosat" / "model.safetensors"


class Net(nn.Module):
    """Two identical blocks of linear layers and a head, on 8x8 pictures; no residual addition."""

    def __init__(self, width=32, classes=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, classes)
        self.preprocessing = Preprocessing(size=(8, 8))

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def data():
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    return [(picture, i % 6) for i, picture in enumerate(pictures)]


@pytest.fixture(autouse=True)
def measured_once(monkeypatch, net, data):
    """The small model's sensitivities are computed once for all tests."""
    monkeypatch.setattr(
        budget_table, "sensitivity", lambda *a, **k: remembered(*a, **k) if a[0] is net else real(*a, **k)
    )


REMEMBERED: dict = {}
real = budget_table.sensitivity


def remembered(model, pictures, recipe="w8a8", **options):
    key = load_recipe(recipe).activations is None
    if key not in REMEMBERED:
        REMEMBERED[key] = real(model, pictures, recipe, **options)
    return REMEMBERED[key]


def code_of(recipe, module):
    if recipe.is_float:
        return FLOAT
    rule = recipe.rule_for(module)
    if rule is None:
        return INT8
    return FLOAT if rule.is_float else INT4 if rule.weights.bits == 4 else INT8


class Known:
    """A measurer with known answers: ms saved by each choice of a module, and what the finished model adds to that."""

    targets = ("onnxruntime",)
    saved = {"blocks.#.0": {FLOAT: 0.0, INT8: 0.2, INT4: -0.1}, "blocks.#.2": {FLOAT: 0.0, INT8: 0.1, INT4: 0.3},
             "head": {FLOAT: 0.0, INT8: 0.05, INT4: 0.0}}  # fmt: skip
    float_ms = 2.0
    weights = {"blocks.#.0": 32 * 64, "blocks.#.2": 32 * 64, "head": 32 * 6}

    def __init__(self, extra_ms=0.0, extra_bytes=0, drop=lambda codes: 0.0):
        self.extra_ms, self.extra_bytes, self.drop, self.timed, self.finished = extra_ms, extra_bytes, drop, [], []

    @staticmethod
    def kind(module):
        return "blocks.#." + module[-1] if module.startswith("blocks") else module

    def codes(self, recipe):
        return {module: code_of(recipe, module) for module in MODULES}

    def ms(self, codes):
        return self.float_ms - sum(self.saved[self.kind(module)][code] for module, code in codes.items())

    def stored(self, codes):
        outputs = {"blocks.#.0": 64, "blocks.#.2": 32, "head": 6}
        total = 5000.0
        for module, code in codes.items():
            count = self.weights[self.kind(module)]
            scales = {FLOAT: 0, INT8: outputs[self.kind(module)], INT4: count // 32}[code]
            total += count * code / 8 + 4 * scales
        return total

    def bytes(self, recipe):
        return int(self.stored(self.codes(recipe)) + (0 if recipe.is_float else self.extra_bytes))

    def timing(self, recipe, target):
        self.timed.append(recipe)
        return self.float_ms, self.ms(self.codes(recipe))

    def outcome(self, recipe, wanted):
        codes = self.codes(recipe)
        self.finished.append(codes)
        full = {"size": self.stored(codes) + self.extra_bytes, "latency": self.ms(codes) + self.extra_ms,
                "drop": self.drop(codes)}  # fmt: skip
        return {name: value for name, value in full.items() if name in {*wanted, "size"}}


def by_hand(net, data, fits):
    """The best plan by trying all: least divergence among those that fit."""
    wide = {layer.module: layer.kl for layer in remembered(net, data)}
    narrow = {layer.module: layer.kl for layer in remembered(net, data, "w4a16")}
    best = None
    for plan in itertools.product(CODES, repeat=len(MODULES)):
        codes = dict(zip(MODULES, plan, strict=True))
        kl = sum({FLOAT: 0.0, INT8: wide[m], INT4: narrow[m]}[code] for m, code in codes.items())
        if fits(codes) and (best is None or kl < best[0]):
            best = kl, codes
    return best[1]


@pytest.mark.parametrize("budget", ["latency=1.6ms", "latency=1.2ms", "latency=1.15ms", "size=20kB", "size=14kB"])
def test_one_budget_is_solved_exactly(net, data, budget):
    known, limit = Known(), parse_budget(budget)
    result = plan_budget(net, data, ["onnxruntime"], [budget], measurer=known)
    measure = known.ms if limit.kind == "latency" else known.stored
    want = by_hand(net, data, lambda codes: measure(codes) <= limit.value + 1e-9)
    assert {layer.module: CODES[("float32", "w8a8", "w4a16").index(layer.choice)] for layer in result.layers} == want
    assert known.codes(result.recipe) == want and result.verified == 1
    assert result.estimated[limit.kind] == pytest.approx(result.measured[limit.kind])
    assert result.measured[limit.kind] <= limit.value * (1 + 1e-9)
    assert recipe_for_budget(net, data, ["onnxruntime"], [limit], measurer=Known()) == result.recipe
    assert "budget" in str(result) and json.loads(json.dumps(result.to_dict()))["budgets"] == {limit.kind: limit.value}


def test_several_budgets_at_once(net, data):
    known = Known()
    result = plan_budget(net, data, ["onnxruntime"], ["size=15kB", "latency=1.4ms"], measurer=known)
    want = by_hand(net, data, lambda codes: known.stored(codes) <= 15e3 and known.ms(codes) <= 1.4 + 1e-9)
    assert known.codes(result.recipe) == want


def test_identical_blocks_share_one_measurement(net, data):
    known = Known()
    plan_budget(net, data, ["onnxruntime"], ["latency=1.6ms"], measurer=known)
    alone = [{m: c for m, c in known.codes(recipe).items() if c != FLOAT} for recipe in known.timed]
    blocks = (("blocks.0.0", "blocks.1.0"), ("blocks.0.2", "blocks.1.2"), ("head",))
    assert alone == [dict.fromkeys(modules, code) for modules in blocks for code in (INT8, INT4)]
    assert all(recipe.residual == "float" and not recipe.steps for recipe in known.timed)


def test_a_plan_that_misses_is_solved_anew_with_a_tighter_limit(net, data):
    known = Known(extra_ms=0.1)
    result = plan_budget(net, data, ["onnxruntime"], ["latency=1.6ms"], measurer=known)
    assert result.verified == 2 and result.measured["latency"] <= 1.6
    assert known.codes(result.recipe) == by_hand(net, data, lambda codes: known.ms(codes) <= 1.5 + 1e-9)


def test_what_quantizers_add_to_the_file_counts(net, data):
    known = Known(extra_bytes=2000)
    result = plan_budget(net, data, ["onnxruntime"], ["size=15kB"], measurer=known)
    assert result.verified == 1 and 14e3 < result.measured["size"] <= 15e3


def test_extreme_plans_are_tried_before_giving_up(net, data):
    """Layers together may be faster than their sum says."""
    known = Known(extra_ms=-0.3)
    result = plan_budget(net, data, ["onnxruntime"], ["latency=0.8ms"], measurer=known)
    assert result.measured["latency"] <= 0.8 < result.estimated["latency"]


def test_size_and_drop_are_both_kept_or_refused(net, data):
    lost = lambda codes: 0.1 * sum(code == INT4 for code in codes.values())  # noqa: E731
    result = plan_budget(net, data, ["onnxruntime"], ["size=20kB", "drop=2"], measurer=Known(drop=lost))
    assert result.measured["drop"] <= 2 and result.measured["size"] <= 20e3
    with pytest.raises(RecipeError, match=r"reached is size .* MB, drop 0.\d points, which misses"):
        plan_budget(net, data, ["onnxruntime"], ["size=11kB", "drop=0.05"], measurer=Known(drop=lost))


@pytest.mark.parametrize("minimise", ["latency", "size"])
def test_a_drop_alone_is_spent_on_the_cheapest_plan(net, data, minimise):
    known = Known(drop=lambda codes: 0.0 if codes["head"] != INT4 else 3.0)
    result = plan_budget(net, data, ["onnxruntime"], ["drop=0.5"], minimise=minimise, measurer=known)
    measure = known.ms if minimise == "latency" else known.stored
    tried = [codes for codes in known.finished if known.drop(codes) <= 0.5]
    assert known.codes(result.recipe) in tried and result.measured["drop"] <= 0.5
    assert measure(known.codes(result.recipe)) == pytest.approx(min(map(measure, tried)))
    assert bool(known.timed) == (minimise == "latency")


def test_a_budget_that_float32_keeps_gives_float32(net, data):
    result = plan_budget(net, data, ["onnxruntime"], ["size=1MB"], measurer=Known())
    assert result.recipe.is_float and {layer.choice for layer in result.layers} == {"float32"}


def test_targets_without_four_bits_get_eight(net, data, monkeypatch):
    known = Known()
    monkeypatch.setattr(budget_table, "_runs_int4", lambda targets: False)
    result = plan_budget(net, data, ["onnxruntime"], ["latency=1.4ms"], measurer=known)
    assert INT4 not in known.codes(result.recipe).values()


@pytest.mark.parametrize(
    "budget, reached",
    [
        ("size=9kB", r"no plan keeps the budget size=0.009 MB: the smallest that was reached is size 0.01\d+ MB"),
        ("latency=0.5ms", r"budget latency=0.5 ms: the smallest that was reached is latency 0.95 ms, which misses it"),
    ],
)
def test_impossible_budgets_say_what_was_reached(net, data, budget, reached):
    with pytest.raises(RecipeError, match=reached):
        plan_budget(net, data, ["onnxruntime"], [budget], measurer=Known())


@pytest.mark.parametrize(
    "text, kind, value",
    [("size=1.2MB", "size", 1.2e6), ("size=2 MiB", "size", 2**21), ("size=300kB", "size", 3e5), ("drop=0", "drop", 0),
     ("latency=800us", "latency", 0.8), ("latency=0.8ms", "latency", 0.8), ("drop=0.5", "drop", 0.5)],
)  # fmt: skip
def test_budgets_are_read(text, kind, value):
    assert parse_budget(text) == Limit(kind, pytest.approx(value))


@pytest.mark.parametrize(
    "text", ["size", "size=", "size=1.2", "size=1.2 parsecs", "latency=-1ms", "latency=0ms", "speed=3ms", "drop=nan",
             "size=1.2.3MB", "=1MB"],
)  # fmt: skip
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(UsageError, match=r"expected size=1.2MB, latency=0.8ms or drop=0.5"):
        parse_budget(text)


@pytest.mark.parametrize(
    "budgets, options, error, said",
    [
        ([], {}, UsageError, "give one or more"),
        (["size=1MB", "size=2MB"], {}, UsageError, "each kind once"),
        (["size=1MB"], {"recipe": "w4a16"}, UsageError, "starts from 8-bit weights and activations"),
        (["drop=1"], {"minimise": "speed"}, UsageError, "expected latency or size"),
    ],
    ids=["none", "twice", "weights only", "unknown aim"],
)
def test_arguments_that_are_refused(net, data, budgets, options, error, said):
    with pytest.raises(error, match=said):
        plan_budget(net, data, ["onnxruntime"], budgets, measurer=Known(), **options)


def test_drop_needs_labels(net, data):
    with pytest.raises(DataError, match="has no labels, and a budget for drop"):
        plan_budget(net, [picture for picture, _ in data], ["onnxruntime"], ["drop=1"], measurer=Known())


def test_rule_with_float_activations(net, data):
    """A layer of 4-bit weights inside an int8 model reads and gives floating point."""
    base = load_recipe("w8a8").model_copy(update={"steps": ()})
    rules = [{"modules": "blocks.0.2", "weights": {"bits": 4}, "activations": "float"}]
    recipe = Recipe.model_validate({**base.model_dump(), "rules": rules})
    assert recipe.formats == ("w4a16", "w8a8") and load_recipe({**base.model_dump(), "rules": rules}) == recipe
    made = quantize(net, recipe, data)
    assert made.precision == {"int8": 4, "int4 weights, float32 activations": 1, "float32": 1}
    matmul = next(n for n in made.graph.graph.nodes if "matmul" in str(n.target))
    inputs = matmul.args[0]
    assert "quantize" not in str(inputs.target)
    with pytest.raises(RecipeError, match="has w4a8"):
        Recipe.model_validate({**base.model_dump(), "rules": [{**rules[0], "activations": "inherit"}]}).for_targets(
            ["tensorrt"]
        )
    assert recipe.for_targets(["tensorrt"]).activations.signedness == "int8"


@pytest.mark.slow
def test_timings_are_kept_under_a_digest_of_everything(net, data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Bench, "_in_turns", lambda *a: calls.append(a) or [2.0, 1.5])
    base = load_recipe("w8a8").for_targets(["onnxruntime"])
    unit = Unit("head", "head", True, CODES)
    for threads, expected in ((1, 1), (1, 1), (2, 2)):
        arguments = (net, open_source(data), base, ["onnxruntime"])
        with Bench(*arguments, threads=threads, cache=tmp_path / "cache" / "t.json") as bench:
            recipe = base.model_copy(update={"rules": (rule_for(unit, INT8), *all_float()), "steps": ()})
            assert bench.timing(recipe, "onnxruntime") == (2.0, 1.5) and len(calls) == expected
    assert len(json.loads((tmp_path / "cache" / "t.json").read_text())["entries"]) == 2


def all_float():
    return load_recipe({"name": "f", "rules": [{"modules": "*", "optional": True}]}).rules


def test_a_damaged_cache_is_measured_again(tmp_path, caplog):
    cache = TimingCache(tmp_path / recipe_bench.CACHE)
    cache.put("a", [1.0])
    cache.put("b", [2.0])
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ([1.0], [2.0], None)
    cache.path.write_text("{")
    assert cache.get("a") is None and "is damaged" in caplog.text
    cache.put("c", [3.0])
    assert cache.get("c") == [3.0]
    blocked = TimingCache(tmp_path / recipe_bench.CACHE / "below-a-file.json")
    assert blocked.get("a") is None


@pytest.mark.slow
def test_real_model_on_this_machine(tmp_path, monkeypatch):
    """End to end with real graphs: the recipe's bundle is as small as was promised."""
    from edgeattn.export.pipeline import export

    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "cache"))
    model = create_model("deit_tiny", weights=DEIT)
    base = {**load_recipe("w8a8").model_dump(), "calibration": {"images": 16}, "steps": [{"step": "gptq"}]}
    result = plan_budget(model, CALIB, ["onnxruntime"], ["size=1.6MB"], recipe=base, images=8)
    assert result.measured["size"] <= 1.6e6 and set(result.measured) == {"size"}
    assert {layer.choice for layer in result.layers} >= {"w8a8", "w4a16"}
    (tmp_path / "recipe.yaml").write_text(result.recipe.to_yaml())
    bundle = export(model, ["onnxruntime"], tmp_path / "out", recipe=tmp_path / "recipe.yaml", data=CALIB)
    assert bundle.size_bytes("onnxruntime", "quantized") == result.measured["size"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--budget", "size=12"], "Units of size: B, kB, KB, KiB, MB, MiB, GB, GiB"),
        (["--budget", "size=1MB", "-o", "recipe.txt"], "give a name that ends in .yaml"),
        (["--budget", "size=1MB"], "no weights: pass --weights FILE"),
        ([], "Missing option '--budget'"),
    ],
    ids=["unit", "suffix", "weights", "no budget"],
)
def test_command_refuses(edgeattn, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    out = [] if "-o" in arguments else ["-o", "recipe.yaml"]
    code, _, error = edgeattn("budget", "deit_tiny", "--data", CALIB, *arguments, *out)
    assert code == 2 and said in error and list(tmp_path.iterdir()) == []
