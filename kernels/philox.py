"""Dropout's random bits: Philox 4x32-10 (Salmon et al. 2011, section 3.3) in PyTorch.

An element is kept or dropped as a pure function of (seed, batch index, query head, query row, key
column), so every implementation, device and tile size drops the same ones and backward recomputes
them. `triton/softmax.py` has the twin for kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .spec import AttentionSpec, Inputs

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def drop_threshold(dropout_p: float) -> int:
    """Words at or above this are kept; 2**32 (p = 1) keeps none."""
    return round(dropout_p * 2**32)


def keep_mask(
    seed: Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    rows: range | Tensor,
    cols: range,
    first_plane: int = 0,
) -> Tensor:
    """Which elements dropout keeps: bool, (batch, heads, len(rows), len(cols)), on the seed's device.

    rows, cols: numbers within the sequence. Key: the 64-bit seed; counter: (col // 4, row, plane, 0)
    with plane = batch·heads + head counted from first_plane; lane: col % 4; keep iff
    word >= round(p·2³²).
    """
    device = seed.device
    block = torch.arange(cols.start // 4, -(-cols.stop // 4), device=device)
    row = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, range) else rows
    plane = torch.arange(first_plane, first_plane + batch * heads, device=device).view(batch, heads, 1, 1)
    counter = torch.broadcast_tensors(block, row[:, None], plane, block.new_zeros(()))
    words = torch.stack(philox(seed, *counter), dim=-1).flatten(-2)  # [batch, heads, rows, 4 * blocks]
    first = cols.start % 4
    return words[..., first : first + len(cols)] >= drop_threshold(dropout_p)


def kept(
    inputs: Inputs, spec: AttentionSpec, rows: slice, cols: slice, first_entry: int = 0
) -> Tensor | None:
    """Which elements of a block of a call dropout keeps, (batch, heads_q, rows, cols); None without dropout.

    first_entry: which of the call's batch entries these inputs start with.
    """
    if spec.dropout_p == 0.0:
        return None
    assert inputs.seed is not None
    batch, heads, _, _ = inputs.q.shape
    row, col = (range(x.start, x.stop) for x in (rows, cols))
    first_plane = (spec.first_entry + first_entry) * heads
    return keep_mask(inputs.seed, spec.dropout_p, batch, heads, row, col, first_plane)


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64) for each counter; all int64, same shape."""
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        hi0, lo0 = _mulhilo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _mulhilo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in int64 without overflow into the sign."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
