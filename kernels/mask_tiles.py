"""Any mask as a list of tiles to visit and bits for those that are seen in part: the tensors of `Inputs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import HIDDEN, TILE, WHOLE

Shown = Callable[[slice, slice], Tensor]
"""Element mask of a block of rows and keys: bool, four axes, the first two the same for every block."""
_BLOCK_ELEMENTS = 2**22
"""Of the element mask at any time, as long as a tile of every plane is smaller."""


class Tiles(NamedTuple):
    """`Inputs.tiles`, `bits`, `visits_q` and `visits_k`."""

    tiles: Tensor
    bits: Tensor
    visits_q: Tensor
    visits_k: Tensor

    @classmethod
    def listed(cls, tiles: Tensor, bits: Tensor) -> Tiles:
        return cls(tiles, bits, _visits(tiles), _visits(tiles.mT))


def build(shown: Shown, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tiles:
    """Ask block by block; synchronises, as how many tiles have bits decides a shape."""
    return Tiles.listed(*_sorted(shown, seqlen_q, seqlen_k, device))


def of_sequences(
    asked: Callable[[list[int]], Shown], lengths: Sequence[tuple[int, int]], device: torch.device
) -> Tiles:
    """`build` for packed sequences, of tiles of the longest; lengths: (seqlen_q, seqlen_k) of each, not all
    without rows or without keys.

    asked: element masks of some of them, by their numbers, False outside of each. Those are asked together
    whose numbers of tiles have as many binary digits: the others do not cost what the longest costs.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, sizes in enumerate(lengths):
        alike.setdefault(tuple(n.bit_length() for n in _tiles(*sizes)), []).append(number)
    parts, bits, count = [], [], 0
    for numbers in alike.values():
        seqlen_q, seqlen_k = (max(x) for x in zip(*(lengths[i] for i in numbers)))
        if 0 in (seqlen_q, seqlen_k):
            continue
        own, words = _sorted(asked(numbers), seqlen_q, seqlen_k, device)
        parts.append((numbers, torch.where(own >= 0, own + count, own)))
        bits.append(words)
        count += len(words)
    longest = (max(x) for x in zip(*lengths))
    heads = max((own.shape[1] for _, own in parts), default=1)
    tiles = torch.full((len(lengths), heads, *_tiles(*longest)), HIDDEN, dtype=torch.int32, device=device)
    for numbers, own in parts:
        tiles[torch.tensor(numbers, device=device), :, : own.shape[2], : own.shape[3]] = own
    if not bits:
        bits.append(_no_bits(device))
    return Tiles.listed(tiles, torch.cat(bits))


def _sorted(shown: Shown, seqlen_q: int, seqlen_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`Tiles.tiles` and `bits`."""
    planes = shown(slice(0, 1), slice(0, 1)).shape[:2]
    tiles = torch.full((*planes, *_tiles(seqlen_q, seqlen_k)), HIDDEN, dtype=torch.int32, device=device)
    bits, count = [], 0
    if device.type != "meta":  # there nothing is known but shapes
        for here, block in _blocks(shown, math.prod(planes), seqlen_q, seqlen_k):
            whole = block.all(5).all(3)
            some = block.any(5).any(3) & ~whole
            words = _words(block.transpose(3, 4)[some])
            target = tiles[here]
            target[whole] = WHOLE
            target[some] = torch.arange(count, count + len(words), dtype=torch.int32, device=device)
            bits.append(words)
            count += len(words)
    if count == 0:
        bits.append(_no_bits(device))
    return tiles, torch.cat(bits)


def _no_bits(device: torch.device) -> Tensor:
    """What may not be empty."""
    return torch.zeros(1, TILE, TILE // 32, dtype=torch.int32, device=device)


def count(shown: Shown, seqlen_q: int, seqlen_k: int) -> int:
    """How many elements are True, over all planes."""
    planes = shown(slice(0, 1), slice(0, 1)).shape[:2]
    return sum(int(block.sum()) for _, block in _blocks(shown, math.prod(planes), seqlen_q, seqlen_k))


def _tiles(seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    return -(-seqlen_q // TILE), -(-seqlen_k // TILE)


def _blocks(
    shown: Shown, planes: int, seqlen_q: int, seqlen_k: int
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """(where in `Tiles.tiles`, [..., tiles of rows, TILE, tiles of keys, TILE]), False outside the matrix."""
    n_rows, n_cols = _tiles(seqlen_q, seqlen_k)
    of_a_block = max(1, _BLOCK_ELEMENTS // (planes * TILE * TILE))
    cols_step = min(n_cols, of_a_block)
    rows_step = max(1, of_a_block // max(1, n_cols))
    for row in range(0, n_rows, rows_step):
        for col in range(0, n_cols, cols_step):
            rows = slice(row * TILE, min((row + rows_step) * TILE, seqlen_q))
            cols = slice(col * TILE, min((col + cols_step) * TILE, seqlen_k))
            size = rows.stop - rows.start, cols.stop - cols.start
            block = shown(rows, cols)
            block = block.expand(*block.shape[:2], *size)
            missing = [-n % TILE for n in size]
            if any(missing):
                block = F.pad(block, (0, missing[1], 0, missing[0]))
            yield (
                (..., slice(row, row + rows_step), slice(col, col + cols_step)),
                block.unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE)),
            )


def _words(tiles: Tensor) -> Tensor:
    """[n, TILE, TILE] as bits, [n, TILE, TILE // 32]."""
    places = torch.arange(32, dtype=torch.int32, device=tiles.device)
    return (tiles.unflatten(2, (-1, 32)).int() << places).sum(-1, dtype=torch.int32)


def _visits(tiles: Tensor) -> Tensor:
    """`Inputs.visits_q` from tiles, or `visits_k` from their transpose."""
    whole, some = tiles == WHOLE, tiles >= 0
    order = torch.where(whole, 0, torch.where(some, 1, 2)).sort(dim=-1, stable=True).indices
    return torch.cat([whole.sum(-1, keepdim=True), some.sum(-1, keepdim=True), order], -1).int()
