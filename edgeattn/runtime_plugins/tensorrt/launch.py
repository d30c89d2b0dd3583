"""Run a program on torch tensors: on a GPU as it is, on the CPU through Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeattn.errors import UnsupportedOp
from edgeattn.ops.registry import load_ops
from edgeattn.runtime_plugins.tensorrt import require_triton
from edgeattn.runtime_plugins.tensorrt.program import COMPILE_OPTIONS, Launch, Program, evaluate
from edgeattn.runtime_plugins.tensorrt.programs import build_program

if TYPE_CHECKING:
    from torch import Tensor

_KERNELS = "edgeattn.runtime_plugins.tensorrt.kernels"
_INTERPRETED = "edgeattn.runtime_plugins.tensorrt._interpreted_kernels"
_ALIGNMENT = 16  # bytes; the kernels are compiled with the promise


def run_op(op: str, inputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> Tensor:
    """The op on tensors of one device, in the type of the first."""
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    return run(build_program(op, [tuple(x.shape) for x in inputs], attributes, dtype), inputs)


def run(program: Program, inputs: Sequence[Tensor]) -> Tensor:
    """What the program computes.

    Raises:
        MissingDependency: triton is not installed.
        UnsupportedOp: a tensor has another shape than the program's, is not contiguous, or not aligned.
    """
    import torch

    require_triton("running GPU kernels")
    symbols = program.bind([x.shape for x in inputs])
    for i, x in enumerate(inputs):
        if not x.is_contiguous() or x.data_ptr() % _ALIGNMENT:
            raise UnsupportedOp(
                f"{program.op}: input {i} of shape {tuple(x.shape)} is not contiguous, or does not start at a multiple "
                f"of {_ALIGNMENT} bytes; the kernels rely on both. Pass x.clone(memory_format=torch.contiguous_format)."
            )
    device = inputs[0].device
    (shape,) = load_ops()[program.op].infer_shape(*(tuple(x.shape) for x in inputs), **program.attributes)
    buffers = {
        "input": list(inputs),
        "output": [inputs[0].new_empty(shape)],
        "workspace": [
            torch.empty(evaluate(size, symbols), dtype=torch.uint8, device=device) for size in program.workspaces
        ],
    }
    interpreted = device.type == "cpu"
    with _interpreter() if interpreted else torch.cuda.device(device):
        for launch in program.launches:
            _launch(launch, buffers, symbols, interpreted)
    return buffers["output"][0]


def _launch(launch: Launch, buffers: Mapping[str, Sequence[Tensor]], symbols: Mapping[str, int], cpu: bool) -> None:
    import torch

    variant, types = launch.variant, {"*fp32": torch.float32}
    grid = tuple(evaluate(size, symbols) for size in launch.grid)
    if 0 in grid:  # an empty batch
        return
    values: dict[str, Any] = dict(variant.constants)
    for (name, kind), argument in zip(variant.signature, launch.arguments, strict=True):
        if argument.kind == "int32":
            values[name] = evaluate(argument.value, symbols)
        else:
            buffer = buffers[argument.kind][argument.value]
            values[name] = buffer.view(types[kind]) if argument.kind == "workspace" else buffer
    options = {**COMPILE_OPTIONS, "num_warps": variant.num_warps, "num_stages": variant.num_stages}
    load_kernel(variant.kernel, interpreted=cpu)[grid](**values, **options)


def load_kernel(kernel: str, *, interpreted: bool = False) -> Any:
    """The function "module.function" of `kernels`, wrapped for the compiler or for the interpreter."""
    module, _, function = kernel.partition(".")
    package = _interpreted_package().__name__ if interpreted else _KERNELS
    with _interpreting() if interpreted else contextlib.nullcontext():
        return getattr(importlib.import_module(f"{package}.{module}"), function)


@functools.cache
def _interpreted_package() -> ModuleType:
    """A second copy of the package `kernels`: Triton decides between compiler and interpreter when it decorates."""
    original = importlib.util.find_spec(_KERNELS)
    assert original is not None and original.submodule_search_locations is not None
    spec = importlib.machinery.ModuleSpec(_INTERPRETED, None, is_package=True)
    spec.submodule_search_locations = list(original.submodule_search_locations)
    sys.modules[_INTERPRETED] = importlib.util.module_from_spec(spec)
    return sys.modules[_INTERPRETED]


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    from triton import knobs

    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        yield


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Triton ready to interpret, although it was imported to compile, and to compile again afterwards.

    Its library functions (tl.sum, ...) were decorated for the compiler at import, its matrix product takes the bits of
    a bfloat16 for an integer, and it leaves in place some of what it exchanges in its language.
    """
    import triton.experimental.gluon  # noqa: F401  imported late by Triton itself, it would meet the exchanged functions
    import triton.language as tl
    from triton.runtime import interpreter, jit

    builder = interpreter.interpreter_builder
    product = builder.create_dot

    def wide_product(a: Any, b: Any, *rest: Any) -> Any:
        a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return product(a, b, *rest)

    language = (
        tl, tl.core, tl.standard, tl.math, tl.tensor, tl.dtype, tl.condition, tl.core.tensor_descriptor_base
    )  # fmt: skip
    before = [(place, dict(vars(place))) for place in language]
    try:
        for module in (tl, tl.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, jit.JITFunction):
                    setattr(module, name, interpreter.InterpretedFunction(value.fn))
        builder.create_dot = wide_product
        yield
    finally:
        del builder.create_dot
        for place, values in before:
            _restore(place, values)


def _restore(place: Any, values: Mapping[str, Any]) -> None:
    """Give a module or class the attributes that it had; a module may have imported others since."""
    for name in [] if isinstance(place, ModuleType) else set(vars(place)) - set(values):
        delattr(place, name)
    for name, value in values.items():
        if vars(place).get(name) is not value:
            setattr(place, name, value)
