"""Packed sequences as a call gives them: cu_seqlens in, spans out that are safe to follow."""

from __future__ import annotations

import itertools
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .validation import Spans, check_tensor


class Sequences(NamedTuple):
    """The arguments of `attention_varlen` that say where sequences lie."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


def unpacked(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, check: bool
) -> tuple[Tensor, Tensor, Tensor, Spans]:
    """q, k, v, (total, heads, head_dim), as views (1, heads, total, head_dim), and where sequences lie.

    Nothing is read outside, whatever cu_seqlens hold: they are made to lie in [0, total] and not to decrease.

    Raises:
        TypeError, ValueError: an argument is not what it must be; with `check`, values too.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must have 3 axes (total, heads, head_dim), got shape {tuple(x.shape)}")
    cu_q, cu_k, max_q, max_k = sequences
    max_q, max_k = _limit("max_seqlen_q", max_q), _limit("max_seqlen_k", max_k)
    spans_q = _spans("q", cu_q, q, max_q, check)
    if cu_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k must have q's total {q.shape[0]} where cu_seqlens_k is None, got {k.shape[0]}"
            )
        max_k = max_q if max_k is None else max_k
        # a view: torch.compile takes no tensor twice
        spans_k = spans_q.view_as(spans_q) if max_k == max_q else _spans("k", cu_q, k, max_k, check)
    else:
        spans_k = _spans("k", cu_k, k, max_k, check)
        if spans_k.shape[0] != spans_q.shape[0]:
            raise ValueError(
                f"cu_seqlens_k must have as many entries as cu_seqlens_q, {spans_q.shape[0] + 1}, "
                f"got {spans_k.shape[0] + 1}"
            )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return q, k, v, Spans(spans_q, spans_k, max_q, max_k)


def _spans(of: str, cu_seqlens: Tensor, x: Tensor, max_seqlen: int | None, check: bool) -> Tensor:
    """int32 (sequences, 2)."""
    name, total = f"cu_seqlens_{of}", x.shape[0]
    check_tensor(name, cu_seqlens, x.device)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if check:
        _check(of, cu_seqlens.tolist(), total, max_seqlen)
    bounds = cu_seqlens.clamp(0, total).to(torch.int32).cummax(0).values
    start, stop = bounds[:-1], bounds[1:]
    if max_seqlen is not None:
        # A branch, for int32: PyTorch 2.11 does not trace a minimum of which it knows the result.
        longest = total if max_seqlen > total else max_seqlen
        stop = torch.minimum(stop, start + longest)
    return torch.stack((start, stop), 1)


def _check(of: str, cu_seqlens: list[int], total: int, max_seqlen: int | None) -> None:
    """Synchronises, before this."""
    name = f"cu_seqlens_{of}"
    if cu_seqlens[0] != 0:
        raise ValueError(f"{name} must start with 0, got {cu_seqlens[0]}")
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
        if stop < start:
            raise ValueError(f"{name} must not decrease, got {start} and then {stop} at {i + 1}")
        if max_seqlen is not None and stop - start > max_seqlen:
            raise ValueError(
                f"max_seqlen_{of} must not be below any length, got {max_seqlen}, and sequence {i} "
                f"of length {stop - start}"
            )
    if cu_seqlens[-1] != total:
        raise ValueError(f"{name} must end with {of}'s total {total}, got {cu_seqlens[-1]}")


def _limit(name: str, limit: int | None) -> int | None:
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int or None, got {type(limit).__name__}")
    if limit < 0:
        raise ValueError(f"{name} must be >= 0, got {limit}")
    return limit if isinstance(limit, torch.SymInt) else int(limit)
