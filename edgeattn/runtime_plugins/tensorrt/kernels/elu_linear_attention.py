"""EluLinearAttention in one launch: every program sums keys times values over the map, then serves some queries."""

# Values in a kernel have no Python type.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .tiles import load_rows


@triton.jit
def feature(x):
    """elu(x) + 1 in float32; NaN stays, which a minimum would lose."""
    return tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))


@triton.jit
def elu_linear_attention(
    qk, v, channels, tokens, out, HEAD_DIM: tl.constexpr, EPSILON: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (shares of the queries, heads, batch)."""
    dtype = qk.dtype.element_ty
    first = tl.program_id(1) * HEAD_DIM
    v_start = (tl.program_id(2).to(tl.int64) * channels + first) * tokens
    q = qk + (tl.program_id(2).to(tl.int64) * 2 * channels + first) * tokens
    k = q + channels * tokens
    v += v_start
    rows, part = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    context = tl.full([BLOCK_D, BLOCK_D], 0.0, tl.float32)  # (value, key)
    key_sums = tl.full([BLOCK_D], 0.0, tl.float32)
    for start in range(0, tokens, BLOCK_N):
        at = start + part
        inside = (rows[:, None] < HEAD_DIM) & (at[None, :] < tokens)
        keys = feature(load_rows(k, rows, at, tokens, HEAD_DIM, tokens).to(tl.float32))
        keys = tl.where(inside, keys, 0.0).to(dtype)
        values = load_rows(v, rows, at, tokens, HEAD_DIM, tokens)
        context = tl.dot(values, tl.trans(keys), context, input_precision="ieee")
        key_sums += tl.sum(keys.to(tl.float32), 1)
    # The second product is in float32 whatever the type: sums over the map do not fit float16.
    for start in range(tl.program_id(0) * BLOCK_N, tokens, tl.num_programs(0) * BLOCK_N):
        at = start + part
        queries = feature(load_rows(q, rows, at, tokens, HEAD_DIM, tokens).to(tl.float32))
        sums = tl.dot(context, queries, input_precision="ieee")
        weights = tl.sum(key_sums[:, None] * queries, 0) + EPSILON * tokens
        mask = (rows[:, None] < HEAD_DIM) & (at[None, :] < tokens)
        tl.store(out + v_start + rows[:, None] * tokens + at[None, :], sums / weights[None, :], mask)
