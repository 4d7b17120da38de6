"""The element mask of causal and window as the operator wants it: one strip of it serves a whole call."""

from __future__ import annotations

import torch
from torch import Tensor

from .fallback_plan import Strip
from .spec import AttentionSpec, Inputs, wide_dtype
from .visibility import within


class Band:
    """What to add to the scores of a block where causal and window alone hide keys: 0 or -inf.

    Who sees whom depends on column - row only. So the mask is made once, for the rows of a strip and every
    distance of a block's columns from the strip's first row, and blocks get views of it.
    """

    def __init__(self, inputs: Inputs, spec: AttentionSpec, strips: tuple[Strip, ...]) -> None:
        self._inputs, self._spec, self._strips = inputs, spec, strips
        self._mask: Tensor | None = None
        self._first = 0

    def of(self, rows: slice, cols: slice) -> Tensor:
        """[1, 1, rows, cols], in wide dtype; the last axis is dense."""
        if self._mask is None:
            self._first, self._mask = self._made()
        first = cols.start - rows.start - self._first
        return self._mask[:, :, : rows.stop - rows.start, first : first + cols.stop - cols.start]

    def _made(self) -> tuple[int, Tensor]:
        q, k = self._inputs.q, self._inputs.k
        blocks = [(s.rows, part.cols) for s in self._strips for part in s.parts if part.visible == "some"]
        first = min(cols.start - rows.start for rows, cols in blocks)
        stop = max(cols.stop - rows.start for rows, cols in blocks)
        rows = torch.arange(max(rows.stop - rows.start for rows, _ in blocks), device=q.device)[:, None]
        ok = within(
            self._spec,
            rows + self._spec.shift(q.shape[2], k.shape[2]),
            torch.arange(first, stop, device=q.device),
        )
        assert ok is not None, "a block that some rows see in part has bounds"
        zero = q.new_zeros((), dtype=wide_dtype(q))
        return first, torch.where(ok, zero, -torch.inf)[None, None]
