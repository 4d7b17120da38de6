"""What may be added to scores besides a tensor: functions of the positions, never stored score by score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ALiBi(NamedTuple):
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


Bias = Tensor | ALiBi
Biases = Bias | Sequence[Bias] | None


def distances(shift: int, rows: slice, cols: slice, like: Tensor) -> Tensor:
    """|p - j| of a block of rows and columns, [rows, cols], in the dtype and on the device of `like`."""
    options = {"dtype": like.dtype, "device": like.device}
    positions = torch.arange(rows.start + shift, rows.stop + shift, **options)
    return (positions[:, None] - torch.arange(cols.start, cols.stop, **options)).abs()
