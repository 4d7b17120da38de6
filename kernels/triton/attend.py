"""How a query tile attends to keys: the loop of the forward pass, and the stretches that it is called for."""

from __future__ import annotations

import triton
import triton.language as tl

from . import softmax, tiles, visibility


@triton.jit
def _attend(
    state,
    q,
    keys,
    pairs,
    dropout,
    where,
    window,
    listing,
    first,
    stop,
    unit,
    scale,
    softcap,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Let the query tile attend to the key tiles from first to stop, of all or of those in a list."""
    acc, row_max, row_sum = state
    k_rows, k_strides, v_rows, v_strides = keys
    bias_ptr, bias_strides, mask_ptr, mask_strides, slope = pairs
    seed, last_dropped, plane = dropout
    batch, head, rows = where
    lo, hi, n_keys, shift, left, right, limits, seen_by = window
    visits, tiles_ptr, tiles_strides, bits_ptr, first_row = listing
    HOIST: tl.constexpr = BLOCK_K < 128  # offsets of more keys would be registers that spill
    # Counting tiles, not keys, shows the compiler that start is a multiple of BLOCK_K.
    for tile in tl.range(first // BLOCK_K, tl.cdiv(stop, BLOCK_K)):
        if visits is not None:
            tile = visibility.listed(visits, tile, BLOCK_K)
        start = tile * BLOCK_K
        cols = start + tl.arange(0, BLOCK_K)[None, :]
        mask = None
        bias = None
        if mask_ptr is not None:
            mask = tiles.load_pairs(mask_ptr, mask_strides, batch, head, rows, cols, n_keys, EDGE)
        if EDGE and visits is not None:
            number = visibility.number_of(tiles_ptr, tiles_strides, batch, head, first_row, start)
            mask = visibility.bits_at(bits_ptr, number, rows, cols)
        k = tiles.load_rows(k_rows, k_strides, start, lo, hi, BLOCK_K, HEAD_DIM, EDGE, TMA, HOIST)
        if mask is None and (limits is None or not EDGE):
            v = tiles.load_rows(v_rows, v_strides, start, lo, hi, BLOCK_K, HEAD_DIM_V, EDGE, TMA, HOIST)
        else:
            # 0 times the NaN of a value that nobody sees is NaN, so such values are not loaded. Keys
            # may be: what they hold stays in a column of scores that is replaced as a whole.
            if mask is not None:
                ok = visibility.element_mask(rows, cols, n_keys, shift, left, right, None, mask, EDGE)
                seen = visibility.any_row(ok)
            else:
                seen = visibility.seen_by_rows(seen_by, start, n_keys, BLOCK_K)
            end = tl.where(seen, hi, 0)[:, None]
            v = tiles.load_rows(v_rows, v_strides, start, lo, end, BLOCK_K, HEAD_DIM_V, True, TMA, HOIST)

        dots = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        if bias_ptr is not None:
            bias = tiles.load_pairs(bias_ptr, bias_strides, batch, head, rows, cols, n_keys, EDGE)
        bias = softmax.added(bias, slope, rows, cols, shift)
        s = softmax.scores(dots, scale, softcap, bias)
        # Compared here, next to its use: earlier, every comparison would occupy a register bit.
        ok = visibility.element_mask(rows, cols, n_keys, shift, left, right, limits, mask, EDGE)
        if ok is not None:
            s = tl.where(ok, s, float("-inf"))
        MAY_BE_EMPTY: tl.constexpr = ok is not None or bias_ptr is not None
        p, alpha, row_max, row_sum = softmax.online_softmax(s, row_max, row_sum, unit, MAY_BE_EMPTY)
        if seed is not None:
            p = tl.where(softmax.keep_mask(seed, last_dropped, plane, rows, start, BLOCK_K), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def attend_to(
    state,
    q,
    keys,
    pairs,
    dropout,
    where,
    window,
    listing,
    stretch,
    unit,
    scale,
    softcap,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    LEFT_EDGE: tl.constexpr,
    EDGE_WITHIN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Let the query tile attend to a stretch of keys: left edge, what every row sees whole, right edge.

    stretch: as `visibility.visible_keys` returns it. EDGE_WITHIN: the middle needs an element mask, too.
    """
    lo, full_lo, full_hi, hi = stretch
    if LEFT_EDGE:
        state = _attend(
            state, q, keys, pairs, dropout, where, window, listing, lo // BLOCK_K * BLOCK_K, full_lo, unit,
            scale, softcap, BLOCK_K, HEAD_DIM, HEAD_DIM_V, True, TMA, PRECISION,
        )  # fmt: skip
    state = _attend(
        state, q, keys, pairs, dropout, where, window, listing, full_lo, full_hi, unit, scale, softcap,
        BLOCK_K, HEAD_DIM, HEAD_DIM_V, EDGE_WITHIN, TMA, PRECISION,
    )  # fmt: skip
    state = _attend(
        state, q, keys, pairs, dropout, where, window, listing, full_hi, hi, unit, scale, softcap,
        BLOCK_K, HEAD_DIM, HEAD_DIM_V, True, TMA, PRECISION,
    )  # fmt: skip
    return state
