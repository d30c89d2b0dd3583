"""The manifest beside the cubins: a JSON file that a generator of C++ reads. `Manifest` is its schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgeattn.runtime_plugins.tensorrt.cubin import Parameter, Resources

FILE_NAME = "manifest.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cubin(_Strict):
    """One variant compiled for one architecture. A launch has num_threads x 1 x 1 threads per block."""

    arch: str
    file: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size_bytes: int
    symbol: str
    num_threads: int
    shared_bytes: int
    parameters: list[Parameter]
    resources: Resources
    ptx_version: str
    elf_os_abi: int
    elf_abi_version: int
    ptxas_version: str


class Kernel(_Strict):
    """One variant: see `program.Variant`."""

    id: str
    kernel: str
    dtype: Literal["float16", "bfloat16", "float32"]
    signature: list[tuple[str, str]]
    constants: dict[str, int | float | None]
    num_warps: int
    num_stages: int
    cubins: list[Cubin]


class LaunchOf(_Strict):
    """One launch: a kernel's id, three size expressions, arguments in the order of its signature."""

    variant: str
    grid: tuple[Any, Any, Any]
    arguments: list[tuple[Literal["input", "workspace", "output", "int32"], Any]]


class ProgramOf(_Strict):
    """One op with its structural sizes: see `program.Program`."""

    op: str
    dtype: Literal["float16", "bfloat16", "float32"]
    shapes: list[list[int | str]]
    attributes: dict[str, Any]
    workspaces: list[Any]
    launches: list[LaunchOf]


class Manifest(_Strict):
    """Everything a launcher needs to know."""

    schema_version: Literal[1] = 1
    triton_version: str
    options: dict[str, bool | int]
    archs: list[str]
    kernels: list[Kernel]
    programs: list[ProgramOf]
