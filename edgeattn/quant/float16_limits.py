"""Limits of float16, and a look inside the ops that hide products, sums and norms from their caller."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from edgeattn.ops.registry import load_ops
from edgeattn.quant.graph import aten

LARGEST = 65504.0
SMALLEST_NORMAL = 2.0**-14
HEADROOM = 2.0  # calibration sees part of the pictures only


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of hazard: the limit, on which side of it the trouble is, and what to say."""

    limit: float
    reason: str
    remedy: str
    is_small: bool = False  # a value below the limit is the hazard


MOST = LARGEST / HEADROOM
_SCALE_DOWN = "compute it in float32, or scale the weights in front of it down"
KINDS = {
    "overflow": Kind(MOST, "its values reach {bound:.4g}", _SCALE_DOWN),
    "weight": Kind(LARGEST, "its constant reaches {bound:.4g}", "keep it in float32"),
    "scores": Kind(MOST, "its scores Q K^T reach {bound:.4g}", "compute the scores and the softmax in float32"),
    "kv_sum": Kind(
        MOST, "its sum K^T V over the tokens reaches {bound:.4g}",
        "sum in float32, or divide V by the number of tokens first",
    ),
    "softmax": Kind(
        SMALLEST_NORMAL, "all probabilities of a row are below {bound:.2g}: too many tokens",
        "compute the softmax in float32", True,
    ),
    "normaliser": Kind(
        SMALLEST_NORMAL, "it is a divisor and falls to {bound:.2g}", "compute it and the division in float32", True
    ),
    "variance": Kind(
        MOST, "its squared deviation from the mean reaches {bound:.4g}", "compute the norm in float32"
    ),
    "epsilon": Kind(
        SMALLEST_NORMAL, "its variance plus epsilon falls to {bound:.2g}", "compute the norm in float32", True
    ),
    "gelu": Kind(MOST, "x (1 + erf) inside reaches {bound:.4g}", _SCALE_DOWN),
    "reduction": Kind(MOST, "the sum of the sizes of its addends reaches {bound:.4g}", "sum in float32"),
    "inside": Kind(MOST, "a value inside reaches {bound:.4g}", "compute it in float32"),
}  # fmt: skip


def is_bad(kind: str, value: float) -> bool:
    """Whether a value is on the wrong side of its kind's limit."""
    return value < KINDS[kind].limit if KINDS[kind].is_small else value > KINDS[kind].limit


def worse(kind: str, a: float, b: float) -> float:
    """The value that is nearer to the trouble."""
    return min(a, b) if KINDS[kind].is_small else max(a, b)


def largest_of(x: Tensor) -> float:
    """The largest finite |x|; masks hold infinities on purpose."""
    largest = float(x.detach().abs().max())
    return largest if largest != torch.inf else float(torch.where(x.isinf(), 0, x).abs().max())


def op_name(node: fx.Node) -> str:
    """Name of the torch op that a node calls, without namespace and overload; "" for anything else."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else ""


def transparent(node: fx.Node) -> Callable[..., Any]:
    """The node's function with its inner tensors in sight of a dispatch mode."""
    name = op_name(node)
    if name in own_ops():
        return getattr(importlib.import_module(f"edgeattn.ops.{name}"), name)._init_fn
    return _attention if name == "scaled_dot_product_attention" else node.target  # type: ignore[return-value]


def own_ops() -> set[str]:
    """Names of our torch ops without the namespace."""
    return {spec.torch_op.split("::")[1] for spec in load_ops().values()}


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> None:  # fmt: skip
    """Scores and softmax, picture by picture: together they would not fit into memory."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    for i in range(len(q)):
        scores = (q[i] * factor) @ k[i].transpose(-1, -2)
        if mask is not None:
            own = mask[i] if mask.dim() == q.dim() and len(mask) > 1 else mask
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
        scores.softmax(-1)


class Inside(TorchDispatchMode):
    """Takes down the worst value of each kind among the aten ops that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.worst: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for kind, value in _inner(func.overloadpacket.__name__, args, kwargs or {}, result):
            self.worst[kind] = worse(kind, self.worst.get(kind, value), value)
        return result


def _inner(name: str, args: Any, kwargs: Any, result: Any) -> Iterator[tuple[str, float]]:
    """Kinds and values of one aten op."""
    if name in ("_softmax", "_safe_softmax"):
        yield "scores", largest_of(args[0])
        yield "softmax", float(result.amax(args[1]).min())
    elif name.startswith("_scaled_dot_product"):
        with Inside() as inside:
            _attention(args[0], args[1], args[2], kwargs.get("attn_mask"), scale=kwargs.get("scale"))
        yield from inside.worst.items()
    elif name in ("bmm", "mm"):
        is_sum_over_tokens = args[0].shape[-1] > max(result.shape[-2:])
        yield "kv_sum" if is_sum_over_tokens else "inside", largest_of(result)
    elif name == "div" and isinstance(args[1], Tensor) and args[1].numel() > 1:
        yield "normaliser", float(args[1].abs().min())
    elif name in ("native_layer_norm", "native_group_norm"):
        if name == "native_layer_norm":
            rows, epsilon = args[0].flatten(-len(args[1])), args[4]
        else:
            rows, epsilon = args[0].reshape(args[3], args[6], -1), args[7]
        centred = (rows - rows.mean(-1, keepdim=True)).square()
        yield "variance", float(centred.max())
        yield "epsilon", float(centred.mean(-1).min()) + epsilon
    elif name == "gelu":
        yield "gelu", 2 * largest_of(args[0])
    elif name in ("mean", "sum") and isinstance(result, Tensor) and args[0].is_floating_point():
        dims = args[1] if len(args) > 1 and args[1] else list(range(args[0].dim()))
        yield "reduction", float(aten.sum.dim_IntList(args[0].abs(), dims).max())
    elif name == "avg_pool2d":
        area = torch.Size(args[1]).numel()
        yield "reduction", area * float(aten.avg_pool2d(args[0].abs(), *args[1:]).max())
    elif isinstance(result, Tensor) and result.is_floating_point() and result.numel():
        yield "inside", largest_of(result)
