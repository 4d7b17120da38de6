"""What may be added to scores besides a tensor: functions of the positions, never stored score by score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .visibility import positions

if TYPE_CHECKING:
    from .spec import AttentionSpec, Inputs


@dataclass(frozen=True, eq=False)
class ALiBi:
    """-slope·|p - j| for the query at position p and key j (Press et al. 2022, section 3).

    slopes: (heads_q,) or (batch, heads_q), any float dtype; they may have gradients. Positions are those of
    the call: the last query stands at the last key.
    """

    slopes: Tensor

    @classmethod
    def of_heads(cls, heads: int, device: torch.device | str | None = None) -> ALiBi:
        """The slopes of the paper: a geometric sequence from 2^(-8/heads) down to 2^-8.

        For a number of heads that is no power of two: that of the next smaller one, then every other one of
        the next larger one, as the authors' code has it.
        """
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        whole = 2 ** int(math.log2(heads))
        slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
        slopes += [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
        return cls(torch.tensor(slopes, dtype=torch.float32, device=device))


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A learned number for each bucket of relative positions and each head (Raffel et al. 2020, section 2.1).

    table: (buckets, heads_q), any float dtype, T5's `relative_attention_bias.weight`; it may have gradients.
    The first half of the buckets holds one distance each; the others grow like its logarithm up to
    max_distance, and the last one holds all that is further. bidirectional: the second half of the table is
    for keys after the query; without it they have the bucket of distance 0, as in T5's decoder.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128


Biases = Tensor | ALiBi | RelativeBias | tuple[Tensor | ALiBi | RelativeBias, ...] | None
"""What `bias` may be; several are added up."""


def distances(
    inputs: Inputs, spec: AttentionSpec, rows: slice | Tensor = slice(None), cols: slice = slice(None)
) -> Tensor:
    """|p - j| of a block of query rows and key columns, [rows, cols], in float32 or wider."""
    position, col = positions(inputs, spec, rows, cols)
    return (position - col).abs().to(torch.promote_types(inputs.q.dtype, torch.float32))


def looked_up(
    inputs: Inputs, spec: AttentionSpec, rows: slice | Tensor = slice(None), cols: slice = slice(None)
) -> Tensor:
    """What a `RelativeBias` adds to the scores of a block, [heads_q, rows, cols], in the table's dtype."""
    assert inputs.table is not None
    position, col = positions(inputs, spec, rows, cols)
    return inputs.table.T[:, _buckets(col - position, inputs.table.shape[0], spec)]


def summed_up(x: Tensor, inputs: Inputs, spec: AttentionSpec, rows: slice, cols: slice) -> Tensor:
    """The transpose of `looked_up`: what a block x, (batch, heads_q, rows, cols), adds to dtable.

    Scores on a diagonal share a bucket, so diagonals are summed first; products, not scatters: the same bits
    on every run.
    """
    assert inputs.table is not None
    n_rows, n_cols = x.shape[2:]
    # The last row first, and each row moved one further than the one before it: diagonals become columns.
    width = n_rows + n_cols - 1
    moved = F.pad(x.sum(0).flip(1), (0, n_rows)).flatten(1)[:, : n_rows * width].unflatten(1, (n_rows, width))
    n_buckets, shift = inputs.table.shape[0], spec.shift(inputs.q.shape[2], inputs.k.shape[2])
    ahead = torch.arange(width, device=x.device) + (cols.start - (rows.start + n_rows - 1 + shift))
    return (moved.sum(1) @ F.one_hot(_buckets(ahead, n_buckets, spec), n_buckets).to(x.dtype)).T


def _buckets(ahead: Tensor, n_buckets: int, spec: AttentionSpec) -> Tensor:
    """Row of the table for keys that are so many positions after the query."""
    if spec.bidirectional:
        n_buckets //= 2
        first, distance = n_buckets * (ahead > 0), ahead.abs()
    else:
        first, distance = torch.zeros_like(ahead), (-ahead).clamp_min(0)
    exact = n_buckets // 2
    growth = (distance.clamp_min(1).float() / exact).log() / math.log(spec.max_distance / exact)
    far = exact + (growth * (n_buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp_max(n_buckets - 1))
