"""Placement: the search against machines with known speeds, and bundles whose targets get different graphs."""

import json
import math
import time
from collections import Counter

import onnx
import pytest

import edgeattn
from edgeattn import create_model
from edgeattn.data.interface import interface_of
from edgeattn.data.source import open_source
from edgeattn.devices.check import check
from edgeattn.devices.latency import SpeedupResult
from edgeattn.devices.placing import RESIDUAL, MeasuredPlacer, Region, _Search, decide, regions, without
from edgeattn.devices.recipe_bench import RUNS, Bench, Gain
from edgeattn.devices.statistics import Interval
from edgeattn.export.pipeline import export
from edgeattn.export.placer import Placed
from edgeattn.models.folding import fuse_attention
from edgeattn.quant import placement
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture, module_path
from edgeattn.quant.recipe import load_recipe
from edgeattn.runtime.bundle import Bundle
from edgeattn.runtime.verify import verify
from tests.conftest import CALIB, VAL, WEIGHTS

RECIPE = load_recipe("w8a8").for_targets(["onnxruntime"])


def folded(model):
    graph = capture(fuse_attention(model), interface_of(model))
    fold(graph)
    return graph


@pytest.fixture
def graph(tiny_model):
    return folded(tiny_model)


class Machine:
    """Stands for `Bench`: integers save `gains[region]` ms of `float_ms`; every conversion-free rule is additive."""

    def __init__(self, graph, gains, float_ms=10.0, spread=0.001):
        self.graph, self.gains, self.float_ms, self.spread = graph, gains, float_ms, spread
        self.timed, self.finalists = 0, 0

    def ms(self, recipe):
        left = {path for rule in recipe.rules if rule.is_float for path in (rule.modules,)}
        total = self.float_ms
        for region in regions(self.graph, RECIPE.model_copy(update={"steps": ()})):
            quantized = recipe.residual == "int8" if region.kind == RESIDUAL else not set(region.modules) <= left
            total -= self.gains.get(region.kind, 0.0) if quantized else 0.0
        return total

    def speedups(self, base, others, target, runs, *, exact):
        self.timed, self.finalists = self.timed + len(others), self.finalists + exact * len(others)
        found = {name: self.ms(base) / self.ms(recipe) for name, recipe in others.items()}
        return {name: Gain(r, r * (1 - self.spread), r * (1 + self.spread)) for name, r in found.items()}


def searched(machine, seconds=60.0):
    search = _Search(machine, RECIPE, "onnxruntime", time.monotonic() + seconds, None)
    search.screen()
    return search.best()


def test_regions_hold_every_quantized_layer_once(graph):
    found = regions(graph, RECIPE)
    plan = placement.plan(graph, RECIPE)
    paths = [path for region in found for path in region.modules]
    assert len(paths) == len(set(paths))
    assert set(paths) == {module_path(n) for n in plan.weighted} | {module_path(n) for n, _ in plan.attention}
    assert {r.kind for r in found} >= {"1x1 convolutions", "depthwise convolutions", "attention", RESIDUAL}
    sizes = {region.size for region in found if region.kind == "depthwise convolutions"}
    assert len(sizes) > 1 and all("x" in size for size in sizes)


def test_linear_layers_of_identical_blocks_are_one_region():
    model = create_model("deit_tiny", img_size=32, depth=3, embed_dim=32, num_heads=2, num_classes=5)
    found = [r for r in regions(folded(model.eval()), RECIPE) if r.kind == "linear layers"]
    assert [len(region.modules) for region in found] == [3, 3, 3, 3, 1]


def test_what_is_left_in_float_is_not_quantized(graph):
    found = regions(graph, RECIPE)
    left = [r for r in found if r.kind in ("depthwise convolutions", RESIDUAL)]
    changed = placement.plan(graph, without(RECIPE, left, "slower here"))
    assert not changed.adds and set(changed.kept_float.values()) >= {"slower here"}
    gone = {path for region in left for path in region.modules}
    assert gone and gone <= set(changed.kept_float) and not gone & {module_path(n) for n in changed.weighted}


def test_search_leaves_out_what_costs_time(graph):
    machine = Machine(graph, {"1x1 convolutions": 1.0, "depthwise convolutions": -0.5, "attention": 0.2})
    placed = searched(machine)
    assert placed.left_float and all(name.startswith("depthwise convolutions of ") for name in placed.left_float)
    assert machine.ms(placed.recipe) < machine.ms(RECIPE) and placed.recipe.steps == RECIPE.steps
    assert "times as fast as the whole recipe" in placed.reason and "placements timed" in placed.reason
    assert {r.reason for r in placed.recipe.rules[:1]} == {"faster in floating point on onnxruntime, by measurement"}
    assert 0 < machine.finalists <= 4 < machine.timed  # what decides is measured on files as they ship


def test_search_leaves_several_kinds_out_together(graph):
    machine = Machine(graph, {"1x1 convolutions": 1.0, "depthwise convolutions": -0.3, RESIDUAL: -0.4})
    placed = searched(machine)
    assert placed.recipe.residual == "float"
    assert {name.split(" of ")[0] for name in placed.left_float} == {"depthwise convolutions", RESIDUAL}


def test_search_keeps_the_recipe_where_everything_pays_or_noise_hides_it(graph):
    pays = searched(Machine(graph, {"1x1 convolutions": 1.0, "depthwise convolutions": 0.5}))
    assert pays.recipe == RECIPE and pays.left_float == () and "none faster than the whole recipe" in pays.reason
    noisy = searched(Machine(graph, {"1x1 convolutions": 1.0, "depthwise convolutions": -0.5}, spread=0.5))
    assert noisy.recipe == RECIPE


def test_search_stops_when_its_time_is_over_and_says_so(graph):
    machine = Machine(graph, {"depthwise convolutions": -0.5})
    placed = searched(machine, seconds=-1)
    assert machine.timed == 0 and placed.recipe == RECIPE and placed.reason.startswith("0 of ")


@pytest.mark.parametrize(
    "ratio, low, high, margin, ships",
    [(1.3, 1.2, 1.4, 1.0, "quantized"), (1.3, 1.2, 1.4, 1.25, "float32"), (1.05, 0.99, 1.1, 1.0, "float32")],
)
def test_the_margin_is_for_the_low_end_of_the_interval(ratio, low, high, margin, ships):
    measured = SpeedupResult("float32", "quantized", ratio, Interval(low, high), 8, 160)
    entry = decide(measured, Placed(RECIPE, ("residual additions",), "2 of 2 placements timed"), margin)
    assert entry.ships == ships and entry.left_float == ["residual additions"] and f"{ratio:.2f}" in entry.reason
    assert (f"more than {margin:g} for certain" in entry.reason) == (ships == "float32")


def test_too_slow_for_an_interval_is_float():
    entry = decide(SpeedupResult("float32", "quantized", 3.0, None, 2, 14), Placed(RECIPE, (), "none"), 1.0)
    assert entry.ships == "float32" and entry.interval is None


def test_margin_of_recipes():
    assert RECIPE.least_speedup == 1.0
    assert [load_recipe(name).least_speedup for name in ("w8a16", "w4a8", "w4a16", "fp16", "float32")] == [None] * 5
    assert load_recipe({"name": "mine", "margin": 1.2}).least_speedup == 1.2
    assert load_recipe({"name": "mine", "margin": None}).least_speedup is None


class Fixed:
    """A placer with known answers; the speed-up of each target and what it leaves in float."""

    def __init__(self, speedups, left=None):
        self.speedups, self.left, self.asked = speedups, left or {}, []

    def place(self, model, recipe, source, targets):
        self.asked += targets
        left = {t: [Region("some layers", "", (pattern,)) for pattern in self.left.get(t, ())] for t in targets}
        return {
            t: Placed(without(recipe, x, "slower here"), tuple(r.name for r in x), "by decree") for t, x in left.items()
        }

    def judge(self, plain, quantized, inputs, placed, margin):
        ratio = self.speedups[quantized.entry.target]
        measured = SpeedupResult("float32", "quantized", ratio, Interval(ratio, ratio), 8, 160)
        return decide(measured, placed, margin)


def test_a_target_that_gains_nothing_gets_float(tiny_model, pictures, tmp_path):
    placer = Fixed({"onnxruntime": 1.5, "openvino": 0.9})
    bundle = export(tiny_model, ["onnxruntime", "openvino"], tmp_path / "out", data=pictures, placer=placer)
    assert placer.asked == ["onnxruntime", "openvino"]
    made = [(entry.target, entry.variant) for entry in bundle.manifest.artifacts]
    assert made == [("onnxruntime", "float32"), ("onnxruntime", "quantized"), ("openvino", "float32")]
    assert not list((bundle.path / "openvino").glob("quantized*")) and bundle.unlisted() == []
    assert bundle.manifest.placements["openvino"].ships == "float32"
    note = next(note for note in bundle.manifest.notes if note.startswith("openvino gets float32"))
    assert "0.90" in note and "more than 1 for certain" in note
    assert verify(bundle.path).ok
    result = check(bundle, pictures, seconds=0.2)
    messages = {one.target: one for one in result.targets}
    assert messages["openvino"].verdict == "PASS"
    assert messages["openvino"].message.startswith("float32 is what was shipped; the quantized model is 0.90")
    assert edgeattn.load(bundle.path, target="openvino")(pictures[0]).index in range(10)


@pytest.mark.slow
def test_float_for_all_targets_is_a_float_bundle_that_says_why(tiny_model, pictures, tmp_path):
    bundle = export(tiny_model, ["onnxruntime"], tmp_path / "out", data=pictures, placer=Fixed({"onnxruntime": 0.5}))
    assert [entry.variant for entry in bundle.manifest.artifacts] == ["float32"]
    assert not (bundle.path / "model.onnx").exists() and list(bundle.manifest.golden_tolerance) == ["float32"]
    assert list(bundle.manifest.precision) == ["float32"] and bundle.manifest.recipe == "w8a8"
    assert load_recipe(bundle.path / "recipe.lock.yaml").is_float and verify(bundle.path).ok
    assert check(bundle, pictures, seconds=0.2).verdict == "PASS"


def test_targets_with_their_own_placement_have_their_own_graph(tiny_model, pictures, tmp_path):
    placer = Fixed({"onnxruntime": 2.0, "openvino": 2.0}, left={"openvino": ["blocks1.*"]})
    bundle = export(tiny_model, ["onnxruntime", "openvino"], tmp_path / "out", data=pictures, placer=placer)
    graphs = {entry.target: entry for entry in bundle.manifest.artifacts if entry.variant == "quantized"}
    assert (graphs["onnxruntime"].graph, graphs["openvino"].graph) == ("quantized", "quantized-openvino")
    assert graphs["openvino"].precision["int8"] < graphs["onnxruntime"].precision["int8"]
    files = [bundle.file(name) for name in ("model.onnx", "model-openvino.onnx")]
    counts = [sum(node.op_type == "QuantizeLinear" for node in onnx.load(file).graph.node) for file in files]
    assert counts[1] < counts[0]
    assert [bundle.manifest.nodes[key]["QuantizeLinear"] for key in ("quantized", "quantized-openvino")] == counts
    lock = load_recipe(bundle.file("recipe-openvino.lock.yaml"))
    assert lock.rules[0].reason == "slower here" and load_recipe(bundle.file("recipe.lock.yaml")) != lock
    assert set(bundle.golden().outputs) == {"float32", "quantized", "quantized-openvino"}
    assert verify(bundle.path).ok


@pytest.mark.slow
def test_recipes_without_a_margin_are_not_searched(tiny_model, pictures, tmp_path):
    placer = Fixed({"onnxruntime": 0.1})
    for recipe in ("w4a16", "float32", {**RECIPE.model_dump(), "margin": None}):
        bundle = export(
            tiny_model, ["onnxruntime"], tmp_path / "out", recipe=recipe, data=pictures, placer=placer, overwrite=True
        )
        assert bundle.manifest.placements == {}
    assert placer.asked == []


@pytest.mark.slow
def test_comparisons_are_kept_by_content(tiny_model, pictures, tmp_path):
    cache, source = tmp_path / "cache.json", open_source(pictures)
    others = {"float additions": RECIPE.model_copy(update={"residual": "float", "steps": ()})}
    base = RECIPE.model_copy(update={"steps": ()})
    with Bench(tiny_model, source, RECIPE, ["onnxruntime"], threads=1, seconds=0.1, cache=cache) as bench:
        first = bench.speedups(base, others, "onnxruntime")
    gain = first["float additions"]
    assert 0 < gain.low <= gain.ratio <= gain.high < math.inf
    # What is in the cache is not measured again: a made-up value comes back for the same question, and for no other.
    with Bench(tiny_model, source, RECIPE, ["onnxruntime"], threads=1, seconds=0.1, cache=cache) as bench:
        file = bench._written(base).folder / "model.onnx"
        key = bench._key("onnxruntime", [file], others["float additions"].to_yaml(), RUNS, "exact")
        cache.write_text(json.dumps({"schema_version": 1, "entries": {key: [7.0, 6.9, 7.1]}}))
        assert bench.speedups(base, others, "onnxruntime")["float additions"] == Gain(7.0, 6.9, 7.1)
        assert bench.speedups(base, others, "onnxruntime", RUNS + 1)["float additions"].ratio < 6
        assert bench.speedups(base, others, "onnxruntime", exact=False)["float additions"].ratio < 6


@pytest.mark.slow
def test_candidates_are_edited_and_what_cannot_be_is_exported(tiny_model, pictures, tmp_path):
    base, source = RECIPE.model_copy(update={"steps": ()}), open_source(pictures)
    with Bench(tiny_model, source, RECIPE, ["onnxruntime"], cache=tmp_path / "cache.json") as bench:
        left = [r for r in regions(bench.graph, base) if r.kind == "attention"]
        edited = bench._edited(without(base, left, ""))
        assert Counter(n.op_type.partition("_")[0] for n in edited.graph.node)["CascadedGroupAttention"] == 3
        files = [bench._written(without(base, left, ""), model).folder for model in (None, edited)]
        assert files[0] != files[1] and all((file / "model.onnx").is_file() for file in files)
        assert bench._edited(base.model_copy(update={"first_layer": "int8"})) is None


@pytest.mark.slow
def test_the_shipped_model_is_placed_by_measurement(tmp_path):
    model = create_model("efficientvit_m0", weights=WEIGHTS)
    placer = MeasuredPlacer(seconds=0.2, most_seconds=10, cache=tmp_path / "cache.json")
    bundle = export(model, ["onnxruntime", "openvino"], tmp_path / "out", data=CALIB, placer=placer)
    assert set(bundle.manifest.placements) == {"onnxruntime", "openvino"}
    for target, entry in bundle.manifest.placements.items():
        made = [e.variant for e in bundle.manifest.artifacts if e.target == target]
        assert made[-1] == entry.ships and entry.speedup > 0
    assert verify(bundle.path).ok and Bundle.open(bundle.path).manifest.placements
    assert check(bundle, open_source(VAL).spread(100), seconds=2).verdict != "DRIFT"
