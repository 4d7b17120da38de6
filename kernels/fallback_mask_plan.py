"""Blocks that a mask object leaves, from its intervals or its tiles, which are read on the host.

On a GPU that synchronises; reading is O(seqlen), and every block that is hidden is spared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .fallback_plan import Limits, Part, Strip, split
from .spec import HIDDEN, TILE, WHOLE

Intervals = list[list[tuple[int, int]]]
"""Of each interval, one or two, its (lo, hi) in each row."""
_ALIKE, _GROWS, _RAGGED = 0, 1, -1
"""What rows do from one to the next: nothing; one interval, the first (`_GROWS`) or the second, gains a key
at its end; anything else."""
_MANY = 32
"""Rows from which on a strip of their own is cheaper than a place in one with an element mask."""
_NEAR = 32
"""Hidden keys between two intervals that cost less than a block more."""


def plan_of_ranges(ranges: Tensor, stop: int, elementwise: bool, limits: Limits) -> tuple[Strip, ...]:
    """Strips of the rows of one batch entry, in order, as `fallback_plan.plan` makes them.

    ranges: `Inputs.ranges` of the entry, (2 or 4, seqlen_q). stop: keys from here on are hidden.
    elementwise: a mask beside them has to be read.
    """
    bounds = ranges.cpu().clamp_max(stop)
    bounds[1::2] = torch.maximum(bounds[::2], bounds[1::2])  # an empty interval ends where it starts
    intervals = [[*zip(*pair)] for pair in bounds.unflatten(0, (-1, 2)).tolist()]
    return tuple(
        strip
        for rows, kind in _segments(bounds, intervals)
        for strip in _strips(intervals, rows, kind, elementwise, limits)
        if strip.parts
    )


def plan_of_tiles(
    tiles: Tensor, seqlen_q: int, stop: int, elementwise: bool, limits: Limits
) -> tuple[Strip, ...]:
    """The same from `Inputs.tiles` of entries that are computed together: what one plane visits, all do."""
    planes = tiles.flatten(0, 1)
    is_hidden, is_whole = (planes == HIDDEN).all(0), (planes == WHOLE).all(0) & (not elementwise)
    lines = torch.where(is_hidden, HIDDEN, torch.where(is_whole, WHOLE, 0)).tolist()
    strips, first = [], 0
    for line, alike in itertools.groupby(lines):
        last, parts, col = first + len([*alike]) * TILE, [], 0
        for kind, run in itertools.groupby(line):
            lo, col = col, col + len([*run]) * TILE
            hi = min(col, stop)
            if kind != HIDDEN and lo < hi:
                parts += split(lo, hi, limits.cols, *((lo, hi) if kind == WHOLE else (0, 0)))
        free = limits.whole and all(part.visible == "all" for part in parts)
        step = seqlen_q if free else min(limits.rows, TILE)
        for rows in _pieces(slice(first, min(last, seqlen_q)), step) if parts else ():
            strips.append(Strip(rows, tuple(parts)))
        first = last
    return tuple(strips)


def _segments(bounds: Tensor, intervals: Intervals) -> Iterator[tuple[slice, int]]:
    """Rows cut where they change what they do, unless so few do it that it does not matter."""
    steps = bounds.diff(dim=1)
    moves = (steps != 0).sum(0)
    kinds = torch.where(moves == 0, _ALIKE, _RAGGED)
    for i, grows in enumerate(steps[1::2] == 1):
        kinds = torch.where((moves == 1) & grows, _GROWS + i, kinds)
    row = done = 0
    for kind, count in zip(*(x.tolist() for x in kinds.unique_consecutive(return_counts=True))):
        first, row = max(row, done), row + count
        if kind == _RAGGED or row - first < _MANY:
            continue
        if kind >= _GROWS and len({*intervals[kind - _GROWS][first]}) == 1:
            first += 1  # it sees nothing there yet
        if done < first:
            yield slice(done, first), _RAGGED
        yield slice(first, row + 1), kind
        done = row + 1
    if done < bounds.shape[1]:
        yield slice(done, bounds.shape[1]), _RAGGED


def _strips(
    intervals: Intervals, rows: slice, kind: int, elementwise: bool, limits: Limits
) -> Iterator[Strip]:
    """Strips of a segment."""
    if kind != _RAGGED and limits.whole and not elementwise:
        yield Strip(rows, tuple(_free_parts(intervals, rows, kind, limits)))
        return
    step = limits.rows if kind == _ALIKE else min(limits.rows, TILE)
    for piece in _pieces(rows, step):
        yield Strip(piece, tuple(_parts(intervals, piece, elementwise, limits)))


def _free_parts(intervals: Intervals, rows: slice, kind: int, limits: Limits) -> Iterator[Part]:
    """Of rows that are alike, or grow by a key each: no element mask."""
    for i, of_rows in enumerate(intervals):
        lo, hi = of_rows[rows.start]
        edge = hi - 1 if kind == _GROWS + i else hi
        yield from split(lo, edge, limits.cols, lo, edge)
        if edge < hi:
            yield Part(slice(edge, of_rows[rows.stop - 1][1]), "causal")


def _parts(intervals: Intervals, rows: slice, elementwise: bool, limits: Limits) -> Iterator[Part]:
    """Of any rows. Bounds do not decrease: the first row has the lowest and the last one the highest."""
    spans = []
    for of_rows in intervals:
        (lo, inner_hi), (inner_lo, hi) = of_rows[rows.start], of_rows[rows.stop - 1]
        if lo < hi:
            spans.append((lo, hi, inner_lo, inner_hi))
    if len(spans) == 2 and spans[1][0] - spans[0][1] <= _NEAR and spans[0][0] - spans[1][1] <= _NEAR:
        spans = [(min(spans[0][0], spans[1][0]), max(spans[0][1], spans[1][1]), 0, 0)]
    for lo, hi, inner_lo, inner_hi in spans:
        yield from split(lo, hi, limits.cols, *((0, 0) if elementwise else (inner_lo, inner_hi)))


def _pieces(rows: slice, step: int) -> Iterator[slice]:
    for first in range(rows.start, rows.stop, step):
        yield slice(first, min(first + step, rows.stop))
