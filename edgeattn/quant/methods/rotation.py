"""Random Hadamard rotations (QuaRot, arXiv 2404.00456): R = diag(signs) H / sqrt(n), orthogonal, in O(n log n).

H = Sylvester(2^k) (x) B, where B has size 1 or comes from Paley's constructions (J. Math. Phys. 12, 1933) over a prime
q: size q + 1 for q = 3 mod 4 (12, 20, 44, 60, ...), size 2 (q + 1) for q = 1 mod 4 (12, 28, 36, 60, 76, ...).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from edgeattn.errors import RecipeError


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley_prime(size: int) -> int | None:
    """The prime over which a matrix of this size is built, or None."""
    if size % 4 == 0 and _is_prime(size - 1):
        return size - 1
    half = size // 2 - 1
    return half if size % 4 == 0 and half % 4 == 1 and _is_prime(half) else None


def _paley(size: int) -> Tensor:
    q = _paley_prime(size)
    assert q is not None
    residues = {i * i % q for i in range(1, q)}
    legendre = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    jacobsthal = legendre[(index[:, None] - index) % q]
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[0, 0] = 0
    core[1:, 1:] = jacobsthal
    if size == q + 1:  # skew-symmetric core plus the identity
        core[1:, 0] = -1
        return core + torch.eye(size, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _base_size(n: int) -> int | None:
    """Size of the factor B of H: 1 for powers of two, else the smallest Paley size that leaves a power of two."""
    if n < 1:
        return None
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    size = odd * 4
    while size <= n:
        if _paley_prime(size) is not None:
            return size
        size *= 2
    return None


@functools.lru_cache(maxsize=16)
def _base(n: int) -> Tensor:
    size = _base_size(n)
    if size is None:
        near = [
            next(m for m in range(n + s, 0 if s < 0 else 4 * n + 8, s) if _base_size(m)) for s in (-1, 1) if n + s > 0
        ]
        raise RecipeError(
            f"no Hadamard matrix of size {n} can be built here; nearest sizes possible: {', '.join(map(str, near))}. "
            "Rotate blocks of such a size, or leave the layer without rotation."
        )
    return torch.ones(1, 1, dtype=torch.float64) if size == 1 else _paley(size)


def hadamard(n: int) -> Tensor:
    """The n x n matrix H of +1 and -1 with H H^T = n I, in float64; Sylvester's when n is a power of two.

    Raises:
        RecipeError: no matrix of this size can be built; the nearest sizes possible are named.
    """
    h = _base(n)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h.clone()


def random_signs(n: int, seed: int) -> Tensor:
    """n random signs, +1.0 or -1.0; store them with the model, a redrawn rotation gives a broken one."""
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def rotation(signs: Tensor) -> Tensor:
    """R = diag(signs) H / sqrt(n), (n, n), of the type of `signs` (n,); x R and w R keep x w^T.

    Raises:
        RecipeError: no Hadamard matrix of size n.
    """
    n = len(signs)
    return signs[:, None] * (hadamard(n) / n**0.5).to(signs.dtype)


def layer_norm_rotation(signs: Tensor) -> Tensor:
    """Q = H diag(signs) H^T / n, (n, n), orthogonal; LayerNorm without an affine turns x Q into LayerNorm(x) Q.

    H has a first column of ones, so 1 Q is 1 or -1 and no part of a mean goes elsewhere. QuaRot (section 4) rewrites
    LayerNorm to RMSNorm for want of that.

    Raises:
        RecipeError: no Hadamard matrix of size n.
    """
    h = hadamard(len(signs)).to(signs.dtype)
    h = h * h[:, :1]
    return h * signs @ h.T / len(signs)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x @ rotation(signs) along the last axis without the matrix: n log2(n) additions, or n times the base size.

    Raises:
        RecipeError: x has not as many channels as there are signs, or there is no Hadamard matrix of this size.
    """
    n = len(signs)
    if x.shape[-1] != n:
        raise RecipeError(f"{n} signs for an input of {x.shape[-1]} channels.")
    base = _base(n).to(x)
    size = len(base)
    y = (x * signs.to(x)).unflatten(-1, (n // size, size))
    if size > 1:
        y = y @ base
    width = 1
    while width < n // size:
        pairs = y.unflatten(-2, (-1, 2, width))
        first, second = pairs.select(-3, 0), pairs.select(-3, 1)
        y = torch.stack([first + second, first - second], -3).flatten(-4, -2)
        width *= 2
    return y.flatten(-2) / n**0.5


def rotate_channels(weight: Tensor, groups: Tensor, turn: Tensor, axis: int) -> Tensor:
    """A weight with each group of channels, (groups, n) indices on an axis, multiplied by `turn` (n, n); float64."""
    channels = weight.double().movedim(axis, 0).clone()
    channels[groups] = torch.einsum("gd...,de->ge...", channels[groups], turn.double())
    return channels.movedim(0, axis)
