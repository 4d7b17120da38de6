"""What a launch says of who sees whom, and of packed sequences: arguments for `visibility` and `tiles`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import AttentionSpec, Inputs


def position_bounds(inputs: Inputs, spec: AttentionSpec) -> tuple[int | None, int | None, int | None]:
    """(shift, left, right) of the call; no shift where each sequence has its own."""
    seqlen_q, seqlen_k = inputs.q.shape[2], inputs.k.shape[2]
    left, right = (None if x is None else min(x, seqlen_q + seqlen_k) for x in (spec.left, spec.right))
    own_shift = inputs.spans_q is not None and not spec.top_left
    return None if own_shift else spec.shift(seqlen_q, seqlen_k), left, right


def segments(inputs: Inputs) -> int:
    """How many intervals of keys a row sees, where ranges say so."""
    return 0 if inputs.ranges is None else inputs.ranges.shape[1] // 2


def row_ranges(inputs: Inputs) -> tuple[Tensor | None, int | None]:
    """Keys of each row, and how far those of the next batch entry are: 0 if it has the same."""
    return _with_step(inputs.ranges)


def key_ranges(inputs: Inputs) -> tuple[Tensor | None, int | None]:
    """Rows of each key, the mirror of `row_ranges`."""
    return _with_step(inputs.key_ranges)


def _with_step(x: Tensor | None) -> tuple[Tensor | None, int | None]:
    if x is None:
        return None, None
    return x, 0 if x.shape[0] == 1 else x.stride(0)


def listing_of(inputs: Inputs, visits: Tensor | None) -> tuple[Any, ...]:
    """(visits, their strides, numbers of tiles, their strides, bits); visits: of rows or of keys."""
    if visits is None or inputs.tiles is None:
        return None, None, None, None, None
    return visits, _tile_strides(visits), inputs.tiles, _tile_strides(inputs.tiles), inputs.bits


def _tile_strides(x: Tensor) -> tuple[int, int, int]:
    """0 for a batch or head axis of size 1; the last stride is 1."""
    return 0 if x.shape[0] == 1 else x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


def tiles_to_run(spans: Tensor | None, batch: int, seqlen: int, block: int) -> int:
    """Tiles of `block` rows, of one head: those of a packed axis as `tiles.tile_count` bounds them."""
    return batch * -(-seqlen // block) if spans is None else seqlen // block + spans.shape[0]


def packing_of(inputs: Inputs, spans: Tensor | None, block: int | None) -> tuple[Any, ...]:
    """((spans of queries, spans of keys, work), number of sequences); spans: those that tiles are cut from.

    work: int32 (tiles, 2), the sequence of each tile, -1 if none needs it, and the tile's number in it; None
    without block. Sequences of very different lengths are thus spread evenly over programs, and nobody asks
    for lengths.
    """
    if spans is None:
        return (None, None, None), None
    if block is None:
        return (inputs.spans_q, inputs.spans_k, None), spans.shape[0]
    n_sequences, axis = spans.shape[0], inputs.q.shape[2] if spans is inputs.spans_q else inputs.k.shape[2]
    tile = torch.arange(tiles_to_run(spans, 1, axis, block), dtype=torch.int32, device=spans.device)
    if spans.is_meta:
        work = spans.new_empty(tile.shape[0], 2)
    else:
        counts = (spans[:, 1] - spans[:, 0] + (block - 1)) // block
        ends = counts.cumsum(0, dtype=torch.int32)
        sequence = torch.searchsorted(ends, tile, right=True, out_int32=True)
        own = sequence.clamp_max(n_sequences - 1)
        number = tile - (ends - counts)[own]
        work = torch.stack([sequence.masked_fill(sequence >= n_sequences, -1), number], 1)
    return (inputs.spans_q, inputs.spans_k, work.contiguous()), n_sequences


def sum_of_rows(x: Tensor, inputs: Inputs) -> Tensor:
    """Sum over the rows of each batch entry or sequence: (entries, heads) from (batch, heads, seqlen_q)."""
    if inputs.spans_q is None:
        return x.sum(2)
    # Segments reach up to the next sequence: between them are zeros.
    starts = inputs.spans_q[:, 0].long()
    stops = torch.cat([starts[1:], starts.new_full((1,), x.shape[2])])
    return torch.segment_reduce(x[0].T.contiguous(), "sum", offsets=torch.cat([starts, stops[-1:]]), axis=0)
