"""dq: one program per query tile walks over the keys that tile may see."""

from __future__ import annotations

import triton
import triton.language as tl

from . import softmax, tiles, visibility


@triton.jit
def _gather_from_keys(
    sums,
    q,
    dout,
    offset,
    delta,
    keys,
    pairs,
    dropout,
    where,
    window,
    start,
    stop,
    unit,
    scale,
    softcap,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dq of a query tile, and to its rows' gradient of ALiBi's slope as far as somebody asks for
    it, what key tiles from start to stop contribute."""
    dq, dslope = sums
    k_rows, k_strides, v_rows, v_strides = keys
    bias_ptr, bias_strides, mask_ptr, mask_strides, slope, dslope_ptr = pairs
    seed, last_dropped, kept_scale, plane = dropout
    batch, head, rows = where
    n_keys, shift, left, right, lo, full_lo, full_hi, hi = window
    HOIST: tl.constexpr = max(HEAD_DIM, HEAD_DIM_V) <= 128
    for tile in tl.range(start // BLOCK_K, stop // BLOCK_K):
        if EDGE:
            tile = tl.where(tile < full_lo // BLOCK_K, tile, tile + (full_hi - full_lo) // BLOCK_K)
        first_col = tl.multiple_of(tile * BLOCK_K, BLOCK_K)
        cols = first_col + tl.arange(0, BLOCK_K)[None, :]
        k = tiles.load_rows(k_rows, k_strides, first_col, lo, hi, BLOCK_K, HEAD_DIM, EDGE, False, HOIST)
        v = tiles.load_rows(v_rows, v_strides, first_col, lo, hi, BLOCK_K, HEAD_DIM_V, EDGE, False, HOIST)
        mask = None
        bias = None
        keep = None
        if mask_ptr is not None:
            mask = tiles.load_pairs(mask_ptr, mask_strides, batch, head, rows, cols, n_keys, EDGE)
        if bias_ptr is not None:
            bias = tiles.load_pairs(bias_ptr, bias_strides, batch, head, rows, cols, n_keys, EDGE)
        bias = softmax.added(bias, slope, rows, cols, shift)
        if seed is not None:
            keep = softmax.keep_mask(seed, last_dropped, plane, rows, first_col, BLOCK_K)
        ok = visibility.element_mask(rows, cols, n_keys, shift, left, right, mask, EDGE)
        if mask_ptr is not None:
            seen = visibility.any_row(ok)
            k = tiles.zero_unless(seen, k)
            v = tiles.zero_unless(seen, v)

        dots = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        dp = softmax.dropped(tl.dot(dout, v.T, input_precision=PRECISION), keep, kept_scale)
        s = softmax.scores(dots, scale, softcap, bias)
        p = softmax.probabilities(s, unit, offset[:, None], softcap, bias)
        ds = p * (dp - delta[:, None])
        if dslope_ptr is not None:
            moved = ds * softmax.distances(rows, cols, shift)
            dslope -= tl.sum(visibility.zero_hidden(moved, ok), 1)
        if softcap is not None:
            ds *= softmax.softcap_slope(dots, scale, softcap)
        ds = visibility.zero_hidden(ds, ok)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, dslope


@triton.jit(do_not_specialize=[
    "slopes_step", "last_dropped", "heads_kv", "group", "seqlen_q", "seqlen_k", "shift", "left", "right",
])  # fmt: skip
def dq_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    dout_ptr,
    dout_strides,
    offset_ptr,
    delta_ptr,
    dq_ptr,
    dq_strides,
    dslope_ptr,
    bias_ptr,
    bias_strides,
    mask_ptr,
    mask_strides,
    slopes_ptr,
    slopes_step,
    lengths_ptr,
    seed_ptr,
    last_dropped,
    kept_scale,
    scale,
    softcap,
    heads_kv,
    group,
    seqlen_q,
    seqlen_k,
    shift,
    left,
    right,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq = scale·dS·k of one query tile; and -Σ dS·|position - key| of its rows, if dslope_ptr is given."""
    tile, batch, head, head_kv = tiles.whose_tile(
        tl.program_id(0), tl.cdiv(seqlen_q, BLOCK_Q), heads_kv, group, right is not None
    )
    first_row = tile * BLOCK_Q
    plane = batch * heads_kv * group + head
    n_keys = visibility.keys_of(batch, lengths_ptr, seqlen_k)
    lo, full_lo, full_hi, hi = visibility.visible_keys(
        first_row, seqlen_q, n_keys, shift, left, right, BLOCK_Q, BLOCK_K
    )
    q_rows = tiles.rows_of_head(q_ptr, q_strides, batch, head, seqlen_q, BLOCK_Q, HEAD_DIM, False)
    dout_rows = tiles.rows_of_head(dout_ptr, dout_strides, batch, head, seqlen_q, BLOCK_Q, HEAD_DIM_V, False)
    q = tiles.load_rows(q_rows, q_strides, first_row, 0, seqlen_q, BLOCK_Q, HEAD_DIM, True, False)
    dout = tiles.load_rows(dout_rows, dout_strides, first_row, 0, seqlen_q, BLOCK_Q, HEAD_DIM_V, True, False)
    statistics = tiles.statistics_of(plane, seqlen_q)
    offset, _ = tiles.row_offsets(offset_ptr + statistics, first_row, seqlen_q, BLOCK_Q, False)
    delta = tl.load(delta_ptr + statistics + first_row + tl.arange(0, BLOCK_Q))
    unit = softmax.score_unit(scale, softcap, softmax.either(bias_ptr, slopes_ptr))
    k_rows = tiles.rows_of_head(k_ptr, k_strides, batch, head_kv, seqlen_k, BLOCK_K, HEAD_DIM, False)
    v_rows = tiles.rows_of_head(v_ptr, v_strides, batch, head_kv, seqlen_k, BLOCK_K, HEAD_DIM_V, False)
    keys = (k_rows, k_strides, v_rows, v_strides)
    pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, None, dslope_ptr)
    if slopes_ptr is not None:
        slope = softmax.slope_of(slopes_ptr, slopes_step, batch, head)
        pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, slope, dslope_ptr)
    dropout = (None, None, None, None)
    if seed_ptr is not None:
        dropout = (tl.load(seed_ptr), last_dropped, kept_scale, plane)
    where = (batch, head, visibility.row_numbers(first_row, seqlen_q, BLOCK_Q)[:, None])
    window = (n_keys, shift, left, right, lo, full_lo, full_hi, hi)
    edges_stop = hi - (full_hi - full_lo) + BLOCK_K - 1
    dslope = 0.0
    if dslope_ptr is not None:
        dslope = tl.zeros([BLOCK_Q], tl.float32)
    sums = (tl.zeros([BLOCK_Q, max(16, triton.next_power_of_2(HEAD_DIM))], tl.float32), dslope)
    sums = _gather_from_keys(
        sums, q, dout, offset, delta, keys, pairs, dropout, where, window, full_lo, full_hi, unit, scale,
        softcap, BLOCK_K, HEAD_DIM, HEAD_DIM_V, False, PRECISION,
    )  # fmt: skip
    sums = _gather_from_keys(
        sums, q, dout, offset, delta, keys, pairs, dropout, where, window, lo, edges_stop, unit,
        scale, softcap, BLOCK_K, HEAD_DIM, HEAD_DIM_V, True, PRECISION,
    )  # fmt: skip
    # An empty row may hold NaN in q and dout, and its neighbours' keys have met it.
    dq, dslope = sums
    empty = offset == float("inf")
    dq = tl.where(empty[:, None], 0.0, dq * scale)
    dq_rows = tiles.rows_of_head(dq_ptr, dq_strides, batch, head, seqlen_q, BLOCK_Q, HEAD_DIM, False)
    tiles.store_rows(dq_rows, dq_strides, first_row, seqlen_q, dq, BLOCK_Q, HEAD_DIM)
    if dslope_ptr is not None:
        index = first_row + tl.arange(0, BLOCK_Q)
        ptr = dslope_ptr + plane.to(tl.int64) * seqlen_q + index
        tl.store(ptr, tl.where(empty, 0.0, dslope), mask=index < seqlen_q)
