import pytest
import torch

from edgeattn.quant.quantize import quantize
from edgeattn.quant.rewrite_rotation import rotate
from tests.quant.outliers import assert_same, captured, deit_with_outliers, images, plain_deit, sqnr_db


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
def test_the_function_stays_and_the_note_counts(dtype, tolerance, pictures):
    model = deit_with_outliers()
    graph, x = captured(model, dtype), images(model, pictures, dtype)
    with torch.no_grad():
        want, nodes = graph(x), [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert rotate(graph, x[:2]) == "rotated 1 residual streams; rotated the values of 2 attentions"
    assert_same(graph, want, x, tolerance)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == nodes, "no op at run time"


@pytest.mark.parametrize("signedness, gain_db", [("uint8", 2), ("int8", 4)])
def test_less_noise_where_channels_stand_out(signedness, gain_db, pictures):
    model = deit_with_outliers()
    with torch.no_grad():
        model.pos_embed[..., 5] += 20
    x = images(model, pictures)
    recipe = {"name": "r", "activations": {"signedness": signedness, "observer": {"method": "min_max"}}}
    plain, helped = (quantize(model, recipe | {"steps": s}, pictures) for s in ([], [{"step": "rotate"}]))
    got = [sqnr_db(result.float_graph, result.graph, x) for result in (plain, helped)]
    assert got[1] > got[0] + gain_db, got


def test_it_goes_together_with_the_other_steps(pictures):
    model, steps = deit_with_outliers(), ["rotate", "reparameterize", "awq", "power_of_two", "smooth"]
    recipe = {"name": "r", "steps": [{"step": step} for step in steps]}
    result = quantize(model, recipe, pictures)
    x = images(model, pictures)
    assert sqnr_db(result.float_graph, result.graph, x) > 20
    starts = ["rotated 1", "reparameterized 4", "AWQ scaled", "merged power-of-two factors into 4", "smoothed 4"]
    notes = [note for note in result.notes if note.startswith(tuple(starts))]
    assert all(note.startswith(start) for note, start in zip(notes, starts, strict=True)), "in the recipe's order"


def test_the_result_is_the_same_every_time(pictures):
    recipe = {"name": "r", "steps": [{"step": "rotate"}, {"step": "reparameterize"}, {"step": "awq"}]}
    first, second = (quantize(plain_deit(), recipe, pictures) for _ in range(2))
    for (name, a), (_, b) in zip(first.graph.named_buffers(), second.graph.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_nothing_to_rotate_is_said(tiny_model):
    said = rotate(captured(tiny_model), torch.randn(2, 3, 64, 64))
    assert said == "rotated 0 residual streams; rotated the values of 0 attentions"
