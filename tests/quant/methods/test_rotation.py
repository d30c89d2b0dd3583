import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.rotation import (
    hadamard,
    layer_norm_rotation,
    random_signs,
    rotate,
    rotate_channels,
    rotation,
)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 60, 64, 96, 104, 144, 192, 240])
def test_hadamard(n):
    h = hadamard(n)
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


def test_power_of_two_is_sylvester():
    index = torch.arange(16)
    parity = torch.tensor([[bin(i & j).count("1") % 2 for j in index.tolist()] for i in index.tolist()])
    assert torch.equal(hadamard(16), 1.0 - 2 * parity.double())


@given(base=st.sampled_from([1, 12, 20, 28, 36]), doublings=st.integers(0, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_fast_form_is_the_matrix_product(base, doublings, seed):
    n = base * 2**doublings
    signs = random_signs(n, seed).double()
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(rotate(x, signs), x @ rotation(signs), rtol=1e-12, atol=1e-12)


def test_product_of_rotated_tensors_stays():
    x, w, signs = torch.randn(5, 96, dtype=torch.float64), torch.randn(7, 96, dtype=torch.float64), random_signs(96, 1)
    torch.testing.assert_close(rotate(x, signs) @ rotate(w, signs).T, x @ w.T)


def test_types_signs_and_seeds():
    assert rotate(torch.randn(2, 8), random_signs(8, 0)).dtype == torch.float32
    assert rotation(random_signs(8, 0)).dtype == torch.float32
    assert torch.equal(random_signs(64, 3), random_signs(64, 3))
    assert not torch.equal(random_signs(64, 3), random_signs(64, 4))


@pytest.mark.parametrize(("n", "near"), [(50, "48, 56"), (52, "48, 56"), (3, "2, 4"), (92, "88, 96")])
def test_impossible_size_names_the_nearest(n, near):
    with pytest.raises(RecipeError, match=f"size {n} .* nearest sizes possible: {near}"):
        rotate(torch.zeros(1, n), torch.ones(n))


def test_wrong_number_of_signs():
    with pytest.raises(RecipeError, match="8 signs for an input of 4"):
        rotate(torch.zeros(1, 4), torch.ones(8))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [4, 12, 28, 64, 192])
def test_layer_norm_commutes_with_its_rotation(n, seed):
    signs = random_signs(n, seed).double()
    turn = layer_norm_rotation(signs)
    torch.testing.assert_close(turn @ turn.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(turn.sum(0), signs[:1].expand(n))
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3 + 1
    rotated, plain = (torch.nn.functional.layer_norm(y, (n,)) for y in (x @ turn, x))
    torch.testing.assert_close(rotated, plain @ turn)
    assert n < 64 or turn.abs().max() < 0.5, "every channel goes to many"


def test_groups_of_channels_rotate_on_any_axis():
    weight = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups, turn = torch.tensor([[5, 0, 3, 6], [1, 2, 7, 4]]), rotation(random_signs(4, 3)).double()
    mixed = rotate_channels(weight, groups, turn, 1)
    for group in groups:
        torch.testing.assert_close(mixed[:, group], torch.einsum("odk,de->oek", weight[:, group], turn))
    torch.testing.assert_close(rotate_channels(weight.transpose(0, 1), groups, turn, 0), mixed.transpose(0, 1))
    one = rotate_channels(weight, groups[:1], turn, 1)
    assert torch.equal(one[:, groups[1]], weight[:, groups[1]])
