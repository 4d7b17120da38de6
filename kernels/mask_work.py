"""How much of the score matrix a mask object leaves, for those who explain a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .flops import lengths
from .spec import HIDDEN, TILE, WHOLE, Inputs


class Work(NamedTuple):
    """The share of scores that are visible, and tiles to visit: averages over batch entries and heads, or, of
    all packed sequences, over heads."""

    share: float
    tiles: int


def left_by_mask(inputs: Inputs) -> Work | None:
    """What `Inputs.ranges` or `tiles` leave; None without them, of ranges of sequences, and of values that
    nobody has.

    Reads them, which synchronises.
    """
    seqlen_q, seqlen_k = inputs.q.shape[2], inputs.k.shape[2]
    if inputs.q.is_meta or 0 in (seqlen_q, seqlen_k):
        return None
    if inputs.spans_q is not None:
        if inputs.tiles is None or inputs.bits is None:
            return None
        (scores, tiles), heads = _of_tiles(inputs.tiles, inputs.bits), inputs.tiles.shape[1]
        total = sum(rows * keys for rows, keys in lengths(inputs))
        return Work(scores / (heads * total), round(tiles / heads))
    if inputs.ranges is not None:
        scores, tiles = _of_ranges(inputs.ranges)
        planes = inputs.ranges.shape[0]
    elif inputs.tiles is not None and inputs.bits is not None:
        scores, tiles = _of_tiles(inputs.tiles, inputs.bits)
        planes = inputs.tiles.shape[0] * inputs.tiles.shape[1]
    else:
        return None
    return Work(scores / (planes * seqlen_q * seqlen_k), round(tiles / planes))


def _of_ranges(ranges: Tensor) -> tuple[int, int]:
    """Visible scores and visited tiles of all entries together."""
    lo, hi = ranges[:, ::2], ranges[:, 1::2]  # [entries, intervals, rows]
    scores = int((hi - lo).clamp_min(0).sum())
    last = torch.arange(TILE - 1, lo.shape[2] + TILE - 1, TILE, device=ranges.device).clamp_max(
        lo.shape[2] - 1
    )
    lo, hi = lo[..., ::TILE], hi[..., last]  # bounds never decrease
    first, stop = lo // TILE, torch.where(lo < hi, (hi + TILE - 1) // TILE, lo // TILE)
    tiles = (stop - first).sum()
    if first.shape[1] == 2:
        tiles -= (stop.amin(1) - first.amax(1)).clamp_min(0).sum()
    return scores, int(tiles)


def _of_tiles(tiles: Tensor, bits: Tensor) -> tuple[int, int]:
    """The same, over all planes."""
    ones = torch.tensor([i.bit_count() for i in range(256)], device=bits.device)
    some = int((ones * torch.bincount(bits.view(torch.uint8).flatten(), minlength=256)).sum())
    return some + int((tiles == WHOLE).sum()) * TILE**2, int((tiles != HIDDEN).sum())
