"""Which keys a query may see.

Visibility is an interval: query row i sees keys [lo, hi). Causal and window give it by arithmetic,
`key_lengths` cuts hi, and mask objects bring intervals of their own, or tiles. A boolean mask comes on top,
element by element. Everybody who has to know,
in PyTorch, asks here; `triton/visibility.py` holds the twins for kernels.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .spec import TILE, WHOLE

if TYPE_CHECKING:
    from .spec import AttentionSpec, Inputs


def key_bounds(first: int, last: int, spec: AttentionSpec, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Keys [lo, hi) that at least one of the query rows first ... last (inclusive) may see."""
    shift = spec.shift(seqlen_q, seqlen_k)
    lo = 0 if spec.left is None else max(0, first + shift - spec.left)
    hi = seqlen_k if spec.right is None else min(seqlen_k, last + shift + spec.right + 1)
    return lo, max(lo, hi)


def visible_scores(spec: AttentionSpec, seqlen_q: int, seqlen_k: int) -> int:
    """How many (query, key) pairs causal and window leave visible, per batch entry and head."""
    shift = spec.shift(seqlen_q, seqlen_k)
    if spec.left is None and spec.right is None:
        return seqlen_q * seqlen_k
    below = 0 if spec.left is None else _clipped_sum(shift - spec.left, seqlen_q, seqlen_k)
    upto = (
        seqlen_q * seqlen_k
        if spec.right is None
        else _clipped_sum(shift + spec.right + 1, seqlen_q, seqlen_k)
    )
    return upto - below


def _clipped_sum(start: int, count: int, limit: int) -> int:
    """Sum of start + i over i in [0, count), each term clipped to [0, limit]."""

    def positive_part(first: int) -> int:
        a, b = max(first, 0), max(first + count, 0)
        return (b * (b - 1) - a * (a - 1)) // 2

    return positive_part(start) - positive_part(start - limit)


def visible(
    inputs: Inputs, spec: AttentionSpec, rows: slice | Tensor = slice(None), cols: slice = slice(None)
) -> Tensor | None:
    """Element mask of a block: True where the query row may see the key column.

    rows: a slice of the query axis, or row numbers; cols: a slice of the key axis. Returns a bool tensor that
    broadcasts to (batch, heads_q, rows, cols), or None where everything is visible.
    """
    position, col = positions(inputs, spec, rows, cols)
    parts = [within(spec, position, col)]
    if inputs.key_lengths is not None:
        parts.append(col < inputs.key_lengths[:, None, None, None])
    if inputs.mask is not None:
        parts.append(block_of(inputs.mask, rows, cols))
    if inputs.ranges is not None:
        parts.append(_within_ranges(inputs.ranges[:, :, rows], col))
    if inputs.tiles is not None:
        row = position[:, 0] - spec.shift(inputs.q.shape[2], inputs.k.shape[2])
        parts.append(_of_tiles(inputs, row, col))
    return _all(parts)


def within(spec: AttentionSpec, position: Tensor, col: Tensor) -> Tensor | None:
    """What causal and window leave visible: position and col broadcast; None where they hide nothing."""
    return _all(
        [
            None if spec.left is None else col >= position - spec.left,
            None if spec.right is None else col <= position + spec.right,
        ]
    )


def _within_ranges(ranges: Tensor, col: Tensor) -> Tensor:
    """[1 or batch, 1, rows, cols] from `Inputs.ranges` of the rows."""
    bounds = ranges[:, :, None, :, None].unbind(1)  # [1 or batch, 1, rows, 1]
    shown = [(col >= lo) & (col < hi) for lo, hi in zip(bounds[::2], bounds[1::2], strict=True)]
    return functools.reduce(torch.logical_or, shown)


def _of_tiles(inputs: Inputs, row: Tensor, col: Tensor) -> Tensor:
    """[1 or batch, 1 or heads_q, rows, cols] from `Inputs.tiles` and `Inputs.bits`; row, col: numbers."""
    assert inputs.tiles is not None
    assert inputs.bits is not None
    number = inputs.tiles[:, :, row // TILE][..., col // TILE]
    word = inputs.bits[number.clamp_min(0), (row % TILE)[:, None], col % TILE // 32]
    return (number == WHOLE) | ((number >= 0) & (word >> (col % 32) & 1).bool())


def owners(spans: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each place on a packed axis: (sequence, place in the sequence, whether any sequence owns it).

    spans: `Inputs.spans_q` or `spans_k`. What nobody owns has a sequence and a place that are merely valid.
    """
    if spans.shape[0] == 0:
        spans = spans.new_zeros(1, 2)
    place = torch.arange(total, dtype=torch.int32, device=spans.device)
    sequence = (torch.searchsorted(spans[:, 0].contiguous(), place, right=True) - 1).clamp_min(0)
    start, stop = spans[sequence].unbind(1)
    return sequence, (place - start).clamp_min(0), (place >= start) & (place < stop)


def rows_of_keys(
    ranges: Tensor, seqlen_k: int, spans_q: Tensor | None = None, spans_k: Tensor | None = None
) -> Tensor:
    """`Inputs.key_ranges`: as no bound of ranges decreases along the rows, those of a key are an interval."""
    seqlen_q = ranges.shape[2]
    key = torch.arange(seqlen_k, dtype=torch.int32, device=ranges.device).expand(ranges.shape[0], -1)
    before: Tensor | int = 0
    if spans_q is not None and spans_k is not None:  # counted on the whole axes, no bound decreases either
        sequence, _, owned = owners(spans_q, seqlen_q)
        start, stop = spans_k[sequence].unbind(1)
        ranges = torch.where(owned, torch.minimum(ranges + start, stop), stop)
        first = torch.arange(seqlen_q, device=ranges.device) < spans_q[sequence, 0]
        ranges = torch.where(first, start, ranges)
        before = spans_q[owners(spans_k, seqlen_k)[0], 0]
    # row i sees key j if lo[i] <= j < hi[i]
    bounds = ranges.unflatten(1, (-1, 2)).flip(2).flatten(1, 2).unbind(1)  # of each segment hi, lo
    counts = [
        torch.searchsorted(x.contiguous(), key.contiguous(), right=True, out_int32=True) for x in bounds
    ]
    return (torch.stack(counts, 1) - before).clamp_min(0)


def _all(parts: list[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return functools.reduce(torch.logical_and, given) if given else None


def positions(
    inputs: Inputs, spec: AttentionSpec, rows: slice | Tensor, cols: slice
) -> tuple[Tensor, Tensor]:
    """Positions of queries, [rows, 1], and of keys, [cols]; rows and cols as for `visible`."""
    seqlen_q, seqlen_k, device = inputs.q.shape[2], inputs.k.shape[2], inputs.q.device
    if isinstance(rows, slice):
        rows = torch.arange(*rows.indices(seqlen_q), device=device)
    col = torch.arange(*cols.indices(seqlen_k), device=device)
    return rows[:, None] + spec.shift(seqlen_q, seqlen_k), col


def block_of(x: Tensor, rows: slice | Tensor, cols: slice) -> Tensor:
    """The (rows, cols) block of a mask or bias whose axes may have size 1 and then stay so."""
    return x[:, :, rows if x.shape[2] != 1 else slice(None), cols if x.shape[3] != 1 else slice(None)]


def entries_of(x: Tensor, entries: slice) -> Tensor:
    """Batch entries of a tensor whose batch axis may have size 1 and then stays so."""
    return x if x.shape[0] == 1 else x[entries]
