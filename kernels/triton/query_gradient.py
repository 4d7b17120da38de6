"""dq, and what else is a sum over a row: one program per query tile walks over the keys that tile may see."""

from __future__ import annotations

import triton
import triton.language as tl

from . import softmax, tiles, visibility


@triton.jit
def _gather_from_keys(
    sums,
    outputs,
    q,
    dout,
    offset,
    delta,
    keys,
    pairs,
    dropout,
    where,
    window,
    listing,
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
    """Add to dq of a query tile, to its rows' gradient of ALiBi's slope and to their sums of P·dP, as far as
    there is an output, what key tiles from start to stop contribute, of all or of those in a list."""
    dq, dslope, total = sums
    dq_ptr, dslope_ptr, total_ptr = outputs
    k_rows, k_strides, v_rows, v_strides = keys
    bias_ptr, bias_strides, mask_ptr, mask_strides, slope = pairs
    seed, last_dropped, kept_scale, plane = dropout
    batch, head, rows = where
    n_keys, shift, left, right, limits, seen_by, lo, full_lo, full_hi, hi = window
    visits, tiles_ptr, tiles_strides, bits_ptr, first_row = listing
    HOIST: tl.constexpr = max(HEAD_DIM, HEAD_DIM_V) <= 128
    for tile in tl.range(start // BLOCK_K, stop // BLOCK_K):
        if visits is not None:
            tile = visibility.listed(visits, tile, BLOCK_K)
        elif EDGE:
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
        if EDGE and visits is not None:
            number = visibility.number_of(tiles_ptr, tiles_strides, batch, head, first_row, first_col)
            mask = visibility.bits_at(bits_ptr, number, rows, cols)
        if bias_ptr is not None:
            bias = tiles.load_pairs(bias_ptr, bias_strides, batch, head, rows, cols, n_keys, EDGE)
        bias = softmax.added(bias, slope, rows, cols, shift)
        if seed is not None:
            keep = softmax.keep_mask(seed, last_dropped, plane, rows, first_col, BLOCK_K)
        ok = visibility.element_mask(rows, cols, n_keys, shift, left, right, limits, mask, EDGE)
        if mask is not None or (limits is not None and EDGE):
            if mask is not None:
                seen = visibility.any_row(ok)
            else:
                seen = visibility.seen_by_rows(seen_by, first_col, n_keys, BLOCK_K)
            k = tiles.zero_unless(seen, k)
            v = tiles.zero_unless(seen, v)

        dots = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        dp = softmax.dropped(tl.dot(dout, v.T, input_precision=PRECISION), keep, kept_scale)
        s = softmax.scores(dots, scale, softcap, bias)
        p = softmax.probabilities(s, unit, offset[:, None], softcap, bias)
        if total_ptr is not None:
            total += tl.sum(visibility.zero_hidden(p * dp, ok), 1)
        ds = p * (dp - delta[:, None])
        if dslope_ptr is not None:
            moved = ds * softmax.distances(rows, cols, shift)
            dslope -= tl.sum(visibility.zero_hidden(moved, ok), 1)
        if dq_ptr is not None:
            if softcap is not None:
                ds *= softmax.softcap_slope(dots, scale, softcap)
            ds = visibility.zero_hidden(ds, ok)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, dslope, total


@triton.jit
def _gather_from_stretch(
    sums,
    outputs,
    q,
    dout,
    offset,
    delta,
    keys,
    pairs,
    dropout,
    where,
    window,
    listing,
    edges_start,
    edges_stop,
    full_start,
    full_stop,
    unit,
    scale,
    softcap,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    EDGE_WITHIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The keys of a stretch that every row sees, then its edges. EDGE_WITHIN: the former need a mask, too."""
    sums = _gather_from_keys(
        sums, outputs, q, dout, offset, delta, keys, pairs, dropout, where, window, listing, full_start,
        full_stop, unit, scale, softcap, BLOCK_K, HEAD_DIM, HEAD_DIM_V, EDGE_WITHIN, PRECISION,
    )  # fmt: skip
    return _gather_from_keys(
        sums, outputs, q, dout, offset, delta, keys, pairs, dropout, where, window, listing, edges_start,
        edges_stop, unit, scale, softcap, BLOCK_K, HEAD_DIM, HEAD_DIM_V, True, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=[
    "slopes_step", "last_dropped", "heads_kv", "group", "seqlen_q", "seqlen_k", "shift", "left", "right",
    "sequences", "ranges_step", "key_ranges_step",
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
    total_ptr,
    bias_ptr,
    bias_strides,
    mask_ptr,
    mask_strides,
    slopes_ptr,
    slopes_step,
    lengths_ptr,
    ranges_ptr,
    ranges_step,
    key_ranges_ptr,
    key_ranges_step,
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
    """Of one query tile, what there are outputs for: dq = scale·dS·k; -Σ dS·|position - key| of its rows;
    Σ P·dP of its rows, which is added to what total_ptr, shaped like delta, holds."""
    visits_ptr, visits_strides, tiles_ptr, tiles_strides, bits_ptr = listing
    spans_q_ptr, spans_k_ptr, work_ptr = packing
    tile, batch, head, head_kv = tiles.whose_tile(
        tl.program_id(0), tiles.tile_count(seqlen_q, sequences, BLOCK_Q), heads_kv, group, work_ptr,
        right is not None or ranges_ptr is not None,
    )  # fmt: skip
    asking = tiles.place_of(batch, spans_q_ptr, seqlen_q)
    keyed = tiles.place_of(batch, spans_k_ptr, seqlen_k)
    n_rows = asking[2]
    shift = tiles.shift_of(shift, n_rows, keyed[2])
    first_row = tile * BLOCK_Q
    n_keys = visibility.keys_of(batch, lengths_ptr, keyed[2])
    q_rows = tiles.rows_of_head(q_ptr, q_strides, asking, head, BLOCK_Q, HEAD_DIM, False)
    dout_rows = tiles.rows_of_head(dout_ptr, dout_strides, asking, head, BLOCK_Q, HEAD_DIM_V, False)
    q = tiles.load_rows(q_rows, q_strides, first_row, 0, n_rows, BLOCK_Q, HEAD_DIM, True, False)
    dout = tiles.load_rows(dout_rows, dout_strides, first_row, 0, n_rows, BLOCK_Q, HEAD_DIM_V, True, False)
    statistics = tiles.statistics_of(batch, head, heads_kv * group, asking[1], seqlen_q, sequences)
    index = first_row + tl.arange(0, BLOCK_Q)
    if sequences is None:
        offset, _ = tiles.row_offsets(offset_ptr + statistics, first_row, n_rows, BLOCK_Q, False)
        delta = tl.load(delta_ptr + statistics + index)
    else:  # a tile that nobody needs lies anywhere
        offset = tl.load(offset_ptr + statistics + index, mask=index < n_rows, other=float("inf"))
        delta = tl.load(delta_ptr + statistics + index, mask=index < n_rows, other=0.0)
    unit = softmax.score_unit(scale, softcap, softmax.either(bias_ptr, slopes_ptr))
    k_rows = tiles.rows_of_head(k_ptr, k_strides, keyed, head_kv, BLOCK_K, HEAD_DIM, False)
    v_rows = tiles.rows_of_head(v_ptr, v_strides, keyed, head_kv, BLOCK_K, HEAD_DIM_V, False)
    keys = (k_rows, k_strides, v_rows, v_strides)
    pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, None)
    if slopes_ptr is not None:
        slope = softmax.slope_of(slopes_ptr, slopes_step, batch, head)
        pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, slope)
    dropout = (None, None, None, None)
    if seed_ptr is not None:
        dropout = (tl.load(seed_ptr), last_dropped, kept_scale, batch * heads_kv * group + head)
    rows = visibility.row_numbers(first_row, n_rows, BLOCK_Q)[:, None]
    where = (batch, head, rows)
    outputs = (dq_ptr, dslope_ptr, total_ptr)
    dq = 0.0
    dslope = 0.0
    total = 0.0
    if dq_ptr is not None:
        dq = tl.zeros([BLOCK_Q, max(16, triton.next_power_of_2(HEAD_DIM))], tl.float32)
    if dslope_ptr is not None:
        dslope = tl.zeros([BLOCK_Q], tl.float32)
    if total_ptr is not None:
        total = tl.zeros([BLOCK_Q], tl.float32)
    sums = (dq, dslope, total)
    if visits_ptr is not None:
        visits, n_whole, n_listed = visibility.visits_of(
            visits_ptr, visits_strides, batch, head, first_row // visibility.TILE
        )
        sums = _gather_from_stretch(
            sums, outputs, q, dout, offset, delta, keys, pairs, dropout, where,
            (n_keys, shift, None, None, None, None, 0, 0, 0, n_keys),
            (visits, tiles_ptr, tiles_strides, bits_ptr, first_row), n_whole * visibility.TILE,
            n_listed * visibility.TILE, 0, n_whole * visibility.TILE, unit, scale, softcap,
            BLOCK_K, HEAD_DIM, HEAD_DIM_V, lengths_ptr is not None, PRECISION,
        )  # fmt: skip
    elif ranges_ptr is not None:
        for segment in tl.static_range(SEGMENTS):
            limits = visibility.limits_of(ranges_ptr, ranges_step, batch, asking[1], seqlen_q, rows, segment)
            lo, full_lo, full_hi, hi = visibility.span_of(limits, n_keys, BLOCK_K)
            seen_by = (key_ranges_ptr, key_ranges_step, batch, keyed[1], seqlen_k, SEGMENTS)
            sums = _gather_from_stretch(
                sums, outputs, q, dout, offset, delta, keys, pairs, dropout, where,
                (n_keys, shift, None, None, limits, seen_by, lo, full_lo, full_hi, hi),
                (None, None, None, None, None), lo, hi - (full_hi - full_lo) + BLOCK_K - 1, full_lo, full_hi,
                unit, scale, softcap, BLOCK_K, HEAD_DIM, HEAD_DIM_V, False, PRECISION,
            )  # fmt: skip
    else:
        lo, full_lo, full_hi, hi = visibility.visible_keys(
            first_row, n_rows, n_keys, shift, left, right, BLOCK_Q, BLOCK_K
        )
        sums = _gather_from_stretch(
            sums, outputs, q, dout, offset, delta, keys, pairs, dropout, where,
            (n_keys, shift, left, right, None, None, lo, full_lo, full_hi, hi),
            (None, None, None, None, None), lo, hi - (full_hi - full_lo) + BLOCK_K - 1, full_lo, full_hi,
            unit, scale, softcap, BLOCK_K, HEAD_DIM, HEAD_DIM_V, False, PRECISION,
        )  # fmt: skip
    # An empty row may hold NaN in q and dout, and its neighbours' keys have met it.
    dq, dslope, total = sums
    empty = offset == float("inf")
    if dq_ptr is not None:
        dq = tl.where(empty[:, None], 0.0, dq * scale)
        dq_rows = tiles.rows_of_head(dq_ptr, dq_strides, asking, head, BLOCK_Q, HEAD_DIM, False)
        tiles.store_rows(dq_rows, dq_strides, first_row, n_rows, dq, BLOCK_Q, HEAD_DIM)
    if dslope_ptr is not None:
        ptr = dslope_ptr + tiles.rows_before(asking, head, heads_kv * group, seqlen_q) + index
        tl.store(ptr, tl.where(empty, 0.0, dslope), mask=index < n_rows)
    if total_ptr is not None:
        ptr = total_ptr + statistics + index
        before = tl.load(ptr, mask=index < n_rows, other=0.0)
        tl.store(ptr, tl.where(empty, 0.0, before + total), mask=index < n_rows)
