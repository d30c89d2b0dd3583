"""Compile the kernels ahead of time: cubins per architecture and a manifest, without a GPU, the same bytes each time.

python -m edgeattn.runtime_plugins.tensorrt.aot OUT [--arch sm_87 ...] [--model NAME ...] [--dtype float16 ...]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeattn.errors import EdgeAttnError, UnsupportedOp, UsageError
from edgeattn.runtime_plugins.tensorrt import require_triton
from edgeattn.runtime_plugins.tensorrt.cubin import elf_abi, parse_parameters, parse_ptx_version, parse_resources
from edgeattn.runtime_plugins.tensorrt.launch import load_kernel
from edgeattn.runtime_plugins.tensorrt.manifest import FILE_NAME, Cubin, Kernel, Manifest, ProgramOf
from edgeattn.runtime_plugins.tensorrt.program import COMPILE_OPTIONS, Program, Variant
from edgeattn.runtime_plugins.tensorrt.programs import TRITON_TYPES
from edgeattn.runtime_plugins.tensorrt.zoo import zoo_programs

# Compute capability, and the shared memory that a block may opt in to (CUDA C++ programming guide, table of
# capabilities). Orin is sm_87, Thor sm_110a; the "a" cubins run on exactly that chip.
ARCHS = {
    "sm_80": (80, 163 << 10), "sm_86": (86, 99 << 10), "sm_87": (87, 163 << 10), "sm_89": (89, 99 << 10),
    "sm_90a": (90, 227 << 10), "sm_100a": (100, 227 << 10), "sm_110a": (110, 227 << 10), "sm_120a": (120, 99 << 10),
}  # fmt: skip
_POINTER_ALIGNMENT = 16  # bytes; TensorRT's buffers are aligned to 256


def compile_kernels(programs: Sequence[Program], archs: Sequence[str], out: Path) -> Manifest:
    """Compile every distinct variant of the programs once per architecture into `out`, and write the manifest there.

    Raises:
        UnsupportedOp: an architecture that there are no kernels for; a kernel that spills registers, needs more shared
            memory than the architecture has, or something that a plain launch does not give.
        UsageError: `out` exists and is not empty.
        MissingDependency: triton is not installed.
    """
    require_triton("compiling GPU kernels")
    import triton

    for arch in archs:
        check_arch(arch)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; give a new folder, or empty it first.")
    out.mkdir(parents=True, exist_ok=True)
    variants = {launch.variant.id: launch.variant for program in programs for launch in program.launches}
    kernels = []
    with _compiler():
        for name, variant in sorted(variants.items()):
            cubins = []
            for arch in archs:
                cubin, data = compile_variant(variant, arch)
                (out / cubin.file).write_bytes(data)
                cubins.append(cubin)
            kernels.append(Kernel(
                id=name, kernel=variant.kernel, dtype=variant.dtype, signature=list(variant.signature),  # type: ignore[arg-type]
                constants=dict(variant.constants), num_warps=variant.num_warps, num_stages=variant.num_stages,
                cubins=cubins,
            ))  # fmt: skip
    manifest = Manifest(
        triton_version=triton.__version__, options=COMPILE_OPTIONS, archs=list(archs), kernels=kernels,
        programs=[ProgramOf.model_validate(program.to_dict()) for program in programs],
    )  # fmt: skip
    (out / FILE_NAME).write_text(manifest.model_dump_json(indent=1) + "\n")
    return manifest


def check_arch(arch: str) -> None:
    """Raise UnsupportedOp for an architecture without kernels, with the list of those that have them."""
    if arch not in ARCHS:
        raise UnsupportedOp(
            f"no GPU kernels for {arch!r}; there are some for {', '.join(ARCHS)}. Older GPUs (sm_75 and before) lack "
            "the matrix instructions that Triton uses: run the op's function body there."
        )


def compile_variant(variant: Variant, arch: str) -> tuple[Cubin, bytes]:
    """One variant for one architecture; call it inside `_compiler()`."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource, compile

    function, signature = load_kernel(variant.kernel), dict(variant.signature)
    aligned = [["tt.divisibility", _POINTER_ALIGNMENT]]
    source = ASTSource(
        function,
        {name: signature.get(name, "constexpr") for name in function.arg_names},
        dict(variant.constants),
        {(function.arg_names.index(name),): aligned for name, kind in variant.signature if kind.startswith("*")},
    )
    capability = ARCHS[arch][0]
    options = {**COMPILE_OPTIONS, "num_warps": variant.num_warps, "num_stages": variant.num_stages}
    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    data, ptx, metadata = compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata
    abi = elf_abi(data)
    cubin = Cubin(
        arch=arch, file=f"{variant.id}.{arch}.cubin", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data),
        symbol=metadata.name, num_threads=metadata.num_warps * metadata.warp_size, shared_bytes=metadata.shared,
        parameters=parse_parameters(ptx, [name for name, _ in variant.signature]),
        resources=parse_resources(log.getvalue()), ptx_version=parse_ptx_version(ptx), elf_os_abi=abi[0],
        elf_abi_version=abi[1], ptxas_version=get_ptxas(capability).version,
    )  # fmt: skip
    check_cubin(variant, cubin, metadata)
    return cubin, data


def check_cubin(variant: Variant, cubin: Cubin, metadata: Any) -> None:
    """Refuse what a plain launch cannot give, spills, and too much shared memory.

    Raises:
        UnsupportedOp: as said; the message names the kernel, what was found and what to change.
    """
    where, limit = f"{variant.id} for {cubin.arch}", ARCHS[cubin.arch][1]
    for name, expected in (
        ("num_ctas", 1), ("global_scratch_size", 0), ("profile_scratch_size", 0), ("launch_cooperative_grid", False),
        ("launch_pdl", False),
    ):  # fmt: skip
        found = getattr(metadata, name)
        if found != expected:
            raise UnsupportedOp(
                f"{where}: {name} is {found}, expected {expected}: the launchers give a kernel neither clusters, "
                "scratch memory, cooperative grids nor programmatic dependent launch. Change the kernel or its options."
            )
    spilled = cubin.resources.spill_store_bytes + cubin.resources.spill_load_bytes
    if spilled:
        raise UnsupportedOp(
            f"{where}: {spilled} bytes of registers spill to memory ({cubin.resources.registers} registers a thread), "
            "expected none. Use smaller tiles or more warps in programs.py."
        )
    if cubin.shared_bytes > limit:
        raise UnsupportedOp(
            f"{where}: {cubin.shared_bytes} bytes of shared memory, the architecture has {limit} per block. "
            "Use smaller tiles in programs.py."
        )


@contextlib.contextmanager
def _compiler() -> Iterator[None]:
    """Triton's settings that decide the bytes: no source paths in the cubin, an empty cache, its own ptxas."""
    from triton import knobs

    if knobs.runtime.interpret:
        raise UsageError("TRITON_INTERPRET is set, so that Triton compiles nothing; unset it and start again.")
    with tempfile.TemporaryDirectory() as cache, knobs.compilation.scope(), knobs.cache.scope():
        knobs.compilation.disable_line_info = True
        knobs.cache.dir = cache
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on top of this file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edgeattn.runtime_plugins.tensorrt.aot", description=__doc__)
    parser.add_argument("out", type=Path, help="new folder for the cubins and their manifest")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help=f"of {', '.join(ARCHS)}; all by default")
    parser.add_argument("--model", nargs="+", help="names of the zoo; all that have an op of ours by default")
    parser.add_argument("--dtype", nargs="+", default=list(TRITON_TYPES), help=f"of {', '.join(TRITON_TYPES)}")
    given = parser.parse_args(arguments)
    try:
        manifest = compile_kernels(zoo_programs(given.model, given.dtype), given.arch, given.out)
    except EdgeAttnError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    count = sum(len(kernel.cubins) for kernel in manifest.kernels)
    print(f"{len(manifest.programs)} programs, {len(manifest.kernels)} kernels, {count} cubins in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
