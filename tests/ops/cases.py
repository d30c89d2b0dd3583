"""Inputs and attributes of every op, by readable case name. An op without cases here fails the table-driven test."""

import numpy as np

# batch, channels, grid, heads, key width, window, kernel
CASCADED = {
    "one-window": (1, 32, (7, 7), 4, 16, (7, 7), 5),
    "windows": (2, 24, (14, 14), 3, 8, (7, 7), 7),
    "padded-window": (1, 24, (9, 16), 2, 16, (7, 7), 3),
    "rectangular-window": (2, 20, (5, 3), 2, 4, (5, 3), 3),
    "one-token": (3, 8, (1, 1), 1, 4, (1, 1), 1),
    "odd-width": (1, 15, (4, 4), 3, 5, (4, 4), 3),
}
# batch, channels, grid, key width
SINGLE_HEAD = {
    "square": (1, 48, (14, 14), 16), "rectangle": (2, 66, (5, 9), 16), "odd-width": (1, 75, (4, 4), 16),
    "one-token": (3, 8, (1, 1), 4), "narrow": (2, 3, (7, 2), 5),
}  # fmt: skip
# batch, grid, heads, head width
LINEAR = {
    "square": (1, (14, 14), 2, 16), "rectangle": (2, (5, 9), 3, 8), "odd-width": (1, (7, 7), 1, 21),
    "one-token": (3, (1, 1), 2, 4), "many-tokens": (1, (40, 30), 2, 8),
}  # fmt: skip
# batch, grid, window, low heads, high heads, head width
HILO = {
    "litv2-s": (1, (14, 14), 2, 10, 2, 32), "rectangle": (2, (6, 10), 2, 3, 1, 8),
    "big-window": (1, (9, 6), 3, 1, 2, 5), "one-window": (2, (4, 4), 4, 1, 1, 16),
    "window-of-one": (1, (5, 3), 1, 2, 1, 4),
}  # fmt: skip


def make_cascaded(batch, channels, grid, heads, key_dim, window, kernel, seed=0):
    rng = np.random.default_rng(seed)
    value, tokens = channels // heads, window[0] * window[1]
    width = heads * (2 * key_dim + value)
    inputs = {
        "x": rng.normal(size=(batch, channels, *grid)),
        "qkv_weight": rng.normal(size=(width, value, 1, 1)) / value**0.5, "qkv_bias": rng.normal(size=width) * 0.1,
        "dw_weight": rng.normal(size=(heads * key_dim, 1, kernel, kernel)) / kernel,
        "dw_bias": rng.normal(size=heads * key_dim) * 0.1, "attention_bias": rng.normal(size=(heads, tokens, tokens)),
        "proj_weight": rng.normal(size=(channels, channels, 1, 1)) / channels**0.5,
        "proj_bias": rng.normal(size=channels) * 0.1,
    }  # fmt: skip
    return inputs, {"num_heads": heads, "key_dim": key_dim, "window": list(window), "scale": key_dim**-0.5}


def make_single_head(batch, channels, grid, key_dim, seed=0):
    rng = np.random.default_rng(seed)
    width = 2 * key_dim + channels
    inputs = {
        "x": rng.normal(size=(batch, channels, *grid)) * 3 + 1,
        "qkv_weight": rng.normal(size=(width, channels, 1, 1)) / channels**0.5,
        "qkv_bias": rng.normal(size=width) * 0.1,
    }  # fmt: skip
    return inputs, {"key_dim": key_dim, "scale": key_dim**-0.5, "epsilon": 1e-5}


def make_linear(batch, grid, heads, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    channels = heads * head_dim
    inputs = {
        "qk": rng.normal(size=(batch, 2 * channels, *grid)) * 2, "v": rng.normal(size=(batch, channels, *grid)) + 0.5,
    }  # fmt: skip
    return inputs, {"num_heads": heads, "epsilon": 1e-6}


def make_hilo(batch, grid, window, low, high, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    tokens = grid[0] * grid[1]
    inputs = {
        "lo_q": rng.normal(size=(batch, tokens, low * head_dim)),
        "lo_kv": rng.normal(size=(batch, tokens // window**2, 2 * low * head_dim)),
        "hi_qkv": rng.normal(size=(batch, tokens, 3 * high * head_dim)),
    }  # fmt: skip
    return inputs, {"grid": list(grid), "window": window, "head_dim": head_dim, "scale": head_dim**-0.5}


MAKERS = {
    "CascadedGroupAttention": (make_cascaded, CASCADED), "SingleHeadAttention": (make_single_head, SINGLE_HEAD),
    "EluLinearAttention": (make_linear, LINEAR), "HiLoAttention": (make_hilo, HILO),
}  # fmt: skip


def case_of(op, case, dtype="float32"):
    """Inputs by name in a type, and attributes by name; for the quantized form of an op, those of the plain one."""
    maker, cases = MAKERS[plain_name(op)]
    inputs, attributes = maker(*cases[case])
    return {name: value.astype(dtype) for name, value in inputs.items()}, attributes


def plain_name(op):
    return op if op in MAKERS else op.removeprefix("Q")
