"""DiT S, B, L and XL with patches of 2, 4 and 8: the denoising step of a latent diffusion transformer.

Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (arXiv 2212.09748), section 3.2 (adaLN-Zero).
State-dict names are those of the official release (facebookresearch/DiT).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeattn.data.interface import BATCH, EVEN_BATCH, Interface, TensorSpec
from edgeattn.errors import UsageError
from edgeattn.models.registry import register_variants
from edgeattn.models.transformer import MLP, Attention, PatchEmbed, sincos_table

_FREQUENCIES = 256  # width of the sinusoidal timestep embedding
_GUIDED = 3  # channels that classifier-free guidance changes; upstream passes the others through


class TimestepEmbedder(nn.Module):
    """(B,) timesteps to (B, width): [cos, sin] of t * 10000^(-j/128) in float32, then an MLP."""

    rate: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        half = _FREQUENCIES // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("rate", rate, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        # Angles reach 1000 rad: half precision would round them by up to 0.25 (bf16: 2), so they stay float32.
        angles = t[:, None].float() * self.rate.float()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """(B,) class labels to (B, width); the last row means "no class" where training dropped labels."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero; nothing random is drawn, large ones touch no memory until they are used."""

    def reset_parameters(self) -> None:
        """Zero weight and bias."""
        for name, parameter in list(self.named_parameters()):
            if parameter.device.type == "cpu":  # NumPy's zeros are pages of the system's, torch's are written
                zeros = torch.from_numpy(np.zeros(parameter.shape, np.float32)).to(parameter.dtype)
                setattr(self, name, nn.Parameter(zeros))
            else:
                nn.init.zeros_(parameter)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, with (B, width) vectors on (B, N, width)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition c; starts as the identity."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, int(width * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, width), c (B, width) to (B, N, width)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated norm and projection to the values of a patch: (B, N, width) to (B, N, patch * patch * channels)."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = ZeroLinear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """One denoising step: latents (B, C, s, s), timesteps (B,), labels (B,) to (B, 2C, s, s): noise, then variance.

    Args:
        input_size: side s of the latents (an eighth of the picture's): 32 for 256 px, 64 for 512 px.
        num_classes: labels; the label `num_classes` means "no class".
        learn_sigma: predict the variance too; without it the result has C channels.

    Raises:
        UsageError: a size that the patch does not divide, or a width that the heads do not.
    """

    task = "denoising"

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        if input_size < patch_size or input_size % patch_size:
            near = max(patch_size, round(input_size / patch_size) * patch_size)
            raise UsageError(f"input_size {input_size} is not a multiple of the patch {patch_size}. Nearest: {near}.")
        if hidden_size % num_heads or hidden_size % 4:
            raise UsageError(
                f"hidden_size {hidden_size} must be a multiple of num_heads ({num_heads}) and of 4 (position table)."
            )
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels, self.num_classes = in_channels * (2 if learn_sigma else 1), num_classes
        side = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_table(hidden_size, side, side)[None], requires_grad=False)
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    @property
    def interface(self) -> Interface:
        """Inputs and outputs of the exported step."""
        shape = (BATCH, self.in_channels, self.input_size, self.input_size)
        return Interface(
            inputs=(
                TensorSpec("x", shape),
                TensorSpec("t", (BATCH,), "int64", high=1000),
                TensorSpec("y", (BATCH,), "int64", high=self.num_classes + 1),
            ),
            outputs=("model_output",),
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents (B, C, s, s), integer timesteps (B,), integer labels (B,) to (B, 2C, s, s)."""
        if tuple(x.shape[1:]) != (self.in_channels, self.input_size, self.input_size):
            raise UsageError(
                f"latents of {tuple(x.shape)}: this DiT was built for (B, {self.in_channels}, {self.input_size}, "
                f"{self.input_size}). Build it with input_size={x.shape[-1]}."
            )
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self._unpatchify(self.final_layer(x, c))

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p * p * C) to (B, C, s, s); a token holds (row in patch, column in patch, channel)."""
        side, patch = self.input_size // self.patch_size, self.patch_size
        x = x.unflatten(1, (side, side)).unflatten(3, (patch, patch, self.out_channels))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance: (2B, ...) inputs whose second half has the "no class" labels, to (2B, 2C, s, s).

        The latents of the first half are used for both. Guided are the first three channels only, as upstream has it.

        Raises:
            UsageError: an odd batch.
        """
        if x.shape[0] % 2:
            raise UsageError(
                f"forward_with_cfg got a batch of {x.shape[0]}; it must be even: labelled, then unlabelled."
            )
        count = x.shape[0] // 2
        out = self(torch.cat([x[:count], x[:count]]), t, y)
        noise, rest = out[:, :_GUIDED], out[:, _GUIDED:]
        labelled, unlabelled = noise[:count], noise[count:]
        guided = unlabelled + cfg_scale * (labelled - unlabelled)
        return torch.cat([torch.cat([guided, guided]), rest], 1)

    def guided(self, cfg_scale: float) -> nn.Module:
        """`forward_with_cfg` at one scale as a module of its own, for export."""
        return GuidedDiT(self, cfg_scale)

    def fit_tensor(self, key: str, value: Tensor) -> tuple[Tensor, str] | None:
        """The fixed position table of this model's own grid where a checkpoint of another size has its own."""
        if key != "pos_embed" or value.shape[-1] != self.pos_embed.shape[-1]:
            return None
        own = self.pos_embed.shape[1]
        return (
            self.pos_embed.detach(),
            f"pos_embed: fixed table made anew for {own} tokens (checkpoint: {value.shape[1]})",
        )


class GuidedDiT(nn.Module):
    """A DiT's guided step as a plain call of (x, t, y)."""

    def __init__(self, model: DiT, cfg_scale: float) -> None:
        super().__init__()
        self.model, self.cfg_scale = model, cfg_scale

    @property
    def interface(self) -> Interface:
        """The model's own, with an even batch."""
        plain = self.model.interface
        inputs = (dataclasses.replace(spec, shape=(EVEN_BATCH, *spec.shape[1:])) for spec in plain.inputs)
        return Interface(tuple(inputs), ("cfg_output",))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See `DiT.forward_with_cfg`."""
        return self.model.forward_with_cfg(x, t, y, self.cfg_scale)


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
_VARIANTS: dict[str, dict[str, Any]] = {
    f"dit_{name}_{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    for name, (width, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
register_variants(DiT, _VARIANTS)
