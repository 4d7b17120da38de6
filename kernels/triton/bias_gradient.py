"""The gradient of a bias: one program per tile of the bias, over everything it broadcasts along.

A sum in a fixed order, in fp32, in registers: the same bits on every run, and never more memory
than the bias itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import softmax, tiles, visibility


@triton.jit
def _score_gradients(
    operands,
    strides,
    pairs,
    dropout,
    where,
    window,
    ranges,
    bits_ptr,
    number,
    unit,
    scale,
    softcap,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P·(dP - delta) of one tile of scores, [BLOCK_Q, BLOCK_K]. number: of its bits, if tiles have any."""
    q_rows, dout_rows, k_rows, v_rows, offset_ptr, delta_ptr = operands
    q_strides, dout_strides, k_strides, v_strides = strides
    bias_ptr, bias_strides, mask_ptr, mask_strides, slope = pairs
    seed, last_dropped, kept_scale, plane = dropout
    batch, head, row, col = where
    n_rows, n_keys, shift, left, right, lo, hi = window
    rows = visibility.row_numbers(row, n_rows, BLOCK_Q)[:, None]
    cols = col + tl.arange(0, BLOCK_K)[None, :]
    offset, hidden_to = tiles.row_offsets(offset_ptr, row, n_rows, BLOCK_Q, True)
    delta = tl.load(delta_ptr + row + tl.arange(0, BLOCK_Q))
    q = tiles.load_rows(q_rows, q_strides, row, hidden_to, n_rows, BLOCK_Q, HEAD_DIM, True, False, False)
    dout = tiles.load_rows(
        dout_rows, dout_strides, row, hidden_to, n_rows, BLOCK_Q, HEAD_DIM_V, True, False, False
    )
    k = tiles.load_rows(k_rows, k_strides, col, lo, hi, BLOCK_K, HEAD_DIM, True, False, False)
    v = tiles.load_rows(v_rows, v_strides, col, lo, hi, BLOCK_K, HEAD_DIM_V, True, False, False)
    mask = None
    keep = None
    if mask_ptr is not None:
        mask = tiles.load_pairs(mask_ptr, mask_strides, batch, head, rows, cols, n_keys, True)
    if ranges is not None:
        mask = visibility.in_ranges(ranges, rows, cols, SEGMENTS)
    if bits_ptr is not None:
        mask = visibility.bits_at(bits_ptr, number, rows, cols)
    if seed is not None:
        keep = softmax.keep_mask(seed, last_dropped, plane, rows, col, BLOCK_K)
    ok = visibility.element_mask(rows, cols, n_keys, shift, left, right, None, mask, True)
    bias = tiles.load_pairs(bias_ptr, bias_strides, batch, head, rows, cols, n_keys, True)
    bias = softmax.added(bias, slope, rows, cols, shift)
    dots = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
    s = softmax.scores(dots, scale, softcap, bias)
    p = softmax.probabilities(s, unit, offset[:, None], softcap, bias)
    dp = softmax.dropped(tl.dot(dout, v.T, input_precision=PRECISION), keep, kept_scale)
    return visibility.zero_hidden(p * (dp - delta[:, None]), ok)


@triton.jit(do_not_specialize=[
    "summed_batches", "summed_heads", "bias_heads", "bias_rows", "bias_cols",
    "slopes_step", "last_dropped", "heads_kv", "group", "seqlen_q", "seqlen_k", "shift", "left", "right",
    "sequences", "ranges_step",
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
    bias_rows,
    bias_cols,
    bias_ptr,
    bias_strides,
    mask_ptr,
    mask_strides,
    slopes_ptr,
    slopes_step,
    lengths_ptr,
    ranges_ptr,
    ranges_step,
    listing,
    packing,
    sequences,
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
    SEGMENTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dbias = Σ P·(dP - delta) of one tile, over the axes where the bias has size 1.

    summed_batches, summed_heads: how many of each share an element of the bias. A stride of None
    in dbias_strides says the same of the rows or columns: then all their tiles are visited.
    """
    tiles_ptr, tiles_strides, bits_ptr = listing[2], listing[3], listing[4]
    spans_q_ptr, spans_k_ptr = packing[0], packing[1]
    SUM_ROWS: tl.constexpr = dbias_strides[2] is None
    SUM_COLS: tl.constexpr = dbias_strides[3] is None
    row_tiles = 1 if SUM_ROWS else tl.cdiv(bias_rows, BLOCK_Q)
    col_tiles = 1 if SUM_COLS else tl.cdiv(bias_cols, BLOCK_K)
    col_tile = tl.program_id(0) % col_tiles
    row_tile = tl.program_id(0) // col_tiles % row_tiles
    plane = tl.program_id(0) // col_tiles // row_tiles
    bias_batch, bias_head = plane // bias_heads, plane % bias_heads
    heads_q = heads_kv * group
    unit = softmax.score_unit(scale, softcap, bias_ptr)
    first_col, stop_col = col_tile * BLOCK_K, col_tile * BLOCK_K + BLOCK_K
    first_row, stop_row = row_tile * BLOCK_Q, row_tile * BLOCK_Q + BLOCK_Q
    if SUM_COLS:
        stop_col = seqlen_k
    if SUM_ROWS:
        stop_row = seqlen_q

    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for nth_batch in tl.range(0, summed_batches):
        batch = bias_batch + nth_batch
        asking = tiles.place_of(batch, spans_q_ptr, seqlen_q)
        keyed = tiles.place_of(batch, spans_k_ptr, seqlen_k)
        n_rows = asking[2]
        own_shift = tiles.shift_of(shift, n_rows, keyed[2])
        n_keys = visibility.keys_of(batch, lengths_ptr, keyed[2])
        for nth_head in tl.range(0, summed_heads):
            head = bias_head + nth_head
            pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, None)
            if slopes_ptr is not None:
                slope = softmax.slope_of(slopes_ptr, slopes_step, batch, head)
                pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, slope)
            dropout = (None, None, None, None)
            if seed_ptr is not None:
                dropout = (tl.load(seed_ptr), last_dropped, kept_scale, batch * heads_q + head)
            statistics = tiles.statistics_of(batch, head, heads_q, asking[1], seqlen_q, sequences)
            operands = (
                tiles.rows_of_head(q_ptr, q_strides, asking, head, BLOCK_Q, HEAD_DIM, False),
                tiles.rows_of_head(dout_ptr, dout_strides, asking, head, BLOCK_Q, HEAD_DIM_V, False),
                tiles.rows_of_head(k_ptr, k_strides, keyed, head // group, BLOCK_K, HEAD_DIM, False),
                tiles.rows_of_head(v_ptr, v_strides, keyed, head // group, BLOCK_K, HEAD_DIM_V, False),
                offset_ptr + statistics,
                delta_ptr + statistics,
            )
            strides = (q_strides, dout_strides, k_strides, v_strides)
            for row in tl.range(first_row, tl.minimum(stop_row, n_rows), BLOCK_Q):
                row = tl.multiple_of(row, BLOCK_Q)
                if ranges_ptr is not None:
                    rows = visibility.row_numbers(row, n_rows, BLOCK_Q)[:, None]
                    place = (ranges_ptr, ranges_step, batch, asking[1], seqlen_q)
                    lo, hi = visibility.hull_of(place, rows, n_keys, BLOCK_K, SEGMENTS)
                else:
                    place = None
                    lo, _, _, hi = visibility.visible_keys(
                        row, n_rows, n_keys, own_shift, left, right, BLOCK_Q, BLOCK_K
                    )
                window = (n_rows, n_keys, own_shift, left, right, lo, hi)
                start = tl.maximum(first_col, lo // BLOCK_K * BLOCK_K)
                for col in tl.range(start, tl.minimum(stop_col, hi), BLOCK_K):
                    where = (batch, head, row, tl.multiple_of(col, BLOCK_K))
                    if tiles_ptr is None:
                        total += _score_gradients(
                            operands, strides, pairs, dropout, where, window, place, None, None, unit, scale,
                            softcap, BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, SEGMENTS, PRECISION,
                        )  # fmt: skip
                    else:
                        number = visibility.number_of(tiles_ptr, tiles_strides, batch, head, row, col)
                        if number != visibility.HIDDEN:
                            total += _score_gradients(
                                operands, strides, pairs, dropout, where, window, place, bits_ptr, number,
                                unit, scale, softcap, BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, SEGMENTS,
                                PRECISION,
                            )  # fmt: skip

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
    inside = (rows < bias_rows) & (cols < bias_cols)
    tl.store(ptr + tl.zeros_like(inside).to(tl.int32), total.to(dbias_ptr.dtype.element_ty), mask=inside)
