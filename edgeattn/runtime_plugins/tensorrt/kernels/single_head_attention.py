"""SingleHeadAttention in one launch: statistics of the map, projection of the tiles it needs, softmax attention.

Every program computes the statistics and projects the keys again; maps are small, a launch costs more.
"""

# Values in a kernel have no Python type.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .tiles import HIDDEN, attend, dequantize_and_shift, load_rows


@triton.jit
def map_statistics(x, count, EPSILON: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1 / deviation of `count` numbers; the variance is that of the centred numbers, which cancels nothing."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, count, BLOCK):
        sums += tl.load(x + start + offsets, start + offsets < count, 0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / count
    squares = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + offsets < count
        centred = tl.load(x + start + offsets, inside, 0.0).to(tl.float32) - mean
        squares += tl.where(inside, centred * centred, 0.0)
    return mean, 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / count + EPSILON)


@triton.jit
def project(
    x, weight_ptr, scale_ptr, bias_ptr, first_row, rows, row_count, columns, channels, tokens, mean, inverse,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of the projection for some tokens: (rows, columns) in the type of x, from the normalised map."""
    dtype = x.dtype.element_ty
    sums = tl.full([rows.shape[0], columns.shape[0]], 0.0, tl.float32)
    part = tl.arange(0, BLOCK_C)
    weight_rows = weight_ptr + first_row * channels
    for start in range(0, channels, BLOCK_C):
        weight = load_rows(weight_rows + start, rows, part, channels, row_count, channels - start)
        tile = load_rows(x + start * tokens, part, columns, tokens, channels - start, tokens)
        normed = (tile.to(tl.float32) - mean) * inverse  # channels that do not exist meet a zero weight
        weight = weight.to(tl.float32).to(dtype)  # int8 has no direct way to bfloat16 in the interpreter
        sums = tl.dot(weight, normed.to(dtype), sums, input_precision="ieee")
    if scale_ptr is not None:
        scale_ptr += first_row
    return dequantize_and_shift(sums, scale_ptr, bias_ptr + first_row, rows, row_count).to(dtype)


@triton.jit
def single_head_attention(
    x, weight, scale, bias, channels, tokens, out,
    KEY_DIM: tl.constexpr, SCALE: tl.constexpr, EPSILON: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, value tiles, batch)."""
    map_start = tl.program_id(2).to(tl.int64) * channels * tokens
    x += map_start
    mean, inverse = map_statistics(x, channels * tokens, EPSILON, 1024)
    queries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_value = tl.program_id(1) * BLOCK_V
    width, value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    values = channels - first_value
    q = project(
        x, weight, scale, bias, 0, width, KEY_DIM, queries, channels, tokens, mean, inverse, BLOCK_C
    )  # fmt: skip
    peak = tl.full([BLOCK_N], HIDDEN, tl.float32)
    total = tl.full([BLOCK_N], 0.0, tl.float32)
    result = tl.full([BLOCK_N, BLOCK_V], 0.0, tl.float32)
    for start in range(0, tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = project(
            x, weight, scale, bias, KEY_DIM, width, KEY_DIM, keys, channels, tokens, mean, inverse, BLOCK_C
        )  # fmt: skip
        v = project(
            x, weight, scale, bias, 2 * KEY_DIM + first_value, value, values, keys, channels, tokens, mean, inverse,
            BLOCK_C,
        )  # fmt: skip
        logits = tl.dot(tl.trans(q), k, input_precision="ieee") * SCALE
        logits = tl.where(keys[None, :] < tokens, logits, HIDDEN)
        peak, total, result = attend(logits, tl.trans(v), peak, total, result)
    out += map_start + first_value * tokens
    mask = (queries[:, None] < tokens) & (value[None, :] < values)
    tl.store(out + queries[:, None] + value[None, :] * tokens, result / total[:, None], mask)
