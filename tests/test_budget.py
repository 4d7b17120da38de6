"""Is the error budget itself right? A correct kernel's arithmetic must fit, planted bugs must not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from planted import BUGS, PLAIN, UNSEEN, flash_model
from undivided.conformance.budget import assert_within_budget, measure
from undivided.conformance.cases import Case
from undivided.conformance.distributions import DISTRIBUTIONS
from undivided.conformance.evaluation import expected
from undivided.conformance.oracle import Oracle, Results

SHAPES = [
    PLAIN,
    Case("one query", batch=4, seqlen_q=1, seqlen_k=200),
    Case("two keys", seqlen_k=2, head_dim=1),
    Case("narrow values", head_dim=64, head_dim_v=1),
    Case("grouped", heads_q=6, causal=True, seqlen_k=40),
    Case("long", batch=2, seqlen_q=113, seqlen_k=203, head_dim=128),
]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precise", [False, True], ids=["delta from out", "precise"])
def test_a_correct_kernel_fits(distribution: str, dtype: torch.dtype, precise: bool) -> None:
    """A budget so tight that rounding P, dS and out once breaks it; with precise P and dS (hazard N17)."""
    for case in SHAPES:
        for seed in range(3):
            problem = replace(case, distribution=distribution, precise=precise).build(dtype, seed=seed)
            assert_within_budget(flash_model(problem), expected(problem), "kernel")


SEEN = [name for name, bug in BUGS.items() if name not in UNSEEN and bug.dtype != torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bug", SEEN)
def test_a_planted_bug_does_not(bug: str, dtype: torch.dtype) -> None:
    """A budget, or a case, so loose that a real bug passes (hazard N22, S7, S9)."""
    problem = BUGS[bug].case.build(dtype)
    oracle = expected(problem)
    assert_within_budget(flash_model(problem), oracle, "kernel")
    with pytest.raises(AssertionError, match="outside the error budget"):
        assert_within_budget(flash_model(problem, bug), oracle, "kernel")


@pytest.mark.parametrize("distribution", ["peaky", "outlier_channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_scores_show_without_lse(distribution: str, dtype: torch.dtype) -> None:
    """The bug that passes "at most twice the error of plain PyTorch": lse is not alone in telling it."""
    problem = replace(PLAIN, distribution=distribution).build(dtype)
    findings = measure(flash_model(problem, "scores rounded to 16 bits"), expected(problem), "kernel")
    assert {"out", "dv"} <= {finding.output for finding in findings if not finding.ok}


def test_tf32_does_not_pass_for_float32() -> None:
    """float32 products in tf32, Triton's default: three digits instead of seven (hazard N12)."""
    problem = PLAIN.build(torch.float32)
    assert_within_budget(flash_model(problem), expected(problem), "kernel")
    with pytest.raises(AssertionError, match=r"(?s)out.*lse.*dq.*dk.*dv"):
        assert_within_budget(flash_model(problem, "products in tf32"), expected(problem), "kernel")


@pytest.fixture
def solved() -> tuple[Results, Oracle]:
    problem = Case("small", batch=2, seqlen_q=5, seqlen_k=4, causal=True).build(torch.float16)
    return flash_model(problem), expected(problem)


@pytest.mark.parametrize("output", ["out", "lse", "dq", "dk", "dv"])
def test_one_wrong_element_is_found_and_named(solved: tuple[Results, Oracle], output: str) -> None:
    """A report that hides where the error is, or a mean that hides a single bad element."""
    actual, oracle = solved
    x = getattr(actual, output).clone()
    element = (1, 0, 2, 3)[: x.ndim]
    for wrong in (x[element] + 0.1, math.nan, math.inf, -math.inf):
        x[element] = wrong
        coordinate = ", ".join(map(str, element))
        with pytest.raises(AssertionError, match=rf"{output}\[{coordinate}\]"):
            assert_within_budget(actual._replace(**{output: x}), oracle, "kernel")


def test_an_empty_row_must_have_lse_minus_infinity(solved: tuple[Results, Oracle]) -> None:
    """Query 0 sees nothing here. A finite sentinel or +inf in its lse (hazard N2)."""
    actual, oracle = solved
    assert actual.lse[0, 0, 0] == -math.inf
    for sentinel in (-1e30, math.inf, 0.0, torch.finfo(torch.float32).min):
        lse = actual.lse.masked_fill(actual.lse == -math.inf, sentinel)
        with pytest.raises(AssertionError, match="lse"):
            assert_within_budget(Results(lse=lse), oracle, "kernel")


def test_a_missing_axis_is_found(solved: tuple[Results, Oracle]) -> None:
    """A gradient that only broadcasts to the right shape."""
    actual, oracle = solved
    with pytest.raises(AssertionError, match="dk has shape"):
        assert_within_budget(Results(dk=actual.dk[:1]), oracle, "kernel")


def test_the_worst_constants_are_returned(solved: tuple[Results, Oracle]) -> None:
    """A figure that reports could not publish: they are scale-free and at most what is allowed."""
    constants = assert_within_budget(solved[0], solved[1], "kernel")
    assert {"out", "lse", "dq", "dk", "dv"} <= set(constants)
    assert 0.1 < constants["out"] <= 2.0
