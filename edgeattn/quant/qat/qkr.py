"""QKR: attention whose query and key weights are multiplied first and quantized as one matrix per head.

OFQ (arXiv 2302.02210), section on query-key reparameterization. W_qk[h] = Wq_h^T Wk_h of shape (C, C); x is quantized
once and used on both sides and for v; T_h[m] = W_qk,q[h] x_q[m] is quantized with one scale per (token, head);
score[h, n, m] = d^-1/2 x_q[n] . T_h,q[m]. It is for accuracy at 2 to 4 bits, not for speed: heads * C * C weights in
place of 2 C * C, and N^2 C heads multiplications for the scores in place of N^2 C.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.errors import RecipeError
from edgeattn.models.transformer import Attention
from edgeattn.quant.qat.cga import frozen_mask
from edgeattn.quant.qat.layers import QatLinear, WeightQuantizer
from edgeattn.quant.qat.lsq import LsqQuantizer

# Submodules, and arguments of forward, that stand between a projection and the product q . k, and what they are.
_BETWEEN = {
    "q_norm": "a normalisation of q and k", "rotary": "a rotary embedding", "dws": "a depthwise convolution on q",
}  # fmt: skip


def refuse(attention: nn.Module, where: str) -> None:
    """Refuse an attention whose product of weights does not exist.

    Raises:
        RecipeError: it is not `transformer.Attention` (DeiT, DiT); what stands between projection and product is named.
    """
    if type(attention) is Attention:
        return
    parts = {name.rpartition(".")[2] for name, module in attention.named_modules() if type(module) is not nn.Identity}
    parts |= set(inspect.signature(attention.forward).parameters)
    found = [what for name, what in _BETWEEN.items() if name in parts]
    raise RecipeError(
        f"{where} is {type(attention).__module__}.{type(attention).__name__}: QKR needs attention whose scores are a "
        "plain product of two linear projections (DeiT's), so that their weights can be multiplied first. "
        f"Here stands {' and '.join(found) or 'something else'} in between; switch qkr off, or take a DeiT."
    )


def product_of(q: Tensor, k: Tensor) -> Tensor:
    """W_qk of (heads, d, C) query and key weights, (heads, C, C)."""
    return q.transpose(-1, -2) @ k


def key_bias_of(q_bias: Tensor, k: Tensor) -> Tensor:
    """u_h = Wk_h^T bq_h, (heads, C), of (heads, d) and (heads, d, C).

    All that survives the softmax of the biases of q and k: the other terms are the same for every key.
    """
    return (q_bias[:, None] @ k)[:, 0]


def scores(x: Tensor, t: Tensor, key_bias: Tensor | None, head_dim: int) -> Tensor:
    """(B, heads, N, N) scores of x (B, N, C) and T (B, N, heads, C); key_bias (heads, C) or None."""
    y = x[:, None] @ t.permute(0, 2, 3, 1)
    if key_bias is not None:
        y = y + F.linear(x, key_bias).transpose(1, 2)[:, :, None]
    return y * head_dim**-0.5


class QueryKeyProduct(nn.Module):
    """Wq and Wk, which are stored and trained, and their quantized product, which is formed in every call.

    `freeze_range` set: gradients of entries of the product that are no nearer to a rounding boundary than that are
    dropped before they reach Wq and Wk (annealing in the product space; the release means to and does not).
    """

    edge = False

    def __init__(self, attention: Attention, weight_quantizer: WeightQuantizer, exact_bias: bool) -> None:
        super().__init__()
        heads, dim = attention.num_heads, attention.head_dim
        q, k, _ = attention.qkv.weight.detach().chunk(3)
        self.q = nn.Parameter(q.unflatten(0, (heads, dim)).clone())
        self.k = nn.Parameter(k.unflatten(0, (heads, dim)).clone())
        bias = attention.qkv.bias if exact_bias else None
        self.q_bias = None if bias is None else nn.Parameter(bias.detach()[: heads * dim].view(heads, dim).clone())
        self.weight_quantizer: WeightQuantizer = weight_quantizer
        self.freeze_range: float | None = None

    def source(self) -> Tensor:
        """The float product, (heads * C, C)."""
        with torch.autocast(self.q.device.type, enabled=False):
            return product_of(self.q, self.k).flatten(0, 1)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Quantized product (heads * C, C), key bias (heads, C) or None."""
        product = self.source()
        if self.freeze_range is not None and product.requires_grad:
            frozen = frozen_mask(self.weight_quantizer.position(product), self.freeze_range)
            product.register_hook(lambda gradient: gradient.masked_fill(frozen, 0))
        bias = None if self.q_bias is None else key_bias_of(self.q_bias, self.k)
        return self.weight_quantizer(product), bias


class QkrAttention(nn.Module):
    """Attention over (B, N, width) with QKR; equal to DeiT's without its quantizers.

    Args:
        x, t, v, softmax: quantizers of (B, N, C), (B, N, heads, C), (B, N, C) and (B, heads, N, N).
        exact_bias: keep what the bias of q does; False drops it as the paper's release does.

    Raises:
        RecipeError: see `refuse`.
    """

    def __init__(
        self, attention: Attention, weight_quantizer: WeightQuantizer, value: QatLinear, proj: QatLinear,
        *, x: LsqQuantizer, t: LsqQuantizer, v: LsqQuantizer, softmax: LsqQuantizer, exact_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        refuse(attention, "attention")
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.product: nn.Module = QueryKeyProduct(attention, weight_quantizer, exact_bias)
        self.value, self.proj = value, proj
        self.x_quantizer: nn.Module = x
        self.t_quantizer: nn.Module = t
        self.v_quantizer: nn.Module = v
        self.softmax_quantizer: nn.Module = softmax

    def forward(self, x: Tensor) -> Tensor:
        product, key_bias = self.product()
        x = self.x_quantizer(x)
        t = self.t_quantizer(F.linear(x, product).unflatten(-1, (self.num_heads, -1)))
        shares = torch.softmax(scores(x, t, key_bias, self.head_dim), -1)
        v = self.v_quantizer(self.value(x)).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return self.proj((self.softmax_quantizer(shares) @ v).transpose(1, 2).flatten(2))
