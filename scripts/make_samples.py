"""Write samples/eurosat64 from the EuroSAT NPZ files: the first pictures per class, JPEG quality 95, 4:4:4.

    python scripts/make_samples.py TRAIN.npz TEST.npz

Calibration pictures come from the training split, validation pictures from the test split.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgeattn.data.source import open_source

_OUT = Path("samples/eurosat64")
_PER_CLASS = {"calib": 40, "val": 100}


def write(npz: str, part: str) -> None:
    source = open_source(npz)
    assert source.class_names is not None
    counts = dict.fromkeys(source.class_names, 0)
    for sample in source:
        name = source.class_names[sample.label or 0]
        if counts[name] < _PER_CLASS[part]:
            folder = _OUT / part / name
            folder.mkdir(parents=True, exist_ok=True)
            sample.image.save(folder / f"{counts[name]:03d}.jpg", quality=95, subsampling=0)
            counts[name] += 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write(sys.argv[1], "calib")
    write(sys.argv[2], "val")
