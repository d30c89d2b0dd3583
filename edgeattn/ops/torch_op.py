"""Torch custom ops that torch.export keeps as one node and that still have a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def torch_op(name: str) -> Callable[[Callable[..., Tensor]], Any]:
    """Decorator: `torch.library.custom_op` of a function of torch operators whose backward pass computes it again."""

    def wrap(function: Callable[..., Tensor]) -> Any:
        op = torch.library.custom_op(name, mutates_args=())(function)

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.inputs = inputs

        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            values = [value.detach() if isinstance(value, Tensor) else value for value in ctx.inputs]
            for i in wanted:
                values[i].requires_grad_()
            with torch.enable_grad():
                found = torch.autograd.grad(function(*values), [values[i] for i in wanted], gradient, allow_unused=True)
            gradients: list[Tensor | None] = [None] * len(values)
            for i, value in zip(wanted, found, strict=True):
                gradients[i] = value
            return tuple(gradients)

        op.register_autograd(backward, setup_context=keep)
        return op

    return wrap
