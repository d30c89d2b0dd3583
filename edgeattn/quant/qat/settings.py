"""What a quantization-aware training quantizes and how: settings, and presets by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from edgeattn.errors import RecipeError

PARTS = ("statsq", "shifts", "qkr", "cga", "fine")
_METHODS = ("ofq", "lsq", "lsqplus")
_BITS = (2, 3, 4)


@dataclasses.dataclass(frozen=True)
class QatSettings:
    """Everything that decides which quantizers a model gets.

    Every method quantizes the same places (see `convert.prepare`), LSQ and LSQ+ with one scale per tensor, as
    published, or, with `fine`, at OFQ's granularity.

    Attributes:
        name: the preset, and what was switched off or on.
        method: of activations and, without statsq, of weights: LSQ, or LSQ+ (learned offsets of activations).
        statsq: weights by StatsQ, a scale per row; else learned scales.
        shifts: learned vectors before and after each activation quantizer (OFQ).
        qkr: multiply query and key weights first.
        cga: the run ends with confidence-guided annealing.
        fine: learned scales per row of a weight, per token position or channel of activations; else one per tensor.
        exact_bias: QKR keeps what the bias of q does; False drops it as the paper's release does.
        clipped_gradient: StatsQ passes no gradient to clipped weights.
        boundary_range: of annealing, in steps of the grid.
        product_space: annealing also freezes entries of the product of QKR.
        edge_bits: of the first convolution and the heads, weights and inputs.

    Raises:
        RecipeError: bits outside 2 to 8, a boundary range outside 0 to 0.5, an unknown method.
    """

    name: str
    weight_bits: int
    activation_bits: int
    method: Literal["lsq", "lsq+"] = "lsq"
    statsq: bool = True
    shifts: bool = True
    qkr: bool = True
    cga: bool = True
    fine: bool = True
    exact_bias: bool = True
    clipped_gradient: bool = False
    boundary_range: float = 0.005
    product_space: bool = False
    edge_bits: int = 8

    def __post_init__(self) -> None:
        for what in ("weight_bits", "activation_bits", "edge_bits"):
            if not 2 <= getattr(self, what) <= 8:
                raise RecipeError(f"{self.name}: {what} is {getattr(self, what)}; expected 2 to 8.")
        if not 0 < self.boundary_range < 0.5:
            raise RecipeError(f"{self.name}: boundary_range is {self.boundary_range}; expected over 0 and under 0.5.")
        if self.method not in ("lsq", "lsq+"):
            raise RecipeError(f"{self.name}: method is {self.method!r}; expected lsq or lsq+.")

    def switch(self, on: Iterable[str] = (), off: Iterable[str] = ()) -> QatSettings:
        """The settings with parts (statsq, shifts, qkr, cga, fine) switched on and off, which the name says.

        Raises:
            RecipeError: a part that there is not.
        """
        wanted = {**dict.fromkeys(on, True), **dict.fromkeys(off, False)}
        for part in wanted:
            if part not in PARTS:
                near = difflib.get_close_matches(part, PARTS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise RecipeError(f"unknown part {part!r} of {self.name}: {hint}Parts: {', '.join(PARTS)}.")
        changed = {part: value for part, value in wanted.items() if getattr(self, part) != value}
        marks = "".join(f"{'+' if value else '-'}{part}" for part, value in changed.items())
        values: dict[str, Any] = {"name": self.name + marks, **changed}
        return dataclasses.replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QatSettings:
        """What `to_dict` gave.

        Raises:
            RecipeError: unknown or missing keys, wrong values.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RecipeError(f"unknown QAT setting(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise RecipeError(f"incomplete QAT settings: {error}.") from error


def _preset(method: str, bits: int) -> QatSettings:
    name = f"{method}-w{bits}a{bits}"
    if method == "ofq":
        return QatSettings(name, bits, bits)
    kind: Literal["lsq", "lsq+"] = "lsq" if method == "lsq" else "lsq+"
    return QatSettings(name, bits, bits, method=kind, statsq=False, shifts=False, qkr=False, cga=False, fine=False)


PRESETS: dict[str, QatSettings] = {
    setting.name: setting for setting in (_preset(method, bits) for method in _METHODS for bits in _BITS)
}


def preset(name: str) -> QatSettings:
    """A preset by name, with parts switched off and on behind it: ofq-w2a2, ofq-w2a2-qkr-cga, lsq-w3a3+statsq.

    Raises:
        RecipeError: there is none of that name, or no such part; near names are suggested.
    """
    found = re.fullmatch(r"([a-z+]+-w\d+a\d+)((?:[+-]\w+)*)", name)
    if found and found[1] in PRESETS:
        parts = re.findall(r"([+-])(\w+)", found[2])
        return PRESETS[found[1]].switch(
            on=[part for sign, part in parts if sign == "+"], off=[part for sign, part in parts if sign == "-"]
        )
    near = difflib.get_close_matches(name, PRESETS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise RecipeError(f"unknown QAT preset {name!r}: {hint}Presets: {', '.join(PRESETS)}; parts behind it: -qkr, +cga.")
