"""Ahead-of-time compilation without a GPU: cubins, manifest, reproducible bytes, refusals."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pydantic
import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'edgeattn[kernels]'")

from triton import knobs

import edgeattn
from edgeattn.errors import UnsupportedOp, UsageError
from edgeattn.runtime_plugins.tensorrt import aot
from edgeattn.runtime_plugins.tensorrt.cubin import Parameter, parse_parameters, parse_resources
from edgeattn.runtime_plugins.tensorrt.manifest import FILE_NAME, Manifest
from edgeattn.runtime_plugins.tensorrt.zoo import zoo_programs

LITTLE = ["litv2_s"]  # one program of one kernel
PLAIN = SimpleNamespace(
    num_ctas=1, global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=False
)


def one_program_per_kernel():
    """Programs in float16 that together launch every kernel, the quantized forms where there are some."""
    found = {}
    for program in zoo_programs(dtypes=["float16"]):
        found[tuple(launch.variant.kernel for launch in program.launches)] = program
    return list(found.values())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot") / "out"
    return out, aot.compile_kernels(zoo_programs(LITTLE, ["float16"]), ["sm_87"], out)


def test_manifest_is_what_was_written(compiled):
    out, manifest = compiled
    text = (out / FILE_NAME).read_text()
    assert Manifest.model_validate_json(text) == manifest
    (kernel,), (program,) = manifest.kernels, manifest.programs
    (cubin,) = kernel.cubins
    data = (out / cubin.file).read_bytes()
    assert {path.name for path in out.iterdir()} == {FILE_NAME, cubin.file}
    assert cubin.sha256 == hashlib.sha256(data).hexdigest() and cubin.size_bytes == len(data)
    assert cubin.symbol.encode() in data and cubin.symbol == "hilo_attention"
    assert program.launches[0].variant == kernel.id and program.launches[0].grid == (7, 12, "B")
    assert (cubin.elf_abi_version, cubin.ptx_version, cubin.num_threads) == (7, "8.8", 128)
    wrong = json.loads(text) | {"unknown": 1}
    with pytest.raises(pydantic.ValidationError, match="unknown"):
        Manifest.model_validate(wrong)


def test_parameters_have_the_hidden_ones(compiled):
    (cubin,) = compiled[1].kernels[0].cubins
    assert [p.name for p in cubin.parameters] == [
        "lo_q", "lo_kv", "hi_qkv", "tokens", "pooled", "grid_width", "low", "high", "out", "", "",
    ]  # fmt: skip
    assert [p.offset for p in cubin.parameters] == [0, 8, 16, 24, 28, 32, 36, 40, 48, 56, 64]


def test_manifest_and_cubins_name_no_path_of_this_machine(compiled):
    out, _ = compiled
    for path in out.iterdir():
        assert str(Path(edgeattn.__file__).parent).encode() not in path.read_bytes()


def test_same_bytes_again(compiled, tmp_path):
    again = aot.compile_kernels(zoo_programs(LITTLE, ["float16"]), ["sm_87"], tmp_path)
    assert again == compiled[1]


@pytest.mark.slow
def test_same_bytes_from_another_folder_and_process(tmp_path):
    source = Path(edgeattn.__file__).parent
    # Without the finders of an editable install, which would lead back to the checkout.
    script = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__.startswith('_frozen_importlib')]; "
        "sys.path.insert(0, sys.argv[1]); from edgeattn.runtime_plugins.tensorrt import aot; "
        "assert aot.__file__.startswith(sys.argv[1]); sys.exit(aot.main(sys.argv[2:]))"
    )
    digests = []
    for i in range(2):
        place = tmp_path / f"copy{i}" / ("deeper" * i)
        shutil.copytree(source, place / "edgeattn", ignore=shutil.ignore_patterns("__pycache__"))
        out = place / "out"
        command = [
            sys.executable,
            "-c",
            script,
            str(place),
            str(out),
            "--arch",
            "sm_80",
            "sm_90a",
            "--model",
            "care_s0",
        ]
        subprocess.run(
            [*command, "--dtype", "float16"], check=True, cwd=place, env=os.environ | {"PYTHONHASHSEED": str(i)}
        )
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()})
    assert digests[0] == digests[1] and len(digests[0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_every_kernel_compiles_for_every_architecture(arch, tmp_path):
    programs = one_program_per_kernel()
    kernels = {launch.variant.kernel for program in programs for launch in program.launches}
    assert len(kernels) == 5
    manifest = aot.compile_kernels(programs, [arch], tmp_path)
    assert {kernel.kernel for kernel in manifest.kernels} == kernels
    for cubin in (cubin for kernel in manifest.kernels for cubin in kernel.cubins):
        assert cubin.resources.spill_store_bytes == 0 and cubin.resources.registers <= 255
        assert cubin.shared_bytes <= 48 << 10, "more needs an attribute that quickly deployable plugins do not set"
        assert cubin.elf_abi_version == (7 if aot.ARCHS[arch][0] < 90 else 8)


@pytest.mark.parametrize("arch", ["sm_72", "sm_75", "sm_90"])
def test_other_architectures_are_refused(arch, tmp_path):
    with pytest.raises(UnsupportedOp, match=f"no GPU kernels for '{arch}'; there are some for sm_80, .*, sm_120a"):
        aot.compile_kernels([], [arch], tmp_path)


@pytest.mark.parametrize(
    "changes, resources, shared, message",
    [
        ({"num_ctas": 2}, {}, 0, "num_ctas is 2, expected 1: the launchers give a kernel neither clusters"),
        ({"global_scratch_size": 64}, {}, 0, "global_scratch_size is 64, expected 0"),
        ({"profile_scratch_size": 8}, {}, 0, "profile_scratch_size is 8, expected 0"),
        ({"launch_cooperative_grid": True}, {}, 0, "launch_cooperative_grid is True"),
        ({"launch_pdl": True}, {}, 0, "launch_pdl is True, expected False"),
        ({}, {"spill_store_bytes": 8}, 0, "8 bytes of registers spill to memory .*Use smaller tiles or more warps"),
        ({}, {"spill_load_bytes": 4}, 0, "4 bytes of registers spill"),
        ({}, {}, (163 << 10) + 1, "166913 bytes of shared memory, the architecture has 166912 per block"),
    ],
)
def test_what_no_launcher_gives_is_refused(compiled, changes, resources, shared, message):
    (cubin,) = compiled[1].kernels[0].cubins
    variant = zoo_programs(LITTLE, ["float16"])[0].launches[0].variant
    aot.check_cubin(variant, cubin, PLAIN)
    found = cubin.resources.__dict__ | resources
    cubin = cubin.model_copy(update={"resources": SimpleNamespace(**found), "shared_bytes": shared})
    with pytest.raises(UnsupportedOp, match=f"{variant.id} for sm_87: {message}"):
        aot.check_cubin(variant, cubin, SimpleNamespace(**(PLAIN.__dict__ | changes)))


def test_used_folder_is_refused(compiled):
    with pytest.raises(UsageError, match="is not empty; give a new folder"):
        aot.compile_kernels([], ["sm_80"], compiled[0])


def test_interpreter_variable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(UsageError, match="TRITON_INTERPRET is set"):
        aot.compile_kernels([], ["sm_80"], tmp_path)


def test_command(tmp_path, capsys):
    assert aot.main([str(tmp_path / "out"), "--arch", "sm_99"]) == 2
    assert "no GPU kernels for 'sm_99'" in capsys.readouterr().err
    assert aot.main([str(tmp_path / "out"), "--arch", "sm_86", "--model", *LITTLE, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith("1 programs, 1 kernels, 1 cubins in ")


def test_parameters_of_an_entry():
    parameters = (".u64 .ptr .global .align 1 f_param_0", ".u32 f_param_1", ".u64 f_param_2")
    ptx = ".visible .entry f(\n" + ",\n".join(f"\t.param {p}" for p in parameters) + "\n)\n.reqntid 128\n"
    assert parse_parameters(ptx, ["x", "n"]) == [
        Parameter("x", "pointer", 0, 8), Parameter("n", "int32_t", 8, 4), Parameter("", "pointer", 16, 8),
    ]  # fmt: skip
    with pytest.raises(UnsupportedOp, match=r"takes .*'u32'.*; expected 4 parameters"):
        parse_parameters(ptx, ["x", "n", "m", "y"])
    with pytest.raises(UnsupportedOp, match="not known to edgeattn"):
        parse_parameters(ptx.replace("u32", "f64"), ["x", "n"])


def test_resources_of_a_log():
    log = (
        "ptxas info    : 0 bytes gmem\nptxas info    : Function properties for f\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 96 registers, used 1 barriers, 16 bytes cumulative stack size\n"
    )
    assert vars(parse_resources(log)) == {
        "registers": 96, "spill_store_bytes": 8, "spill_load_bytes": 4, "stack_bytes": 16,
    }  # fmt: skip
    with pytest.raises(UnsupportedOp, match="no spills, in the output of this version of Triton"):
        parse_resources("nothing")
