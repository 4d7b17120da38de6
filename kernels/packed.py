"""Packed sequences for what computes dense batches: cut out, run, put together.

Neighbours of equal lengths are one batch. Where sequences lie is read on the host: a GPU is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import N_GRADIENTS, TILE, AttentionSpec, Gradients, Inputs, Needs, like, wide_dtype
from .visibility import block_of, entries_of

Results = tuple[Tensor, Tensor, "Tensor | None"]
Forward = Callable[[Inputs, AttentionSpec], Results]
_MOST_ROWS = 2**14
"""Of a batch that neighbours are joined to, so that a block of it stays small."""


class Piece(NamedTuple):
    """Neighbours of equal lengths: their numbers, and where their rows and keys lie on the packed axes."""

    entries: slice
    rows: slice
    cols: slice

    def rows_of(self, x: Tensor) -> Tensor:
        """View of (1, heads, all rows, ...) as (sequences, heads, seqlen_q, ...)."""
        return self._of(x, self.rows)

    def keys_of(self, x: Tensor) -> Tensor:
        """View of (1, heads, all keys, ...) as (sequences, heads, seqlen_k, ...)."""
        return self._of(x, self.cols)

    def cut(self, inputs: Inputs) -> Inputs:
        """The dense problem; all but ranges are views. Lists of tiles are for kernels, which cut nothing."""
        n = self.entries.stop - self.entries.start
        rows, cols = (slice(0, (x.stop - x.start) // n) for x in (self.rows, self.cols))

        def corner(x: Tensor | None) -> Tensor | None:
            return None if x is None else block_of(entries_of(x, self.entries), rows, cols)

        tiles = inputs.tiles
        if tiles is not None:
            n_rows, n_cols = (-(-x.stop // TILE) for x in (rows, cols))
            tiles = entries_of(tiles, self.entries)[:, :, :n_rows, :n_cols]
        return inputs._replace(
            q=self.rows_of(inputs.q),
            k=self.keys_of(inputs.k),
            v=self.keys_of(inputs.v),
            bias=corner(inputs.bias),
            slopes=None if inputs.slopes is None else entries_of(inputs.slopes, self.entries),
            mask=corner(inputs.mask),
            ranges=None if inputs.ranges is None else self.rows_of(inputs.ranges).contiguous(),
            tiles=tiles,
            key_ranges=None,
            visits_q=None,
            visits_k=None,
            key_lengths=None if inputs.key_lengths is None else inputs.key_lengths[self.entries],
            spans_q=None,
            spans_k=None,
        )

    def spec(self, spec: AttentionSpec) -> AttentionSpec:
        """That of the dense problem; the same for all where dropout does not ask who they are."""
        return spec._replace(first_entry=spec.first_entry + self.entries.start) if spec.dropout_p else spec

    def _of(self, x: Tensor, places: slice) -> Tensor:
        n = self.entries.stop - self.entries.start
        return x[0, :, places].unflatten(1, (n, (places.stop - places.start) // n)).transpose(0, 1)


def pieces(inputs: Inputs, spec: AttentionSpec) -> Iterator[Piece]:
    """All sequences that have rows and keys, in their order; alone where nobody may depend on neighbours."""
    assert inputs.spans_q is not None
    assert inputs.spans_k is not None
    found: Piece | None = None
    spans = zip(inputs.spans_q.tolist(), inputs.spans_k.tolist(), strict=True)
    for number, ((row, row_stop), (col, col_stop)) in enumerate(spans):
        if row == row_stop or col == col_stop:
            continue
        if found is not None:
            n = found.entries.stop - found.entries.start
            joins = (
                not spec.batch_invariant
                and (found.entries.stop, found.rows.stop, found.cols.stop) == (number, row, col)
                and found.rows.stop - found.rows.start == n * (row_stop - row)
                and found.cols.stop - found.cols.start == n * (col_stop - col)
                and row_stop - found.rows.start <= _MOST_ROWS
            )
            if joins:
                found = Piece(
                    slice(found.entries.start, number + 1),
                    slice(found.rows.start, row_stop),
                    slice(found.cols.start, col_stop),
                )
                continue
            yield found
        found = Piece(slice(number, number + 1), slice(row, row_stop), slice(col, col_stop))
    if found is not None:
        yield found


def one_by_one(inputs: Inputs, spec: AttentionSpec) -> Iterator[tuple[Piece, Inputs, AttentionSpec]]:
    """Every sequence as a dense problem of its own, without rows or keys too."""
    assert inputs.spans_q is not None
    assert inputs.spans_k is not None
    spans = zip(inputs.spans_q.tolist(), inputs.spans_k.tolist(), strict=True)
    for number, (rows, cols) in enumerate(spans):
        piece = Piece(slice(number, number + 1), slice(*rows), slice(*cols))
        yield piece, piece.cut(inputs), piece.spec(spec)


def concatenated(
    run: Callable[[Inputs, AttentionSpec], tuple[Tensor, ...]],
    inputs: Inputs,
    spec: AttentionSpec,
    *,
    of_keys: bool = False,
) -> tuple[Tensor, ...]:
    """What a differentiable `run` says of rows, or of keys: (batch, heads_q, rows or keys, ...) each."""
    q, k, v = inputs[:3]
    results, done = [], 0

    def nobody(start: int, stop: int) -> None:
        """What belongs to no sequence is like rows without keys, or keys without rows."""
        rows, cols = slice(start, stop), slice(0, 0)
        rows, cols = (cols, rows) if of_keys else (rows, cols)
        own = Inputs(q[:, :, rows], k[:, :, cols], v[:, :, cols])
        results.append(run(own, AttentionSpec(spec.scale)))

    for piece in pieces(inputs, spec):
        places = piece.cols if of_keys else piece.rows
        nobody(done, places.start)
        dense = run(piece.cut(inputs), piece.spec(spec))
        results.append(tuple(x.transpose(0, 1).flatten(1, 2)[None] for x in dense))
        done = places.stop
    nobody(done, (k if of_keys else q).shape[2])
    return tuple(torch.cat(parts, 2) for parts in zip(*results, strict=True))


def forward(run: Forward, inputs: Inputs, spec: AttentionSpec) -> Results:
    """What an implementation's `run` says of rows, as the operator promises it."""
    q, v = inputs.q, inputs.v
    out = like(q, v.shape[3]).zero_()
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide_dtype(q))
    results = out, lse, lse.clone() if spec.want_max else None
    for piece in pieces(inputs, spec):
        for whole, part in zip(results, run(piece.cut(inputs), piece.spec(spec)), strict=True):
            if whole is not None and part is not None:
                piece.rows_of(whole).copy_(part)
    return results


def statistics(
    run: Callable[[Tensor, Inputs, AttentionSpec, bool, bool], tuple[Tensor | None, Tensor | None]],
    lse: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    entropy: bool,
    key_mass: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(entropy, key_mass) by an implementation's `run`; 0 where nobody has one."""
    of_rows = torch.zeros_like(lse) if entropy else None
    of_keys = lse.new_zeros(*lse.shape[:2], inputs.k.shape[2]) if key_mass else None
    for piece in pieces(inputs, spec):
        rows, keys = run(piece.rows_of(lse), piece.cut(inputs), piece.spec(spec), entropy, key_mass)
        if of_rows is not None and rows is not None:
            piece.rows_of(of_rows).copy_(rows)
        if of_keys is not None and keys is not None:
            piece.keys_of(of_keys).copy_(keys)
    return of_rows, of_keys


def gradients(
    run: Callable[[Piece, Inputs, AttentionSpec], Gradients],
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Needs,
) -> Gradients:
    """Gradients by what `run` says of each piece; what sequences share is summed wide and rounded once."""
    wide = wide_dtype(inputs.q)
    names = Inputs._fields[:N_GRADIENTS]
    sums = {
        name: like(x, x.shape[3]).zero_()  # a row or a key has a share of one piece only
        if name in ("q", "k", "v")
        else torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, wide), device=x.device)
        for name, x, need in zip(names, inputs, needs)
        if x is not None and need
    }
    for piece in pieces(inputs, spec):
        own = piece.cut(inputs)
        unrounded = {
            name: x.to(torch.promote_types(x.dtype, wide))
            for name, x in zip(names[3:], own[3:N_GRADIENTS])
            if x is not None
        }
        shares = run(piece, own._replace(**unrounded), piece.spec(spec))
        targets = piece.cut(inputs._replace(**sums))  # sums are cut as the inputs are
        for name in sums:
            getattr(targets, name).add_(getattr(shares, f"d{name}"))
    given = inputs._asdict()
    return Gradients(*(sums[name].to(given[name].dtype) if name in sums else None for name in names))
