"""`precise=True`: backward's delta free of the rounding of a 16-bit out, and a budget that tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from undivided import attention
from undivided.conformance.adapters import ARITHMETIC, ours
from undivided.conformance.budget import assert_within_budget, measure
from undivided.conformance.cases import Case, Extra, Problem
from undivided.conformance.evaluation import evaluate, expected
from undivided.conformance.oracle import Oracle, Results

CASE = Case("precise", batch=2, seqlen_q=70, seqlen_k=90, head_dim=64, precise=True)
IMPLEMENTATIONS = [impl for impl in ("fallback", "triton") if ours(impl).capabilities.precise]


def without(problem: Problem) -> Problem:
    return problem._replace(options={**problem.options, "precise": False})


@pytest.mark.parametrize("distribution", ["uniform", "mean_v", "low_rank"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_keeps_digits_that_the_rounded_out_has_not(
    impl: str, distribution: str, device: torch.device
) -> None:
    """The option ignored, or its budget so loose that ignoring it passes (hazard N9)."""
    dtype = torch.bfloat16 if torch.bfloat16 in ours(impl).capabilities.dtypes else torch.float16
    problem = replace(CASE, distribution=distribution).build(dtype, device)
    oracle = expected(problem)
    assert_within_budget(evaluate(ours(impl), problem), oracle, ARITHMETIC[impl])
    ordinary = evaluate(ours(impl), without(problem))
    assert_within_budget(ordinary, expected(without(problem)), ARITHMETIC[impl])
    assert "dq" in {f.output for f in measure(ordinary, oracle, ARITHMETIC[impl]) if not f.ok}


def test_a_bias_keeps_them_too() -> None:
    """dbias, or a sink's gradient, made from another delta than dq's."""
    problem = replace(CASE, distribution="mean_v", bias=Extra(axes="hqk"), sinks=True).build(torch.bfloat16)
    oracle = expected(problem)
    assert_within_budget(evaluate(ours("fallback"), problem), oracle, "wide")
    ordinary = measure(evaluate(ours("fallback"), without(problem)), oracle, "wide")
    assert "dbias" in {finding.output for finding in ordinary if not finding.ok}


@pytest.mark.parametrize("rows", [5, 70])
def test_a_forward_pass_of_few_digits_spoils_nothing(rows: int) -> None:
    """Without `want` forward may leave an lse with errors of 5e-5: a Σ P·dP would inherit them."""
    problem = replace(CASE, seqlen_q=rows, distribution="mean_v").build(torch.bfloat16)
    problem = problem._replace(dlse=torch.zeros_like(problem.dlse))
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    out = attention(*leaves, impl="fallback", **problem.given_options())
    grads = torch.autograd.grad(out, leaves, problem.dout)
    assert_within_budget(Results(None, None, *grads), expected(problem), "wide")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_changes_no_bit_where_out_is_not_rounded(dtype: torch.dtype) -> None:
    """A pass that is paid for nothing, and other gradients than yesterday's."""
    problem = CASE.build(dtype)
    for x, y in zip(evaluate(ours("fallback"), problem), evaluate(ours("fallback"), without(problem))):
        assert x is y is None or torch.equal(x, y)


def test_forward_is_the_same() -> None:
    """out computed otherwise because backward will be."""
    problem = CASE.build(torch.bfloat16)
    precise, plain = (evaluate(ours("fallback"), x) for x in (problem, without(problem)))
    assert torch.equal(precise.out, plain.out)
    assert torch.equal(precise.lse, plain.lse)


def test_its_budget_is_never_the_looser_one() -> None:
    """A tighter table that gives room elsewhere."""

    def room(oracle: Oracle, name: str) -> torch.Tensor:
        cond, score_cond = getattr(oracle.cond, name), getattr(oracle.score_cond, name)
        return 2.0**-8 * cond + 8 * 2.0**-24 * (cond + score_cond)

    problem = replace(CASE, sinks=True, bias=Extra(axes="hk")).build(torch.bfloat16)
    tight, loose = expected(problem), expected(without(problem))
    for name in ("out", "dq", "dk", "dv", "dbias", "dsinks"):
        assert (room(tight, name) <= room(loose, name) * (1 + 1e-12)).all()
