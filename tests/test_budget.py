"""Is the error budget itself right? A correct kernel's arithmetic must fit, planted bugs must not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from undivided.conformance.budget import assert_within_budget, measure
from undivided.conformance.cases import Case, Extra, Problem
from undivided.conformance.distributions import DISTRIBUTIONS
from undivided.conformance.evaluation import expected
from undivided.conformance.oracle import Oracle, Results
from undivided.kernels.masks import visible
from undivided.kernels.philox import keep_mask


def flash_model(problem: Problem, bug: str | None = None) -> Results:
    """What a fused kernel computes, in PyTorch: float32 sums of 16-bit products, P and dS rounded once."""
    inputs, spec = problem.prepared()
    dtype = inputs.q.dtype
    if bug == "window off by one":
        spec = spec._replace(left=spec.left + 1)
    if bug == "aligned top-left":
        spec = spec._replace(top_left=True)
    if bug == "scale forgotten in scores":
        spec = spec._replace(scale=1.0)
    if bug == "dropout keeps too many":
        spec = spec._replace(dropout_p=spec.dropout_p * 0.9)

    def operand(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def per_query_head(x: Tensor) -> Tensor:
        group = inputs.q.shape[1] // x.shape[1]
        return x.repeat(1, group, 1, 1) if bug == "heads interleaved" else x.repeat_interleave(group, 1)

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (inputs.k.shape[1], -1)).sum(2)

    q, dout = inputs.q.float(), problem.dout.float()
    k, v = per_query_head(inputs.k.float()), per_query_head(inputs.v.float())
    if bug == "products in tf32":
        q, k = to_tf32(q), to_tf32(k)
    bias = 0.0 if inputs.bias is None else inputs.bias.float()
    dlse = torch.zeros_like(problem.dlse) if bug == "lse gradient ignored" else problem.dlse
    shape = (*q.shape[:3], k.shape[2])
    ok = visible(inputs, spec)
    ok = torch.ones(shape, dtype=torch.bool) if ok is None else ok.expand(shape)
    survives = torch.ones(shape)
    if spec.dropout_p:
        keep = keep_mask(inputs.seed, spec.dropout_p, *shape[:2], range(shape[2]), range(shape[3]))
        survives = keep / (1 - spec.dropout_p)

    s = spec.scale * (q @ k.mT)
    if bug == "softcap after bias":
        s = s + bias
    slope = 1.0
    if spec.softcap is not None:
        t = torch.tanh(s / spec.softcap)
        s = spec.softcap * t
        slope = 1.0 if bug == "softcap not differentiated" else 1 - t * t
    if bug != "softcap after bias":
        s = s + bias
    if bug == "scores rounded":
        s = operand(s)
    scores, s = s, s.masked_fill(~ok, -torch.inf)
    peak = s.amax(-1, keepdim=True)
    dead = peak == -torch.inf
    weights = torch.exp(s - peak.masked_fill(dead, 0.0))
    total = weights.sum(-1, keepdim=True).masked_fill(dead, 1.0)
    out = (operand(weights * survives) @ v / total).to(dtype)
    lse = (peak + total.log()).squeeze(-1)

    if bug == "mask missing in backward":
        s = scores
    p = torch.exp(s - lse[..., None]).masked_fill(dead, 0.0)
    dp = dout @ v.mT
    survives_backward = survives.flip(-1) if bug == "another dropout mask in backward" else survives
    delta = (out.float() * dout).sum(-1, keepdim=True) - dlse[..., None]
    ds = p * (dp * survives_backward - delta)
    dv = operand(p * survives_backward).mT @ dout
    dq, dk = operand(ds * slope) @ k, operand(ds * slope).mT @ q
    dbias = None if inputs.bias is None else ds.sum_to_size(inputs.bias.shape).to(inputs.bias.dtype)
    if bug == "dbias not reduced":
        dbias = ds.mean(2, keepdim=True)
    if bug == "scale forgotten in dk":
        dk = dk / spec.scale
    if bug == "lse in base 2":
        lse = lse / math.log(2)
    dq, dk, dv = spec.scale * dq, spec.scale * per_key_head(dk), per_key_head(dv)
    return Results(out, lse, dq.to(dtype), dk.to(dtype), dv.to(dtype), dbias)


def to_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, rounded."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


PLAIN = Case("plain", batch=2, seqlen_q=50, seqlen_k=65, head_dim=64)
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
def test_a_correct_kernel_fits(distribution: str, dtype: torch.dtype) -> None:
    """A budget so tight that rounding P, dS and out once breaks it."""
    for case in SHAPES:
        for seed in range(3):
            problem = replace(case, distribution=distribution).build(dtype, seed=seed)
            assert_within_budget(flash_model(problem), expected(problem), "kernel")


BUGS = {
    "scores rounded": PLAIN,
    "window off by one": Case("window", window=(3, 1)),
    "aligned top-left": Case("causal", causal=True, seqlen_k=40),
    "scale forgotten in scores": PLAIN,
    "scale forgotten in dk": PLAIN,
    "lse in base 2": PLAIN,
    "lse gradient ignored": PLAIN,
    "softcap after bias": Case("softcap", softcap=2.0, bias=Extra(axes="hqk")),
    "softcap not differentiated": Case("softcap", softcap=2.0),
    "heads interleaved": Case("grouped", heads_q=4),
    "mask missing in backward": Case("mask", mask=Extra("random", "qk")),
    "dropout keeps too many": Case("dropout", dropout_p=0.3),
    "another dropout mask in backward": Case("dropout", dropout_p=0.3),
    "dbias not reduced": Case("bias", bias=Extra(axes="bhk")),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_does_not(bug: str, dtype: torch.dtype) -> None:
    """A budget, or a case, so loose that a real bug passes."""
    problem = BUGS[bug].build(dtype)
    oracle = expected(problem)
    assert_within_budget(flash_model(problem), oracle, "kernel")
    with pytest.raises(AssertionError, match="outside the error budget"):
        assert_within_budget(flash_model(problem, bug), oracle, "kernel")


@pytest.mark.parametrize("distribution", ["peaky", "outlier_channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_scores_show_without_lse(distribution: str, dtype: torch.dtype) -> None:
    """The bug that passes "at most twice the error of plain PyTorch": lse is not alone in telling it."""
    problem = replace(PLAIN, distribution=distribution).build(dtype)
    findings = measure(flash_model(problem, "scores rounded"), expected(problem), "kernel")
    assert {"out", "dv"} <= {finding.output for finding in findings if not finding.ok}


def test_tf32_does_not_pass_for_float32() -> None:
    """float32 products in tf32, Triton's default: three digits instead of seven."""
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
    """Query 0 sees nothing here. A finite sentinel or +inf in its lse."""
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
    assert set(constants) == {"out", "lse", "dq", "dk", "dv"}
    assert 0.1 < constants["out"] <= 2.0
