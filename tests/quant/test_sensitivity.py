import csv
import io
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from edgeattn.data.preprocessing import Preprocessing
from edgeattn.data.source import open_source
from edgeattn.errors import DataError, RecipeError, UsageError
from edgeattn.quant import sensitivity_report as report
from edgeattn.quant.sensitivity import sensitivity
from tests.conftest import CALIB, WEIGHTS


class Net(nn.Module):
    """Two identical blocks, an activation in place, and a head, on 8x8 pictures."""

    def __init__(self, width=16, classes=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(2)
        )
        self.head = nn.Linear(width, classes)
        self.preprocessing = Preprocessing(size=(8, 8))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.head.weight.mul_(4)
    return net


def noise_pictures(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8))


def labelled_by(net, pictures):
    """Labels drawn from the model's own probabilities: its loss is then at a minimum on average."""
    inputs = torch.stack([torch.from_numpy(net.preprocessing(p)) for p in (s.image for s in open_source(pictures))])
    with torch.no_grad():
        probabilities = net(inputs).softmax(1)
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1)).flatten()
    return list(zip(pictures, drawn.tolist(), strict=True))


def only(path, **weights):
    return {"name": "one", "rules": [{"modules": path, "weights": weights or {"bits": 8}}, {"modules": "*"}],
            "residual": "float", "first_layer": "int8"}  # fmt: skip


def test_every_layer_in_order_with_sizes(net):
    layers = sensitivity(net, noise_pictures(8))
    assert [layer.kind for layer in layers] == ["conv", "conv", "add", "conv", "conv", "add", "linear"]
    assert [layer.module for layer in layers if layer.kind == "conv"] == [
        f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 2)
    ]
    head = layers[-1]
    assert (head.size_bytes, head.float_bytes) == (16 * 6 + 4 * 6, 4 * 16 * 6)
    assert head.weights == head.activations == "int8" and head.kl > 0 and 20 < head.sqnr_db < 70
    assert all(layer.loss is None and layer.second_order is None for layer in layers)


def test_identical_blocks_share_a_key_and_others_do_not(net):
    keys = {layer.module: layer.block for layer in sensitivity(net, noise_pictures(4)) if layer.kind == "conv"}
    assert keys["blocks.0.0"] == keys["blocks.1.0"] and keys["blocks.0.2"] == keys["blocks.1.2"]
    assert keys["blocks.0.0"] != keys["blocks.0.2"]
    net.blocks[1][2] = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
    keys = {layer.module: layer.block for layer in sensitivity(net, noise_pictures(4)) if layer.kind == "conv"}
    assert keys["blocks.0.0"] == keys["blocks.1.0"] and keys["blocks.0.2"] != keys["blocks.1.2"]


def test_weights_on_the_grid_cost_nothing(net):
    with torch.no_grad():
        codes = torch.randint(-127, 128, net.head.weight.shape, generator=torch.Generator().manual_seed(0))
        codes[:, 0] = 127
        net.head.weight.copy_(codes / 128)
    weights_only = {"name": "w", "activations": None}
    layers = {layer.module: layer for layer in sensitivity(net, labelled_by(net, noise_pictures(8)), weights_only)}
    head = layers["head"]
    assert head.kl < 1e-9 and head.sqnr_db > 120 and abs(head.loss) < 1e-5 and head.second_order < 1e-9
    assert layers["blocks.0.0"].kl > 1e-8


def test_second_order_is_close_to_the_measured_loss(net):
    data = labelled_by(net, noise_pictures(512))
    for recipe, path in ((only("blocks.0.0"), "blocks.0.0"), (only("blocks.1.2"), "blocks.1.2")):
        recipe["weights"], recipe["activations"] = {"bits": 8}, None
        recipe["rules"][0]["weights"] = {"bits": 4}
        (layer,) = sensitivity(net, data, recipe, images=512)
        assert layer.module == path
        # Errors of the outputs hang together through the shared weights, which a diagonal leaves out.
        assert layer.kl / 3 < layer.second_order < layer.kl * 3
        # First-order terms cancel over drawn labels but for their own noise.
        assert abs(layer.loss - layer.kl) < 6 * math.sqrt(2 * layer.kl / 512) + layer.kl / 4


def test_noise_adds_up_to_the_right_order(net):
    """Independent errors add in power: all layers together make about the sum of what each makes alone."""
    pictures = noise_pictures(32)
    layers = sensitivity(net, pictures, {"name": "all", "residual": "float"})
    alone = sum(10 ** (-layer.sqnr_db / 10) for layer in layers)
    from edgeattn.quant.quantize import quantize

    done = quantize(net, {"name": "all", "residual": "float"}, pictures)
    inputs = torch.stack([torch.from_numpy(net.preprocessing(s.image)) for s in open_source(pictures)])
    with torch.no_grad():
        plain, got = done.float_graph(inputs), done.graph(inputs)
    together = float((got - plain).square().sum() / plain.square().sum())
    assert alone / 4 < together < alone * 4


def test_operators_in_place_and_users_gradients_are_left_alone(net):
    data = labelled_by(net, noise_pictures(8))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = sensitivity(net, data)
    assert all((parameter.grad == 1).all() for parameter in net.parameters())
    for block in net.blocks:
        block[1] = nn.ReLU()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    # Without the convolutions in front, whose results are rounded before a ReLU in place but behind another one.
    pairs = [(a, b) for a, b in zip(before, sensitivity(net, data), strict=True) if not a.module.endswith(".0")]
    assert len(pairs) == 5
    for one, other in pairs:
        assert (one.kl, one.second_order) == pytest.approx((other.kl, other.second_order))


def test_labels_go_by_name(net):
    pictures = noise_pictures(12)
    net.class_names = tuple("abcdef")
    (want, *_) = sensitivity(net, [(p, 1 + i % 2) for i, p in enumerate(pictures)])
    source = open_source([(p, 1 - i % 2) for i, p in enumerate(pictures)])
    source.class_names = ("c", "b")
    (got, *_) = sensitivity(net, source)
    assert got.loss == pytest.approx(want.loss) and got.second_order == pytest.approx(want.second_order)
    source.class_names = ("c", "z")
    with pytest.raises(DataError, match=r"does not know the class\(es\) 'z'"):
        sensitivity(net, source)


def test_attention_layers_are_measured(tiny_model, pictures):
    layers = sensitivity(tiny_model, [(p, i % 10) for i, p in enumerate(pictures[:8])], images=8)
    attention = [layer for layer in layers if layer.kind == "attention"]
    assert len(attention) == 3 and all(layer.weights == "int8" and layer.second_order > 0 for layer in attention)


@pytest.mark.parametrize(
    "recipe, error, said",
    [
        ("float32", UsageError, "recipe 'float32' quantizes nothing; name one such as w8a8"),
        ({"name": "none", "rules": [{"modules": "*"}]}, UsageError, "its rules leave every layer float"),
        ({"name": "r", "rules": [{"modules": "haed"}]}, RecipeError, "'haed' matches no module"),
    ],
    ids=["float recipe", "all float by rule", "rule without module"],
)
def test_recipes_that_are_refused(net, recipe, error, said):
    with pytest.raises(error, match=said):
        sensitivity(net, noise_pictures(4), recipe)


@pytest.mark.parametrize("label, said", [(6, "expected 0 to 5"), (-1, "expected 0 to 5"), (None, "has no label")])
def test_labels_that_do_not_fit_are_refused(net, label, said):
    pictures = noise_pictures(4)
    with pytest.raises(DataError, match=said):
        sensitivity(net, [(pictures[0], 0), (pictures[1], label)])


def test_no_classifier_and_no_pictures(net):
    with pytest.raises(DataError, match="no images were given"):
        sensitivity(net, None)
    del net.preprocessing
    with pytest.raises(UsageError, match="preprocessing"):
        sensitivity(net, noise_pictures(2))


def test_tables_csv_and_chart(net):
    layers = sensitivity(net, labelled_by(net, noise_pictures(8)))
    ranked, blocks = report.worst_first(layers), report.by_block(layers)
    assert [layer.kl for layer in ranked] == sorted((layer.kl for layer in layers), reverse=True)
    assert sum(row["kl"] for row in blocks) == pytest.approx(sum(layer.kl for layer in layers))
    assert {row["modules"]: row["layers"] for row in blocks if row["kind"] == "conv"} == {"blocks.#.#": 2}
    assert len([row for row in blocks if row["kind"] == "conv"]) == 2 and all(row["loss"] is not None for row in blocks)
    rows = list(csv.DictReader(io.StringIO(report.to_csv(ranked))))
    assert [float(row["kl"]) for row in rows] == [layer.kl for layer in ranked]
    svg = ElementTree.fromstring(report.to_svg(layers))
    assert sum(element.tag.endswith("title") for element in svg.iter()) == len(layers)
    assert "1e-" in "".join(svg.itertext()) and "head" in "".join(svg.itertext())


def test_command(edgeattn, tmp_path):
    arguments = ["sensitivity", "efficientvit_m0", "--weights", WEIGHTS, "--data", CALIB, "--images", 4]
    recipe = tmp_path / "quick.yaml"
    recipe.write_text("name: quick\ncalibration: {images: 8}\n")
    plot, table = tmp_path / "out.svg", tmp_path / "out.csv"
    code, out, error = edgeattn(*arguments, "--quant", recipe, "--plot", plot, "--csv", table)
    assert code == 0 and "SQNR dB" in out and "blocks" in out, error
    assert plot.read_text().startswith("<svg") and table.read_text().startswith("module,kind,block")
    code, _, error = edgeattn(*arguments, "--plot", tmp_path / "out.png")
    assert code == 2 and "this writes SVG; give a name that ends in .svg" in error
    code, _, error = edgeattn("sensitivity", "efficientvit_m0", "--data", CALIB)
    assert code == 2 and "no weights: pass --weights FILE" in error
