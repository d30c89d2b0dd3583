import numpy as np
import pytest
import torch

from edgeattn import create_model
from edgeattn.data.interface import interface_of
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.errors import RecipeError
from edgeattn.models.folding import fuse_attention
from edgeattn.quant import placement
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture, module_path
from edgeattn.quant.quantize import quantize
from edgeattn.quant.recipe import load_recipe
from edgeattn.quant.sweep import units

INT4 = {"bits": 4, "granularity": "group", "group_size": "auto"}


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(16)
        self.deep = torch.nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up, self.down = torch.nn.Conv2d(16, 32, 1), torch.nn.Conv2d(32, 16, 1)

    def forward(self, x):
        return x + self.down(self.up(self.deep(self.norm(x))).relu())


class Small(torch.nn.Module):
    """Convolutions of every kind in two residual blocks, a strided one and a linear layer around them."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(16, 16))
        self.stem, self.shrink = torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.Conv2d(16, 16, 2, 2)
        self.blocks = torch.nn.ModuleList([Residual(), Residual()])
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        x = self.shrink(self.stem(x).relu())
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


def recipe(weights=INT4, activations=None, **step):
    step = {"step": "reconstruct", "iterations": 30, "images": 24, "batch_size": 8} | step
    return {"name": "r", "weights": weights, "activations": activations, "first_layer": "int8", "steps": [step]}


def plain(values):
    return values | {"steps": []}


def codes(graph):
    return {n: b for n, b in graph.named_buffers() if b.dtype == torch.int8 and "zero_point" not in n}


def noise(result, pictures):
    x = torch.stack([torch.from_numpy(result.preprocessing.normalize(p)) for p in pictures])
    with torch.no_grad():
        return float((result.graph(x) - result.float_graph(x)).square().mean())


@pytest.fixture
def shown(pictures):
    return [p[:16, :16] for p in pictures[:24]], [p[16:32, 32:48] for p in pictures]


@pytest.mark.parametrize("unit, activations", [("layer", None), ("layer", {}), ("block", {})])
def test_learned_rounding_beats_the_nearest(small, shown, unit, activations):
    seen, unseen = shown
    values = recipe(activations=activations, unit=unit, iterations=60 if unit == "block" else 150)
    learned, nearest = quantize(small, values, seen), quantize(small, plain(values), seen)
    assert noise(learned, seen) < 0.8 * noise(nearest, seen)
    assert noise(learned, unseen) < noise(nearest, unseen)
    assert any(note.startswith("reconstructed 9 layers in ") for note in learned.notes)


@pytest.mark.parametrize("weights", [INT4, {"bits": 4}, {"bits": 8}], ids=["groups", "int4", "int8"])
def test_codes_are_at_most_one_from_the_nearest_and_scales_the_same(small, shown, weights):
    values = recipe(weights=weights, activations={}, iterations=30)
    learned, nearest = (quantize(small, r, shown[0]).graph for r in (values, plain(values)))
    changed = 0
    for (name, a), b in zip(codes(learned).items(), codes(nearest).values(), strict=True):
        difference = (a.int() - b.int()).abs()
        assert difference.max() <= 1, name
        changed += int(difference.sum())
    assert changed
    scales = [[b for n, b in g.named_buffers() if "weight" in n and n.endswith("scale")] for g in (learned, nearest)]
    assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))


def test_transformer_blocks(pictures):
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = create_model("deit_tiny", **sizes).eval()
    model.preprocessing = Preprocessing(size=(32, 32))
    seen, unseen = [p[:32, :32] for p in pictures[:24]], [p[32:, 32:] for p in pictures]
    values = recipe(unit="block", iterations=30, activations={})
    learned, nearest = quantize(model, values, seen), quantize(model, plain(values), seen)
    assert noise(learned, seen) < noise(nearest, seen) and noise(learned, unseen) < noise(nearest, unseen)


def test_a_stopped_run_goes_on_where_it_was(small, shown, tmp_path):
    whole = quantize(small, recipe(iterations=10), shown[0])
    done = []

    def stop_after_three(stage, count, total):
        if stage == "reconstruct":
            done.append(count)
            if count == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(small, recipe(iterations=10), shown[0], work=tmp_path, progress=stop_after_three)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    assert len(times) == 3 and done == [1, 2, 3]
    result = quantize(small, recipe(iterations=10), shown[0], work=tmp_path)
    assert any("reconstructed 9 layers (3 by an earlier run)" in note for note in result.notes)
    assert len(list(tmp_path.rglob("*.npz"))) == 9 and all(p.stat().st_mtime_ns == t for p, t in times.items())
    for (name, a), b in zip(codes(result.graph).items(), codes(whole.graph).values(), strict=True):
        assert torch.equal(a, b), name


def test_other_pictures_and_broken_files_are_learned_again(small, shown, tmp_path, caplog):
    quantize(small, recipe(iterations=2), shown[0], work=tmp_path)
    next(tmp_path.rglob("0000.npz")).write_bytes(b"half")
    again = quantize(small, recipe(iterations=2), shown[0], work=tmp_path)
    assert "0000.npz cannot be read" in caplog.text and any("(8 by an earlier run)" in n for n in again.notes)
    other = quantize(small, recipe(iterations=2), shown[1], work=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and not any("earlier" in note for note in other.notes)


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_same_pictures_give_the_same_bytes(small, shown, unit):
    torch.manual_seed(1)
    first = codes(quantize(small, recipe(unit=unit, iterations=20), shown[0]).graph)
    torch.manual_seed(2)
    second = codes(quantize(small, recipe(unit=unit, iterations=20), shown[0]).graph)
    assert all(np.array_equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_units_follow_the_residual_blocks(small, tiny_model):
    chosen = load_recipe(recipe())
    graph = capture(small, interface_of(small))
    fold(graph)
    found = units(graph, placement.plan(graph, chosen), "block")
    assert [[module_path(layer) for layer in unit.layers] for unit in found] == [
        ["stem"], ["shrink"], *([f"blocks.{i}.{name}" for name in ("deep", "up", "down")] for i in (0, 1)), ["head"],
    ]  # fmt: skip
    assert module_path(found[2].nodes[-1]) == "blocks.0", "the addition belongs to the block"
    graph = capture(fuse_attention(tiny_model), interface_of(tiny_model))
    fold(graph)
    plan = placement.plan(graph, chosen)
    layers = [layer for unit in units(graph, plan, "block") for layer in unit.layers]
    assert layers == list(plan.weighted)


def test_one_step_rounds_the_weights():
    with pytest.raises(RecipeError, match="gptq and reconstruct both round the weights"):
        load_recipe({"name": "x", "steps": [{"step": "gptq"}, {"step": "reconstruct"}]})
