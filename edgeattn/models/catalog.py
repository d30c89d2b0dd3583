"""What is published about each model of the zoo, and what it costs to run. Plain data: importing this needs no torch.

Parameters and multiply-accumulates are those of `edgeattn.models.complexity` for one input; the tests count them again.
Accuracies are the authors' on ImageNet-1k (validation, top-1) unless said otherwise; nothing here was measured by us.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any

from edgeattn.errors import UsageError

OBTAIN = {
    "official": "--weights official",
    "hub": "timm's copy on the hub, such as --weights {hub}",
    "page": "download from the page, then --weights FILE",
    "none": "none published",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant.

    Attributes:
        macs: multiply-accumulates of one input of `input_size`.
        input_size: (height, width) in pixels; of the latents for DiT.
        top1: published ImageNet-1k top-1 in percent; `metric` is the text where something else was published.
        licence: of the official weights; None where none are published.
        paper: arXiv number.
        page: where the authors offer the weights.
        url: one file that can be fetched, an address or a hub id; None where only the page is known.
        hub: the same weights on the hub, converted by timm.
        sha256, sha256_prefix: digest of that file, or its first digits where only these are published.
    """

    name: str
    family: str
    parameters: int
    macs: int
    input_size: tuple[int, int]
    top1: float | None
    metric: str | None
    licence: str | None
    paper: str
    page: str
    url: str | None = None
    hub: str | None = None
    sha256: str | None = None
    sha256_prefix: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "obtain": self.obtain}

    @property
    def published(self) -> str:
        """The published figure as text; empty if there is none."""
        return f"{self.top1:.1f} %" if self.top1 is not None else self.metric or ""

    @property
    def obtain(self) -> str:
        """How the official weights are had: one of the keys of `OBTAIN`."""
        if self.licence is None:
            return "none"
        if self.url and (self.sha256 or self.sha256_prefix or not self.url.startswith("http")):
            return "official"
        return "hub" if self.hub else "page"


def _efficientvit() -> list[Entry]:
    release = "https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases"
    numbers = {
        "m0": (2_349_436, 79_193_600, 63.2), "m1": (2_980_560, 167_051_840, 68.4),
        "m2": (4_187_554, 201_035_712, 70.8), "m3": (6_900_722, 262_662_208, 73.4),
        "m4": (8_804_228, 299_308_544, 74.3), "m5": (12_473_772, 521_583_104, 77.1),
    }  # fmt: skip
    return [
        Entry(
            f"efficientvit_{size}", "EfficientViT", parameters, macs, (224, 224), top1, None, "MIT", "2305.07027",
            f"{release}/tag/v1.0", f"{release}/download/v1.0/efficientvit_{size}.pth",
            hub=f"timm:efficientvit_{size}.r224_in1k",
        )
        for size, (parameters, macs, top1) in numbers.items()
    ]  # fmt: skip


def _shvit() -> list[Entry]:
    release = "https://github.com/ysj9909/SHViT/releases"
    numbers = {
        "s1": (6_330_808, 241_320_768, 224, 72.8), "s2": (11_483_072, 365_394_896, 224, 75.2),
        "s3": (14_245_273, 600_570_164, 224, 77.4), "s4": (16_588_484, 986_216_960, 256, 79.4),
    }  # fmt: skip
    return [
        Entry(
            f"shvit_{size}", "SHViT", parameters, macs, (side, side), top1, None, "MIT", "2401.16456",
            f"{release}/tag/v1.0", f"{release}/download/v1.0/shvit_{size}.pth", hub=f"timm:shvit_{size}.in1k",
        )
        for size, (parameters, macs, side, top1) in numbers.items()
    ]  # fmt: skip


def _care() -> list[Entry]:
    numbers = {
        "s0": (7_340_000, 717_796_096, 78.4), "s1": (9_602_424, 1_028_617_600, 80.1),
        "s2": (19_481_288, 1_923_109_952, 82.1),
    }  # fmt: skip
    # The repository has no licence file; the card of the same authors' hub repository says MIT.
    return [
        Entry(
            f"care_{size}", "CARE", parameters, macs, (224, 224), top1, None, "unclear (hub card: MIT)", "2411.16170",
            "https://github.com/zhouyuan888888/CARE-Transformer",
        )
        for size, (parameters, macs, top1) in numbers.items()
    ]  # fmt: skip


def _litv2() -> list[Entry]:
    release = "https://github.com/ziplab/LITv2/releases"
    numbers = {
        "s": (27_844_000, 3_723_626_496, 224, 82.0), "m": (48_830_368, 7_463_043_072, 224, 83.3),
        "b": (86_520_704, 13_171_973_120, 224, 83.6), "b_384": (86_520_704, 39_646_044_160, 384, 84.7),
    }  # fmt: skip
    return [
        Entry(
            f"litv2_{size}", "LITv2", parameters, macs, (side, side), top1, None, "Apache-2.0", "2205.13213",
            f"{release}/tag/v1.0", f"{release}/download/v1.0/litv2_{size}.pth",
        )
        for size, (parameters, macs, side, top1) in numbers.items()
    ]  # fmt: skip


def _deit() -> list[Entry]:
    # Name here, name in the release, first digits of the SHA-256, which torch.hub's convention puts into the file name.
    numbers = {
        "tiny": ("tiny_patch16_224", "a1311bcf", 5_717_416, 1_253_683_200, 72.2),
        "small": ("small_patch16_224", "cd65a155", 22_050_664, 4_598_882_304, 79.9),
        "base": ("base_patch16_224", "b5f2ef4d", 86_567_656, 17_563_828_224, 81.8),
        "tiny_distilled": ("tiny_distilled_patch16_224", "b40b3cf7", 5_910_800, 1_261_003_776, 74.5),
        "small_distilled": ("small_distilled_patch16_224", "649709d9", 22_436_432, 4_624_140_288, 81.2),
        "base_distilled": ("base_distilled_patch16_224", "df68dfff", 87_338_192, 17_656_811_520, 83.4),
        "base_384": ("base_patch16_384", "8de9b5d1", 86_859_496, 55_484_350_464, 82.9),
        "base_distilled_384": ("base_distilled_patch16_384", "d0272ac0", 87_630_032, 55_591_342_080, 85.2),
    }
    return [
        Entry(
            f"deit_{size}", "DeiT", parameters, macs, (side := int(release[-3:]), side), top1, None, "Apache-2.0",
            "2012.12877", "https://github.com/facebookresearch/deit/blob/main/README_deit.md",
            f"https://dl.fbaipublicfiles.com/deit/deit_{release}-{prefix}.pth", hub=f"timm:deit_{release}.fb_in1k",
            sha256_prefix=prefix,
        )
        for size, (release, prefix, parameters, macs, top1) in numbers.items()
    ]  # fmt: skip


def _vggt() -> list[Entry]:
    # One picture, nothing tracked. The weights of VGGT-1B-Commercial (gated) allow commercial use, these do not.
    return [
        Entry(
            name, "VGGT", 1_256_537_516, 1_823_408_519_936, (518, 518), None, "AUC@30 89.98 (Co3D)",
            "VGGT (non-commercial)", "2503.11651", "https://huggingface.co/facebook/VGGT-1B",
            "hf-hub:facebook/VGGT-1B/model.safetensors",
        )
        for name in ("vggt", "vggt_1b")
    ]  # fmt: skip


def _dit() -> list[Entry]:
    numbers = {
        "s_2": (32_963_360, 6_055_673_856), "s_4": (32_945_024, 1_412_579_328), "s_8": (33_148_160, 357_974_016),
        "b_2": (130_512_416, 23_005_102_080), "b_4": (130_475_648, 5_565_186_048), "b_8": (130_881_536, 1_417_543_680),
        "l_2": (458_102_816, 80_697_622_528), "l_4": (458_053_760, 19_695_665_152),
        "l_8": (458_594_816, 5_011_406_848), "xl_2": (675_129_632, 118_621_421_568),
        "xl_4": (675_074_432, 29_043_671_040), "xl_8": (675_683_072, 7_392_411_648),
    }  # fmt: skip
    page = "https://github.com/facebookresearch/DiT"
    # Of XL/2 alone there are weights, for 256 px and, as DiT-XL-2-512x512.pt beside them, for 512 px (64x64 latents).
    published = {
        "metric": "FID 2.27 (256 px)", "licence": "CC BY-NC 4.0",
        "url": "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
    }  # fmt: skip
    none: dict[str, Any] = {"metric": None, "licence": None, "url": None}
    return [
        Entry(
            f"dit_{size}", "DiT", parameters, macs, (32, 32), None, paper="2212.09748", page=page,
            **(published if size == "xl_2" else none),
        )
        for size, (parameters, macs) in numbers.items()
    ]  # fmt: skip


CATALOG: dict[str, Entry] = {
    entry.name: entry for family in (_efficientvit, _shvit, _care, _litv2, _deit, _vggt, _dit) for entry in family()
}


def find(name: str) -> Entry | None:
    """The variant of that name, if the zoo has it."""
    return CATALOG.get(name)


def find_address(address: str) -> Entry | None:
    """The variant whose official file is at that address."""
    return next((entry for entry in CATALOG.values() if entry.url == address), None)


def matching(pattern: str = "*") -> list[Entry]:
    """The variants whose name matches a shell pattern, family by family.

    Raises:
        UsageError: none does; near names are suggested.
    """
    found = [entry for entry in CATALOG.values() if fnmatch.fnmatchcase(entry.name, pattern)]
    if found:
        return found
    near = difflib.get_close_matches(pattern.strip("*?"), CATALOG, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"the zoo has {', '.join(_families())}."
    raise UsageError(f"no model matches {pattern!r}: {hint} Patterns are those of a shell, e.g. 'deit_*'.")


def _families() -> list[str]:
    return sorted({f"{name.partition('_')[0]}_*" for name in CATALOG})
