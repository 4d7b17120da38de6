"""Intervals of keys: what a query row sees, and when intersections and unions of that stay intervals.

Bounds are tensors over rows that never decrease along them, which maximum and minimum preserve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import AttentionSpec, Inputs
from .visibility import block_of, owners

AT_MOST = 2
"""Intervals of a row that `Inputs.ranges` holds."""
_FAR = 2**30
"""Further than any key; sums with positions stay within int32."""


class Ranges(NamedTuple):
    """What `Inputs` says in its fields of these names."""

    ranges: Tensor
    key_ranges: Tensor


class Lengths(NamedTuple):
    """Sizes of one packed sequence, and where its query 0 stands."""

    seqlen_q: int
    seqlen_k: int
    shift: int


class Call(NamedTuple):
    """What a mask is asked about: sizes of a call, and where query 0 stands.

    packed: batch is the number of sequences, seqlen_q and seqlen_k are those of all; or, where their lengths
    are known on the host, the longest of each.
    """

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    shift: int
    device: torch.device
    packed: bool = False
    lengths: tuple[Lengths, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the scores."""
        return self.batch, self.heads, self.seqlen_q, self.seqlen_k

    def check_holds_longest(self, name: str, sizes: Sequence[int], *, broadcasts: bool) -> None:
        """Raise if axes (sequences, heads_q, rows, keys) do not reach the longest sequences, as far as those
        are known. broadcasts: whether a size of 1 is for any number of rows and keys."""
        fit = [a in (1, b) for a, b in zip(sizes[:2], self.shape)]
        fit += [a >= b or (broadcasts and a == 1) for a, b in zip(sizes[2:], self.shape[2:])]
        if self.lengths and not (len(sizes) == 4 and all(fit)):
            raise ValueError(
                f"{name} must be (sequences, heads_q, rows, keys) = ({self.batch}, {self.heads}, at least "
                f"{self.seqlen_q}, at least {self.seqlen_k}), which the longest packed sequences have, got "
                f"{tuple(sizes)}"
            )

    def of_longest(self, inputs: Inputs, spec: AttentionSpec) -> Call:
        """A packed call with the lengths of its sequences, which are read: that synchronises. Of meta tensors
        nobody has them: there each sequence may be all there is."""
        assert inputs.spans_q is not None
        assert inputs.spans_k is not None
        sizes: list[tuple[int, int]] = [(self.seqlen_q, self.seqlen_k)] * self.batch
        if not inputs.spans_q.is_meta:
            spans = torch.cat([inputs.spans_q, inputs.spans_k], 1).tolist()
            sizes = [(row_stop - row, col_stop - col) for row, row_stop, col, col_stop in spans]
        seqlen_q, seqlen_k = (max(x) for x in zip(*sizes, strict=True))
        lengths = tuple(Lengths(*both, spec.shift(*both)) for both in sizes)
        return self._replace(seqlen_q=seqlen_q, seqlen_k=seqlen_k, lengths=lengths)


class Entries(NamedTuple):
    """Batch entries of a call that is dense, or sequences: number, int64 (entries, 1). The others: an int
    for all entries, or int32 (entries, 1) for sequences."""

    number: Tensor
    seqlen_q: int | Tensor
    seqlen_k: int | Tensor
    shift: int | Tensor

    @classmethod
    def of(cls, call: Call, sequences: Sequence[int] | None = None) -> Entries:
        """All of a dense call; these of a packed one, which has lengths."""
        if sequences is None:
            number = torch.arange(call.batch, device=call.device)[:, None]
            return cls(number, call.seqlen_q, call.seqlen_k, call.shift)
        rows = [(i, *call.lengths[i]) for i in sequences]
        number, *others = torch.tensor(rows, device=call.device).split(1, 1)
        seqlen_q, seqlen_k, shift = (x.int() for x in others)
        return cls(number, seqlen_q, seqlen_k, shift)


class Rows(NamedTuple):
    """Query rows, and what places them among the keys.

    Rows of batch entries, or of sequences, as many of each: number, int32 (1, rows), each row's own; position
    (1 or entries, rows), where it stands on the axis of keys; entry, int64 (entries, 1); seqlen_k, an int
    or int32 (entries, 1); owned, (entries, rows), None if all: whether the sequence has such a row.
    All rows of a packed call: each of these is (1, rows), number and position count within the sequence, and
    rows that belong to no sequence are not owned. heads: of the call.
    """

    number: Tensor
    position: Tensor
    entry: Tensor
    seqlen_k: int | Tensor
    heads: int
    owned: Tensor | None = None

    @classmethod
    def of(cls, inputs: Inputs, spec: AttentionSpec) -> Rows:
        """All rows of a call."""
        (batch, heads, seqlen_q, _), seqlen_k = inputs.q.shape, inputs.k.shape[2]
        if inputs.spans_q is None or inputs.spans_k is None:
            shift = spec.shift(seqlen_q, seqlen_k)
            call = Call(batch, heads, seqlen_q, seqlen_k, shift, inputs.q.device)
            return cls.between(slice(0, seqlen_q), Entries.of(call), heads)
        sequence, place, owned = (x[None] for x in owners(inputs.spans_q, seqlen_q))
        len_q, len_k = ((x[:, 1] - x[:, 0])[sequence] for x in (inputs.spans_q, inputs.spans_k))
        position = place if spec.top_left else place + (len_k - len_q)
        return cls(place, position, sequence, len_k, heads, owned)

    @classmethod
    def between(cls, rows: slice, entries: Entries, heads: int) -> Rows:
        """Some rows of each of the entries."""
        number = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=entries.number.device)[None]
        owned = None if isinstance(entries.seqlen_q, int) else number < entries.seqlen_q
        return cls(number, number + entries.shift, entries.number, entries.seqlen_k, heads, owned)

    def columns(self, cols: slice) -> Tensor:
        """Numbers of keys, [cols], where the rows are."""
        return torch.arange(cols.start, cols.stop, device=self.number.device)

    def each(self, x: Tensor) -> Tensor:
        """What x, (1 or batch,), says of the rows, shaped like entry, or (1, 1)."""
        return x[:, None] if x.shape[0] == 1 else x[self.entry]

    def look_up(self, x: Tensor, at: Tensor) -> Tensor:
        """x, (1 or batch, n), at a place for each row, shaped like position: (1 or entries, rows)."""
        return x[0][at] if x.shape[0] == 1 else x[self.entry, at]

    def block(self, x: Tensor, cols: slice) -> Tensor:
        """The block of a mask, of four axes that may have size 1 and then stay so, of rows of entries."""
        x = block_of(x, slice(None), cols)
        entry, row = (
            index if n != 1 else index.new_zeros(1)
            for index, n in zip((self.entry[:, 0], self.number[0]), x.shape[::2])
        )
        return x[entry[:, None], :, row].transpose(1, 2)

    def owns(self, cols: slice) -> Tensor | None:
        """Which elements of a block a sequence has, (entries, 1, rows, cols); None if all."""
        if self.owned is None or isinstance(self.seqlen_k, int):
            return None
        return self.owned[:, None, :, None] & (self.columns(cols) < self.seqlen_k[:, None, :, None])


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
