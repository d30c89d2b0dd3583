import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.errors import RecipeError
from edgeattn.quant.methods.rotation import hadamard, random_signs, rotate, rotation


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
