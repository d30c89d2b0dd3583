import numpy as np
import pytest
import torch

from edgeattn import create_model
from edgeattn.data.interface import classifier_interface
from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import open_source
from edgeattn.errors import NumericError
from edgeattn.models.folding import fuse_attention
from edgeattn.quant.calibration import Calibrator
from edgeattn.quant.float16_limits import LARGEST, SMALLEST_NORMAL
from edgeattn.quant.fold import fold
from edgeattn.quant.graph import capture
from edgeattn.quant.half import to_half
from edgeattn.quant.hazards import analyse
from edgeattn.quant.recipe import load_recipe
from tests.conftest import randomize

SHVIT = dict(embed_dim=(32, 48, 64), depth=(1, 1, 1), partial_dim=(8, 12, 16), types=("i", "s", "s"))
DEIT = dict(embed_dim=48, depth=2)
CARE = dict(depths=(1, 1, 1, 1), feat_dims=(12, 24, 48, 96), mem_dims=(4, 8, 16, 32), att_head_dim=(1, 1, 8, 16))
LITV2 = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
EFFICIENTVIT = dict(
    embed_dim=(32, 48, 64), depth=(1, 1, 1), num_heads=(2, 3, 4), kernels=(5, 3, 3, 3), key_dim=(8, 8, 8)
)


def build(name, **config):
    torch.manual_seed(0)
    return randomize(create_model(name, img_size=64, num_classes=10, **config))


def prepared(model, pictures):
    """The folded graph, its hazards on the pictures, and the pictures as the model takes them."""
    graph = capture(fuse_attention(model), classifier_interface(model.preprocessing.size))
    fold(graph)
    hazards = analyse(graph, Calibrator(open_source(pictures), load_recipe("w8a8"), model.preprocessing))
    return graph, hazards, torch.from_numpy(np.stack([model.preprocessing.normalize(p) for p in pictures]))


@torch.no_grad()
def check_repair(graph, hazards, x, *, naive_fails=True):
    """The naive float16 graph gives NaN or infinity; with the islands it stays within 1 % of float32."""
    want, naive, repaired = graph(x), to_half(graph, []).graph(x), to_half(graph, hazards)
    got = repaired.graph(x)
    want, naive, got = (value[0] if isinstance(value, tuple) else value for value in (want, naive, got))
    assert torch.isfinite(naive).all() != naive_fails
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    assert (got - want).norm() < 0.01 * want.norm()
    return repaired


@pytest.mark.parametrize("name, config", [
    ("efficientvit_m0", EFFICIENTVIT), ("shvit_s1", SHVIT), ("deit_tiny", DEIT), ("deit_tiny_distilled", DEIT),
    ("care_s0", CARE), ("litv2_s", LITV2),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_models_without_hazards_get_no_islands(name, config, pictures):
    graph, hazards, x = prepared(build(name, **config), pictures)
    assert hazards == []
    made = check_repair(graph, hazards, x, naive_fails=False)
    assert made.notes == [] and set(made.precision) == {"float16"}


def scale_queries_and_keys(model, block, factor):
    """Make the scores of one block of a model larger by factor squared."""
    with torch.no_grad():
        if hasattr(block, "mixer") and hasattr(block.mixer.m, "qkv"):
            block.mixer.m.qkv.bn.weight[: 2 * block.mixer.m.key_dim] *= factor
            block.mixer.m.qkv.bn.bias[: 2 * block.mixer.m.key_dim] *= factor
        elif hasattr(block, "mixer"):
            attn = block.mixer.m.attn
            for qkv in attn.qkvs:
                qkv.bn.weight[: 2 * attn.key_dim] *= factor
                qkv.bn.bias[: 2 * attn.key_dim] *= factor
        else:
            block.attn.qkv.weight[: 2 * len(block.attn.qkv.weight) // 3] *= factor
    return model


@pytest.mark.parametrize("name, config, block, factor, path", [
    ("shvit_s1", SHVIT, lambda m: m.blocks3[-1], 1000.0, "blocks3.3.mixer.m"),
    ("efficientvit_m0", EFFICIENTVIT, lambda m: m.blocks2[-1], 5000.0, "blocks2.3.mixer.m"),
], ids=["shvit", "efficientvit"])  # fmt: skip
def test_scores_inside_our_ops_overflow_and_are_found(name, config, block, factor, path, pictures):
    model = build(name, **config)
    graph, hazards, x = prepared(scale_queries_and_keys(model, block(model), factor), pictures)
    (hazard,) = hazards
    assert (hazard.path, hazard.kind, hazard.handled, hazard.spread) == (path, "scores", False, ())
    assert hazard.bound > LARGEST and "its scores Q K^T reach" in str(hazard) and "beyond float16" in str(hazard)
    made = check_repair(graph, hazards, x)
    assert any(note.startswith(f"float32 island: {path} (") for note in made.notes)


def test_scores_of_a_deit_overflow(pictures):
    """torch's own attention sums in float32 on a CPU; with the scores written out, as exporters do, they overflow."""
    model = build("deit_tiny", **DEIT)
    graph, hazards, x = prepared(scale_queries_and_keys(model, model.blocks[1], 1200.0), pictures)
    (hazard,) = hazards
    assert (hazard.path, hazard.kind) == ("blocks.1.attn", "scores") and hazard.bound > LARGEST
    q = torch.full((1, 1, 2, 16), 400.0).half()
    assert ((q / 4) @ q.transpose(-1, -2)).isinf().any(), "the bound is about the product, not about q and k"
    made = check_repair(graph, hazards, x, naive_fails=False)
    assert made.precision == {"float16": 23, "float32": 1}


class LinearAttention(torch.nn.Module):
    """ReLU attention as EfficientViT-B has it: sums over the tokens, then a division by the sum of the keys."""

    def __init__(self, gain, epsilon=1e-6):
        super().__init__()
        self.preprocessing = Preprocessing(size=(64, 64))
        self.qkv, self.gain, self.epsilon = torch.nn.Conv2d(3, 24, 1), gain, epsilon
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        q, k, v = (self.qkv(x).flatten(2) * self.gain).chunk(3, 1)
        q, k = q.relu() / self.gain, k.relu()
        context = v @ k.transpose(1, 2)
        weights = q.transpose(1, 2) @ k.sum(2, keepdim=True) + self.epsilon
        out = q.transpose(1, 2) @ context.transpose(1, 2) / weights
        return self.head(out.mean(1))


def test_sums_over_tokens_of_linear_attention_overflow(pictures):
    torch.manual_seed(0)
    graph, hazards, x = prepared(LinearAttention(10.0).eval(), pictures)
    found = {(hazard.kind, hazard.node.name) for hazard in hazards}
    assert ("kv_sum", "matmul") in found and {kind for kind, _ in found} <= {"kv_sum", "reduction", "overflow"}
    (products,) = (hazard for hazard in hazards if hazard.kind == "kv_sum")
    assert products.bound > LARGEST and "sum K^T V over the tokens" in products.reason
    made = check_repair(graph, hazards, x)
    assert made.precision["float32"] < made.precision["float16"] + 4


class Dividing(torch.nn.Module):
    """A normaliser that float16 rounds to zero: 2e-8 at the least."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(64, 64))
        self.keys, self.head = torch.nn.Conv2d(3, 8, 1), torch.nn.Linear(8, 5)

    def forward(self, x):
        keys = self.keys(x).flatten(2).relu() * 1e-8
        total = keys.mean(2, keepdim=True) + 1e-8
        return self.head((keys / total).mean(2))


def test_a_normaliser_that_underflows_is_computed_in_float32(pictures):
    torch.manual_seed(0)
    graph, hazards, x = prepared(Dividing().eval(), pictures)
    (hazard,) = hazards
    assert (hazard.kind, hazard.node.name, hazard.spread) == ("normaliser", "add", (hazard.node,))
    assert hazard.bound < SMALLEST_NORMAL and "falls to" in hazard.reason
    with torch.no_grad():
        naive, made = to_half(graph, []).graph(x), to_half(graph, hazards)
        got = made.graph(x)
    naive, got = (value[0] if isinstance(value, tuple) else value for value in (naive, got))
    assert not torch.isfinite(naive).all() and torch.isfinite(got).all()
    assert [note.split(" (")[0] for note in made.notes] == ["float32 island: add", "float32 island: div"]


def test_linear_attention_of_ours_sums_in_float32_by_itself(pictures):
    """CARE with activations 300 times larger: the sum overflows, the op does not, and no island is made."""
    model = build("care_s0", **CARE)
    mixer = model.stages[3].blocks[0].token_mixer
    with torch.no_grad():
        mixer.qk.weight *= 1e5
    graph, hazards, x = prepared(model, pictures)
    (hazard,) = hazards
    assert (hazard.path, hazard.handled) == ("stages.3.blocks.0.token_mixer.attend", True)
    made = check_repair(graph, hazards, x, naive_fails=False)
    assert "float32" not in made.precision and made.notes[0].startswith("float32 inside: stages.3.blocks.0")


class Norms(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.preprocessing = Preprocessing(size=(64, 64))
        self.stem, self.gain = torch.nn.Conv2d(3, 8, 8, 8), gain
        self.norm, self.head = torch.nn.LayerNorm(8, eps=1e-6), torch.nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2) * self.gain)
        return self.head(x.mean(1))


@pytest.mark.parametrize("gain, kind", [(1e3, "variance"), (1e-4, "epsilon"), (1.0, None)])
def test_norms(gain, kind, pictures):
    torch.manual_seed(0)
    graph, hazards, x = prepared(Norms(gain).eval(), pictures)
    assert [(hazard.kind, hazard.path) for hazard in hazards] == ([(kind, "norm")] if kind else [])
    made = check_repair(graph, hazards, x, naive_fails=False)
    assert made.precision.get("float32", 0) == (kind is not None)


class Wide(torch.nn.Module):
    """Activations beyond float16 that come back into range, through a view, a sum over a map, and a large constant."""

    def __init__(self):
        super().__init__()
        self.preprocessing = Preprocessing(size=(64, 64))
        self.stem, self.head = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Linear(8, 5)
        self.register_buffer("large", torch.full((8,), 1e5))

    def forward(self, x):
        x = torch.nn.functional.gelu(self.stem(x)) * 100
        x = (x.flatten(2).transpose(1, 2) * self.large).unflatten(1, (16, 16)) / 1e6
        return self.head(x.sum((1, 2)) * 0.01)


def test_islands_last_until_the_values_fit_again(pictures):
    torch.manual_seed(0)
    graph, hazards, x = prepared(Wide().eval(), pictures)
    assert [(hazard.kind, hazard.node.name) for hazard in hazards] == [("overflow", "mul_1")]
    assert [node.name for node in hazards[0].spread] == ["mul_1", "unflatten"]
    made = check_repair(graph, hazards, x)
    names = {note.split(" (")[0].removeprefix("float32 island: ") for note in made.notes}
    assert names == {"mul_1", "div"}
    assert any(
        note.startswith("float32 island: div (reads unflatten, which float16 cannot hold") for note in made.notes
    )


def test_nan_is_an_error_not_a_hazard(pictures):
    model = build("shvit_s1", **SHVIT)
    with torch.no_grad():
        model.blocks2[-1].ffn.m.pw1.bn.running_var.fill_(-1.0)
    with pytest.raises(NumericError, match=r"layer blocks2\.\d\.ffn.* gives NaN in float32 already"):
        prepared(model, pictures)
