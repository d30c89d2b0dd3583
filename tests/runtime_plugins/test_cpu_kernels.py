"""Every compiled instruction set against the definition of the op, through the plain C door."""

from __future__ import annotations

import dataclasses
import itertools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cga_cases import Case, assert_close, load_kernels, run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.ops.cascaded_group_attention import reference
from edgeattn.runtime_plugins import cpu

LIBRARY = load_kernels()
COMPILED = LIBRARY.edgeattn_compiled_isas().decode().split(",")
ISAS = [isa for isa in COMPILED if LIBRARY.edgeattn_runs_here(isa.encode())]
SOURCES = Path(cpu.__file__).parent

CASES = {
    "m0-stage1": Case(1, 64, 14, 14, 4, 16, (7, 7), 7),
    "m0-stage2": Case(2, 128, 7, 7, 4, 16, (7, 7), 5),
    "m5-stage1": Case(1, 192, 14, 14, 3, 16, (7, 7), 5),
    "m5-stage3": Case(1, 384, 4, 4, 4, 16, (4, 4), 7),
    "padded-both-sides": Case(2, 96, 9, 16, 3, 16, (7, 7), 7),
    "window-larger-than-grid": Case(1, 32, 3, 2, 2, 16, (7, 7), 3),
    "one-token": Case(3, 32, 1, 1, 2, 16, (1, 1), 1),
    "odd-widths": Case(2, 39, 5, 6, 3, 5, (5, 3), 3),
    "one-channel-a-head": Case(1, 2, 4, 4, 2, 1, (2, 2), 3),
    "wide-keys": Case(1, 24, 6, 6, 2, 37, (6, 6), 5),
    "kernel-larger-than-window": Case(1, 32, 4, 4, 2, 16, (2, 2), 7),
    "long-rows": Case(1, 16, 3, 21, 2, 8, (3, 21), 5),
    "kernel-11": Case(1, 16, 6, 9, 2, 8, (6, 9), 11),
}


def expected(case: Case, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return reference(**inputs, **case.attributes)[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(isa: str, name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    assert_close(run_kernel(LIBRARY, case, inputs, isa), expected(case, inputs))


@pytest.mark.parametrize("isa", ISAS)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 4), value_dim=st.integers(1, 36), key_dim=st.integers(1, 20),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)), window=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([1, 3, 5, 7]), threads=st.integers(1, 3), seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_matches_the_definition_for_any_shape(
    isa: str, batch: int, heads: int, value_dim: int, key_dim: int, grid: tuple[int, int], window: tuple[int, int],
    kernel: int, threads: int, seed: int,
) -> None:  # fmt: skip
    case = Case(batch, heads * value_dim, *grid, heads, key_dim, window, kernel)
    inputs = case.inputs(seed)
    want = expected(case, inputs)
    found = run_kernel(LIBRARY, case, inputs, isa, threads)
    # Drawn shapes include softmaxes over large logits in a row, which amplify rounding; a mistake is 1e-2 or more.
    assert np.abs(found - want).max() < 1e-4 * max(want.std(), 1.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["m0-stage2", "m5-stage1", "padded-both-sides"])
def test_threads_do_not_change_the_result(isa: str, name: str) -> None:
    case = dataclasses.replace(CASES[name], channels=CASES[name].channels * 2)
    inputs = case.inputs()
    one, two, three, eight = (run_kernel(LIBRARY, case, inputs, isa, threads) for threads in (1, 2, 3, 8))
    for other in (two, three, eight):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_logits_stay_finite(isa: str) -> None:
    case = Case(1, 32, 7, 7, 2, 16, (7, 7), 3)
    inputs = case.inputs()
    inputs["attention_bias"] *= 500
    # A logit of 2000 is known to 1e-4 in float32, and so is its exponential.
    assert_close(run_kernel(LIBRARY, case, inputs, isa), expected(case, inputs), limit=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_window(isa: str) -> None:
    case = Case(1, 32, 8, 4, 2, 16, (4, 4), 3)
    inputs = case.inputs()
    inputs["x"][0, 0, 1, 1] = np.nan
    found = run_kernel(LIBRARY, case, inputs, isa)
    assert np.isnan(found[0, :, :4]).any(axis=0).all()
    assert np.isfinite(found[0, :, 4:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_batch_of_none(isa: str) -> None:
    case = Case(1, 32, 4, 4, 2, 16, (4, 4), 3)
    inputs = case.inputs()
    inputs["x"] = inputs["x"][:0]
    assert run_kernel(LIBRARY, case, inputs, isa).shape == (0, 32, 4, 4)


def test_wrong_sizes_are_refused() -> None:
    case = Case(1, 32, 4, 4, 2, 16, (4, 4), 3)
    for change, message in (
        (dict(heads=3), "32 channels do not divide by 3 heads"),
        (dict(kernel=4), "depthwise kernel side 4 is even"),
        (dict(window=(0, 4)), "window height is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run_kernel(LIBRARY, dataclasses.replace(case, **change), case.inputs(), "scalar")


def test_instruction_sets() -> None:
    assert COMPILED[0] == "scalar"
    assert LIBRARY.edgeattn_best_isa().decode() == ISAS[-1]
    assert LIBRARY.edgeattn_abi_version() == cpu.ABI_VERSION
    case = Case(1, 32, 4, 4, 2, 16, (4, 4), 3)
    with pytest.raises(ValueError, match='unknown instruction set "mmx"; this library has: scalar'):
        run_kernel(LIBRARY, case, case.inputs(), "mmx")


def test_kernels_know_no_runtime() -> None:
    allowed = re.compile(r'^#include (<\w+>|"(cga|cga_plan|isa)\.h"|"cga_simd\.inl")$')
    for path in sorted((SOURCES / "kernels").iterdir()):
        lines = path.read_text().splitlines()
        includes = [line for line in lines if line.startswith("#include")]
        assert all(allowed.match(line) for line in includes), f"{path}: {includes}"
        assert not re.search("onnxruntime|openvino|Ort::", "\n".join(lines)), path


def test_vector_files_share_no_inline_code() -> None:
    """An inline library function compiled for AVX-512 could be the one that the linker keeps for everyone."""
    for path in (SOURCES / "kernels").glob("cga_*.cpp"):
        if "cga_simd.inl" in path.read_text():
            assert re.findall(r"#include (\S+)", path.read_text()) == ['"cga_plan.h"', '"cga_simd.inl"']
    assert re.findall(r"#include (\S+)", (SOURCES / "kernels/cga_plan.h").read_text()) == ["<cstddef>"]


# Flags of the vector sources, as in CMakeLists.txt.
_ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "neon": [],
}


def build_isa_check(compiler: str, isas: list[str], flags: list[str], folder: Path) -> Path:
    """The program of isa_check.cpp with these instruction sets compiled in."""
    define = "-DEDGEATTN_WITH_NEON" if isas == ["neon"] else "-DEDGEATTN_WITH_X86"
    common = [compiler, *flags, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", define,
              '-DEDGEATTN_VERSION="test"', f"-I{SOURCES}"]  # fmt: skip
    plain = [SOURCES / "kernels" / f"{n}.cpp" for n in ("cga", "cga_schedule", "cga_scalar", "isa")]
    sources = {source: [] for source in [*plain, SOURCES / "c_api.cpp", Path(__file__).with_name("isa_check.cpp")]}
    sources |= {SOURCES / "kernels" / f"cga_{isa}.cpp": [*_ISA_FLAGS[isa], "-ffp-contract=fast"] for isa in isas}
    for source, own in sources.items():
        subprocess.run([*common, *own, "-c", source, "-o", folder / f"{source.stem}.o"], check=True)
    subprocess.run([*common, *folder.glob("*.o"), "-o", folder / "isa_check"], check=True)
    return folder / "isa_check"


def run_isa_check(command: list[str | Path], isa: str) -> None:
    for case, threads in itertools.product(CASES.values(), (1, 2)):
        sizes = [*dataclasses.astuple(case)[:6], case.kernel, *case.window, threads]
        done = subprocess.run([*command, isa, *map(str, sizes)], capture_output=True, text=True)
        assert done.returncode == 0, f"{isa} {case}: {done.stdout}{done.stderr}"


@pytest.mark.slow
def test_neon_under_emulation(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu qemu-user)")
    run_isa_check([emulator, build_isa_check(compiler, ["neon"], ["-static", "-O3"], tmp_path)], "neon")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds the x86 kernels")
def test_no_sanitizer_finds_anything(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    assert compiler, "the kernels were built, so a compiler is here"
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = build_isa_check(compiler, ["avx2", "avx512"], flags, tmp_path)
    for isa in cpu.plugin_info().isas if cpu.missing_reason() is None else ("scalar",):
        run_isa_check([program], isa)
