"""The fallback's plans for mask objects: no block that is hidden, none twice, none without its mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from undivided import Causal, Dense, Documents, FirstKeys, Mask, PrefixLM, Window, attention, from_predicate
from undivided.conformance.adapters import ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import Case
from undivided.conformance.evaluation import evaluate, expected
from undivided.kernels import fallback_blocks, fallback_mask_plan
from undivided.kernels.fallback_mask_plan import plan_of_ranges, plan_of_tiles
from undivided.kernels.fallback_plan import Limits, Strip
from undivided.kernels.functional import prepare
from undivided.kernels.visibility import visible


@dataclass(frozen=True)
class Drawn:
    """A mask whose plan is asked for, sizes and limits."""

    mask: Mask
    seqlen_q: int
    seqlen_k: int
    stop: int
    limits: Limits
    elementwise: bool


@st.composite
def drawn(draw: Any, masks: Any) -> Drawn:
    seqlen_q, seqlen_k = (draw(st.integers(1, 60)) for _ in "qk")
    limits = st.builds(Limits, st.integers(1, 20), st.integers(1, 70), st.booleans())
    mask = draw(masks(seqlen_k))
    return Drawn(mask, seqlen_q, seqlen_k, draw(st.integers(0, seqlen_k)), draw(limits), draw(st.booleans()))


def intervals(seqlen_k: int) -> Any:
    sizes = st.lists(st.integers(1, 25), min_size=1).map(
        lambda sizes: torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    )
    ids = sizes.map(lambda x: (x.repeat(seqlen_k)[:seqlen_k] % 5) - 1)
    atoms = st.one_of(
        ids.map(Documents),
        st.integers(0, 40).map(lambda n: PrefixLM(torch.tensor([n]))),
        st.integers(0, 40).map(FirstKeys),
        st.tuples(st.integers(0, 30), st.integers(0, 5)).map(lambda sides: Window(*sides)),
        st.just(Causal()),
    )
    return st.tuples(atoms, atoms, st.integers(0, 40), st.booleans()).map(
        lambda x: (x[0] & x[1]) | FirstKeys(x[2]) if x[3] else x[0] & x[1]
    )


def tiles(seqlen_k: int) -> Any:
    """Whole, partial and hidden ones in a pattern."""
    return st.integers(0, 2**20).map(
        lambda seed: from_predicate(
            lambda b, h, q, k: (
                ((q // 128 * 7 + k // 128 * 5 + seed) % 3 == 0)
                | (((q + k + seed) % 11 == 0) & (q // 256 % 2 == 0))
            )
        )
    )


def count(strips: tuple[Strip, ...], allowed: Tensor, elementwise: bool) -> Tensor:
    """How often each pair is met and not hidden."""
    times = torch.zeros(allowed.shape, dtype=torch.int64)
    for rows, parts in strips:
        assert parts
        for part in parts:
            here = torch.ones_like(times[rows, part.cols], dtype=torch.bool)
            assert here.numel()
            if part.visible == "causal":
                here = here.tril()
            elif part.visible == "some":
                here = allowed[rows, part.cols]
            assert not (elementwise and part.visible != "some")
            times[rows, part.cols] += here
    return times


@settings(deadline=None, max_examples=300)
@given(case=drawn(intervals))
def test_a_plan_of_ranges_holds_every_visible_pair_once(case: Drawn) -> None:
    """A block counted twice, left out, or called visible when it is not; few rows that are alike matter."""
    many, fallback_mask_plan._MANY = fallback_mask_plan._MANY, 3
    near, fallback_mask_plan._NEAR = fallback_mask_plan._NEAR, 2
    try:
        q, k = (torch.zeros(1, 1, n, 8) for n in (case.seqlen_q, case.seqlen_k))
        inputs, spec = prepare(q, k, k, {"mask": case.mask})
        if inputs.ranges is None:
            return
        allowed = visible(inputs, spec)
        assert allowed is not None
        allowed = allowed[0, 0].clone()
        allowed[:, case.stop :] = False
        strips = plan_of_ranges(inputs.ranges[0], case.stop, case.elementwise, case.limits)
        assert torch.equal(count(strips, allowed, case.elementwise), allowed.long())
    finally:
        fallback_mask_plan._MANY, fallback_mask_plan._NEAR = many, near


@settings(deadline=None, max_examples=40)
@given(case=drawn(tiles), scale=st.sampled_from([1, 16]))
def test_a_plan_of_tiles_holds_every_visible_pair_once(case: Drawn, scale: int) -> None:
    """The same of tiles: runs of whole ones, of partial ones, the last one."""
    q, k = (torch.zeros(1, 1, n * scale, 8) for n in (case.seqlen_q, case.seqlen_k))
    stop = case.stop * scale
    inputs, spec = prepare(q, k, k, {"mask": case.mask})
    assert inputs.tiles is not None
    allowed = visible(inputs, spec)
    assert allowed is not None
    allowed = allowed[0, 0].clone()
    allowed[:, stop:] = False
    strips = plan_of_tiles(inputs.tiles, q.shape[2], stop, case.elementwise, case.limits)
    assert torch.equal(count(strips, allowed, case.elementwise), allowed.long())


SEQLEN = 1024
SPARSE: dict[str, tuple[Mask, float]] = {
    "documents": (Documents(torch.arange(SEQLEN) // 128), 1 / 8),
    "documents and causal": (Documents(torch.arange(SEQLEN) // 128) & Causal(), 1 / 8),
    "streaming": ((Window(100, 0) | FirstKeys(4)) & Causal(), 0.3),
    "prefix": (PrefixLM(torch.tensor([200])), 1.0),
    "blocks": (from_predicate(lambda b, h, q, k: q // 128 == k // 128), 1 / 8),
    "dense": (Dense(torch.ones(SEQLEN, SEQLEN).tril() > 0), 0.6),
}


@pytest.mark.parametrize("name", SPARSE)
def test_hidden_blocks_are_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is right because it visits everything; element masks where none is needed."""
    mask, share = SPARSE[name]
    scores, masked = [], []
    flash = fallback_blocks._flash

    def counted(q: Tensor, k: Tensor, v: Tensor, *rest: Any, attn_mask: Tensor | None, **kwargs: Any) -> Any:
        scores.append(q.shape[2] * k.shape[2])
        masked.append(attn_mask is not None)
        return flash(q, k, v, *rest, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(fallback_blocks, "_flash", counted)
    q = torch.randn(1, 1, SEQLEN, 8)
    attention(q, q, q, mask=mask)
    assert sum(scores) <= share * SEQLEN**2
    if name in ("documents", "documents and causal", "prefix", "blocks"):
        assert not any(masked)


MANY = [
    (Documents(torch.arange(150) // 40), {}),
    (Documents(torch.stack([torch.arange(150) // 40, torch.arange(150) // 9 - 2])), {"causal": True}),
    ((Window(20, 0) | FirstKeys(4)) & Causal(), {"heads_q": 4}),
    (PrefixLM(torch.tensor([90, 0])), {"alibi": "h"}),
    (from_predicate(lambda b, h, q, k: (q // 9 + k // 7 + b + h) % 3 == 0), {"key_lengths": (150, 70)}),
    (FirstKeys(40) | Window(33, 0), {"seqlen_q": 3, "heads_q": 4}),
    (Documents(torch.arange(150) // 40 - 1) & Causal(), {"key_lengths": (100, 150), "sinks": True}),
]


@pytest.mark.parametrize("number", range(len(MANY)))
@pytest.mark.parametrize("engine", ["operator", "matmul"])
def test_many_small_blocks(number: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging and summing go wrong only where a row has several blocks: small limits, on both engines."""
    for limit in ("_MASK_ELEMENTS", "_BLOCK_ELEMENTS", "_CONVERTED_ELEMENTS"):
        monkeypatch.setattr(fallback_blocks, limit, 256)
    monkeypatch.setattr(fallback_blocks, "_COLS", 16)
    if engine == "matmul":
        monkeypatch.setattr(fallback_blocks.FlashEngine, "takes", lambda inputs, spec: False)
    mask, options = MANY[number]
    sizes: dict[str, Any] = {"batch": 2, "seqlen_q": 150, "seqlen_k": 150} | options
    problem = Case("", **sizes).build(torch.float32)
    problem = problem._replace(options={**problem.options, "mask": mask})
    k, v = problem.k.clone(), problem.v.clone()
    inputs, spec = problem.prepared()
    shown = visible(inputs, spec)
    assert shown is not None
    hidden = ~shown.expand(2, -1, -1, -1).flatten(1, 2).any(1)
    k.masked_fill_(hidden[:, None, :, None], torch.nan)
    v.masked_fill_(hidden[:, None, :, None], torch.inf)
    results = evaluate(ours("fallback"), problem._replace(k=k, v=v))
    assert_within_budget(results, expected(problem), "wide")
