"""The forward pass: one program per query tile walks over the keys that tile may see."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import descriptors
from ..spec import AttentionSpec, Inputs, like
from . import replay, softmax, tiles, visibility
from .attend import attend_to
from .config import TileConfig, architecture, load_of, tile_config
from .launch import (
    Launch,
    broadcast_strides,
    dense_slopes,
    dropout_seed,
    dropped_bits,
    kept_scale,
    positive_scale,
)
from .visible import (
    key_ranges,
    listing_of,
    packing_of,
    position_bounds,
    row_ranges,
    segments,
    tiles_to_run,
)


@triton.jit(
    do_not_specialize=[
        "slopes_step",
        "last_dropped",
        "heads_kv",
        "group",
        "seqlen_q",
        "seqlen_k",
        "shift",
        "left",
        "right",
        "sequences",
        "ranges_step",
        "key_ranges_step",
    ]
)
def _forward_kernel(
    q_ptr,
    q_strides,
    k_ptr,
    k_strides,
    v_ptr,
    v_strides,
    out_ptr,
    out_strides,
    lse_ptr,
    max_ptr,
    bias_ptr,
    bias_strides,
    mask_ptr,
    mask_strides,
    sinks_ptr,
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
    NEGATIVE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = dropout(softmax(scores)) · v and lse of one query tile; scale is |scale|."""
    visits_ptr, visits_strides, tiles_ptr, tiles_strides, bits_ptr = listing
    spans_q_ptr, spans_k_ptr, work_ptr = packing
    tile, batch, head, head_kv = tiles.whose_tile(
        tl.program_id(0), tiles.tile_count(seqlen_q, sequences, BLOCK_Q), heads_kv, group, work_ptr,
        right is not None or ranges_ptr is not None,
    )  # fmt: skip
    queries = tiles.place_of(batch, spans_q_ptr, seqlen_q)
    keyed = tiles.place_of(batch, spans_k_ptr, seqlen_k)
    n_rows, n_keys = queries[2], keyed[2]
    shift = tiles.shift_of(shift, n_rows, n_keys)
    first_row = tile * BLOCK_Q
    rows = visibility.row_numbers(first_row, n_rows, BLOCK_Q)
    n_keys = visibility.keys_of(batch, lengths_ptr, n_keys)
    q_rows = tiles.rows_of_head(q_ptr, q_strides, queries, head, BLOCK_Q, HEAD_DIM, TMA)
    k_rows = tiles.rows_of_head(k_ptr, k_strides, keyed, head_kv, BLOCK_K, HEAD_DIM, TMA)
    v_rows = tiles.rows_of_head(v_ptr, v_strides, keyed, head_kv, BLOCK_K, HEAD_DIM_V, TMA)
    q = tiles.load_rows(q_rows, q_strides, first_row, 0, n_rows, BLOCK_Q, HEAD_DIM, True, TMA)
    if NEGATIVE:  # the running maximum needs scores that grow with the products
        q = -q
    anything_added = softmax.either(bias_ptr, slopes_ptr)
    unit = softmax.score_unit(scale, softcap, anything_added)

    PADDED_V: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM_V))
    state = (
        tl.zeros([BLOCK_Q, PADDED_V], tl.float32),
        tl.full([BLOCK_Q], float("-inf"), tl.float32),
        tl.zeros([BLOCK_Q], tl.float32),
    )
    keys = (k_rows, k_strides, v_rows, v_strides)
    pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, None)
    if slopes_ptr is not None:
        slope = softmax.slope_of(slopes_ptr, slopes_step, batch, head)
        pairs = (bias_ptr, bias_strides, mask_ptr, mask_strides, slope)
    dropout = (None, None, None)
    if seed_ptr is not None:
        dropout = (tl.load(seed_ptr), last_dropped, batch * heads_kv * group + head)
    where = (batch, head, rows[:, None])
    if visits_ptr is not None:
        # Positions in the list stand for keys: whole tiles first, all of their keys seen by every row.
        visits, n_whole, n_listed = visibility.visits_of(
            visits_ptr, visits_strides, batch, head, first_row // visibility.TILE
        )
        state = attend_to(
            state, q, keys, pairs, dropout, where, (0, n_keys, n_keys, shift, None, None, None, None),
            (visits, tiles_ptr, tiles_strides, bits_ptr, first_row),
            (0, 0, n_whole * visibility.TILE, n_listed * visibility.TILE), unit, scale, softcap,
            BLOCK_K, HEAD_DIM, HEAD_DIM_V, False, lengths_ptr is not None, TMA, PRECISION,
        )  # fmt: skip
    elif ranges_ptr is not None:
        for segment in tl.static_range(SEGMENTS):
            limits = visibility.limits_of(
                ranges_ptr, ranges_step, batch, queries[1], seqlen_q, rows[:, None], segment
            )
            stretch = visibility.span_of(limits, n_keys, BLOCK_K)
            seen_by = (key_ranges_ptr, key_ranges_step, batch, keyed[1], seqlen_k, SEGMENTS)
            state = attend_to(
                state, q, keys, pairs, dropout, where,
                (stretch[0], stretch[3], n_keys, shift, None, None, limits, seen_by),
                (None, None, None, None, None), stretch, unit, scale, softcap,
                BLOCK_K, HEAD_DIM, HEAD_DIM_V, True, False, TMA, PRECISION,
            )  # fmt: skip
    else:
        stretch = visibility.visible_keys(first_row, n_rows, n_keys, shift, left, right, BLOCK_Q, BLOCK_K)
        state = attend_to(
            state, q, keys, pairs, dropout, where,
            (stretch[0], stretch[3], n_keys, shift, left, right, None, None),
            (None, None, None, None, None), stretch, unit, scale, softcap,
            BLOCK_K, HEAD_DIM, HEAD_DIM_V, left is not None, False, TMA, PRECISION,
        )  # fmt: skip

    acc, row_max, row_sum = state
    lse = softmax.natural_lse(row_max, row_sum, scale, softcap, anything_added)
    if sinks_ptr is not None:
        lse, share = softmax.join_sink(lse, tl.load(sinks_ptr + head).to(tl.float32))
        acc = acc * share[:, None]
    if seed_ptr is not None:
        acc = acc * kept_scale
    # A row that sees nothing may have met the NaN of a key that its neighbours see.
    acc = tl.where(row_sum[:, None] == 0.0, 0.0, acc / row_sum[:, None])
    out_rows = tiles.rows_of_head(out_ptr, out_strides, queries, head, BLOCK_Q, HEAD_DIM_V, False)
    tiles.store_rows(out_rows, out_strides, first_row, n_rows, acc, BLOCK_Q, HEAD_DIM_V)
    index = first_row + tl.arange(0, BLOCK_Q)
    before = tiles.rows_before(queries, head, heads_kv * group, seqlen_q)
    tl.store(lse_ptr + before + index, lse, mask=index < n_rows)
    if max_ptr is not None:
        top = softmax.natural_max(row_max, scale, softcap, anything_added)
        tl.store(max_ptr + before + index, top, mask=index < n_rows)


def attention_forward(
    inputs: Inputs, spec: AttentionSpec, config: TileConfig | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, max_logit) of one call, outside autograd.

    out: (batch, heads_q, seqlen_q, head_dim_v) in q's dtype and physical order; lse: float32,
    natural logarithm, -inf for rows that see nothing. max_logit: like lse, each row's largest score; None
    unless the spec asks. config: tile sizes, None takes the table's.
    """
    q = inputs.q
    out = like(q, inputs.v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    max_logit = torch.empty_like(lse) if spec.want_max else None
    if inputs.spans_q is not None:  # rows that no sequence owns are in no tile
        out.zero_()
        for x in (lse, max_logit):
            if x is not None:
                x.fill_(-torch.inf)
    replay.run(
        (_forward_kernel, spec, config),
        (*inputs, out, lse, max_logit),
        q.device,
        lambda: [forward_launch(inputs, spec, out, lse, config, max_logit)],
    )
    return out, lse, max_logit


def forward_launch(
    inputs: Inputs,
    spec: AttentionSpec,
    out: Tensor,
    lse: Tensor,
    config: TileConfig | None = None,
    max_logit: Tensor | None = None,
) -> Launch:
    """The launch that fills out, lse and max_logit; with meta tensors and a config, one to compile only."""
    q, k, v, bias, sinks, slopes, _, mask = inputs[:8]
    key_lengths = inputs.key_lengths
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    if config is None:
        load = load_of(inputs, spec)
        config = tile_config("forward", architecture(q.device), head_dim, head_dim_v, q.dtype, load)
        if config is None:
            raise NotImplementedError(f"head_dim {head_dim} (v: {head_dim_v}) is larger than any tile")
    bounds = position_bounds(inputs, spec)
    tma = (
        config.tma
        and descriptors.why_not(inputs, spec) is None
        and all(map(descriptors.is_laid_out, (q, k, v)))
    )
    arguments: tuple[Any, ...] = (
        q, q.stride(), k, k.stride(), v, v.stride(), out, out.stride(), lse, max_logit,
        bias, broadcast_strides(bias), mask, broadcast_strides(mask),
        None if sinks is None else sinks.contiguous(), *dense_slopes(slopes), key_lengths,
        *row_ranges(inputs), *key_ranges(inputs), listing_of(inputs, inputs.visits_q),
        *packing_of(inputs, inputs.spans_q, config.block_q),
        dropout_seed(inputs, spec), dropped_bits(spec.dropout_p), kept_scale(spec.dropout_p),
        positive_scale(spec.scale), spec.softcap,
        heads_kv, heads_q // heads_kv, seqlen_q, seqlen_k, *bounds,
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "SEGMENTS": segments(inputs),
        "NEGATIVE": spec.scale < 0,
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "TMA": tma,
        "PRECISION": "tf32" if spec.tf32 else "ieee",
    }
    programs = heads_q * tiles_to_run(inputs.spans_q, batch, seqlen_q, config.block_q)
    return Launch(_forward_kernel, programs, arguments, constants, config)
