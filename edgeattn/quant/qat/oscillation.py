"""How many integer weights oscillate: the trouble that OFQ (arXiv 2302.02210) removes, measured.

Frequency of oscillation as in Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022
(arXiv 2203.08711), section 3.2: o = 1 where a code changes in the direction opposite to its last change, and
f <- m o + (1 - m) f after every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.quant.qat.cga import frozen_mask


class OscillationTracker:
    """Follows the codes of quantized weights from step to step.

    Args:
        layers: by name, modules with `source()` and `weight_quantizer`.
        momentum: m; threshold: a weight with f above it counts as oscillating (with the defaults: one reversal in the
            last 69 steps).
        near: distance to a rounding boundary, in steps of the grid, that counts as near.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], momentum: float = 0.01, threshold: float = 0.005, near: float = 0.05
    ) -> None:
        self.layers, self.momentum, self.threshold, self.near = dict(layers), momentum, threshold, near
        self._codes: dict[str, Tensor] = {}
        self._direction: dict[str, Tensor] = {}
        self._frequency: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Compare the codes with those of the last call; after every optimizer step."""
        for name, layer in self.layers.items():
            codes = layer.weight_quantizer.codes(layer.source()).to(torch.int8)  # type: ignore[union-attr, operator]
            if name not in self._codes:
                self._direction[name] = torch.zeros_like(codes)
                self._frequency[name] = torch.zeros(codes.shape)
            else:
                change = (codes - self._codes[name]).sign()
                reversal = change * self._direction[name] < 0
                self._frequency[name].lerp_(reversal.float(), self.momentum)
                self._direction[name] = torch.where(change != 0, change, self._direction[name])
            self._codes[name] = codes

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """Shares over all followed weights: `oscillating`, and `near_boundary` of a code in use."""
        moving = near = total = 0
        for name, layer in self.layers.items():
            position = layer.weight_quantizer.position(layer.source())  # type: ignore[union-attr, operator]
            near += int((~frozen_mask(position, self.near)).sum())
            moving += int((self._frequency[name] > self.threshold).sum()) if name in self._frequency else 0
            total += position.numel()
        return {"oscillating": moving / max(1, total), "near_boundary": near / max(1, total)}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"codes": self._codes, "direction": self._direction, "frequency": self._frequency}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._codes, self._direction = dict(state["codes"]), dict(state["direction"])
        self._frequency = dict(state["frequency"])
