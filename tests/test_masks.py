"""Mask objects: what each shows, what they become in a call, and that every path then says the same."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from undivided import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    FirstKeys,
    Mask,
    PrefixLM,
    Window,
    attention,
    attention_varlen,
    attention_weights,
    explain,
    from_predicate,
)
from undivided.conformance.adapters import ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import Case, Problem
from undivided.conformance.evaluation import evaluate, expected
from undivided.kernels import mask_tiles
from undivided.kernels.functional import prepare
from undivided.kernels.mask_algebra import Atom, Joined
from undivided.kernels.mask_compile import tiles_of
from undivided.kernels.spec import HIDDEN, TILE, WHOLE, AttentionSpec, Inputs
from undivided.kernels.visibility import visible

Seen = Callable[[int, int, int, int], bool]
"""(batch entry, head, position of the query, key) -> visible."""


def by_hand(seen: Seen, batch: int, heads: int, seqlen_q: int, seqlen_k: int, shift: int) -> Tensor:
    """Element by element, as slowly and plainly as can be."""
    return torch.tensor(
        [
            [
                [[bool(seen(b, h, i + shift, j)) for j in range(seqlen_k)] for i in range(seqlen_q)]
                for h in range(heads)
            ]
            for b in range(batch)
        ],
        dtype=torch.bool,
    ).view(batch, heads, seqlen_q, seqlen_k)


def same_document(ids: list[int], p: int, j: int) -> bool:
    if not 0 <= p < len(ids) or ids[p] < 0:
        return False
    first, last = min(p, j), max(p, j)
    return all(ids[i] == ids[p] for i in range(first, last + 1))


IDS = [[0, 0, 0, 1, 1, -1, -1, 3, 3, 3], [5, 5, -1, 5, 2, 2, 2, 2, -3, -1]]
ATOMS: dict[str, tuple[Callable[[], Mask], Seen]] = {
    "causal": (Causal, lambda b, h, p, j: j <= p),
    "window": (lambda: Window(3, 1), lambda b, h, p, j: p - 3 <= j <= p + 1),
    "open window": (lambda: Window(None, 2), lambda b, h, p, j: j <= p + 2),
    "window of itself": (lambda: Window(0, 0), lambda b, h, p, j: j == p),
    "first keys": (lambda: FirstKeys(3), lambda b, h, p, j: j < 3),
    "more first keys than keys": (lambda: FirstKeys(99), lambda b, h, p, j: True),
    "no first keys": (lambda: FirstKeys(0), lambda b, h, p, j: False),
    "prefix": (
        lambda: PrefixLM(torch.tensor([4, -2])),
        lambda b, h, p, j: j < (4, -2)[b] or j <= p,
    ),
    "one prefix": (lambda: PrefixLM(torch.tensor([6])), lambda b, h, p, j: j < 6 or j <= p),
    "documents": (lambda: Documents(torch.tensor(IDS)), lambda b, h, p, j: same_document(IDS[b], p, j)),
    "documents for all": (
        lambda: Documents(torch.tensor(IDS[0], dtype=torch.int32)),
        lambda b, h, p, j: same_document(IDS[0], p, j),
    ),
    "packed": (
        lambda: Documents.from_cu_seqlens(torch.tensor([0, 3, 3, 8]), 10),
        lambda b, h, p, j: same_document([0, 0, 0, 2, 2, 2, 2, 2, -1, -1], p, j),
    ),
    "predicate": (
        lambda: from_predicate(lambda b, h, q, k: (q * k + b + 2 * h) % 3 == 0),
        lambda b, h, p, j: (p * j + b + 2 * h) % 3 == 0,
    ),
}


@pytest.mark.parametrize("name", ATOMS)
@pytest.mark.parametrize(("seqlen_q", "shift"), [(10, 0), (4, 6), (13, -3)])
def test_atoms_by_hand(name: str, seqlen_q: int, shift: int) -> None:
    """A bound off by one, positions counted from the wrong end, another entry's lengths or documents."""
    make, seen = ATOMS[name]
    if name == "predicate":  # asks rows, not positions
        shift = 0
    want = by_hand(seen, 2, 3, seqlen_q, 10, shift)
    dense = make().to_dense(seqlen_q, 10, batch=2, heads=3)
    assert dense.dtype == torch.bool
    assert torch.equal(dense.expand_as(want), want)
    assert torch.equal(shown_in_a_call(make(), seqlen_q, 10), want)
    assert make().density(seqlen_q, 10, batch=2, heads=3) == pytest.approx(float(want.float().mean()))


def call(seqlen_q: int, seqlen_k: int, heads: int = 3, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(batch, heads, n, 8) for n in (seqlen_q, seqlen_k, seqlen_k))  # type: ignore[return-value]


def shown_in_a_call(mask: Mask, seqlen_q: int, seqlen_k: int, **options: Any) -> Tensor:
    """What implementations are told, decoded: bool (batch, heads, seqlen_q, seqlen_k)."""
    q, k, v = call(seqlen_q, seqlen_k)
    inputs, spec = prepare(q, k, v, {"mask": mask, **options})
    check_contract(inputs, spec)
    shown = visible(inputs, spec)
    return torch.ones(2, 3, seqlen_q, seqlen_k).bool() & (True if shown is None else shown)


def check_contract(inputs: Inputs, spec: AttentionSpec) -> None:
    """What `Inputs` promises of ranges and tiles beside what they show."""
    seqlen_q, seqlen_k = inputs.q.shape[2], inputs.k.shape[2]
    if inputs.ranges is not None:
        ranges = inputs.ranges
        assert spec.left is None
        assert spec.right is None
        assert ranges.dtype == torch.int32
        assert ranges.is_contiguous()
        assert ranges.shape[0] in (1, inputs.q.shape[0])
        assert ranges.shape[1] in (2, 4)
        assert ranges.shape[2] == seqlen_q
        assert bool((ranges.diff(dim=2) >= 0).all())
        assert bool(((ranges >= 0) & (ranges <= seqlen_k)).all())
        if ranges.shape[1] == 4:
            assert not bool(
                (torch.maximum(ranges[:, 0], ranges[:, 2]) < torch.minimum(ranges[:, 1], ranges[:, 3])).any()
            )
    if inputs.tiles is not None:
        tiles, bits, visits_q, visits_k = inputs.tiles, inputs.bits, inputs.visits_q, inputs.visits_k
        assert bits is not None
        assert visits_q is not None
        assert visits_k is not None
        assert all(x.dtype == torch.int32 for x in (tiles, bits, visits_q, visits_k))
        assert bits.shape[0] >= 1
        assert bits.shape[1:] == (TILE, TILE // 32)
        for visits, along in ((visits_q, tiles), (visits_k, tiles.mT)):
            assert visits.shape == (*along.shape[:3], 2 + along.shape[3])
            for line, there in zip(visits.flatten(0, 2).tolist(), along.flatten(0, 2).tolist(), strict=True):
                n_whole, n_some, *columns = line
                assert columns[:n_whole] == [i for i, x in enumerate(there) if x == WHOLE]
                assert columns[n_whole:][:n_some] == [i for i, x in enumerate(there) if x >= 0]
                assert n_whole + n_some == sum(x != HIDDEN for x in there)
        if seqlen_q % TILE:
            assert not bool((tiles[:, :, -1] == WHOLE).any())
        if seqlen_k % TILE:
            assert not bool((tiles[..., -1] == WHOLE).any())


NAMES = [name for name in ATOMS if name != "predicate"]
EXPRESSIONS: Any = st.recursive(
    st.sampled_from([*NAMES, "dense"]),
    lambda inner: st.tuples(st.sampled_from("&|"), st.lists(inner, min_size=2, max_size=3)),
    max_leaves=6,
)
OPERATORS = {"&": operator.and_, "|": operator.or_}


def evaluated(expression: Any, atom: Callable[[str], Any]) -> Any:
    if isinstance(expression, str):
        return atom(expression)
    sign, parts = expression
    return functools.reduce(OPERATORS[sign], [evaluated(part, atom) for part in parts])


@settings(deadline=None, max_examples=200)
@given(expression=EXPRESSIONS, seqlen_q=st.sampled_from([10, 4, 13]), window=st.sampled_from([None, (2, 0)]))
def test_algebra(expression: Any, seqlen_q: int, window: Any) -> None:
    """A union whose gap is filled, an intersection of more intervals than fit, the wrong operator."""
    dense = torch.rand(3, seqlen_q, 10, generator=torch.Generator().manual_seed(0)) > 0.5

    def as_mask(name: str) -> Mask:
        return Dense(dense) if name == "dense" else ATOMS[name][0]()

    def as_tensor(name: str) -> Tensor:
        shown = as_mask(name).to_dense(seqlen_q, 10, batch=2, heads=3)
        return shown.expand(2, 3, seqlen_q, 10)

    want = evaluated(expression, as_tensor)
    mask = evaluated(expression, as_mask)
    assert torch.equal(mask.to_dense(seqlen_q, 10, batch=2, heads=3).expand_as(want), want)
    if window is not None:
        want = want & Window(*window).to_dense(seqlen_q, 10)
    assert torch.equal(shown_in_a_call(mask, seqlen_q, 10, window=window), want)


def forms(mask: Mask, seqlen: int = 300, **options: Any) -> tuple[Inputs, AttentionSpec]:
    q, k, v = call(seqlen, seqlen)
    inputs, spec = prepare(q, k, v, {"mask": mask, **options})
    check_contract(inputs, spec)
    return inputs, spec


def test_forms_are_the_cheapest_that_say_it() -> None:
    """A mask that costs memory or a synchronisation where arithmetic or intervals would do."""
    ids = torch.arange(300) // 100
    for mask in (Causal(), Window(7, 2) & Causal(), Window(7, 0) | Window(3, 5), Window(None, None)):
        inputs, spec = forms(mask, causal=True)
        assert inputs[3:] == (None,) * len(inputs[3:])
        assert spec.right == 0
    assert forms(Window(7, 2) & Causal(), window=(5, None))[1][1:3] == (5, 0)
    assert forms(Window(7, 0) | Window(3, 5))[1][1:3] == (7, 5)
    bounds = {
        2: [Documents(ids), Documents(ids) & Causal(), PrefixLM(torch.tensor([3, 9])), FirstKeys(3),
            FirstKeys(3) | Causal(), Documents(ids) & (Causal() | FirstKeys(4)),
            (Window(3, 0) | Window(5, 0)) & Documents(ids)],
        4: [(Window(9, 0) | FirstKeys(4)) & Causal(), Documents(ids) | PrefixLM(torch.tensor([3])),
            (Window(9, 0) | FirstKeys(4)) & Documents(ids), FirstKeys(2) | FirstKeys(4) | Window(9, 0)],
    }  # fmt: skip
    for n, masks in bounds.items():
        for mask in masks:
            inputs, spec = forms(mask, window=(50, None))
            assert inputs.ranges is not None, mask
            assert inputs.ranges.shape[1] == n, mask
            assert inputs.mask is None
            assert inputs.tiles is None
            assert spec[1:3] == (None, None)
    for mask in (
        from_predicate(lambda b, h, q, k: q >= k),
        Dense(torch.ones(300, 300) > 0),
        Documents(ids) | Window(3, 0),
    ):
        inputs, spec = forms(mask)
        assert inputs.tiles is not None, mask
        assert inputs.tiles.shape[:2] == (1, 1)
        assert inputs.ranges is None
    padding = torch.ones(2, 1, 1, 300) > 0
    inputs, spec = forms(Dense(padding), causal=True)
    assert inputs.mask is not None
    assert inputs.tiles is None
    assert spec.right == 0


def test_lengths_of_keys_stay_beside_a_mask() -> None:
    """key_lengths lost where a mask object is given too."""
    lengths = torch.tensor([200, 17])
    for mask in (Documents(torch.arange(300) // 7), from_predicate(lambda b, h, q, k: q >= k)):
        inputs, _ = forms(mask, key_lengths=lengths)
        assert inputs.key_lengths is not None
        assert inputs.key_lengths.tolist() == [200, 17]


STREAMING = (Window(20, 0) | FirstKeys(4)) & Causal()
CASES: dict[str, tuple[Callable[[], Mask], dict[str, Any]]] = {
    "documents": (lambda: Documents(torch.arange(150) // 40), {}),
    "documents and causal": (lambda: Documents(torch.arange(150) // 40) & Causal(), {}),
    "short documents": (lambda: Documents(torch.arange(150) // 3) & Causal(), {}),
    "documents of each entry": (
        lambda: Documents(torch.stack([torch.arange(150) // 40, torch.arange(150) // 9 - 2])),
        {"causal": True},
    ),
    "padding": (
        lambda: Documents(torch.cat([torch.full((50,), -1), torch.zeros(60).long(), torch.full((40,), -2)])),
        {},
    ),
    "prefix": (lambda: PrefixLM(torch.tensor([90, 0])), {}),
    "streaming": (lambda: STREAMING, {}),
    "streaming in documents": (lambda: STREAMING & Documents(torch.arange(150) // 60), {}),
    "first keys and far window": (lambda: FirstKeys(40) | Window(33, 0), {}),
    "predicate": (lambda: from_predicate(lambda b, h, q, k: (q // 9 + k // 7 + b + h) % 3 == 0), {}),
    "blocks": (lambda: from_predicate(lambda b, h, q, k: (q // 64 >= k // 64) & ((k // 64) % 2 == 0)), {}),
    "dense": (lambda: Dense(torch.arange(150)[:, None] * 7 % 5 > torch.arange(150) % 4), {"window": (60, 3)}),
    "lengths": (lambda: Documents(torch.arange(150) // 40) & Causal(), {"key_lengths": (150, 70)}),
    "lengths and tiles": (
        lambda: from_predicate(lambda b, h, q, k: k <= q),
        {"key_lengths": (30, 149)},
    ),
    "softcap": (lambda: STREAMING, {"softcap": 3.0}),
    "dropout": (lambda: Documents(torch.arange(150) // 40) & Causal(), {"dropout_p": 0.3}),
    "sinks": (lambda: Documents(torch.arange(150) // 40 - 1), {"sinks": True}),
    "bias": (lambda: Documents(torch.arange(150) // 40) & Causal(), {"alibi": "h"}),
    "top-left": (lambda: Documents(torch.arange(150) // 40) & Causal("top-left"), {"alibi": "h"}),
}


def problem_of(name: str, dtype: torch.dtype, seqlen_q: int = 150) -> tuple[Problem, Problem]:
    """The call with the mask object, and the same with a tensor made by `to_dense`."""
    make, options = CASES[name]
    options = {"batch": 2, "heads_q": 4, "seqlen_q": seqlen_q, "seqlen_k": 150} | options
    problem = Case(name, **options).build(dtype)
    mask = make()
    dense = mask.to_dense(seqlen_q, 150, batch=2, heads=4)
    top_left = name == "top-left"
    asked = problem._replace(options={**problem.options, "mask": mask})
    return asked, problem._replace(options={**problem.options, "mask": dense}, top_left=top_left)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("reference", torch.float32), ("fallback", torch.float32), ("fallback", torch.bfloat16)],
    ids=str,
)
def test_values_and_gradients(name: str, impl: str, dtype: torch.dtype) -> None:
    """A block skipped, met twice or met without its mask; each gradient of each path."""
    asked, same_as = problem_of(name, dtype)
    results = evaluate(ours(impl), asked)
    assert_within_budget(results, expected(same_as), "wide")


@pytest.mark.parametrize("name", ["documents and causal", "prefix", "streaming", "predicate", "top-left"])
@pytest.mark.parametrize("seqlen_q", [1, 7, 170])
def test_fewer_and_more_queries_than_keys(name: str, seqlen_q: int) -> None:
    """Positions that stand outside the keys, and few rows, whose heads are stacked."""
    asked, same_as = problem_of(name, torch.float32, seqlen_q)
    assert_within_budget(evaluate(ours("fallback"), asked), expected(same_as), "wide")


@pytest.mark.parametrize("impl", ["reference", "fallback"])
@pytest.mark.parametrize(
    "mask",
    [
        Documents(torch.cat([torch.full((20,), -1), torch.arange(130) // 50])) & Causal(),
        from_predicate(lambda b, h, q, k: (k >= 20) & (k <= q)),
        Dense(torch.arange(150) >= 20),
        Dense(torch.arange(150) >= 20) & Documents(torch.arange(150) // 50),
    ],
    ids=repr,
)
def test_what_nobody_sees_may_be_anything(mask: Mask, impl: str) -> None:
    """A NaN times a weight of 0, in out, lse or a gradient."""
    problem = Case("", batch=2, seqlen_q=150, seqlen_k=150).build(torch.float32)
    problem = problem._replace(options={**problem.options, "mask": mask})
    oracle = expected(problem)
    k, v = problem.k.clone(), problem.v.clone()
    k[:, :, :20], v[:, :, :20] = torch.nan, torch.inf
    assert_within_budget(evaluate(ours(impl), problem._replace(k=k, v=v)), oracle, "wide")


def test_weights_and_explain_take_masks() -> None:
    """A public call that only knows tensors."""
    q, k, v = (torch.randn(2, 2, 150, 8) for _ in range(3))
    out, lse = attention(q, k, v, mask=STREAMING, want=("lse",))[:2]
    assert lse is not None
    weights = attention_weights(q, k, lse, mask=STREAMING)
    torch.testing.assert_close(weights @ v, out)
    of_heads = from_predicate(lambda b, h, q, k: (q >= k) & (h == k % 2))
    lse = attention(q, k, v, mask=of_heads, want=("lse",)).lse
    assert lse is not None
    some = attention_weights(q, k, lse, mask=of_heads, heads=[1])
    torch.testing.assert_close(some, attention_weights(q, k, lse, mask=of_heads)[:, 1:])
    assert bool((some[..., ::2] == 0).all())
    meta = q.to("meta")
    for mask, words in ((STREAMING, "intervals"), (of_heads, "tiles")):
        assert explain(q, k, v, mask=mask).chosen == "fallback"
        assert words in explain(meta, meta, meta, mask=mask).call
    x = torch.empty(2, 2, 1000, 8)
    full = explain(x, x, x)
    for mask in (STREAMING, Documents(torch.arange(1000) // 130) & Causal(), of_heads):
        explained = explain(x, x, x, mask=mask)
        density = mask.density(1000, 1000, batch=2, heads=2)
        assert explained.flops_forward == pytest.approx(density * full.flops_forward, rel=1e-6)
        assert explained.flops_backward == pytest.approx(density * full.flops_backward, rel=1e-6)
        tiles = tiles_of(mask, mask._call(1000, 1000, 2, 2, None)).tiles
        visited = int((tiles != HIDDEN).sum()) / tiles.shape[:2].numel()
        assert visited <= explained.tiles_visited <= visited + 8


def test_a_predicate_is_asked_once() -> None:
    """Tiles made anew at each call, kept for other sizes, or kept after a tensor has changed."""
    asked = []

    def fn(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        asked.append(q.shape)
        return q >= k

    mask = from_predicate(fn)
    first = forms(mask)[0].tiles
    times = len(asked)
    assert forms(mask)[0].tiles is first
    assert len(asked) == times
    forms(mask, causal=True)
    assert len(asked) > times
    dense = torch.ones(300, 300) > 0
    mask = Dense(dense) & FirstKeys(9)
    before = forms(mask)[0].tiles
    dense[5] = False
    assert forms(mask)[0].tiles is not before
    with torch.inference_mode():
        forms(mask := from_predicate(lambda b, h, q, k: q >= k), 150)
    q, k, v = (x.requires_grad_() for x in call(150, 150))
    attention(q, k, v, mask=mask).sum().backward()


@pytest.mark.parametrize("elements", [1, 3 * TILE**2, 9 * TILE**2])
def test_tiles_made_in_pieces(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces put in the wrong place, numbers that start again, padding of a piece that is not the last."""
    mask = from_predicate(lambda b, h, q, k: ((q // 128 + k // 128) % 3 == b) | ((q * k + h) % 7 == 0))
    whole = forms(mask, 500)[0]
    monkeypatch.setattr(mask_tiles, "_BLOCK_ELEMENTS", elements)
    pieces = forms(copy.deepcopy(mask), 500)[0]
    assert pieces.tiles is not None
    assert not torch.equal(pieces.tiles, pieces.tiles[:1, :1].expand_as(pieces.tiles))
    assert torch.equal(visible(pieces, AttentionSpec(1.0)), visible(whole, AttentionSpec(1.0)))  # type: ignore[arg-type]


def greater(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q > k


@pytest.mark.parametrize(
    "mask", [STREAMING & Documents(torch.arange(9) // 4), from_predicate(greater) | Dense(torch.ones(9) > 0)]
)
def test_masks_are_values(mask: Mask) -> None:
    """Copies, pickles and moved masks that say something else, or carry tiles along."""
    want = mask.to_dense(9, 9)
    forms_of(mask)
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert torch.equal(other.to_dense(9, 9), want)
        assert repr(other) == repr(mask)
        assert "_built" not in vars(other)
    moved = mask.to("meta")
    assert isinstance(moved, Joined)
    assert {x.device.type for atom in moved._atoms() for x in atom._tensors()} <= {"meta"}


def forms_of(mask: Mask) -> None:
    q, k, v = call(9, 9)
    prepare(q, k, v, {"mask": mask})


def test_masks_say_what_they_are() -> None:
    """Parentheses lost, or a tensor's numbers printed."""
    ids = torch.zeros(3, 9, dtype=torch.int32)
    assert repr((Window(128, 0) | FirstKeys(4)) & Causal()) == (
        "(Window(left=128, right=0) | FirstKeys(4)) & Causal()"
    )
    assert repr(Documents(ids) & Causal("top-left") & PrefixLM(ids[:, 0])) == (
        "Documents(int32 (3, 9)) & Causal(align='top-left') & PrefixLM(int32 (3,))"
    )
    assert repr(from_predicate(greater) | (ids > 0)) == "from_predicate(greater) | Dense(bool (3, 9))"
    assert repr((ids > 0) | Causal()) == "Dense(bool (3, 9)) | Causal()"


def test_alignment() -> None:
    """Two alignments in one call, of which one is ignored."""
    q, k, v = call(5, 9)
    top_left = Causal(align="top-left")
    _, spec = prepare(q, k, v, {"mask": top_left & Window(2, 0)})
    assert spec[1:4] == (2, 0, True)
    _, spec = prepare(q, k, v, {"mask": top_left & FirstKeys(3), "bias": ALiBi(torch.ones(3))})
    assert spec[1:4] == (None, None, True)
    assert torch.equal(top_left.to_dense(5, 9)[0, 0], torch.ones(5, 9).tril().bool())
    for options in ({"causal": True}, {"window": (3, None)}):
        with pytest.raises(ValueError, match="bottom-right"):
            prepare(q, k, v, {"mask": top_left, **options})  # type: ignore[typeddict-item]
    with pytest.raises(ValueError, match="one alignment"):
        prepare(q, k, v, {"mask": top_left & Causal()})
    with pytest.raises(ValueError, match="top-left"):
        prepare(q, k, v, {"mask": Causal()}, top_left=True)
    with pytest.raises(ValueError, match="align of Causal"):
        Causal(align="left")


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "float lengths": (lambda: PrefixLM(torch.ones(2)), TypeError, r"PrefixLM lengths must be int32"),
    "lengths of two axes": (lambda: PrefixLM(torch.ones(2, 2).int()), ValueError, "PrefixLM lengths"),
    "list": (lambda: Documents([0, 1]), TypeError, "Documents ids must be a torch.Tensor"),
    "float ids": (lambda: Documents(torch.ones(9)), TypeError, "Documents ids"),
    "ids of another length": (lambda: Documents(torch.zeros(8).int()), ValueError, r"\(2, 9\).*\(8,\)"),
    "ids of another batch": (lambda: Documents(torch.zeros(3, 9).int()), ValueError, "Documents ids"),
    "lengths of another batch": (lambda: PrefixLM(torch.zeros(3).int()), ValueError, r"\(batch,\) = \(2,\)"),
    "a float tensor": (lambda: Causal() & torch.ones(9, 9), TypeError, "must be bool"),
    "dense of another length": (lambda: Dense(torch.ones(9, 8) > 0), ValueError, "broadcast"),
    "negative window": (lambda: Window(-1, 0), ValueError, "left of Window"),
    "window of bools": (lambda: Window(True, 0), TypeError, "left of Window"),
    "first keys": (lambda: FirstKeys(-1), ValueError, "n of FirstKeys"),
    "number": (lambda: Causal() & 3, TypeError, "unsupported operand"),
    "no function": (lambda: from_predicate(3), TypeError, "fn of from_predicate"),
    "float predicate": (lambda: from_predicate(lambda b, h, q, k: q * 1.0), TypeError, "float32"),
    "predicate's shape": (lambda: from_predicate(lambda *x: torch.ones(5) > 0), ValueError, "broadcast"),
    "cu_seqlens": (lambda: Documents.from_cu_seqlens(torch.ones(3), 9), TypeError, "cu_seqlens"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_are_named(name: str) -> None:
    """A mask built for another call that broadcasts into this one, or an error from deep inside.

    (hazard S13)
    """
    make, error, words = WRONG[name]
    q, k, v = call(9, 9)
    with pytest.raises(error, match=words):
        attention(q, k, v, mask=make())


def test_check_looks_at_values() -> None:
    """Values that are clamped in silence although somebody asked for a check."""
    q, k, v = call(9, 9)
    back = torch.tensor([0, 0, 1, 1, 0, -1, 2, -1, 2])
    for mask, words in (
        (Documents(back), "id 0 comes back"),
        (Documents(back) & Causal(), "id 0 comes back"),
        (PrefixLM(torch.tensor([10])), r"\[0, 9\], got 10"),
        (PrefixLM(torch.tensor([-1, 3])), "got -1"),
    ):
        attention(q, k, v, mask=mask)
        with pytest.raises(ValueError, match=words):
            attention(q, k, v, mask=mask, check=True)
    attention(q, k, v, mask=Documents(torch.tensor([3, 3, -1, -1, 5, 5, 5, -1, 0])), check=True)


@pytest.mark.parametrize("axis", ["batch", "heads", "seqlen_q", "seqlen_k"])
def test_empty_calls(axis: str) -> None:
    """A mask that looks at the first key of none."""
    sizes = {"batch": 2, "heads": 3, "seqlen_q": 9, "seqlen_k": 9} | {axis: 0}
    n, heads, rows, cols = sizes.values()
    q, k, v = (torch.zeros(n, heads, s, 8) for s in (rows, cols, cols))
    for mask in (
        Documents(torch.zeros(n, cols).long()) & Causal(),
        PrefixLM(torch.zeros(n).long()),
        from_predicate(greater),
        STREAMING,
    ):
        assert attention(q, k, v, mask=mask).shape == (n, heads, rows, 8)


def test_vmap_over_a_call_with_ranges() -> None:
    """Ranges folded into the batch in the wrong order, or not at all."""
    q, k, v = (torch.randn(3, 2, 2, 30, 8) for _ in range(3))
    ids = torch.stack([torch.arange(30) // n for n in (4, 9, 40)])

    def one(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Any:
        return attention(q, k, v, mask=Documents(ids) & Causal())

    for in_dims in ((0, 0, 0, 0), (0, 0, 0, None)):
        given = ids if in_dims[3] == 0 else ids[0]
        mapped = torch.func.vmap(one, in_dims)(q, k, v, given)
        alone = [one(q[i], k[i], v[i], given[i] if in_dims[3] == 0 else given) for i in range(3)]
        torch.testing.assert_close(mapped, torch.stack(alone))


def test_atoms_are_made_of_nothing_else() -> None:
    """An atom that forgets what every mask must answer."""
    for make, _ in ATOMS.values():
        mask = make()
        assert isinstance(mask, Atom)
        assert mask._atoms() == (mask,)


def test_intervals_are_made_once_for_calls_alike() -> None:
    """Catches a mask that every layer of a model compiles anew, and one that an edit in place leaves old."""
    ids = torch.tensor([0] * 5 + [1] * 6)
    mask, (q, k, v) = Documents(ids), (torch.randn(1, 2, 11, 8) for _ in range(3))
    first, again, other = (
        prepare(q, k, v, {"mask": mask, "causal": causal})[0] for causal in (True, True, False)
    )
    assert again.ranges is first.ranges
    assert again.key_ranges is first.key_ranges
    assert other.ranges is not first.ranges
    ids[5] = 0
    changed = prepare(q, k, v, {"mask": mask, "causal": True})[0]
    assert changed.ranges is not None
    assert int(changed.ranges[0, 0, 5]) == 0


@pytest.mark.parametrize("kind", [Documents, Dense])
def test_edits_that_nobody_counts(kind: type[Mask]) -> None:
    """Catches what is kept of tensors made under inference mode, which have no version: an old mask."""
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    with torch.inference_mode():
        x = torch.zeros(6, dtype=torch.int64) if kind is Documents else torch.ones(6, 6) > 0
        mask = kind(x)  # type: ignore[call-arg]
        attention(q, k, v, mask=mask)
        x[..., 3:] = kind is Documents
        assert torch.equal(attention(q, k, v, mask=mask), attention(q, k, v, mask=kind(x)))  # type: ignore[call-arg]


def test_a_transform_leaves_no_wrapped_tiles_behind() -> None:
    """Catches tiles first made inside torch.func.grad and kept: no kernel can read them afterwards."""
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    mask = Dense(torch.ones(6, 6).tril() > 0)
    torch.func.grad(lambda x: attention(x, k, v, mask=mask).sum())(q)
    tiles = prepare(q, k, v, {"mask": mask})[0].tiles
    assert tiles is not None
    assert not torch._C._functorch.is_functorch_wrapped_tensor(tiles)


def test_a_compiled_call_sees_a_dense_mask_change() -> None:
    """Catches a `Dense` that breaks the graph, and tiles in a graph that an edit in place leaves old."""
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    shown = torch.ones(6, 6).tril() > 0
    mask = Dense(shown)
    call = torch.compile(lambda q: attention(q, k, v, mask=mask), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(call(q), attention(q, k, v, mask=Dense(shown)))
        shown.fill_(True)


@pytest.mark.parametrize("width", [0, 2, 5])
def test_documents_narrower_than_a_sequence(width: int) -> None:
    """Catches a look-up past the ids: a query that stands at no id sees nothing."""
    q, cu = torch.randn(8, 2, 8), torch.tensor([0, 3, 8])
    ids = torch.zeros(2, width, dtype=torch.int64)
    out = attention_varlen(q, q, q, cu, mask=Documents(ids))
    for rows in (slice(0, 3), slice(3, 8)):
        own = q[rows][:width].transpose(0, 1)[None]
        expected = torch.zeros_like(q[rows])
        expected[:width] = attention(own, own, own)[0].transpose(0, 1)
        torch.testing.assert_close(out[rows], expected)


def test_check_asks_each_sequence() -> None:
    """Catches ids behind a packed sequence's last key taken for its own, and prefixes that exceed it."""
    q, cu = torch.randn(10, 2, 8), torch.tensor([0, 4, 10])
    ids = torch.tensor([[0, 0, 1, 1, 0, 0], [0] * 6])
    attention_varlen(q, q, q, cu, mask=Documents(ids), check=True)
    ids[0, 3] = 0
    with pytest.raises(ValueError, match="id 0 comes back"):
        attention_varlen(q, q, q, cu, mask=Documents(ids), check=True)
    attention_varlen(q, q, q, cu, mask=PrefixLM(torch.tensor([4, 6])), check=True)
    with pytest.raises(ValueError, match="PrefixLM lengths must lie"):
        attention_varlen(q, q, q, cu, mask=PrefixLM(torch.tensor([5, 6])), check=True)


def test_and_is_no_ampersand() -> None:
    """Catches `Causal() and Window(3, 0)`, which is the window alone to Python."""
    with pytest.raises(TypeError, match="combine masks with & and"):
        _ = Causal() and Window(3, 0)


def test_a_wrong_mask_is_told_of_mask_objects() -> None:
    """An error that sends who forgot () or passed a function to a tensor."""
    q = torch.randn(1, 1, 4, 8)
    for wrong in (Causal, lambda b, h, q, k: q >= k, "causal"):
        with pytest.raises(TypeError, match=r"a mask object, such as Causal\(\).*from_predicate"):
            attention(q, q, q, mask=wrong)  # type: ignore[arg-type]


def test_offsets_of_documents_do_not_decrease() -> None:
    """Keys that three documents claim: taken as packed sequences take such offsets."""
    ids = Documents.from_cu_seqlens(torch.tensor([0, 3, 2, 6]), 7).ids
    assert ids.tolist() == [0, 0, 0, 2, 2, 2, -1]
    with pytest.raises(ValueError, match=r"documents \+ 1"):
        Documents.from_cu_seqlens(torch.zeros(0, dtype=torch.int32), 7)


def test_a_picture_is_of_the_head_that_was_asked_for() -> None:
    """The last head of too few, drawn for one that the mask would hide."""
    pytest.importorskip("matplotlib")
    mask = from_predicate(lambda b, h, q, k: (q >= k) & (h < 3))
    legend = [text.get_text() for text in mask.plot(64, 64, head=3).get_legend().get_texts()]
    assert legend == ["skipped: 1", "whole: 0", "partial: 0"]
    with pytest.raises(IndexError, match="head must lie in"):
        mask.plot(64, 64, head=3, heads=2)
