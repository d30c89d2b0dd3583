"""Inputs of every op on torch tensors, for the GPU kernels: the op tests' cases, and those that tiles make hard."""

import numpy as np
import torch

from edgeattn.ops.registry import load_ops
from edgeattn.quant.quantizer import quantize_weight
from tests.ops import cases

OPS = load_ops()
# Sizes as in tests/ops/cases.py: widths that no tile divides, maps that end inside a tile, one token, several pictures.
MORE = {
    "SingleHeadAttention": {
        "shvit-s2": (1, 66, (7, 7), 16), "batch": (3, 68, (4, 4), 16), "wide-keys": (1, 9, (3, 3), 37),
    },
    "EluLinearAttention": {"batch": (3, (5, 5), 1, 24), "care-s0": (1, (7, 7), 2, 32)},
    "HiLoAttention": {
        "batch": (3, (4, 6), 2, 1, 1, 16), "window-over-tiles": (1, (14, 7), 7, 1, 1, 8),
        "odd-tail": (1, (6, 22), 2, 1, 1, 8),
    },
    "CascadedGroupAttention": {
        "batch": (3, 20, (4, 4), 1, 16, (4, 4), 5), "efficientvit-m3": (1, 160, (4, 4), 2, 16, (4, 4), 5),
        "two-windows": (1, 24, (7, 9), 2, 4, (7, 7), 7),
    },
}  # fmt: skip
SLOW = {("CascadedGroupAttention", "windows"), ("SingleHeadAttention", "square")}


def cases_of(op):
    """Case names of an op or its quantized form."""
    return [*cases.MAKERS[cases.plain_name(op)][1], *MORE[cases.plain_name(op)]]


def inputs_of(op, case, dtype):
    """The op's inputs in order as tensors of a type, and its attributes; weights of a quantized form are int8."""
    plain = cases.plain_name(op)
    maker, shared = cases.MAKERS[plain]
    arrays, attributes = maker(*{**shared, **MORE[plain]}[case])
    tensors = []
    for name in OPS[op].inputs:
        if name.endswith("_scale") or (op != plain and name.endswith("_weight")):
            weight = torch.from_numpy(arrays[name.replace("scale", "weight")]).float()
            codes, scale = quantize_weight(weight)
            tensors.append(scale.to(dtype) if name.endswith("_scale") else codes)
        else:
            tensors.append(torch.from_numpy(arrays[name]).to(dtype))
    return tensors, attributes


def reference_of(op, tensors, attributes):
    """The definition in float64, of the very numbers that the kernel gets."""
    values = [x.double().numpy() if x.is_floating_point() else x.numpy() for x in tensors]
    return OPS[op].reference(*values, **attributes)[0]


def assert_close(found, want, limit, dtype):
    """Largest error relative to the spread of the reference, on top of rounding the result to its type."""
    assert found.dtype == dtype and tuple(found.shape) == want.shape
    error = np.abs(found.double().numpy() - want).max()
    rounding = torch.finfo(dtype).eps / 2 * np.abs(want).max()
    spread = np.ptp(want)
    assert error <= limit * spread + rounding, f"error {error / spread:.2e} of the spread, limit {limit:.0e}"
