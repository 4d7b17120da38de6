"""What may be added to scores besides a tensor: functions of the positions, never stored score by score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .masks import positions

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


Biases = Tensor | ALiBi | tuple[Tensor | ALiBi, ...] | None
"""What `bias` may be; several are added up."""


def distances(
    inputs: Inputs, spec: AttentionSpec, rows: slice | Tensor = slice(None), cols: slice = slice(None)
) -> Tensor:
    """|p - j| of a block of query rows and key columns, [rows, cols], in float32 or wider."""
    position, col = positions(inputs, spec, rows, cols)
    return (position - col).abs().to(torch.promote_types(inputs.q.dtype, torch.float32))
