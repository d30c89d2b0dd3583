"""CascadedGroupAttention in two launches: all heads of a window one after the other, then ReLU and projection.

A head takes the result of the head before, so one program does them all; what its threads exchange (q before the
depthwise convolution, results of heads) goes through a workspace, which stays in the cache of its multiprocessor.
"""

# Values in a kernel have no Python type.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .tiles import HIDDEN, attend, dequantize_and_shift, load_rows


@triton.jit
def depthwise(
    query, weight, scale_ptr, bias_ptr, tokens, win_h, win_w, side, KEY_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(key width, tokens) in float32: the side x side convolution of `query` inside the window."""
    width, at = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    y, x, middle = at // win_w, at % win_w, side // 2
    sums = tl.full([BLOCK_D, BLOCK_N], 0.0, tl.float32)
    # Only the taps that reach into the window.
    for i in range(tl.maximum(0, middle - win_h + 1), tl.minimum(side, middle + win_h)):
        for j in range(tl.maximum(0, middle - win_w + 1), tl.minimum(side, middle + win_w)):
            from_y, from_x = y + i - middle, x + j - middle
            inside = (from_y >= 0) & (from_y < win_h) & (from_x >= 0) & (from_x < win_w)
            source = tl.where(inside, from_y * win_w + from_x, tokens)
            tap = tl.load(weight + (width * side + i) * side + j, width < KEY_DIM, 0.0).to(tl.float32)
            sums += tap[:, None] * load_rows(query, width, source, tokens, KEY_DIM, tokens)
    return dequantize_and_shift(sums, scale_ptr, bias_ptr, width, KEY_DIM)


@triton.jit
def project_head(
    x, before, weight, scale, bias, rows, row_count, pixels, pixel_count, tokens, value_dim, before_dim,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(rows, tokens) in float32 of a head's projection; its input is its part of x plus the head before."""
    dtype = x.dtype.element_ty
    at = tl.arange(0, BLOCK_N)
    sums = tl.full([rows.shape[0], BLOCK_N], 0.0, tl.float32)
    for start in range(0, value_dim, BLOCK_C):
        part = start + tl.arange(0, BLOCK_C)
        own = load_rows(x, part, pixels, pixel_count, value_dim, pixel_count).to(tl.float32)
        source = own + load_rows(before, part, at, tokens, before_dim, tokens)
        weights = load_rows(weight, rows, part, value_dim, row_count, value_dim)
        weights = weights.to(tl.float32).to(dtype)  # int8 has no direct way to bfloat16 in the interpreter
        sums = tl.dot(weights, source.to(dtype), sums, input_precision="ieee")
    return dequantize_and_shift(sums, scale, bias, rows, row_count)


@triton.jit
def cascaded_heads(
    x, qkv_weight, qkv_scale, qkv_bias, dw_weight, dw_scale, dw_bias, attention_bias,
    channels, height, width, win_h, win_w, heads, side, qkv, results,
    KEY_DIM: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (window columns, window rows, batch); qkv is (windows, 2d + v, tokens), results (windows, C, tokens).

    BLOCK_N holds all tokens of a window; keys pass in tiles of BLOCK_K, channels of v in tiles of BLOCK_V.
    """
    dtype = x.dtype.element_ty
    tokens, value_dim, pixel_count = win_h * win_w, channels // heads, height * width
    row_count = 2 * KEY_DIM + value_dim
    window = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    qkv += window.to(tl.int64) * row_count * tokens
    results += window.to(tl.int64) * channels * tokens
    x += tl.program_id(2).to(tl.int64) * channels * pixel_count
    at, key = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    y, column = tl.program_id(1) * win_h + at // win_w, tl.program_id(0) * win_w + at % win_w
    in_map = (at < tokens) & (y < height) & (column < width)
    pixels = tl.where(in_map, y * width + column, pixel_count)  # beyond the map: the zeros that pad it
    before_dim = tokens * 0  # no head before the first
    for _ in range(heads):
        for first in range(0, row_count, BLOCK_V):
            rows = first + tl.arange(0, BLOCK_V)
            projected = project_head(
                x, results - value_dim * tokens, qkv_weight, qkv_scale, qkv_bias, rows, row_count, pixels, pixel_count,
                tokens, value_dim, before_dim, BLOCK_C, BLOCK_N,
            )  # fmt: skip
            mask = (rows[:, None] < row_count) & (at[None, :] < tokens)
            tl.store(qkv + rows[:, None] * tokens + at[None, :], projected, mask)
        tl.debug_barrier()  # other threads read it than wrote it
        q = depthwise(qkv, dw_weight, dw_scale, dw_bias, tokens, win_h, win_w, side, KEY_DIM, BLOCK_N, BLOCK_D)
        q = tl.trans(q.to(dtype))
        for first in range(0, value_dim, BLOCK_V):
            value = first + tl.arange(0, BLOCK_V)
            peak = tl.full([BLOCK_N], HIDDEN, tl.float32)
            total = tl.full([BLOCK_N], 0.0, tl.float32)
            result = tl.full([BLOCK_N, BLOCK_V], 0.0, tl.float32)
            for start in range(0, tokens, BLOCK_K):
                keys = start + tl.arange(0, BLOCK_K)
                k = load_rows(qkv + KEY_DIM * tokens, key, keys, tokens, KEY_DIM, tokens).to(dtype)
                v = load_rows(qkv + 2 * KEY_DIM * tokens, value, keys, tokens, value_dim, tokens).to(dtype)
                logits = tl.dot(q, k, input_precision="ieee") * SCALE
                logits += load_rows(attention_bias, at, keys, tokens, tokens, tokens).to(tl.float32)
                logits = tl.where(keys[None, :] < tokens, logits, HIDDEN)
                peak, total, result = attend(logits, tl.trans(v), peak, total, result)
            mask = (at[:, None] < tokens) & (value[None, :] < value_dim)
            tl.store(results + at[:, None] + value[None, :] * tokens, result / total[:, None], mask)
        tl.debug_barrier()  # the next head reads these results, and overwrites qkv
        before_dim = value_dim
        x += value_dim * pixel_count
        results += value_dim * tokens
        attention_bias += tokens * tokens
        qkv_weight += row_count * value_dim
        qkv_bias += row_count
        dw_weight += KEY_DIM * side * side
        dw_bias += KEY_DIM
        if qkv_scale is not None:
            qkv_scale += row_count
            dw_scale += KEY_DIM


@triton.jit
def project_windows(
    results, weight, scale, bias, channels, height, width, win_h, win_w, out,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Grid (pixel tiles, output channel tiles, batch): projection of the ReLU of all heads, windows put together."""
    dtype = out.dtype.element_ty
    tokens, window_columns = win_h * win_w, tl.cdiv(width, win_w)
    pixels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    y, x = pixels // width, pixels % width
    windows = (tl.program_id(2) * tl.cdiv(height, win_h) + y // win_h) * window_columns + x // win_w
    source = windows.to(tl.int64) * channels * tokens + y % win_h * win_w + x % win_w
    in_map = pixels < height * width
    sums = tl.full([BLOCK_O, BLOCK_N], 0.0, tl.float32)
    for start in range(0, channels, BLOCK_C):
        part = start + tl.arange(0, BLOCK_C)
        mask = (part[:, None] < channels) & in_map[None, :]
        heads = tl.load(results + source[None, :] + part[:, None] * tokens, mask, 0.0)
        active = tl.where(heads < 0, 0.0, heads)  # NaN stays, which a maximum would lose
        weights = load_rows(weight, rows, part, channels, channels, channels).to(tl.float32).to(dtype)
        sums = tl.dot(weights, active.to(dtype), sums, input_precision="ieee")
    sums = dequantize_and_shift(sums, scale, bias, rows, channels)
    place = out + tl.program_id(2).to(tl.int64) * channels * height * width + pixels[None, :]
    tl.store(place + rows[:, None] * height * width, sums, (rows[:, None] < channels) & in_map[None, :])
