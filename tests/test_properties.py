"""Laws that hold whatever the numbers are: no oracle needed, and each catches what an oracle may share."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from undivided.conformance.adapters import ARITHMETIC, ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import Case, Extra, Problem
from undivided.conformance.evaluation import evaluate, expected
from undivided.conformance.oracle import Results
from undivided.kernels.visibility import visible

IMPLEMENTATIONS = ["reference", "fallback", "triton"]
HALF = torch.float16
PLAIN = Case("plain", seqlen_q=20, seqlen_k=40)

pytestmark = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def assert_answers(impl: str, asked: Problem, same_as: Problem) -> Results:
    """`impl`, asked one way, answers what the oracle says to the other way."""
    results = evaluate(ours(impl), asked)
    assert_within_budget(results, expected(same_as)._replace(dtype=asked.q.dtype), ARITHMETIC[impl])
    return results


def with_options(problem: Problem, **options: object) -> Problem:
    return problem._replace(options={**problem.options, **options})


def test_grouped_heads_are_repeated_heads(impl: str, device: torch.device) -> None:
    """Heads shared in the wrong order, or their gradients not summed over the group."""
    problem = replace(PLAIN, heads_q=6, causal=True).build(HALF, device)
    k, v = (x.repeat_interleave(3, 1) for x in (problem.k, problem.v))
    oracle = expected(problem._replace(k=k, v=v))
    results = evaluate(ours(impl), problem)
    answer, repeated = results._replace(dk=None, dv=None), oracle.value
    assert_within_budget(answer, oracle, ARITHMETIC[impl])
    whole = expected(problem)
    for name in ("dk", "dv"):
        summed = getattr(repeated, name).unflatten(1, (2, 3)).sum(2)
        torch.testing.assert_close(getattr(whole.value, name), summed)
    assert_within_budget(results, whole, ARITHMETIC[impl])


@pytest.mark.parametrize("window", [(3, 1), (None, 2), (0, None)])
def test_a_window_is_a_mask(impl: str, window: tuple[int | None, int | None], device: torch.device) -> None:
    """An interval computed by arithmetic that differs from the one that is drawn."""
    problem = replace(PLAIN, window=window).build(HALF, device)
    inputs, spec = problem.prepared()
    dense = with_options(problem, window=None, mask=visible(inputs, spec))
    assert_answers(impl, problem, same_as=dense)
    assert_answers(impl, dense, same_as=problem)


def test_lengths_are_a_mask(impl: str, device: torch.device) -> None:
    """Lengths that move the alignment of causal."""
    problem = replace(PLAIN, batch=2, key_lengths=(31, 0), causal=True).build(HALF, device)
    inputs, spec = problem.prepared()
    dense = with_options(problem, causal=False, key_lengths=None, mask=visible(inputs, spec))
    assert_answers(impl, problem, same_as=dense)


def test_a_mask_is_a_bias_of_minus_infinity(impl: str, device: torch.device) -> None:
    """Two ways to hide that differ, in empty rows for instance (hazard P6)."""
    problem = replace(PLAIN, mask=Extra("empty_rows", "qk")).build(HALF, device)
    bias = torch.zeros(problem.options["mask"].shape, device=device)
    bias = bias.masked_fill(~problem.options["mask"], -torch.inf)
    added = with_options(problem, mask=None, bias=bias)
    results = evaluate(ours(impl), added)
    assert_within_budget(results._replace(dbias=None), expected(problem), ARITHMETIC[impl])


def test_the_order_of_keys_does_not_matter(impl: str, device: torch.device) -> None:
    """A key left out at a tile's edge, or a running maximum that is not carried along."""
    problem = replace(PLAIN, seqlen_k=65).build(HALF, device)
    order = torch.randperm(65, generator=torch.Generator().manual_seed(1)).to(device)
    oracle = expected(problem)
    permuted = oracle._replace(
        **{
            field: getattr(oracle, field)._replace(
                **{
                    name: getattr(getattr(oracle, field), name)[:, :, order]
                    for name in ("dk", "dv", "key_mass")
                }
            )
            for field in ("value", "cond", "score_cond", "underflow")
        }
    )
    shuffled = problem._replace(k=problem.k[:, :, order], v=problem.v[:, :, order])
    assert_within_budget(evaluate(ours(impl), shuffled), permuted, ARITHMETIC[impl])


@pytest.mark.parametrize("constant", [1.0, -0.3, 1000.0])
def test_constant_values_come_back(impl: str, constant: float, device: torch.device) -> None:
    """P rounded but its sum not, which biases every output (arXiv 2510.04212); exact in 16 bits.

    (hazard N8)
    """
    problem = replace(PLAIN, causal=True, seqlen_q=40, seqlen_k=77).build(HALF, device)
    results = evaluate(ours(impl), problem._replace(v=torch.full_like(problem.v, constant)))
    rounding = 2.0**-11 * abs(constant)
    assert (results.out.double() - torch.tensor(constant, dtype=HALF).double()).abs().max() <= rounding


def test_constant_keys_have_no_query_gradient(impl: str, device: torch.device) -> None:
    """Rows of dS that do not sum to zero: delta of another row, or without dropout or dlse."""
    problem = replace(PLAIN, dropout_p=0.2).build(HALF, device)
    problem = problem._replace(k=problem.k[:, :, :1].expand_as(problem.k), dlse=problem.dlse * 0)
    results = assert_answers(impl, problem, same_as=problem)
    assert results.dq.abs().max() < 0.01 * problem.dout.abs().max()


@pytest.mark.parametrize("shift", [1e5, -1e5])
def test_a_constant_added_to_all_scores_changes_nothing(
    impl: str, shift: float, device: torch.device
) -> None:
    """A finite sentinel as the first maximum, above the scores of a whole row (hazard N4)."""
    problem = replace(PLAIN, bias=Extra(axes="h", dtype=torch.float32)).build(HALF, device)
    base = with_options(problem, bias=torch.zeros_like(problem.options["bias"]))
    moved = with_options(problem, bias=torch.full_like(problem.options["bias"], shift))
    oracle = expected(moved)
    assert_within_budget(evaluate(ours(impl), moved), oracle, ARITHMETIC[impl])
    torch.testing.assert_close(oracle.value.out, expected(base).value.out)
    torch.testing.assert_close(oracle.value.lse, expected(base).value.lse + shift)


def test_lowest_finite_scores_are_uniform(impl: str, device: torch.device) -> None:
    """A row of finfo.min taken for an empty one: it is a row like any other, and all its keys are equal.

    (hazard N1)
    """
    problem = replace(PLAIN, bias=Extra(axes="qk", dtype=torch.float32)).build(HALF, device)
    bias = torch.zeros_like(problem.options["bias"])
    bias[::2] = torch.finfo(torch.float32).min
    results = evaluate(ours(impl), with_options(problem, bias=bias))
    assert_row_means(results.out[:, :, ::2], problem.v)
    assert results.lse.isfinite().all()


def test_lse_is_the_logarithm_of_the_sum(impl: str, device: torch.device) -> None:
    """lse in base 2, or without the scale; computed here without any attention (hazard N7, N20)."""
    problem = replace(PLAIN, scale=-0.7).build(torch.float32, device)
    lse = evaluate(ours(impl), problem).lse
    scores = -0.7 * problem.q.double() @ problem.k.double().mT
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=1e-6, atol=4e-6)


def test_lse_alone_gives_no_value_gradient(impl: str, device: torch.device) -> None:
    """A loss on lse leaking into v; a gradient of lse that is ignored (hazard N21)."""
    problem = PLAIN.build(torch.float32, device)
    problem = problem._replace(dout=torch.zeros_like(problem.dout))
    results = assert_answers(impl, problem, same_as=problem)
    assert not results.dv.any()
    assert results.dq.any()


def test_one_query_alone_is_the_last_of_many(impl: str, device: torch.device) -> None:
    """Decoding that disagrees with prefilling: another alignment, or other keys (hazard N10)."""
    problem = replace(PLAIN, causal=True, seqlen_q=40, window=(17, None)).build(HALF, device)
    oracle = expected(problem)
    last = problem._replace(
        q=problem.q[:, :, -1:],
        dout=problem.dout[:, :, -1:],
        dlse=problem.dlse[..., -1:],
        dentropy=problem.dentropy[..., -1:],
    )
    results = evaluate(ours(impl), last)
    whole = [
        field._replace(out=field.out[:, :, -1:], lse=field.lse[..., -1:], dq=field.dq[:, :, -1:])
        for field in oracle[:4]
    ]
    answer = Results(results.out, results.lse, results.dq)
    assert_within_budget(answer, oracle._replace(**dict(zip(oracle._fields, whole))), ARITHMETIC[impl])


def test_errors_have_no_sign(impl: str, device: torch.device) -> None:
    """A cast that truncates: each error is small, but all go the same way and training drifts (hazard N8)."""
    case = Case("many", seqlen_q=64, seqlen_k=64, head_dim=64, head_dim_v=256)
    if impl != "triton" or device.type == "cuda":
        case = replace(case, heads_q=8, heads_kv=8)
    errors = []
    for seed in range(2):
        problem = case.build(HALF, device, seed)
        out = evaluate(ours(impl), problem).out
        errors.append((out.double() - expected(problem).value.out) * out.sign())
    error = torch.cat(errors)
    deviation = 1 / math.sqrt(error.numel())
    assert abs(error.mean() / error.abs().mean()) < max(0.05, 6 * deviation)


def test_one_entry_alone_is_one_of_a_batch(impl: str, device: torch.device) -> None:
    """Numbers that depend on who else is in the batch: not one bit may (hazard R3)."""
    case = Case("batch", batch=3, heads_q=4, causal=True, seqlen_q=20, batch_invariant=True)
    problem = case.build(torch.float32 if impl == "reference" else HALF, device)
    together = evaluate(ours(impl), problem)
    for i in range(3):
        alone = evaluate(
            ours(impl),
            problem._replace(
                **{n: getattr(problem, n)[i : i + 1] for n in ("q", "k", "v", "dout", "dlse", "dentropy")}
            ),
        )
        for name, x, y in zip(Results._fields, alone, together):
            assert x is None or torch.equal(x, y[i : i + 1]), name


def test_the_same_call_gives_the_same_bits(impl: str, device: torch.device) -> None:
    """State left behind by a call with other options; gradients added up in any order (hazard L11)."""
    case = Case("again", heads_q=4, bias=Extra(axes="h"), alibi="h", sinks=True, dropout_p=0.2)
    problem = case.build(HALF, device)
    first = evaluate(ours(impl), problem)
    evaluate(ours(impl), with_options(problem, causal=True, softcap=3.0, scale=2.0, dropout_p=0.5))
    for name, x, y in zip(Results._fields, first, evaluate(ours(impl), problem)):
        assert (x is None and y is None) or torch.equal(x, y), name


def test_nan_in_a_query_stays_in_its_row(impl: str, device: torch.device) -> None:
    """A bad row that spreads to its neighbours in the tile, or that is silently mended."""
    problem = PLAIN.build(torch.float32, device)
    q = problem.q.clone()
    q[:, :, 7] = math.nan
    clean, dirty = evaluate(ours(impl), problem), evaluate(ours(impl), problem._replace(q=q))
    others = [i for i in range(20) if i != 7]
    assert dirty.out[:, :, 7].isnan().all()
    for a, b in ((clean.out, dirty.out), (clean.lse, dirty.lse), (clean.dq, dirty.dq)):
        assert torch.equal(a[:, :, others], b[:, :, others])


@pytest.mark.parametrize("value", [256.0, 30000.0])
def test_large_scores_do_not_overflow(impl: str, value: float, device: torch.device) -> None:
    """q·k stored in 16 bits, or a scale applied after it; s·scale - max·scale not 0 at the maximum.

    (hazard N5, N6)
    """
    problem = replace(PLAIN, head_dim=40).build(HALF, device)
    q, k = (torch.full_like(x, value) for x in (problem.q, problem.k))
    results = evaluate(ours(impl), problem._replace(q=q, k=k))
    assert_row_means(results.out, problem.v)
    assert results.lse.isfinite().all()


def assert_row_means(out: Tensor, v: Tensor) -> None:
    """Uniform attention: every row is the mean of all values, to two roundings."""
    mean, size = v.double().mean(2, keepdim=True), v.double().abs().mean(2, keepdim=True)
    assert ((out.double() - mean).abs() <= 2 * 2.0**-11 * size).all()
