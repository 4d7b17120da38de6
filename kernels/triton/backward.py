"""The backward pass: row statistics, then the gradients of keys, queries and bias, each by its own kernel.

Recomputing the scores in each needs no atomics: the same bits on every run. Notation of Dao et al.
2022, algorithm 4: delta = rowsum(out·dout), dS = P·(dP - delta).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import sinks as attention_sinks
from ..spec import AttentionSpec, Gradients, Inputs, Needs, like
from ..visibility import owners
from . import replay, softmax, tiles
from .bias_gradient import dbias_kernel
from .config import Kernel, TileConfig, architecture, load_of, tile_config
from .key_gradients import dkdv_kernel
from .launch import Launch, broadcast_strides, dense_slopes, dropout_seed, dropped_bits, kept_scale
from .query_gradient import dq_kernel
from .visible import (
    key_ranges,
    listing_of,
    packing_of,
    position_bounds,
    row_ranges,
    segments,
    sum_of_rows,
    tiles_to_run,
)

ROW_STATISTICS = TileConfig(32, 32, num_warps=4, num_stages=1)
PADDING: int = tiles.STATISTICS_PADDING.value
DK_DV_TOGETHER = 128
"""Largest head_dim for which the accumulators of dk and dv fit in the registers of one program. Above
it each has a launch of its own: five products instead of four, but none of them waits for spills."""


@triton.jit(do_not_specialize=["heads", "seqlen_q", "sequences"])
def _row_statistics_kernel(
    out_ptr,
    out_strides,
    dout_ptr,
    dout_strides,
    lse_ptr,
    dlse_ptr,
    added_ptr,
    offset_ptr,
    delta_ptr,
    softcap,
    heads,
    seqlen_q,
    packing,
    sequences,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """delta = rowsum(out·dout) - dlse, and the lse as `softmax.probabilities` subtracts it.

    added_ptr: None if nothing is added to the scores. out_ptr: None leaves delta without the sum.

    An empty row gets delta 0 and offset +inf, whatever out, dout and dlse hold there.
    """
    PARTS: tl.constexpr = tiles.STATISTICS_PADDING // BLOCK_Q
    spans_ptr, work_ptr = packing[0], packing[2]
    n_tiles = tiles.tile_count(seqlen_q, sequences, tiles.STATISTICS_PADDING)
    tile, batch, _, head = tiles.whose_tile(tl.program_id(0) // PARTS, n_tiles, heads, 1, work_ptr, False)
    place = tiles.place_of(batch, spans_ptr, seqlen_q)
    n_rows = place[2]
    first_row = tile * tiles.STATISTICS_PADDING + tl.program_id(0) % PARTS * BLOCK_Q
    dout_rows = tiles.rows_of_head(dout_ptr, dout_strides, place, head, BLOCK_Q, HEAD_DIM_V, False)
    dout = tiles.load_rows(dout_rows, dout_strides, first_row, 0, n_rows, BLOCK_Q, HEAD_DIM_V, True, False)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    if out_ptr is not None:
        out_rows = tiles.rows_of_head(out_ptr, out_strides, place, head, BLOCK_Q, HEAD_DIM_V, False)
        out = tiles.load_rows(out_rows, out_strides, first_row, 0, n_rows, BLOCK_Q, HEAD_DIM_V, True, False)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)

    index = first_row + tl.arange(0, BLOCK_Q)
    rows = tiles.rows_before(place, head, heads, seqlen_q) + index
    inside = index < n_rows
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("-inf"))
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=inside, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    statistics = tiles.statistics_of(batch, head, heads, place[1], seqlen_q, sequences) + index
    needed = n_rows > 0 if sequences is not None else True  # else this tile would be another sequence's
    tl.store(delta_ptr + statistics, delta, mask=needed)
    tl.store(offset_ptr + statistics, softmax.lse_offset(lse, softcap, added_ptr), mask=needed)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Needs,
    config: Mapping[Kernel, TileConfig] | None = None,
) -> Gradients:
    """Gradients of one call, outside autograd; None where `needs` does not ask.

    dout: (batch, heads_q, seqlen_q, head_dim_v), any strides. dlse: (batch, heads_q, seqlen_q) or
    None. out, lse: as the forward pass returned them. config: tile sizes by kernel; the table's for
    those it lacks.
    """
    room = _allocate(dout, dlse, lse, inputs, needs)
    gradients, delta = room.gradients, room.delta
    if any(needs):
        tiles_given = None if config is None else tuple(config.items())
        replay.run(
            (_row_statistics_kernel, dkdv_kernel, dq_kernel, dbias_kernel, spec, tiles_given),
            (*inputs, out, *room.gradients, *room[1:]),
            inputs.q.device,
            lambda: _launches(room, out, inputs, spec, needs, config),
        )
    dsinks, dslopes = None, gradients.dslopes
    if inputs.sinks is not None and needs.dsinks:
        dsinks = attention_sinks.gradient(_by_row(delta, inputs), lse, inputs.sinks)
    if inputs.slopes is not None and dslopes is not None:
        dslopes = sum_of_rows(dslopes, inputs).sum_to_size(inputs.slopes.shape).to(inputs.slopes.dtype)
    dq = gradients.dq if needs.dq else None
    return gradients._replace(dq=dq, dsinks=dsinks, dslopes=dslopes)


def backward_launches(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Needs,
    config: Mapping[Kernel, TileConfig] | None = None,
) -> tuple[Gradients, list[Launch], Tensor]:
    """The gradients, unfilled, the launches that fill them, in their order, and delta, filled by the first.

    dsinks is a sum over delta, and has no launch. With meta tensors and a config for every kernel: launches
    to compile only.
    """
    room = _allocate(dout, dlse, lse, inputs, needs)
    launches = _launches(room, out, inputs, spec, needs, config) if any(needs) else []
    return room.gradients, launches, room.delta


class _Room(NamedTuple):
    """What the launches fill: gradients, and statistics of rows. And what they read that may be a copy:
    dout, whose last stride is 1, and dlse and lse, dense, which are read by row number."""

    gradients: Gradients
    dout: Tensor
    dlse: Tensor | None
    lse: Tensor
    offset: Tensor
    delta: Tensor


def _allocate(dout: Tensor, dlse: Tensor | None, lse: Tensor, inputs: Inputs, needs: Needs) -> _Room:
    q, bias, slopes = inputs.q, inputs.bias, inputs.slopes
    batch, heads_q, seqlen_q, head_dim = q.shape
    dq, dk, dv = (like(x, x.shape[3]) if need else None for x, need in zip(inputs[:3], needs))
    dbias = bias.new_empty(bias.shape) if bias is not None and needs.dbias else None
    dslopes = None
    if slopes is not None and needs.dslopes:  # of each row; `attention_backward` adds them up
        dslopes = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        dq = like(q, head_dim) if dq is None else dq  # the same kernel fills both
    if inputs.spans_q is not None:  # what no sequence owns is in no tile
        for x in (dq, dk, dv, dslopes):
            if x is not None:
                x.zero_()
    if dout.stride(3) != 1:  # expanded by sum(), say: a copy costs less than reading it element by element
        dout = dout.contiguous()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    padded = PADDING * tiles_to_run(inputs.spans_q, batch, seqlen_q, PADDING)
    offset, delta = lse.new_empty(2, heads_q * padded).unbind()
    return _Room(Gradients(dq, dk, dv, dbias, None, dslopes, None), dout, dlse, lse, offset, delta)


def _launches(
    room: _Room,
    out: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Needs,
    config: Mapping[Kernel, TileConfig] | None,
) -> list[Launch]:
    (dq, dk, dv, dbias, _, dslopes, _), dout, dlse, lse, offset, delta = room
    q, k, v, bias, _, slopes, _, mask = inputs[:8]
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    operands = (q, q.stride(), k, k.stride(), v, v.stride(), dout, dout.stride(), offset, delta)
    pairs = (
        bias, broadcast_strides(bias), mask, broadcast_strides(mask), *dense_slopes(slopes),
        inputs.key_lengths,
    )  # fmt: skip
    numbers = (
        dropout_seed(inputs, spec), dropped_bits(spec.dropout_p), kept_scale(spec.dropout_p),
        spec.scale, spec.softcap, heads_kv, heads_q // heads_kv, seqlen_q, seqlen_k,
        *position_bounds(inputs, spec),
    )  # fmt: skip

    def row(kernel: Kernel) -> TileConfig:
        tile = (config or {}).get(kernel)
        if tile is None:
            load = load_of(inputs, spec)
            tile = tile_config(kernel, architecture(q.device), head_dim, head_dim_v, q.dtype, load)
        if tile is None:
            raise NotImplementedError(f"head_dim {head_dim} (v: {head_dim_v}) is larger than any tile")
        return tile

    def launch(
        kernel: Any,
        tile: TileConfig,
        programs: int,
        outputs: tuple[Any, ...],
        visible: tuple[Any, ...],
        packing: tuple[Any, ...],
    ) -> Launch:
        constants = {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "SEGMENTS": segments(inputs),
            "BLOCK_Q": tile.block_q,
            "BLOCK_K": tile.block_k,
            "PRECISION": "tf32" if spec.tf32 else "ieee",
        }
        arguments = (*operands, *outputs, *pairs, *visible, *packing, *numbers)
        return Launch(kernel, programs, arguments, constants, tile)

    @functools.cache
    def of_queries(block: int) -> tuple[Any, ...]:
        return packing_of(inputs, inputs.spans_q, block)

    def over_queries(tile: TileConfig, *outputs: Any) -> Launch:
        programs = heads_q * tiles_to_run(inputs.spans_q, batch, seqlen_q, tile.block_q)
        visible = (*row_ranges(inputs), *key_ranges(inputs), listing_of(inputs, inputs.visits_q))
        return launch(dq_kernel, tile, programs, outputs, visible, of_queries(tile.block_q))

    added = slopes if bias is None else bias
    sums_products = spec.precise and q.element_size() == 2
    launches = [
        row_statistics_launch(
            dout, dlse, None if sums_products else out, lse, added, offset, delta, inputs, spec
        )
    ]
    if sums_products:
        launches.append(over_queries(row("dq"), None, None, None, delta))
    if dk is not None or dv is not None:
        tile = row("dkdv")
        programs = heads_kv * tiles_to_run(inputs.spans_k, batch, seqlen_k, tile.block_k)
        packing = packing_of(inputs, inputs.spans_k, tile.block_k)
        of_keys = (*key_ranges(inputs), listing_of(inputs, inputs.visits_k))
        together = max(head_dim, head_dim_v) <= DK_DV_TOGETHER or dk is None or dv is None
        for a, b in [(dk, dv)] if together else [(dk, None), (None, dv)]:
            outputs = (a, _strides(a), b, _strides(b))
            launches.append(launch(dkdv_kernel, tile, programs, outputs, of_keys, packing))
    if dq is not None:
        launches.append(over_queries(row("dq"), dq, dq.stride(), dslopes, None))
    if dbias is not None:
        tile = row("dbias")
        n_batches, n_heads, n_rows, n_cols = dbias.shape
        entries = batch if inputs.spans_q is None else inputs.spans_q.shape[0]
        programs = n_batches * n_heads * -(-n_rows // tile.block_q) * -(-n_cols // tile.block_k)
        shared = entries // n_batches, heads_q // n_heads, n_heads, n_rows, n_cols
        target = (dbias, broadcast_strides(dbias), *shared)
        packing = packing_of(inputs, inputs.spans_q, None)  # its tiles are those of the bias
        visible = (*row_ranges(inputs), listing_of(inputs, inputs.visits_q))
        launches.append(launch(dbias_kernel, tile, programs, target, visible, packing))
    return launches


def room_for_statistics(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(offset, delta) of a call that is not packed: float32 (batch, heads_q, seqlen_q and padding)."""
    padded = (*lse.shape[:2], -(-lse.shape[2] // PADDING) * PADDING)
    offset, delta = lse.new_empty(2, *padded).unbind()
    return offset, delta


def _by_row(delta: Tensor, inputs: Inputs) -> Tensor:
    """delta as (batch, heads_q, seqlen_q), without the padding that `tiles.statistics_of` describes."""
    batch, heads_q, seqlen_q, _ = inputs.q.shape
    if inputs.spans_q is None:
        return delta.view(batch, heads_q, -1)[..., :seqlen_q]
    sequence, place, _ = owners(inputs.spans_q, seqlen_q)
    first = (inputs.spans_q[sequence, 0] // PADDING + sequence) * PADDING
    return delta.view(1, heads_q, -1)[..., first + place]


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


def row_statistics_launch(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    added: Tensor | None,
    offset: Tensor,
    delta: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
) -> Launch:
    """The launch that fills offset and delta as `_row_statistics_kernel` says; dlse and lse dense."""
    _, heads, seqlen_q, head_dim_v = dout.shape
    tile = ROW_STATISTICS
    arguments = (
        out, _strides(out), dout, dout.stride(), lse, dlse, added, offset, delta, spec.softcap, heads,
        seqlen_q, *packing_of(inputs, inputs.spans_q, PADDING),
    )  # fmt: skip
    programs = delta.numel() // tile.block_q
    constants = {"HEAD_DIM_V": head_dim_v, "BLOCK_Q": tile.block_q}
    return Launch(_row_statistics_kernel, programs, arguments, constants, tile)
