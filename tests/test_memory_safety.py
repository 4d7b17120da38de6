"""Nothing is read that should not be, nothing is left unwritten, nothing of the caller's changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from undivided.conformance.adapters import ours
from undivided.conformance.cases import Case, Extra, Problem
from undivided.conformance.evaluation import evaluate
from undivided.conformance.memory import fenced, poisoned_allocations
from undivided.conformance.oracle import Results
from undivided.conformance.safety import hidden_keys

IMPLEMENTATIONS = ["reference", "fallback", "triton"]

CASES = [
    Case("odd", batch=2, seqlen_q=17, seqlen_k=33, head_dim=20, heads_q=2, heads_kv=1),
    Case("causal", seqlen_q=33, seqlen_k=19, causal=True, head_dim_v=5),
    Case("window", seqlen_q=35, seqlen_k=50, window=(3, 2)),
    Case("masked", seqlen_q=18, mask=Extra("random", "qk"), bias=Extra("random", "hqk")),
    Case("broadcast", batch=2, seqlen_q=18, mask=Extra("padding_left", "bk"), bias=Extra("random", "hk")),
    Case("lengths", batch=2, seqlen_q=5, key_lengths=(3, 31), dropout_p=0.2, layout="bshd"),
    Case("expanded", batch=2, seqlen_q=5, layout="expanded_batch", softcap=2.0),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def problem(request: pytest.FixtureRequest, device: torch.device) -> Problem:
    return request.param.build(torch.float32, device)


def assert_same(a: Results, b: Results) -> None:
    """Bitwise, and finite: two NaN are not the same."""
    for name, x, y in zip(Results._fields, a, b):
        assert (x is None and y is None) or torch.equal(x, y), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_outside_a_tensor_is_read(impl: str, problem: Problem) -> None:
    """A load past the last row, column or head, or one that ignores a stride (hazard S12)."""
    fence = problem.mapped(fenced)
    assert_within_a_last_bit(evaluate(ours(impl), fence), evaluate(ours(impl), problem))


def assert_within_a_last_bit(a: Results, b: Results) -> None:
    """Other strides may be summed in another order by a library; NaN never passes."""
    for x, y in zip(a, b):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_element_is_written(impl: str, problem: Problem) -> None:
    """Rows without keys, heads of a group or a last partial tile that a kernel forgets to store.

    (hazard L11)
    """
    with poisoned_allocations():
        poisoned = evaluate(ours(impl), problem)
    assert_same(poisoned, evaluate(ours(impl), problem))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_are_not_modified(impl: str, problem: Problem) -> None:
    """q scaled in place, a mask completed in place, dout used as scratch (hazard L12)."""
    before = problem.mapped(torch.clone)
    evaluate(ours(impl), problem)
    for a, b in zip(problem, before):
        assert not isinstance(a, Tensor) or torch.equal(a, b)
    for name, x in problem.options.items():
        assert not isinstance(x, Tensor) or torch.equal(x, before.options[name])


HIDDEN = {
    "past the lengths": Case("lengths", batch=2, key_lengths=(21, 4), heads_q=2, heads_kv=1),
    "an empty sequence": Case("lengths", batch=2, key_lengths=(0, 33), seqlen_q=5),
    "masked columns": Case("mask", mask=Extra("empty_columns", "k")),
    "masked columns of one entry": Case("mask", batch=2, mask=Extra("padding_left", "bqk"), dropout_p=0.2),
    "before every window": Case("window", seqlen_q=4, seqlen_k=40, window=(3, None)),
    "after every window": Case("window", seqlen_q=4, seqlen_k=40, window=(None, 2), top_left=True),
}


@pytest.mark.parametrize("hiding", HIDDEN)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_hidden_keys_may_hold_anything(impl: str, hiding: str, device: torch.device) -> None:
    """0·NaN: scores masked after the product, but not the values; a gradient for what nobody saw.

    (hazard N15)
    """
    problem = HIDDEN[hiding].build(torch.float32, device)
    hidden = hidden_keys(problem)
    assert hidden.any()
    traps = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device)
    anything = traps[torch.arange(hidden.shape[2], device=device) % 3][:, None]
    clean = problem._replace(k=problem.k.masked_fill(hidden, 0.0), v=problem.v.masked_fill(hidden, 0.0))
    dirty = problem._replace(
        k=torch.where(hidden, anything, problem.k), v=torch.where(hidden, anything, problem.v)
    )
    results = evaluate(ours(impl), dirty)
    assert_same(results, evaluate(ours(impl), clean))
    for grad in (results.dk, results.dv):
        assert not grad.masked_select(hidden).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_rows_may_hold_anything(impl: str, device: torch.device) -> None:
    """NaN in q, dout or dlse of a row that sees nothing, multiplied by 0 instead of replaced (hazard N1)."""
    for case in (
        Case("mask", mask=Extra("empty_rows", "q"), bias=Extra(axes="hqk")),
        Case("causal", seqlen_q=20, seqlen_k=10, causal=True, heads_kv=1),
        Case("lengths", batch=2, key_lengths=(0, 20), seqlen_q=5, softcap=1.0),
    ):
        problem = case.build(torch.float32, device)
        clean = evaluate(ours(impl), problem)
        empty = clean.lse == -torch.inf
        assert empty.any()

        def trap(x: Tensor, rows: Tensor = empty) -> Tensor:
            return x.masked_fill(rows if x.ndim == 3 else rows[..., None], torch.nan)

        dirty = problem._replace(q=trap(problem.q), dout=trap(problem.dout), dlse=trap(problem.dlse))
        assert_same(evaluate(ours(impl), dirty), clean)
        for x in (clean.out, clean.dq):
            assert not x.masked_select(empty[..., None]).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_bias_is_not_read_where_nobody_sees(impl: str, device: torch.device) -> None:
    """NaN in a hidden element of bias reaching out, or its gradient not being zero."""
    case = Case("bias", mask=Extra("random", "qk"), bias=Extra(axes="hqk"), causal=True)
    problem = case.build(torch.float32, device)
    rows = torch.arange(case.seqlen_q, device=device)
    hidden = ~problem.options["mask"] | (rows > rows[:, None])
    bias = problem.options["bias"].masked_fill(hidden, torch.nan)
    dirty = problem._replace(options={**problem.options, "bias": bias})
    results = evaluate(ours(impl), dirty)
    assert_same(results, evaluate(ours(impl), problem))
    assert not results.dbias.masked_select(hidden).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_lengths_past_the_end_are_clamped(impl: str, device: torch.device) -> None:
    """A length that the caller got wrong turning into reads outside k and v."""
    case = Case("lengths", batch=2, key_lengths=(10**6, 33), seqlen_q=5)
    problem, full = (
        c.build(torch.float32, device).mapped(fenced) for c in (case, replace(case, key_lengths=None))
    )
    assert_same(evaluate(ours(impl), problem), evaluate(ours(impl), full))
