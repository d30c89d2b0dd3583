"""How new weights get their random values: not at all where a checkpoint replaces them, from two threads where many."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

_FILLERS = (
    "uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
    "orthogonal_", "sparse_",
)  # fmt: skip
_LARGE = 1 << 18  # elements from which two threads pay


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Building a model in this block leaves its weights uninitialised: that touches no memory and takes no time.

    torch.nn.init has no switch for one thread, so its random fillers are replaced for as long as any thread is here, by
    ones that do nothing in the threads that are.
    """
    with _lock:
        _threads.append(threading.get_ident())
        if len(_threads) == 1:
            for name in _FILLERS:
                setattr(nn.init, name, _unless_unfilled(getattr(nn.init, name)))
    try:
        yield
    finally:
        with _lock:
            _threads.remove(threading.get_ident())
            if not _threads:
                for name in _FILLERS:
                    setattr(nn.init, name, getattr(nn.init, name).__wrapped__)


_lock = threading.Lock()
_threads: list[int] = []


def _unless_unfilled(filler: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(filler)
    def fill(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return tensor if threading.get_ident() in _threads else filler(tensor, *args, **options)

    return fill


class LargeLinear(nn.Linear):
    """`nn.Linear` with the same distribution of initial weights, drawn from two threads.

    Drawing the numbers and touching their memory first is most of what making a model of 300 M parameters costs.
    The values follow torch.manual_seed, on any number of processors.
    """

    def reset_parameters(self) -> None:
        """Weight and bias uniform within 1 / sqrt(in_features)."""
        if self.weight.device.type != "cpu" or self.weight.numel() < _LARGE:
            super().reset_parameters()
            return
        bound = 1 / math.sqrt(self.in_features)
        if threading.get_ident() not in _threads:
            halves = self.weight.detach().flatten().chunk(2)
            generators = [torch.Generator().manual_seed(int(torch.randint(1 << 62, ()))) for _ in halves]
            with ThreadPoolExecutor(len(halves)) as pool:
                list(
                    pool.map(lambda half, numbers: half.uniform_(-bound, bound, generator=numbers), halves, generators)
                )
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
