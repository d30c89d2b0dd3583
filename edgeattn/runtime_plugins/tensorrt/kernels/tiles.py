"""Tile arithmetic that several ops share."""

# Values in a kernel have no Python type.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # logit of a key that does not exist; finite, so that a row without keys makes no NaN


@triton.jit
def load_rows(pointer, rows, columns, width, row_count, column_count):
    """Tile of a row-major matrix with `width` columns in memory; zero outside of its first rows and columns."""
    mask = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(pointer + rows[:, None] * width + columns[None, :], mask, 0.0)


@triton.jit
def dequantize_and_shift(product, scale_ptr, bias_ptr, rows, row_count):
    """Scale of an int8 weight (None for a float one) and bias, both per row, on a float32 product."""
    mask = rows < row_count
    if scale_ptr is not None:
        product *= tl.load(scale_ptr + rows, mask, 0.0).to(tl.float32)[:, None]
    return product + tl.load(bias_ptr + rows, mask, 0.0).to(tl.float32)[:, None]


@triton.jit
def attend(logits, values, peak, total, result):
    """Fold a tile of keys into a softmax that has seen others (Milakov and Gimelshein, arXiv 1805.02867).

    logits (queries, keys) in float32, values (keys, width); peak and total (queries) are the running maximum and sum,
    result (queries, width) the weighted values: divide it by total at the end.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    fade = tl.exp(peak - new_peak)
    # The sum is of the rounded weights, so that the weights used add up to one.
    weights = tl.exp(logits - new_peak[:, None]).to(values.dtype)
    total = total * fade + tl.sum(weights.to(tl.float32), 1)
    result = tl.dot(weights, values, result * fade[:, None], input_precision="ieee")
    return new_peak, total, result
