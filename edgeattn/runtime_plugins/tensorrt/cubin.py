"""What a compiled kernel says about itself: parameters in its PTX, ABI in its ELF header, resources in ptxas' log."""

from __future__ import annotations

import dataclasses
import re

from edgeattn.errors import UnsupportedOp

_C_TYPES = {"u64": ("pointer", 8), "u32": ("int32_t", 4)}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One kernel parameter; `name` is "" for those that Triton appends, to be passed as null."""

    name: str
    c_type: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas gave one thread."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int


def parse_ptx_version(ptx: str) -> str:
    """The `.version` of a PTX text, such as "8.8"."""
    return _find(r"^\.version (\d+\.\d+)", ptx, "a .version line in the PTX")[1]


def parse_parameters(ptx: str, names: list[str]) -> list[Parameter]:
    """All parameters of the entry, in order; the first ones are `names`.

    Raises:
        UnsupportedOp: fewer parameters than names, or one of an unexpected type.
    """
    entry = _find(r"\.entry \w+\((.*?)\)", ptx, "an entry in the PTX")[1]
    types = re.findall(r"\.param \.(\w+)", entry)
    if len(types) < len(names) or set(types) - set(_C_TYPES) or set(types[len(names) :]) - {"u64"}:
        raise UnsupportedOp(
            f"the compiled kernel takes {types}; expected {len(names)} parameters ({', '.join(names)}) of types "
            f"{', '.join(_C_TYPES)}, then pointers only. This version of Triton is not known to edgeattn."
        )
    parameters, offset = [], 0
    for i, kind in enumerate(types):
        c_type, size = _C_TYPES[kind]
        offset = -(-offset // size) * size
        parameters.append(Parameter(names[i] if i < len(names) else "", c_type, offset, size))
        offset += size
    return parameters


def parse_resources(log: str) -> Resources:
    """From the text that `ptxas -v` prints."""
    bytes_of = _find(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log, "spills")
    used = _find(r"Used (\d+) registers", log, "registers")
    return Resources(int(used[1]), int(bytes_of[2]), int(bytes_of[3]), int(bytes_of[1]))


def elf_abi(cubin: bytes) -> tuple[int, int]:
    """(OS ABI, ABI version) of a cubin; a driver loads the versions that it knows."""
    if cubin[:4] != b"\x7fELF":
        raise UnsupportedOp(f"the compiled kernel is not an ELF file: it starts with {cubin[:4]!r}.")
    return cubin[7], cubin[8]


def _find(pattern: str, text: str, what: str) -> re.Match[str]:
    match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise UnsupportedOp(f"no {what}, in the output of this version of Triton: {text[:200]!r}")
    return match
