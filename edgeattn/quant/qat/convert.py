"""Puts quantizers into a DeiT, lists its quantized weights, and freezes a trained model for export.

OFQ (arXiv 2302.02210), experimental setup: first convolution and heads with LSQ at 8 bits, weights and inputs;
LayerNorm, softmax itself, GELU and residual additions in float; every other product at the bits asked for. Scales of
activations: one per token position for the inputs of linear layers, for q, k and softmax rows; one per channel for v.
LSQ and LSQ+ get the same places; one scale per tensor, as published, or at the same granularity (`fine`), weights then
one per row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.errors import RecipeError
from edgeattn.models.deit import Block, DeiT
from edgeattn.models.transformer import Attention
from edgeattn.quant.qat.layers import QatAttention, QatConv2d, QatLinear, WeightQuantizer, split_linear
from edgeattn.quant.qat.lsq import SCALE_FLOOR, LsqQuantizer, scale_shape
from edgeattn.quant.qat.qkr import QkrAttention, QueryKeyProduct, product_of, refuse
from edgeattn.quant.qat.settings import QatSettings
from edgeattn.quant.qat.statsq import StatsQuantizer

_TREATS = "QAT takes DeiT (deit_tiny, deit_small, deit_base, each plain or _distilled, any size and width)"


class _Maker:
    """Makes the quantizers of one model."""

    def __init__(self, settings: QatSettings, tokens: int, width: int) -> None:
        self.settings, self.tokens, self.width = settings, tokens, width

    def activation(
        self, shape: Sequence[int], *, signed: bool = True, shifts: Sequence[int] | None = None
    ) -> LsqQuantizer:
        """One at the bits asked for; `shape` of the scale where it is fine, `shifts` theirs where OFQ has them."""
        shape = shape if self.settings.fine else (1,) * len(shape)
        plus = self.settings.method == "lsq+"
        return LsqQuantizer(
            shape, self.settings.activation_bits, signed=signed, offset=plus, start="range" if plus else "mean",
            shifts=shifts if self.settings.shifts else None,
            # The paper's release starts unsigned grids twice as wide, LSQ does not.
            factor=4.0 if self.settings.shifts and not signed else 2.0,
        )  # fmt: skip

    def per_token(self, channels: int, signed: bool = True) -> LsqQuantizer:
        """Of (B, N, channels)."""
        return self.activation(scale_shape("token", self.tokens), signed=signed, shifts=(channels,))

    def value(self) -> LsqQuantizer:
        """Of v, (B, N, width), one scale per channel."""
        return self.activation(scale_shape("channel", channels=self.width), shifts=(self.width,))

    def softmax(self) -> LsqQuantizer:
        """Of (B, heads, N, N), one scale per row; without shifts, as in the release."""
        return self.activation((1, 1, self.tokens, 1), signed=False)

    def weight(self, value: Tensor) -> WeightQuantizer:
        """Of (out, in) at the bits asked for."""
        if self.settings.statsq:
            return StatsQuantizer(self.settings.weight_bits, self.settings.clipped_gradient)
        return self._learned(value, self.settings.weight_bits)

    def _learned(self, value: Tensor, bits: int) -> LsqQuantizer:
        shape = (len(value) if self.settings.fine else 1,) + (1,) * (value.dim() - 1)
        start = self.settings.method == "lsq+"
        quantizer = LsqQuantizer(shape, bits, start="three_sigma" if start else "mean")
        quantizer.initialise(value)
        return quantizer

    def linear(self, layer: nn.Linear, input_quantizer: LsqQuantizer | None) -> QatLinear:
        return QatLinear(layer, self.weight(layer.weight), input_quantizer)

    def edge(self, layer: Any) -> QatLinear | QatConv2d:
        """First convolution or head."""
        bits = self.settings.edge_bits
        weights = self._learned(layer.weight, bits)
        if isinstance(layer, nn.Conv2d):
            return QatConv2d(layer, weights, LsqQuantizer((1, 1, 1, 1), bits))
        return QatLinear(layer, weights, LsqQuantizer((1, 1), bits), edge=True)

    def attention(self, old: Attention) -> nn.Module:
        if not self.settings.qkr:
            qkv, proj = (self.linear(layer, self.per_token(self.width)) for layer in (old.qkv, old.proj))
            grids = self.per_token(self.width), self.per_token(self.width), self.value(), self.softmax()
            return QatAttention(old, qkv, proj, *grids)
        heads, dim = old.num_heads, old.head_dim
        q, k, _ = (part.unflatten(0, (heads, dim)) for part in old.qkv.weight.detach().chunk(3))
        stacked = product_of(q, k).flatten(0, 1)
        t = self.activation(scale_shape("token_head", self.tokens, heads=heads), shifts=(heads, self.width))
        return QkrAttention(
            old, self.weight(stacked), self.linear(split_linear(old.qkv, 2 * self.width, 3 * self.width), None),
            self.linear(old.proj, self.per_token(self.width)), x=self.per_token(self.width), t=t, v=self.value(),
            softmax=self.softmax(), exact_bias=self.settings.exact_bias,
        )  # fmt: skip


def prepare(model: nn.Module, settings: QatSettings) -> DeiT:
    """Put quantizers into a float DeiT, in place; the scales are tied to its token count, that is to its image size.

    Raises:
        RecipeError: another model, or one that has quantizers already; what is treated is named.
    """
    blocks = _treatable(model)
    assert isinstance(model, DeiT)
    tokens, width = model.pos_embed.shape[1:]
    maker, heads = _Maker(settings, tokens, width), blocks[0].attn.num_heads
    model.patch_embed.proj = maker.edge(model.patch_embed.proj)  # type: ignore[assignment]
    for block in blocks:
        mlp: Any = block.mlp
        block.attn = maker.attention(block.attn)  # type: ignore[assignment]
        mlp.fc1 = maker.linear(mlp.fc1, maker.per_token(width))
        mlp.fc2 = maker.linear(mlp.fc2, maker.per_token(mlp.fc2.in_features, signed=False))
    for name in DeiT.heads:
        if getattr(model, name) is not None:
            setattr(model, name, maker.edge(getattr(model, name)))
    model.quantization = settings  # type: ignore[assignment]
    if settings.qkr:
        note = (
            f"QKR keeps {heads * width * width} numbers per block where query and key weights are {2 * width * width}"
        )
        model.notes = [*getattr(model, "notes", []), f"{note}; its scores cost {heads} times as much"]  # type: ignore[assignment]
    return model.train(model.training)


def has_quantizers(model: nn.Module) -> bool:
    """Whether a model trains its grids, or has trained them; a frozen one has none left."""
    return any(isinstance(module, (LsqQuantizer, StatsQuantizer)) for module in model.modules())


def _treatable(model: nn.Module) -> list[Block]:
    name = getattr(model, "name", type(model).__name__)
    if has_quantizers(model):
        raise RecipeError(f"{name} has quantizers already; start from the float model.")
    if not isinstance(model, DeiT):
        kinds = sorted({type(m).__name__ for m in model.modules() if type(m).__name__.endswith(("Attention", "SHSA"))})
        reason = f" (its {', '.join(kinds)} have no plain product of query and key layers)" if kinds else ""
        raise RecipeError(f"{name} is a {type(model).__name__}{reason}: {_TREATS}.")
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    for i, block in enumerate(blocks):
        refuse(block.attn, f"{name}: blocks.{i}.attn")
    return blocks


def quantized_weights(model: nn.Module, edges: bool = False) -> dict[str, nn.Module]:
    """Modules with a quantized weight (`source()`, `weight_quantizer`) by name; `edges` also those of 8 bits."""
    kinds = (QatLinear, QatConv2d, QueryKeyProduct)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in found.items() if edges or not module.edge}


def quantizer_parameters(model: nn.Module) -> set[int]:
    """Ids of the quantizers' own parameters, which no weight decay should pull at."""
    return {id(p) for m in model.modules() if isinstance(m, LsqQuantizer) for p in m.parameters(recurse=False)}


def export_grids(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(codes, scale, zero point) by layer of all quantized weights, 8-bit ones too; QKR's is the stacked product."""
    grids = {}
    for name, module in quantized_weights(model, edges=True).items():
        grids[name] = module.weight_quantizer.export_grid(module.source().detach())  # type: ignore[union-attr, operator]
    return grids


class FrozenQuantizer(nn.Module):
    """A trained activation quantizer as plain arithmetic: Add, Div, Clip, Round, Mul, Add; of x's shape."""

    scale: Tensor
    before: Tensor | None
    after: Tensor | None

    def __init__(self, trained: LsqQuantizer) -> None:
        super().__init__()
        if not trained.initialised:
            raise RecipeError("a quantizer's scale was never set: train the model, or load a trained state.")
        none = [part is None for part in (trained.before, trained.offset)]
        zero = torch.zeros(())
        offset = zero if trained.offset is None else trained.offset.detach()
        before = (zero if trained.before is None else trained.before.detach()) - offset
        after = (zero if trained.after is None else trained.after.detach()) + offset
        self.limits = trained.limits
        self.register_buffer("scale", trained.scale.detach().clamp(min=SCALE_FLOOR).clone())
        self.register_buffer("before", None if all(none) else before.clone())
        self.register_buffer("after", None if all(none) else after.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else x + self.before
        x = torch.round((x / self.scale).clamp(*self.limits)) * self.scale
        return x if self.after is None else x + self.after


class _Constants(nn.Module):
    """In place of `QueryKeyProduct`: its result."""

    product: Tensor
    key_bias: Tensor | None

    def __init__(self, product: Tensor, key_bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("product", product)
        self.register_buffer("key_bias", key_bias)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.product, self.key_bias


@torch.no_grad()
def freeze(model: nn.Module) -> nn.Module:
    """A copy for export, in evaluation mode: quantized weights are constants, activation quantizers plain arithmetic.

    It computes in float32 what the trained model computes, on the grids' values: the bits are simulated, which is
    added to its `notes`. Exact codes for integer storage are in `export_grids` of the trained model.

    Raises:
        RecipeError: the model has no quantizers, or some that never saw a batch.
    """
    layers = quantized_weights(model, edges=True)
    if not layers:
        raise RecipeError(f"{type(model).__name__} has no quantizers to freeze; `prepare` and train it first.")
    model = copy.deepcopy(model).eval()
    for module in quantized_weights(model, edges=True).values():
        if not isinstance(module, QueryKeyProduct):
            quantizer = module.weight_quantizer
            module.weight = nn.Parameter(quantizer(module.weight), requires_grad=False)  # type: ignore[operator]
            module.weight_quantizer = nn.Identity()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LsqQuantizer):
                setattr(parent, name, FrozenQuantizer(child))
            elif isinstance(child, QueryKeyProduct):
                product, key_bias = child()
                setattr(parent, name, _Constants(product.clone(), None if key_bias is None else key_bias.clone()))
    name = getattr(getattr(model, "quantization", None), "name", "QAT")
    note = f"{name}: weights and activations lie on the trained grids, and the artefact computes in float32 (simulated)"
    model.notes = [*getattr(model, "notes", []), note]  # type: ignore[assignment]
    return model
