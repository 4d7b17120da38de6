"""Which blocks of the score matrix the fallback computes, and which of them need an element mask.

A strip is a slice of query rows; its parts are slices of keys. Between them they hold every pair
that causal and window leave visible, each once, and skip what is hidden.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

from .spec import AttentionSpec
from .visibility import key_bounds


class Part(NamedTuple):
    """Keys that the rows of a strip meet. visible: "all" of them; "causal": row r of the strip sees
    columns 0 ... r of the part; "some": ask `visibility.visible`."""

    cols: slice
    visible: Literal["all", "causal", "some"]


class Strip(NamedTuple):
    """Query rows that are computed together, and the keys they see. Never without parts."""

    rows: slice
    parts: tuple[Part, ...]


class Run(NamedTuple):
    """A strip, and how many there are like it, each moved along the diagonal by the rows of one."""

    strip: Strip
    times: int


class Limits(NamedTuple):
    """Largest block of an engine.

    rows, cols: of a block that needs an element mask. whole: blocks that need none may take all rows,
    and a causal edge counts as such.
    """

    rows: int
    cols: int
    whole: bool


@functools.lru_cache(maxsize=1024)
def plan(
    spec: AttentionSpec, seqlen_q: int, seqlen_k: int, stop: int, elementwise: bool, limits: Limits
) -> tuple[Strip, ...]:
    """Strips in the order of their rows; rows that see nothing are in none.

    stop: keys from here on are hidden; the positions of queries still count from seqlen_k.
    elementwise: a mask or a bias has to be read, so no block is free of one.
    """

    def bounds(first: int, last: int) -> tuple[int, int]:
        lo, hi = key_bounds(first, last, spec, seqlen_q, seqlen_k)
        return lo, max(lo, min(hi, stop))

    start, end = _rows_that_see(spec, seqlen_q, seqlen_k, stop)
    if start >= end:
        return ()
    lo, hi = bounds(start, end - 1)
    first_hidden = bounds(start, start)[1]
    left_binds, right_binds = bounds(end - 1, end - 1)[0] > lo, first_hidden < hi

    if limits.whole and not elementwise and not left_binds:
        edge = first_hidden - 1 if right_binds else hi
        parts = [*split(lo, edge, limits.cols, lo, edge)]
        if right_binds:
            parts.append(Part(slice(edge, hi), "causal"))
        return (Strip(slice(start, end), tuple(parts)),)

    strips = []
    for first in range(start, end, limits.rows):
        last = min(first + limits.rows, end) - 1
        inner = (0, 0) if elementwise else (bounds(last, last)[0], bounds(first, first)[1])
        parts = [*split(*bounds(first, last), limits.cols, *inner)]
        strips.append(Strip(slice(first, last + 1), tuple(parts)))
    return tuple(strips)


@functools.lru_cache(maxsize=1024)
def runs(
    spec: AttentionSpec, seqlen_q: int, seqlen_k: int, stop: int, elementwise: bool, limits: Limits
) -> tuple[Run, ...]:
    """The strips of `plan`; neighbours of one part each that lie alike are one run."""
    found: list[Run] = []
    for strip in plan(spec, seqlen_q, seqlen_k, stop, elementwise, limits):
        if found and len(strip.parts) == 1 and strip == _moved(*found[-1]):
            found[-1] = Run(found[-1].strip, found[-1].times + 1)
        else:
            found.append(Run(strip, 1))
    return tuple(found)


def _moved(strip: Strip, times: int) -> Strip:
    """The strip, by so many times its rows further along the diagonal."""
    step = times * (strip.rows.stop - strip.rows.start)

    def moved(x: slice) -> slice:
        return slice(x.start + step, x.stop + step)

    parts = tuple(Part(moved(part.cols), part.visible) for part in strip.parts)
    return Strip(moved(strip.rows), parts)


def _rows_that_see(spec: AttentionSpec, seqlen_q: int, seqlen_k: int, stop: int) -> tuple[int, int]:
    """Rows [start, end) whose interval of keys is not empty."""
    shift = spec.shift(seqlen_q, seqlen_k)
    start = 0 if spec.right is None else max(0, -shift - spec.right)
    end = seqlen_q if spec.left is None else min(seqlen_q, stop + spec.left - shift)
    return (start, end) if stop > 0 else (0, 0)


def split(lo: int, hi: int, step: int, inner_lo: int, inner_hi: int) -> list[Part]:
    """Keys [lo, hi) in steps; what lies within [inner_lo, inner_hi) is visible to all rows."""
    parts = []
    for col in range(lo, hi, step):
        end = min(col + step, hi)
        parts.append(Part(slice(col, end), "all" if inner_lo <= col and end <= inner_hi else "some"))
    return parts
