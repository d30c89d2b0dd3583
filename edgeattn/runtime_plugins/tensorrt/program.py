"""What an op launches, as plain data that a generator of C++ reads as well as Python: programs, launches, variants.

A size is an expression: a number, the name of a symbol such as "B", or (operator, left, right), in which both sides are
expressions. Symbols get their values by matching a program's shape patterns with the shapes of a call.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from edgeattn.errors import UnsupportedOp

Expression = Any  # int, str, or (str, Expression, Expression); lists where it comes from JSON
Value = int | float | None

# Of Triton, for every kernel. A limit of registers, even the hardware's own, keeps ptxas from aiming at more blocks per
# multiprocessor, for which it spills.
COMPILE_OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255, "launch_cooperative_grid": False, "launch_pdl": False}

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "min": min,
    "cdiv": lambda a, b: -(-a // b),
}


def evaluate(expression: Expression, symbols: Mapping[str, int]) -> int:
    """The value of an expression.

    Raises:
        UnsupportedOp: it uses a symbol without a value, or an unknown operator.
    """
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        if expression not in symbols:
            raise UnsupportedOp(f"size {expression!r} has no value; the shapes of this call give {dict(symbols)}.")
        return symbols[expression]
    operator, left, right = expression
    if operator not in OPERATORS:
        raise UnsupportedOp(f"size {expression!r}: operator {operator!r} is not one of {', '.join(OPERATORS)}.")
    return OPERATORS[operator](evaluate(left, symbols), evaluate(right, symbols))


def product(*factors: Expression) -> Expression:
    """The expression of a product; its numbers are multiplied here."""
    number = math.prod(f for f in factors if isinstance(f, int))
    result: Expression = None
    for factor in (f for f in factors if not isinstance(f, int)):
        result = factor if result is None else ("mul", result, factor)
    if result is None:
        return number
    return result if number == 1 else ("mul", result, number)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time constants, to be compiled once per architecture.

    Attributes:
        kernel: module in `kernels` and the name of the function in it, "module.function".
        dtype: numpy's name of the floating-point type of the op's tensors.
        signature: (parameter, type) in the order of the launch's arguments; Triton's names, "*fp16", "*i8", "i32".
        constants: (parameter, value) of the compile-time ones; None for an absent pointer.
    """

    kernel: str
    dtype: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Value], ...]
    num_warps: int
    num_stages: int

    @property
    def id(self) -> str:
        """Name that is stable between runs: function, type, digest of everything else."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        function, short = self.kernel.partition(".")[2], {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
        return f"{function}_{short[self.dtype]}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclasses.dataclass(frozen=True)
class Argument:
    """One run-time argument: the pointer number `value` of a kind, or an int32 expression."""

    kind: Literal["input", "workspace", "output", "int32"]
    value: Any


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: the variant, three grid expressions, arguments in the order of the variant's signature."""

    variant: Variant
    grid: tuple[Expression, Expression, Expression]
    arguments: tuple[Argument, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """All that one call of an op does on the GPU.

    Attributes:
        op: ONNX op type.
        dtype: numpy's name of the floating-point type.
        shapes: pattern per input, in order: numbers, and names of symbols where any size fits.
        attributes: the op's attributes that the program holds for.
        workspaces: bytes of each scratch buffer; contents are not kept between calls.
        launches: in order, on one stream; a launch sees what the ones before it wrote.
    """

    op: str
    dtype: str
    shapes: tuple[tuple[int | str, ...], ...]
    attributes: Mapping[str, Any]
    workspaces: tuple[Expression, ...]
    launches: tuple[Launch, ...]

    def bind(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Values of the symbols for a call.

        Raises:
            UnsupportedOp: the shapes do not fit the patterns.
        """
        symbols: dict[str, int] = {}
        given = tuple(tuple(shape) for shape in shapes)
        fits = [len(shape) for shape in given] == [len(pattern) for pattern in self.shapes]
        for shape, pattern in zip(given, self.shapes, strict=False):
            for size, expected in zip(shape, pattern, strict=False):
                wanted = symbols.setdefault(expected, size) if isinstance(expected, str) else expected
                fits = fits and size == wanted
        if not fits:
            raise UnsupportedOp(
                f"{self.op}: inputs have shapes {given}, this program is for {self.shapes}; build one for these shapes."
            )
        return symbols

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest; launches name their variant by id."""
        plain = dataclasses.asdict(self)
        for launch, source in zip(plain["launches"], self.launches, strict=True):
            launch["variant"] = source.variant.id
            launch["arguments"] = [[argument.kind, argument.value] for argument in source.arguments]
        return plain
