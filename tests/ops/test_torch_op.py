"""The backward pass of every attention op: against autograd of the plain formula, and against finite differences."""

import importlib
import inspect

import pytest
import torch

from edgeattn.ops.registry import load_ops
from tests.ops import cases
from tests.ops.test_ops import torch_op, values_of

SMALL = {
    "CascadedGroupAttention": (1, 6, (2, 2), 2, 2, (2, 2), 3), "SingleHeadAttention": (1, 3, (2, 2), 2),
    "EluLinearAttention": (1, (2, 2), 1, 3), "HiLoAttention": (1, (2, 2), 2, 1, 1, 2),
}  # fmt: skip
EVERY = [(name, case) for name in load_ops() for case in cases.MAKERS[cases.plain_name(name)][1]]


def undecorated(name):
    """The function under the decorator, in torch operators that autograd knows."""
    spec = load_ops()[name]
    module = importlib.import_module(inspect.getmodule(spec.reference).__name__)
    return getattr(module, spec.torch_op.split("::")[1])._init_fn


def gradients(function, tensors, attributes):
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    result = function(*leaves, *attributes)
    weight = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    wanted = [t for t in leaves if t.requires_grad]
    return result, torch.autograd.grad((result * weight).sum(), wanted)


@pytest.mark.parametrize("name, case", EVERY, ids=lambda value: value)
def test_gradient_equals_autograd_of_the_formula(name, case):
    values, attributes = values_of(name, case)
    tensors = list(map(torch.from_numpy, values))
    got, ours = gradients(torch_op(load_ops()[name]), tensors, attributes.values())
    want, theirs = gradients(undecorated(name), tensors, attributes.values())
    assert torch.equal(got, want) and len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert any(one.abs().max() > 0 for one in ours)


@pytest.mark.parametrize("name", cases.MAKERS)
def test_gradient_equals_finite_differences(name):
    maker, _ = cases.MAKERS[name]
    inputs, attributes = maker(*SMALL[name])
    op = torch_op(load_ops()[name])
    tensors = [torch.from_numpy(value).double().requires_grad_() for value in inputs.values()]
    # Linear attention sums in float32 whatever it is given; a difference of two results has that rounding in it.
    eps, atol = (1e-3, 2e-3) if name == "EluLinearAttention" else (1e-6, 1e-6)
    assert torch.autograd.gradcheck(lambda *t: op(*t, *attributes.values()), tensors, eps=eps, atol=atol)


@pytest.mark.parametrize("name", cases.MAKERS)
def test_only_what_is_wanted_gets_a_gradient(name):
    values, attributes = values_of(name, next(iter(cases.MAKERS[name][1])))
    tensors = list(map(torch.from_numpy, values))
    tensors[0].requires_grad_()
    torch_op(load_ops()[name])(*tensors, *attributes.values()).sum().backward()
    assert tensors[0].grad is not None and all(t.grad is None for t in tensors[1:])
    assert not tensors[1].requires_grad
