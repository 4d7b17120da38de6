"""The gradient of a bias: one program per tile of the bias, over everything it broadcasts along.

A sum in a fixed order, in fp32, in registers: the same bits on every run, and never more memory
than the bias itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import softmax, tiles, visibility


@triton.jit(do_not_specialize=[
    "summed_batches", "summed_heads", "bias_heads",
    "slopes_step", "last_dropped", "heads_kv", "group", "seqlen_q", "seqlen_k", "shift", "left", "right",
])  # fmt: skip
def dbias_kernel(
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
    dbias_ptr,
    dbias_strides,
    summed_batches,
    summed_heads,
    bias_heads,
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
    """dbias = Σ P·(dP - delta) of one tile, over the axes where the bias has size 1.

    summed_batches, summed_heads: how many of each share an element of the bias. A stride of None
    in dbias_strides says the same of the rows or columns: then all their tiles are visited.
    """
    SUM_ROWS: tl.constexpr = dbias_strides[2] is None
    SUM_COLS: tl.constexpr = dbias_strides[3] is None
    row_tiles = 1 if SUM_ROWS else tl.cdiv(seqlen_q, BLOCK_Q)
    col_tiles = 1 if SUM_COLS else tl.cdiv(seqlen_k, BLOCK_K)
    col_tile = tl.program_id(0) % col_tiles
    row_tile = tl.program_id(0) // col_tiles % row_tiles
    plane = tl.program_id(0) // col_tiles // row_tiles
    bias_batch, bias_head = plane // bias_heads, plane % bias_heads
    heads_q = heads_kv * group
    unit = softmax.score_unit(scale, softcap, bias_ptr)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    first_col, stop_col = col_tile * BLOCK_K, col_tile * BLOCK_K + BLOCK_K
    first_row, stop_row = row_tile * BLOCK_Q, row_tile * BLOCK_Q + BLOCK_Q
    if SUM_COLS:
        stop_col = seqlen_k
    if SUM_ROWS:
        stop_row = seqlen_q

    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for nth_batch in tl.range(0, summed_batches):
        batch = bias_batch + nth_batch
        n_keys = visibility.keys_of(batch, lengths_ptr, seqlen_k)
        for nth_head in tl.range(0, summed_heads):
            head = bias_head + nth_head
            q_rows = tiles.rows_of_head(q_ptr, q_strides, batch, head, seqlen_q, BLOCK_Q, HEAD_DIM, False)
            k_rows = tiles.rows_of_head(
                k_ptr, k_strides, batch, head // group, seqlen_k, BLOCK_K, HEAD_DIM, False
            )
            v_rows = tiles.rows_of_head(
                v_ptr, v_strides, batch, head // group, seqlen_k, BLOCK_K, HEAD_DIM_V, False
            )
            dout_rows = tiles.rows_of_head(
                dout_ptr, dout_strides, batch, head, seqlen_q, BLOCK_Q, HEAD_DIM_V, False
            )
            slope = None
            if slopes_ptr is not None:
                slope = softmax.slope_of(slopes_ptr, slopes_step, batch, head)
            plane_q = batch * heads_q + head
            statistics = tiles.statistics_of(plane_q, seqlen_q)
            for row in tl.range(first_row, stop_row, BLOCK_Q):
                row = tl.multiple_of(row, BLOCK_Q)
                rows = visibility.row_numbers(row, seqlen_q, BLOCK_Q)[:, None]
                offset, hidden_to = tiles.row_offsets(offset_ptr + statistics, row, seqlen_q, BLOCK_Q, True)
                delta = tl.load(delta_ptr + statistics + row + tl.arange(0, BLOCK_Q))
                q = tiles.load_rows(
                    q_rows, q_strides, row, hidden_to, seqlen_q, BLOCK_Q, HEAD_DIM, True, False, False
                )
                dout = tiles.load_rows(
                    dout_rows, dout_strides, row, hidden_to, seqlen_q, BLOCK_Q, HEAD_DIM_V, True, False, False
                )
                lo, _, _, hi = visibility.visible_keys(
                    row, seqlen_q, n_keys, shift, left, right, BLOCK_Q, BLOCK_K
                )
                start = tl.maximum(first_col, lo // BLOCK_K * BLOCK_K)
                for col in tl.range(start, tl.minimum(stop_col, hi), BLOCK_K):
                    col = tl.multiple_of(col, BLOCK_K)
                    cols = col + tl.arange(0, BLOCK_K)[None, :]
                    k = tiles.load_rows(k_rows, k_strides, col, lo, hi, BLOCK_K, HEAD_DIM, True, False, False)
                    v = tiles.load_rows(
                        v_rows, v_strides, col, lo, hi, BLOCK_K, HEAD_DIM_V, True, False, False
                    )
                    mask = None
                    keep = None
                    if mask_ptr is not None:
                        mask = tiles.load_pairs(mask_ptr, mask_strides, batch, head, rows, cols, n_keys, True)
                    if seed is not None:
                        keep = softmax.keep_mask(seed, last_dropped, plane_q, rows, col, BLOCK_K)
                    ok = visibility.element_mask(rows, cols, n_keys, shift, left, right, mask, True)
                    bias = tiles.load_pairs(bias_ptr, bias_strides, batch, head, rows, cols, n_keys, True)
                    bias = softmax.added(bias, slope, rows, cols, shift)
                    dots = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
                    s = softmax.scores(dots, scale, softcap, bias)
                    p = softmax.probabilities(s, unit, offset[:, None], softcap, bias)
                    dp = softmax.dropped(tl.dot(dout, v.T, input_precision=PRECISION), keep, kept_scale)
                    total += visibility.zero_hidden(p * (dp - delta[:, None]), ok)

    ptr = dbias_ptr + bias_batch.to(tl.int64) * dbias_strides[0] + bias_head.to(tl.int64) * dbias_strides[1]
    rows = first_row + tl.arange(0, BLOCK_Q)[:, None]
    cols = first_col + tl.arange(0, BLOCK_K)[None, :]
    if SUM_ROWS:
        total = tl.sum(total, 0, keep_dims=True)
        rows = tl.zeros([1, 1], tl.int32)
    else:
        ptr += rows.to(tl.int64) * dbias_strides[2]
    if SUM_COLS:
        total = tl.sum(total, 1, keep_dims=True)
        cols = tl.zeros([1, 1], tl.int32)
    else:
        ptr += cols.to(tl.int64) * dbias_strides[3]
    inside = (rows < seqlen_q) & (cols < seqlen_k)
    tl.store(ptr + tl.zeros_like(inside).to(tl.int32), total.to(dbias_ptr.dtype.element_ty), mask=inside)
