"""Attention weights as a tensor, for those who ask to see them.

Fused attention never holds them. From its lse each weight is one exponential away, so they are computed
only as far as the answer is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .biases import distances, looked_up
from .functional import prepare, with_options
from .philox import keep_mask
from .spec import AttentionOptions, AttentionSpec, Inputs
from .validation import check_tensor
from .visibility import block_of, visible

if TYPE_CHECKING:
    from typing_extensions import Unpack

Chosen = int | slice | Sequence[int] | Tensor | None
_BLOCK_ELEMENTS = 2**23
"""Of the weights of one block of rows. glibc gives blocks from 32 MiB on back to the system at once; the room
of smaller ones is split for what autograd keeps between them, and not used again."""


class TopWeights(NamedTuple):
    """The largest weights of each row, largest first, and the keys they belong to: (..., rows, topk)."""

    values: Tensor
    keys: Tensor


@overload
def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: Chosen = None,
    heads: Chosen = None,
    reduce: Literal["mean"] | None = None,
    topk: None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: Chosen = None,
    heads: Chosen = None,
    reduce: Literal["mean"] | None = None,
    topk: int,
    **options: Unpack[AttentionOptions],
) -> TopWeights: ...
@with_options
def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: Chosen = None,
    heads: Chosen = None,
    reduce: Literal["mean"] | None = None,
    topk: int | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor | TopWeights:
    """What `attention(q, k, v, want=("lse",), **options)` multiplied v with: exact, and differentiable.

    Never holds more than the answer and blocks of fixed size; with `reduce` or `topk` not even in backward,
    which computes them again.

    q: (batch, heads_q, seqlen_q, head_dim); k: (batch, heads_kv, seqlen_k, head_dim); lse: (batch, heads_q,
    seqlen_q), of that call; options: of that call, with its seed if there is dropout. Dropped weights are 0,
    the others scaled by 1/(1 - dropout_p). Weights are 0 in rows that see nothing; a row with a sink adds up
    to less than 1.

    rows, heads: which query rows and query heads, as an int, a slice, a sequence of ints or an int tensor;
    None for all. reduce: "mean" averages over these heads. topk: only the largest weights of each row.

    Returns (batch, heads, rows, seqlen_k) in lse's dtype, without the heads' axis if they are averaged; with
    topk, `TopWeights` of (batch, heads, rows, topk).

    Raises:
        ValueError, TypeError: an argument is not what it must be; the message names it.
        IndexError: a row or head that is not there.
    """
    inputs, spec = prepare(q, k, k, options)
    (batch, heads_q, seqlen_q, _), seqlen_k = inputs.q.shape, inputs.k.shape[2]
    _check_lse(lse, (batch, heads_q, seqlen_q), q.device)
    if reduce not in (None, "mean"):
        raise ValueError(f"reduce must be None or 'mean', got {reduce!r}")
    if topk is not None and (
        isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= seqlen_k
    ):
        raise ValueError(f"topk must be an int from 1 to seqlen_k = {seqlen_k}, or None, got {topk!r}")
    numbers = torch.tensor(_chosen("rows", rows, seqlen_q), dtype=torch.int64, device=q.device)
    asked = _Question(inputs, spec, lse, _chosen("heads", heads, heads_q), reduce, topk)
    if topk is None:
        return asked.weights(numbers)
    shape = (batch, *([] if reduce else [len(asked.heads)]), len(numbers), topk)
    # Room for the answer comes first: a piece of it between the blocks would keep their memory from reuse.
    values, keys = lse.new_empty(shape), numbers.new_empty(shape)
    planes = batch * (1 if reduce else len(asked.heads))
    step = max(1, _BLOCK_ELEMENTS // max(1, planes * seqlen_k))
    for first in range(0, len(numbers), step):
        here = (..., slice(first, first + step), slice(None))
        values[here], keys[here] = asked.largest(numbers[first : first + step])
    return TopWeights(values, keys)


class _Question(NamedTuple):
    """What is asked about each block of rows."""

    inputs: Inputs
    spec: AttentionSpec
    lse: Tensor
    heads: list[int]
    reduce: Literal["mean"] | None
    topk: int | None

    def largest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The topk weights and their keys; recomputed in backward, or autograd would keep all of them."""
        return checkpoint(self._largest, rows, use_reentrant=False, preserve_rng_state=False)

    def _largest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert self.topk is not None
        values, keys = self.weights(rows).topk(self.topk, -1)
        return values, keys

    def weights(self, rows: Tensor) -> Tensor:
        """All weights of these rows; averaged, head by head."""
        inputs, spec, lse = self.inputs, self.spec, self.lse
        if self.reduce is None:
            return _weights(inputs, lse, spec, self.heads, rows)
        total = lse.new_zeros(lse.shape[0], len(rows), inputs.k.shape[2])
        for head in self.heads:
            one = checkpoint(
                _weights, inputs, lse, spec, [head], rows, use_reentrant=False, preserve_rng_state=False
            )
            total = total + one.squeeze(1)
        return total / len(self.heads)


def _weights(inputs: Inputs, lse: Tensor, spec: AttentionSpec, heads: list[int], rows: Tensor) -> Tensor:
    """dropout(exp(s - lse)) of some heads and rows, in the dtype of lse: (batch, heads, rows, seqlen_k)."""
    planes, group = inputs.q.shape[1], inputs.q.shape[1] // max(inputs.k.shape[1], 1)
    own = inputs._replace(
        q=inputs.q[:, heads], k=inputs.k[:, [head // group for head in heads]],
        bias=_of_heads(inputs.bias, heads), mask=_of_heads(inputs.mask, heads),
        tiles=_of_heads(inputs.tiles, heads),
    )  # fmt: skip
    lse = lse[:, heads][:, :, rows, None]
    with torch.autocast(lse.device.type, enabled=False):
        s = spec.scale * (own.q[:, :, rows].to(lse.dtype) @ own.k.to(lse.dtype).mT)
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if own.bias is not None:
        s = s + block_of(own.bias, rows, slice(None)).to(lse.dtype)
    if own.slopes is not None:
        s = s - own.slopes[:, heads, None, None].to(lse.dtype) * distances(own, spec, rows).to(lse.dtype)
    if own.table is not None:
        s = s + looked_up(own, spec, rows)[heads].to(lse.dtype)
    ok = visible(own, spec, rows)
    if ok is not None:
        s = torch.where(ok, s, -torch.inf)
    # In an empty row s and lse are -inf, and their difference is NaN.
    p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse))
    if spec.dropout_p == 1.0:
        return p * 0.0
    if own.seed is None:
        return p
    cols = range(p.shape[3])
    keep = [
        keep_mask(own.seed, spec.dropout_p, 1, 1, rows, cols, entry * planes + head)
        for entry in range(p.shape[0])
        for head in heads
    ]
    return torch.where(torch.cat(keep).view(p.shape), p / (1.0 - spec.dropout_p), 0.0)


def _of_heads(x: Tensor | None, heads: list[int]) -> Tensor | None:
    return x if x is None or x.shape[1] == 1 else x[:, heads]


def _chosen(name: str, chosen: Chosen, size: int) -> list[int]:
    """Numbers of the chosen rows or heads."""
    everything = range(size)
    if chosen is None:
        return [*everything]
    if isinstance(chosen, slice):
        return [*everything[chosen]]
    given = chosen.tolist() if isinstance(chosen, Tensor) else chosen
    given = [given] if isinstance(given, int) else given
    if not isinstance(given, Sequence) or any(isinstance(i, bool) or not isinstance(i, int) for i in given):
        raise TypeError(f"{name} must be an int, a slice, ints, an int tensor or None, got {chosen!r}")
    if any(not -size <= i < size for i in given):
        raise IndexError(f"{name} must lie in [{-size}, {size}), got {chosen!r}")
    return [everything[i] for i in given]


def _check_lse(lse: Tensor, shape: tuple[int, int, int], device: torch.device) -> None:
    check_tensor("lse", lse, device)
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be float32 or float64, got {lse.dtype}")
    if lse.shape != shape:
        raise ValueError(f"lse must have shape (batch, heads_q, seqlen_q) = {shape}, got {tuple(lse.shape)}")
