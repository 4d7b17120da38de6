"""What a call asks for: the tensors and the options, and what becomes of them.

Every public call is turned into two values before anything is computed: `Inputs` (the tensors), by
`validation`, and `AttentionSpec` (everything else, hashable), by `options`. Implementations see nothing but
these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .biases import Biases
    from .mask_algebra import Mask

IMPLEMENTATIONS = ("reference", "fallback", "triton", "gluon")
STATISTICS = ("lse", "max_logit", "entropy", "key_mass")
TILE, HIDDEN, WHOLE = 128, -2, -1
"""Of `Inputs.tiles`."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionOptions(TypedDict, total=False):
    """Keyword options shared by the public calls. (`want` decides what a call returns, and stands there.)"""

    causal: bool
    window: tuple[int | None, int | None] | None
    mask: Tensor | Mask | None
    key_lengths: Tensor | None
    bias: Biases
    softcap: float | None
    sinks: Tensor | None
    scale: float | None
    dropout_p: float
    seed: int | Tensor | None
    deterministic: bool | str | None
    precise: bool
    check: bool
    impl: str | None


DEFAULTS: AttentionOptions = {
    "causal": False,
    "window": None,
    "mask": None,
    "key_lengths": None,
    "bias": None,
    "softcap": None,
    "sinks": None,
    "scale": None,
    "dropout_p": 0.0,
    "seed": None,
    "deterministic": None,
    "precise": False,
    "check": False,
    "impl": None,
}


class Inputs(NamedTuple):
    """The tensors of one call, validated.

    q: (batch, heads_q, seqlen_q, head_dim); k: (batch, heads_kv, seqlen_k, head_dim);
    v: (batch, heads_kv, seqlen_k, head_dim_v). Any strides.
    bias: float; mask: bool, True = may attend; both 4-D, each axis either 1 or its full size, so
    that nothing broadcast is ever stored. sinks: float (heads_q,). slopes: ALiBi's, float (1 or batch,
    heads_q). table: RelativeBias's, float (buckets, heads_q). key_lengths: int32 (batch,), dense. seed: int64
    scalar tensor. The first ones can have gradients: those that `Gradients` has, in its order.

    What a mask object says, with causal and window in it. ranges: int32 (1 or batch, 2 or 4, seqlen_q),
    dense: row i sees keys [ranges[0], ranges[1]) and [ranges[2], ranges[3]), which are disjoint; along the
    rows no bound decreases; an empty one may end before it starts. key_ranges: the rows that see a key,
    likewise, (1 or batch, 2 or 4, seqlen_k). Else, of tiles of `TILE` x `TILE` scores,
    tiles: int32 (1 or batch, 1 or heads_q, tiles of rows, tiles of keys), HIDDEN, WHOLE, or a number of bits;
    whole tiles lie inside the score matrix. bits: int32 (numbers, TILE, TILE // 32), bit k of a word is key
    k. visits_q: int32 (..., tiles of rows, 2 + tiles of keys): how many whole tiles and how many others each
    row of tiles has, then these tiles' columns, in that order, ascending. visits_k: the same for columns.

    Packed: the batch axis of q, k, v has size 1, and sequences lie one behind the other on the axis seqlen.
    spans_q, spans_k: int32 (sequences, 2), dense: where each starts and stops; inside, ascending, disjoint.
    The other tensors count entries, rows and keys by sequence and from its start, but for ranges,
    (1, 2 or 4, all rows), and key_ranges, whose values alone are counted from the sequence's start.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None
    mask: Tensor | None = None
    ranges: Tensor | None = None
    key_ranges: Tensor | None = None
    tiles: Tensor | None = None
    bits: Tensor | None = None
    visits_q: Tensor | None = None
    visits_k: Tensor | None = None
    key_lengths: Tensor | None = None
    spans_q: Tensor | None = None
    spans_k: Tensor | None = None
    seed: Tensor | None = None


class AttentionSpec(NamedTuple):
    """Everything about a call that is not a tensor.

    A query at position p sees keys p - left ... p + right, both ends included; None = unbounded.
    The position of query i is i + (seqlen_k - seqlen_q), or i with `top_left`. Without `want_lse` nobody
    but a backward pass will read lse: 16-bit inputs may then leave it with errors far below their own.
    bidirectional, max_distance: of the table, see `RelativeBias`. precise: backward's delta is the sum of
    P·dP, not made from a rounded out. batch_invariant: the bits of an entry do not depend on the others.
    first_entry: what dropout calls the first batch entry. want_max: forward also gives max_logit.
    deterministic: the same bits on every run.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    top_left: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0
    tf32: bool = False
    want_lse: bool = True
    bidirectional: bool = True
    max_distance: int = 128
    precise: bool = False
    batch_invariant: bool = False
    first_entry: int = 0
    want_max: bool = False
    deterministic: bool = False

    def shift(self, seqlen_q: int, seqlen_k: int) -> int:
        """Position of query 0 on the axis of keys."""
        return 0 if self.top_left else seqlen_k - seqlen_q


class Gradients(NamedTuple):
    """Gradients of one call; None where nobody asked. Each has the shape and dtype of its input."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dbias: Tensor | None
    dsinks: Tensor | None
    dslopes: Tensor | None
    dtable: Tensor | None


class Needs(NamedTuple):
    """Which of `Gradients` somebody asks for."""

    dq: bool = False
    dk: bool = False
    dv: bool = False
    dbias: bool = False
    dsinks: bool = False
    dslopes: bool = False
    dtable: bool = False


N_GRADIENTS = len(Gradients._fields)


class AttentionStats(NamedTuple):
    """What a call with `want` returns; None for what was not asked.

    out: (batch, heads_q, seqlen_q, head_dim_v). lse: (batch, heads_q, seqlen_q) float32 (float64
    for float64 inputs), natural logarithm of the softmax's denominator, -inf for an empty row, or its sink.
    The others are of the softmax before dropout too, in lse's dtype. max_logit: shaped like lse, the row's
    largest score, with the bias, without the sink; -inf for an empty row; not differentiable. entropy: shaped
    like lse, -Σ p·ln p over keys, in nats, for p with the sink in the denominator; 0 for an empty row;
    differentiable once. key_mass: (batch, heads_q, seqlen_k), Σ p over rows; not differentiable.
    """

    out: Tensor
    lse: Tensor | None = None
    max_logit: Tensor | None = None
    entropy: Tensor | None = None
    key_mass: Tensor | None = None


_OF_ALL_ENTRIES = ("sinks", "table", "bits", "spans_q", "spans_k", "seed")


def of_entries(inputs: Inputs, entries: slice) -> Inputs:
    """The problem of some batch entries, as views; what all share has a batch axis of 1, and stays."""
    batch = inputs.q.shape[0]
    return Inputs(
        **{
            name: x if x is None or name in _OF_ALL_ENTRIES or x.shape[0] != batch else x[entries]
            for name, x in inputs._asdict().items()
        }
    )


def like(x: Tensor, head_dim: int) -> Tensor:
    """Uninitialised (batch, heads, seqlen, head_dim) in x's physical order, dense.

    A transposed view of (batch, seqlen, heads, head_dim) gets an output of that kind, so that the
    model's next transpose and reshape copy nothing.
    """
    batch, heads, seqlen, _ = x.shape
    if seq_major(x):
        return x.new_empty(batch, seqlen, heads, head_dim).transpose(1, 2)
    return x.new_empty(batch, heads, seqlen, head_dim)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What is computed in where x is kept: float32, or x's own where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def empty_gradients(inputs: Inputs, needs: Sequence[bool], nothing: Tensor) -> tuple[Tensor, ...]:
    """Room for the gradient of each input that can have one: of q, k, v laid out by `like`, others dense.

    Those that nobody needs are empty, of the kind of `nothing`.
    """
    return tuple(
        nothing.new_empty(0)
        if x is None or not need
        else like(x, x.shape[3])
        if name in ("q", "k", "v")
        else x.new_empty(x.shape)
        for name, x, need in zip(Inputs._fields, inputs[:N_GRADIENTS], needs)
    )


def is_empty(inputs: Inputs) -> bool:
    """Whether there is nothing to compute: implementations are never asked then."""
    q, k, spans = inputs.q, inputs.k, inputs.spans_q
    return q.numel() == 0 or k.numel() == 0 or (spans is not None and spans.numel() == 0)


def seq_major(x: Tensor) -> bool:
    """Whether x is a transposed view of (batch, seqlen, heads, head_dim)."""
    return x.stride(1) < x.stride(2)
