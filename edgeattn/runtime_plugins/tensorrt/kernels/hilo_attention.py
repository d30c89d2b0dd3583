"""HiLoAttention in one launch: heads of both parts side by side, the Hi heads first, as in the output."""

# Values in a kernel have no Python type.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .tiles import HIDDEN, attend, load_rows


@triton.jit
def lo_head(q, k, v, out, pooled, tokens, low, total_width, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """A tile of queries over the pooled map; pointers are those of this head and picture."""
    rows, width, part = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    queries = load_rows(q, rows, width, low, tokens, HEAD_DIM)
    peak = tl.full([BLOCK_N], HIDDEN, tl.float32)
    total = tl.full([BLOCK_N], 0.0, tl.float32)
    result = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for start in range(0, pooled, BLOCK_N):
        at = start + part
        keys = load_rows(k, at, width, 2 * low, pooled, HEAD_DIM)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
        logits = tl.where(at[None, :] < pooled, logits, HIDDEN)
        values = load_rows(v, at, width, 2 * low, pooled, HEAD_DIM)
        peak, total, result = attend(logits, values, peak, total, result)
    mask = (rows[:, None] < tokens) & (width[None, :] < HEAD_DIM)
    tl.store(out + rows[:, None] * total_width + width[None, :], result / total[:, None], mask)


@triton.jit
def token_of(place, grid_width, WINDOW: tl.constexpr):
    """Token at a place of the order that goes window by window."""
    window, inner = place // (WINDOW * WINDOW), place % (WINDOW * WINDOW)
    columns = grid_width // WINDOW
    row = window // columns * WINDOW + inner // WINDOW
    return row * grid_width + window % columns * WINDOW + inner % WINDOW


@triton.jit
def hi_head(q, k, v, out, tokens, grid_width, high, total_width, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
            WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """A tile of queries in the order of the windows, each over its own window; pointers as in `lo_head`."""
    width, part = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * BLOCK_N
    places = first + part
    rows = tl.where(places < tokens, token_of(places, grid_width, WINDOW), tokens)
    queries = load_rows(q, rows, width, 3 * high, tokens, HEAD_DIM)
    peak = tl.full([BLOCK_N], HIDDEN, tl.float32)
    total = tl.full([BLOCK_N], 0.0, tl.float32)
    result = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    # From the first token of the first query's window to the last of the last one's.
    area: tl.constexpr = WINDOW * WINDOW
    end = tl.minimum(tokens, (first + BLOCK_N + area - 1) // area * area)
    for start in range(first // area * area, end, BLOCK_N):
        at = start + part
        key_rows = tl.where(at < end, token_of(at, grid_width, WINDOW), tokens)
        keys = load_rows(k, key_rows, width, 3 * high, tokens, HEAD_DIM)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE
        same = (places[:, None] // area == at[None, :] // area) & (at[None, :] < end)
        values = load_rows(v, key_rows, width, 3 * high, tokens, HEAD_DIM)
        peak, total, result = attend(tl.where(same, logits, HIDDEN), values, peak, total, result)
    mask = (rows[:, None] < tokens) & (width[None, :] < HEAD_DIM)
    tl.store(out + rows[:, None] * total_width + width[None, :], result / total[:, None], mask)


@triton.jit
def hilo_attention(
    lo_q, lo_kv, hi_qkv, tokens, pooled, grid_width, low, high, out,
    HEAD_DIM: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, Hi heads then Lo heads, batch)."""
    first, batch = tl.program_id(1) * HEAD_DIM, tl.program_id(2).to(tl.int64)
    out += batch * tokens * (high + low) + first
    if first < high:
        q = hi_qkv + batch * tokens * 3 * high + first
        hi_head(
            q, q + high, q + 2 * high, out, tokens, grid_width, high, high + low, HEAD_DIM, SCALE, WINDOW, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
    else:
        q = lo_q + batch * tokens * low + first - high
        k = lo_kv + batch * pooled * 2 * low + first - high
        lo_head(q, k, k + low, out, pooled, tokens, low, high + low, HEAD_DIM, SCALE, BLOCK_N, BLOCK_D)
