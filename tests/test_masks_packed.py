"""Mask objects of packed sequences: every form that a call makes of one, against each sequence's own mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from undivided import (
    Causal,
    Dense,
    Documents,
    FirstKeys,
    Mask,
    PrefixLM,
    Window,
    attention,
    attention_varlen,
    explain,
    from_predicate,
)
from undivided.conformance.adapters import ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import Case, Problem
from undivided.conformance.evaluation import evaluate, expected
from undivided.kernels import mask_tiles
from undivided.kernels.functional import prepare
from undivided.kernels.masks import Predicate, compiled
from undivided.kernels.sequences import Sequences
from undivided.kernels.spec import HIDDEN, WHOLE, AttentionSpec, Inputs
from undivided.kernels.visibility import visible

STREAMING = (Window(2, 0) | FirstKeys(2)) & Causal()


def greater(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q > k


def spans_of(lengths_q: list[int], lengths_k: list[int]) -> tuple[Inputs, list[tuple[int, int]]]:
    """Inputs of sequences one behind the other, with a gap before each."""
    spans, start_q, start_k = [], 0, 0
    for n_q, n_k in zip(lengths_q, lengths_k, strict=True):
        spans.append((start_q + 1, start_q + 1 + n_q, start_k + 2, start_k + 2 + n_k))
        start_q, start_k = spans[-1][1], spans[-1][3]
    table = torch.tensor(spans, dtype=torch.int32)
    q, k = torch.zeros(1, 2, start_q + 3, 8), torch.zeros(1, 2, start_k + 1, 8)
    inputs = Inputs(q, k, k, spans_q=table[:, :2].contiguous(), spans_k=table[:, 2:].contiguous())
    return inputs, [(a, b) for a, b, _, _ in spans]


@pytest.mark.parametrize("top_left", [False, True])
def test_packed_sequences(top_left: bool) -> None:
    """Positions, lengths or documents of another sequence, and rows of nobody that see something."""
    lengths_q, lengths_k = [3, 0, 7, 10], [5, 4, 7, 6]
    inputs, spans = spans_of(lengths_q, lengths_k)
    ids = torch.tensor([[0, 0, 1, 1, 1, 9, 9], [0] * 7, [0, 1, 1, -1, 2, 2, 2], [3, 3, 3, 4, 4, 4, 0]])
    prefixes = torch.tensor([2, 1, 9, 0])
    for mask, of_sequence in (
        (STREAMING, lambda i: STREAMING),
        (Documents(ids) & Window(2, 0), lambda i: Documents(ids[i, : lengths_k[i]]) & Window(2, 0)),
        (PrefixLM(prefixes), lambda i: PrefixLM(prefixes[i : i + 1])),
        (FirstKeys(3) | Documents(ids), lambda i: FirstKeys(3) | Documents(ids[i, : lengths_k[i]])),
    ):
        own, spec = compiled(mask, inputs, AttentionSpec(1.0, None, 1, top_left and mask is not STREAMING))
        assert own.ranges is not None
        assert spec[1:3] == (None, None)
        rows = torch.zeros(inputs.q.shape[2], dtype=torch.bool)
        for i, (start, stop) in enumerate(spans):
            n_q, n_k = lengths_q[i], lengths_k[i]
            rows[start:stop] = True
            q, k = torch.zeros(1, 2, n_q, 8), torch.zeros(1, 2, n_k, 8)
            alone, alone_spec = compiled(
                of_sequence(i), Inputs(q, k, k), AttentionSpec(1.0, None, 1, spec.top_left)
            )
            here = own.ranges[:, :, start:stop].contiguous()
            shown = visible(alone._replace(ranges=here), spec._replace(left=None, right=None))
            assert torch.equal(
                torch.ones(1, 2, n_q, n_k).bool() & shown,
                torch.ones(1, 2, n_q, n_k).bool() & visible(alone, alone_spec),
            )
            assert bool((here <= n_k).all())
        assert not bool(own.ranges[:, :, ~rows].any())
    _, spec = compiled(Window(3, 0), inputs, AttentionSpec(1.0))
    assert spec[1:3] == (3, 0)


def test_masks_that_are_not_for_these_sequences() -> None:
    """A row of ids or a plane of a tensor that is another sequence's, or read past its end."""
    inputs, _ = spans_of([3, 0, 7, 10], [5, 4, 7, 6])
    fits, spec = torch.ones(4, 2, 10, 7) > 0, AttentionSpec(1.0)
    for mask in (
        Documents(torch.zeros(7, dtype=torch.int64)),
        Documents(torch.zeros(2, 7, dtype=torch.int64)),
        PrefixLM(torch.zeros(2, dtype=torch.int64)),
        Dense(fits[:3]),
        Dense(fits[:, :, :9]),
        Dense(fits[..., :6]) & Causal(),
        Dense(torch.ones(2, 1, 4, 2, 10, 7)[0] > 0),
        Predicate(greater, (4, 1, 10, 6)),
        Predicate(greater, (1, 1, 1, 7)),
        Predicate(greater, (3, 1, 10, 7)),
    ):
        with pytest.raises(ValueError, match="sequences"):
            compiled(mask, inputs, spec)
    for mask in (
        Dense(fits),
        Dense(fits[:1, 0, :, :1]),
        Dense(torch.ones(4, 1, 12, 9) > 0),
        Predicate(greater, (4, 2, 10, 8)),
    ):
        assert compiled(mask, inputs, spec)[0].tiles is not None


@pytest.mark.parametrize("impl", ["reference", "fallback"])
def test_packed_calls_take_masks(impl: str) -> None:
    """Ranges of all rows cut at the wrong rows, in forward or backward."""
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 60, 60], [0, 9, 64, 70]))
    ids = (torch.arange(55) // 17).expand(3, 55)
    mask = (FirstKeys(2) | Window(9, 0)) & Documents(ids)
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (60, 70, 70))
    out = attention_varlen(q, k, v, starts_q, starts_k, mask=mask, impl=impl)
    want = []
    for row, stop, col, last in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        one = (x[None, a:b].transpose(1, 2) for x, a, b in ((q, row, stop), (k, col, last), (v, col, last)))
        alone = (FirstKeys(2) | Window(9, 0)) & Documents(ids[0, : last - col])
        want.append(attention(*one, mask=alone, impl="reference")[0].transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(want))
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(torch.cat(want), (q, k, v), dout)
    for x, y in zip(torch.autograd.grad(out, (q, k, v), dout), grads, strict=True):
        torch.testing.assert_close(x, y)


LENGTHS = ((5, 5), (0, 7), (140, 150), (33, 20), (4, 0), (20, 33))
BEFORE, AFTER = 3, 4
"""Tokens of nobody, in front of the first sequence and behind the last."""
MAX_Q, MAX_K = (max(x) for x in zip(*LENGTHS))
IDS = torch.arange(MAX_K) // (torch.arange(len(LENGTHS))[:, None] * 3 + 4)
PREFIXES = torch.tensor([3, 1, 70, 9, 0, 40])
NOISE = torch.rand(len(LENGTHS), 2, MAX_Q + 1, MAX_K + 2, generator=torch.Generator().manual_seed(3)) > 0.3


def scattered(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A whole tile, a hidden one and two partial ones of the longest sequence."""
    return ((q < 128) & (k < 128)) | ((q >= 128) & ((3 * q + k + b + 2 * h) % 4 > 0))


def ragged(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (5 * q + 3 * k + h + b) % 7 < 4


def documents(i: int, p: Tensor, k: Tensor) -> Tensor:
    return (p >= 0) & (p < MAX_K) & (IDS[i][p.clamp(0, MAX_K - 1)] == IDS[i][k])


MASKS: dict[str, tuple[Mask, dict[str, Any], Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]]] = {
    "scattered": (from_predicate(scattered), {}, lambda i, h, q, k, p: scattered(torch.tensor(i), h, q, k)),
    "predicate and causal": (
        from_predicate(ragged),
        {"causal": True},
        lambda i, h, q, k, p: ragged(torch.tensor(i), h, q, k) & (k <= p),
    ),
    "documents or predicate": (
        Documents(IDS) | from_predicate(ragged),
        {"window": (30, 20), "key_lengths": torch.tensor([4, 7, 131, 20, 0, 9], dtype=torch.int32)},
        lambda i, h, q, k, p: (
            (documents(i, p, k) | ragged(torch.tensor(i), h, q, k)) & (k >= p - 30) & (k <= p + 20)
        ),
    ),
    "prefix and tensor": (
        PrefixLM(PREFIXES) & Dense(NOISE),
        {"bias": NOISE[0, 0, :MAX_Q, :MAX_K].float()},
        lambda i, h, q, k, p: ((k < PREFIXES[i]) | (k <= p)) & NOISE[i][:, : q.shape[1], : k.shape[2]],
    ),
    "tensor of keys": (Dense(NOISE[:, 0, 0, None, None]), {}, lambda i, h, q, k, p: NOISE[i, 0, 0, k]),
    "top-left": (
        Causal("top-left") & from_predicate(ragged),
        {},
        lambda i, h, q, k, p: (k <= q) & ragged(torch.tensor(i), h, q, k),
    ),
}
"""A mask, options beside it, and what sequence i shows: bool, from h, q, k and positions p, all
[heads, rows, keys]."""


def problems(name: str, dtype: torch.dtype) -> tuple[Problem, Problem]:
    """The question, with NaN in tokens of nobody, and the same with one plain tensor for a mask."""
    mask, options, seen = MASKS[name]
    total_q, total_k = (sum(x) + BEFORE + AFTER for x in zip(*LENGTHS))
    case = Case("", seqlen_q=total_q, seqlen_k=total_k, heads_q=2, heads_kv=1, head_dim=16)
    problem = case.build(dtype)
    bounds = torch.tensor([(BEFORE, BEFORE), *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    sequences = Sequences(bounds[:, 0], bounds[:, 1], MAX_Q, MAX_K)
    elements = torch.zeros(len(LENGTHS), 2, MAX_Q, MAX_K, dtype=torch.bool)
    for i, (seqlen_q, seqlen_k) in enumerate(LENGTHS):
        h, q, k = torch.meshgrid(*map(torch.arange, (2, seqlen_q, seqlen_k)), indexing="ij")
        elements[i, :, :seqlen_q, :seqlen_k] = seen(i, h, q, k, q + seqlen_k - seqlen_q)
    options = {**problem.options, **options}
    clean = problem._replace(options={**options, "mask": elements}, sequences=sequences)
    q, k, v = (x.clone() for x in problem[:3])
    for x in (q, k, v):
        x[:, :, :BEFORE], x[:, :, -AFTER:] = torch.nan, torch.nan
    return clean._replace(q=q, k=k, v=v, options={**options, "mask": mask}), clean


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *((name, impl) for name in MASKS for impl in ("reference", "fallback")),
        *((name, "triton") for name in ("scattered", "documents or predicate", "prefix and tensor")),
    ],
)
def test_values_and_gradients(name: str, impl: str) -> None:
    """Tiles, entries or positions of another sequence, tiles past the end of a short one, in any gradient."""
    asked, same_as = problems(name, torch.float32)
    arithmetic = "kernel" if impl == "triton" else "wide"
    assert_within_budget(evaluate(ours(impl), asked), expected(same_as), arithmetic)


@pytest.mark.parametrize("impl", ["reference", "fallback"])
def test_each_sequence_as_if_alone(impl: str) -> None:
    """A predicate that `attention` of one sequence and the packed call ask differently."""
    problem, _ = problems("predicate and causal", torch.float64)
    q, k, v = (x.nan_to_num() for x in problem.packed())
    sequences, mask = problem.sequences, from_predicate(ragged)
    assert sequences is not None
    out = attention_varlen(q, k, v, *sequences[:2], mask=mask, window=(40, 3), impl=impl)
    row = col = BEFORE
    for i, (seqlen_q, seqlen_k) in enumerate(LENGTHS):
        own = from_predicate(lambda b, h, q, k, i=i: ragged(b + i, h, q, k))
        here = slice(row, row + seqlen_q), slice(col, col + seqlen_k), slice(col, col + seqlen_k)
        one = (x[None, place].transpose(1, 2) for x, place in zip((q, k, v), here))
        alone = attention(*one, mask=own, window=(40, 3), impl="reference")
        torch.testing.assert_close(out[here[0]], alone[0].transpose(0, 1))
        row, col = row + seqlen_q, col + seqlen_k


def test_tiles_lie_inside_their_sequence() -> None:
    """A tile that is called whole because a predicate says yes past the end of the sequence."""
    everything = from_predicate(lambda b, h, q, k: q >= 0)
    inputs, _ = spans_of([5, 128, 300, 0], [600, 128, 250, 9])
    own, _ = compiled(everything, inputs, AttentionSpec(1.0))
    assert own.tiles is not None
    assert own.visits_q is not None
    assert own.visits_k is not None
    assert own.tiles.shape == (4, 1, 3, 5)
    assert (own.tiles == WHOLE).nonzero().tolist() == [[1, 0, 0, 0], [2, 0, 0, 0], [2, 0, 1, 0]]
    some = (own.tiles >= 0).nonzero().tolist()
    assert some == [
        *([0, 0, 0, col] for col in range(5)),
        [2, 0, 0, 1],
        [2, 0, 1, 1],
        [2, 0, 2, 0],
        [2, 0, 2, 1],
    ]
    assert bool((own.tiles[3] == HIDDEN).all())
    assert own.visits_q[2, 0, :, :2].tolist() == [[1, 1], [1, 1], [0, 2]]
    assert own.visits_k[2, 0, :, :2].tolist() == [[2, 1], [0, 3], [0, 0], [0, 0], [0, 0]]


def test_short_sequences_are_not_asked_as_far_as_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of sequences times the square of the longest: one long document in a batch of many short ones."""
    asked = 0

    def counted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        nonlocal asked
        asked += b.shape[0] * q.shape[2] * k.shape[3]
        return (b + h + q + k) % 2 == 0

    monkeypatch.setattr(mask_tiles, "_BLOCK_ELEMENTS", 2**18)
    inputs, _ = spans_of([*[20] * 60, 1500], [*[30] * 60, 1500])
    compiled(from_predicate(counted), inputs, AttentionSpec(1.0))
    assert asked < 1.1 * (60 * 20 * 30 + 1500**2)


def test_tiles_are_made_once_for_sequences_alike() -> None:
    """A mask that every layer of a model compiles anew, and one kept for sequences of other lengths."""
    mask, (q, k, v) = from_predicate(ragged), (torch.randn(40, 2, 8) for _ in range(3))
    first, again, other = (
        prepare(q, k, v, {"mask": mask}, sequences=Sequences(torch.tensor(x, dtype=torch.int32)))[0]
        for x in ([0, 10, 40], [0, 10, 40], [0, 11, 40])
    )
    assert again.tiles is first.tiles
    assert other.tiles is not first.tiles


@pytest.mark.parametrize("lengths", [([3, 0], [0, 4]), ([0, 0], [0, 0]), ([], [])], ids=str)
def test_nobody_meets_anybody(lengths: tuple[list[int], list[int]]) -> None:
    """A maximum, or a concatenation, of nothing; tokens of nobody around sequences that are empty."""
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0) for x in lengths)
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (5, 6, 6))
    for impl in ("reference", "fallback"):
        out = attention_varlen(q, k, v, cu_q, cu_k, mask=from_predicate(ragged), impl=impl)
        assert not bool(out.any())
        assert all(not bool(x.any()) for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_explain_reads_tiles_of_sequences() -> None:
    """Tiles of all sequences of the longest's size, counted as if each had as many; meta tensors, read."""
    q = torch.randn(400, 2, 8)
    cu = torch.tensor([0, 10, 20, 400])
    half = from_predicate(lambda b, h, q, k: k < 128)
    found = explain(q, q, q, cu_seqlens_q=cu, mask=half)
    assert (found.tiles, found.tiles_visited) == (1 + 1 + 9, 1 + 1 + 3)
    whole = explain(q, q, q, cu_seqlens_q=cu).flops_forward
    assert found.flops_forward == round(whole * (2 * 100 + 380 * 128) / (2 * 100 + 380**2))
    meta = explain(*(x.to("meta") for x in (q, q, q)), cu_seqlens_q=cu.to("meta"), mask=half)
    assert meta.chosen == "triton"
