"""Intervals of keys: what a query row sees, and when intersections and unions of that stay intervals.

Bounds are tensors over rows that never decrease along them, which maximum and minimum preserve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import AttentionSpec, Inputs
from .visibility import owners

AT_MOST = 2
"""Intervals of a row that `Inputs.ranges` holds."""
_FAR = 2**30
"""Further than any key; sums with positions stay within int32."""


class Ranges(NamedTuple):
    """What `Inputs` says in its fields of these names."""

    ranges: Tensor
    key_ranges: Tensor


class Call(NamedTuple):
    """What a mask is asked about: sizes of a call, and where query 0 stands. packed: batch is the number of
    sequences, seqlen_q and seqlen_k are those of all."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    shift: int
    device: torch.device
    packed: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the scores."""
        return self.batch, self.heads, self.seqlen_q, self.seqlen_k


class Rows(NamedTuple):
    """Query rows, and what places them among the keys.

    number, position: int32 (1, rows): each row's own, and where it stands on the axis of keys. batch, heads:
    of the call; packed, batch is the number of sequences. seqlen_k: an int, or, packed, int32 (1, rows), as
    sequence and owned are: which sequence a row belongs to, counting within it, and whether to one at all.
    """

    number: Tensor
    position: Tensor
    seqlen_k: int | Tensor
    batch: int
    heads: int
    sequence: Tensor | None = None
    owned: Tensor | None = None

    @classmethod
    def of(cls, inputs: Inputs, spec: AttentionSpec) -> Rows:
        """All rows of a call."""
        (batch, heads, seqlen_q, _), seqlen_k = inputs.q.shape, inputs.k.shape[2]
        if inputs.spans_q is None or inputs.spans_k is None:
            shift = spec.shift(seqlen_q, seqlen_k)
            return cls.between(slice(0, seqlen_q), shift, seqlen_k, batch, heads, inputs.q.device)
        sequence, place, owned = (x[None] for x in owners(inputs.spans_q, seqlen_q))
        len_q, len_k = ((x[:, 1] - x[:, 0])[sequence] for x in (inputs.spans_q, inputs.spans_k))
        position = place if spec.top_left else place + (len_k - len_q)
        return cls(place, position, len_k, inputs.spans_q.shape[0], heads, sequence, owned)

    @classmethod
    def between(
        cls, rows: slice, shift: int, seqlen_k: int, batch: int, heads: int, device: torch.device
    ) -> Rows:
        """Some rows of a dense call, whose row 0 stands at shift."""
        number = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)[None]
        return cls(number, number + shift, seqlen_k, batch, heads)

    def columns(self, cols: slice) -> Tensor:
        """Numbers of keys, [cols], where the rows are."""
        return torch.arange(cols.start, cols.stop, device=self.number.device)

    def each(self, x: Tensor) -> Tensor:
        """What x, (1 or batch,), says of the rows: (1 or batch, 1), or (1, rows) if packed."""
        return x[:, None] if self.sequence is None else x.expand(self.batch)[self.sequence]

    def look_up(self, x: Tensor, at: Tensor) -> Tensor:
        """x, (1 or batch, n), at one place for each row, (1, rows): (1 or batch, rows), or (1, rows)."""
        return x[:, at[0]] if self.sequence is None else x.expand(self.batch, -1)[self.sequence, at]


class Band(NamedTuple):
    """Keys p - left ... p + right of the query at p; None = unbounded."""

    left: int | None = None
    right: int | None = None

    def intersected(self, other: Band) -> Band:
        return Band(*(b if a is None else a if b is None else min(a, b) for a, b in zip(self, other)))

    def united(self, other: Band) -> Band:
        """The hull: both hold p itself, so that no key between the two is in neither."""
        return Band(*(None if a is None or b is None else max(a, b) for a, b in zip(self, other)))


UNBOUNDED = Band()


class Interval(NamedTuple):
    """Keys [lo, hi) of each row, int32 (1 or batch, 1 or rows). lo None: from key 0; hi None: to the last."""

    lo: Tensor | None
    hi: Tensor | None


def band(left: int | None, right: int | None, rows: Rows) -> Interval:
    """What causal and window leave."""
    return Interval(
        None if left is None else rows.position - min(left, _FAR),
        None if right is None else rows.position + (min(right, _FAR) + 1),
    )


def intersected(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval] | None:
    """Keys in one of a and in one of b; None if that may be more intervals than `AT_MOST`."""
    if len(a) * len(b) > AT_MOST:
        return None
    return [Interval(_latest(x.lo, y.lo), _earliest(x.hi, y.hi)) for x in a for y in b]


def united(given: Sequence[Interval]) -> list[Interval] | None:
    """Keys in any of them, disjoint; None unless all but one provably start at key 0.

    Those are one interval, and the other is clipped to what lies right of it: then no bound decreases.
    """
    first, others = [x for x in given if x.lo is None], [x for x in given if x.lo is not None]
    if not first:
        return others if len(others) == 1 else None
    prefix = Interval(None, None) if any(x.hi is None for x in first) else _longest(first)
    if not others or prefix.hi is None:
        return [prefix]
    return [prefix, Interval(_latest(prefix.hi, others[0].lo), others[0].hi)] if len(others) == 1 else None


def as_ranges(intervals: Sequence[Interval], rows: Rows) -> Tensor:
    """`Inputs.ranges`."""
    end = rows.position.new_full((1, 1), rows.seqlen_k) if isinstance(rows.seqlen_k, int) else rows.seqlen_k
    start = torch.zeros_like(rows.position)
    bounds = [
        start if bound is None and is_lo else end if bound is None else bound
        for interval in intervals
        for is_lo, bound in zip((True, False), interval)
    ]
    inside = [torch.minimum(x, end).clamp_min(0) for x in torch.broadcast_tensors(start, *bounds)[1:]]
    ranges = torch.stack(inside, 1)
    return ranges if rows.owned is None else ranges * rows.owned[:, None]


def holds(intervals: Sequence[Interval], col: Tensor) -> Tensor:
    """Element mask, bool (1 or batch, 1, 1 or rows, cols); col: numbers of keys."""
    shown = torch.zeros((), dtype=torch.bool, device=col.device)
    for lo, hi in intervals:
        here = torch.ones(1, 1, 1, len(col), dtype=torch.bool, device=col.device)
        if lo is not None:
            here = here & (col >= lo[:, None, :, None])
        if hi is not None:
            here = here & (col < hi[:, None, :, None])
        shown = shown | here
    return shown


def _latest(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else torch.maximum(a, b)


def _earliest(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else torch.minimum(a, b)


def _longest(prefixes: Sequence[Interval]) -> Interval:
    longest = prefixes[0]
    for x in prefixes[1:]:
        longest = Interval(None, _latest(longest.hi, x.hi))
    return longest
