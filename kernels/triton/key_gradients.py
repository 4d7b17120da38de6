"""dk and dv: one program per key tile walks over the queries that may see it, for all heads of its group."""

from __future__ import annotations

import triton
import triton.language as tl

from . import softmax, tiles, visibility


@triton.jit
def _gather_from_queries(
    dk,
    dv,
    outputs,
    k,
    v,
    queries,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dk and dv of a key tile, as far as there is an output, what query tiles contribute.

    Everything is transposed, [BLOCK_K, BLOCK_Q], so that P and dS go from registers into the next
    product. EDGE visits the tiles on both sides of [full_lo, full_hi) in one loop: a loop of its
    own for each side costs registers that spill. A listing names the tiles to visit instead.
    """
    q_rows, q_strides, dout_rows, dout_strides, offset_ptr, delta_ptr = queries
    dk_ptr, dv_ptr = outputs
    bias_ptr, bias_strides, mask_ptr, mask_strides, slope = pairs
    seed, last_dropped, kept_scale, plane = dropout
    batch, head, first_col = where
    n_rows, n_keys, shift, left, right, limits, full_lo, full_hi = window
    visits, tiles_ptr, tiles_strides, bits_ptr = listing
    cols = first_col + tl.arange(0, BLOCK_K)[:, None]
    # Only such tiles can meet rows that are empty or past the end; their q and dout may be NaN.
    MAY_BE_EMPTY: tl.constexpr = EDGE or bias_ptr is not None or mask_ptr is not None
    for tile in tl.range(start // BLOCK_Q, stop // BLOCK_Q):
        if visits is not None:
            tile = visibility.listed(visits, tile, BLOCK_Q)
        elif EDGE:
            tile = tl.where(tile < full_lo // BLOCK_Q, tile, tile + (full_hi - full_lo) // BLOCK_Q)
        first_row = tl.multiple_of(tile * BLOCK_Q, BLOCK_Q)
        index = first_row + tl.arange(0, BLOCK_Q)[None, :]
        rows = visibility.row_numbers(first_row, n_rows, BLOCK_Q)[None, :]
        offset, hidden_to = tiles.row_offsets(offset_ptr, first_row, n_rows, BLOCK_Q, MAY_BE_EMPTY)
        q = tiles.load_rows(
            q_rows, q_strides, first_row, hidden_to, n_rows, BLOCK_Q, HEAD_DIM, MAY_BE_EMPTY, False, False
        )
        dout = tiles.load_rows(
            dout_rows, dout_strides, first_row, hidden_to, n_rows, BLOCK_Q, HEAD_DIM_V, MAY_BE_EMPTY,
            False, False,
        )  # fmt: skip
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
            keep = softmax.keep_mask(seed, last_dropped, plane, rows.T, first_col, BLOCK_K).T

        dots = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_K, BLOCK_Q]
        s = softmax.scores(dots, scale, softcap, bias)
        ok = visibility.element_mask_of_keys(index, cols, n_keys, shift, left, right, limits, mask, EDGE)
        p = visibility.zero_hidden(softmax.probabilities(s, unit, offset[None, :], softcap, bias), ok)
        if dv_ptr is not None:
            p_kept = softmax.dropped(p, keep, kept_scale)
            dv = tl.dot(p_kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if dk_ptr is not None:
            dp = softmax.dropped(tl.dot(v, dout.T, input_precision=PRECISION), keep, kept_scale)
            # Loaded here, next to its use: from the top on it would occupy 16 registers.
            delta = tl.load(delta_ptr + first_row + tl.arange(0, BLOCK_Q))
            ds = p * (dp - delta[None, :])
            if softcap is not None:
                ds *= softmax.softcap_slope(dots, scale, softcap)
            if ok is not None:  # p is 0 where hidden; asking it instead of ok frees a register per element
                ds = tl.where(p > 0.0, ds, 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _gather_from_stretch(
    dk,
    dv,
    outputs,
    k,
    v,
    queries,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    EDGE_WITHIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The edges of a stretch of queries, then those that see the key tile whole.

    EDGE_WITHIN: these need an element mask, too.
    """
    dk, dv = _gather_from_queries(
        dk, dv, outputs, k, v, queries, pairs, dropout, where, window, listing, edges_start, edges_stop, unit,
        scale, softcap, BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, True, PRECISION,
    )  # fmt: skip
    return _gather_from_queries(
        dk, dv, outputs, k, v, queries, pairs, dropout, where, window, listing, full_start, full_stop, unit,
        scale, softcap, BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, EDGE_WITHIN, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=[
    "slopes_step", "last_dropped", "heads_kv", "group", "seqlen_q", "seqlen_k", "shift", "left", "right",
    "sequences", "ranges_step",
])  # fmt: skip
def dkdv_kernel(
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
    dk_ptr,
    dk_strides,
    dv_ptr,
    dv_strides,
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
    """dv = dropout(P)ᵀ·dout and dk = scale·dSᵀ·q of one key tile, over the query heads that share it.

    ranges_ptr, listing: rows that each key sees, the mirror of what the other kernels get.
    """
    visits_ptr, visits_strides, tiles_ptr, tiles_strides, bits_ptr = listing
    spans_q_ptr, spans_k_ptr, work_ptr = packing
    tile, batch, head_kv, _ = tiles.whose_tile(
        tl.program_id(0), tiles.tile_count(seqlen_k, sequences, BLOCK_K), heads_kv, 1, work_ptr, False
    )
    asking = tiles.place_of(batch, spans_q_ptr, seqlen_q)
    keyed = tiles.place_of(batch, spans_k_ptr, seqlen_k)
    n_rows, stop_col = asking[2], keyed[2]
    shift = tiles.shift_of(shift, n_rows, stop_col)
    first_col = tile * BLOCK_K
    n_keys = visibility.keys_of(batch, lengths_ptr, stop_col)
    k_rows = tiles.rows_of_head(k_ptr, k_strides, keyed, head_kv, BLOCK_K, HEAD_DIM, False)
    v_rows = tiles.rows_of_head(v_ptr, v_strides, keyed, head_kv, BLOCK_K, HEAD_DIM_V, False)
    if visits_ptr is not None or ranges_ptr is not None:
        seen_lo, seen_hi = 0, n_keys
    else:
        seen_lo, seen_hi = visibility.seen_keys(n_rows, n_keys, shift, left, right)
    k = tiles.load_rows(k_rows, k_strides, first_col, seen_lo, seen_hi, BLOCK_K, HEAD_DIM, True, False)
    v = tiles.load_rows(v_rows, v_strides, first_col, seen_lo, seen_hi, BLOCK_K, HEAD_DIM_V, True, False)
    unit = softmax.score_unit(scale, softcap, softmax.either(bias_ptr, slopes_ptr))
    outputs = (dk_ptr, dv_ptr)
    dk = 0.0
    dv = 0.0
    if dk_ptr is not None:
        dk = tl.zeros([BLOCK_K, max(16, triton.next_power_of_2(HEAD_DIM))], tl.float32)
    if dv_ptr is not None:
        dv = tl.zeros([BLOCK_K, max(16, triton.next_power_of_2(HEAD_DIM_V))], tl.float32)
    for member in tl.range(0, group):
        head = head_kv * group + member
        pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, None)
        if slopes_ptr is not None:
            slope = softmax.slope_of(slopes_ptr, slopes_step, batch, head)
            pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, slope)
        first_statistic = tiles.statistics_of(batch, head, heads_kv * group, asking[1], seqlen_q, sequences)
        queries = (
            tiles.rows_of_head(q_ptr, q_strides, asking, head, BLOCK_Q, HEAD_DIM, False),
            q_strides,
            tiles.rows_of_head(dout_ptr, dout_strides, asking, head, BLOCK_Q, HEAD_DIM_V, False),
            dout_strides,
            offset_ptr + first_statistic,
            delta_ptr + first_statistic,
        )
        dropout = (None, None, None, None)
        if seed_ptr is not None:
            dropout = (tl.load(seed_ptr), last_dropped, kept_scale, batch * heads_kv * group + head)
        where = (batch, head, first_col)
        if visits_ptr is not None:
            visits, n_whole, n_listed = visibility.visits_of(
                visits_ptr, visits_strides, batch, head, first_col // visibility.TILE
            )
            window = (n_rows, n_keys, shift, None, None, None, 0, 0)
            dk, dv = _gather_from_stretch(
                dk, dv, outputs, k, v, queries, pairs, dropout, where, window,
                (visits, tiles_ptr, tiles_strides, bits_ptr), n_whole * visibility.TILE,
                n_listed * visibility.TILE, 0, n_whole * visibility.TILE, unit, scale, softcap,
                BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, lengths_ptr is not None, PRECISION,
            )  # fmt: skip
        elif ranges_ptr is not None:
            for segment in tl.static_range(SEGMENTS):
                limits = visibility.limits_of_keys(
                    ranges_ptr, ranges_step, batch, keyed[1], seqlen_k, first_col, n_keys, BLOCK_K, segment
                )
                lo, full_lo, full_hi, hi = visibility.span_of(limits, n_rows, BLOCK_Q)
                window = (n_rows, n_keys, shift, None, None, limits, full_lo, full_hi)
                dk, dv = _gather_from_stretch(
                    dk, dv, outputs, k, v, queries, pairs, dropout, where, window, (None, None, None, None),
                    lo, hi - (full_hi - full_lo) + BLOCK_Q - 1, full_lo, full_hi, unit, scale, softcap,
                    BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, False, PRECISION,
                )  # fmt: skip
        else:
            lo, full_lo, full_hi, hi = visibility.visible_queries(
                first_col, n_rows, n_keys, shift, left, right, BLOCK_Q, BLOCK_K
            )
            window = (n_rows, n_keys, shift, left, right, None, full_lo, full_hi)
            dk, dv = _gather_from_stretch(
                dk, dv, outputs, k, v, queries, pairs, dropout, where, window, (None, None, None, None),
                lo, hi - (full_hi - full_lo) + BLOCK_Q - 1, full_lo, full_hi, unit, scale, softcap,
                BLOCK_Q, BLOCK_K, HEAD_DIM, HEAD_DIM_V, False, PRECISION,
            )  # fmt: skip
    if dk_ptr is not None:
        dk_rows = tiles.rows_of_head(dk_ptr, dk_strides, keyed, head_kv, BLOCK_K, HEAD_DIM, False)
        tiles.store_rows(dk_rows, dk_strides, first_col, stop_col, dk * scale, BLOCK_K, HEAD_DIM)
    if dv_ptr is not None:
        dv_rows = tiles.rows_of_head(dv_ptr, dv_strides, keyed, head_kv, BLOCK_K, HEAD_DIM_V, False)
        tiles.store_rows(dv_rows, dv_strides, first_col, stop_col, dv, BLOCK_K, HEAD_DIM_V)
