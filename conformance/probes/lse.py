"""What is the lse that comes back? Base, sign, scale, layout, dropout, and whether it is differentiable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Problem
from .subject import Probe, Subject, recognised

KEYS, SCORE = 8, 2.0
DROPOUT = {"dropout_p": 0.5, "seed": 3}
DIFFERENTIABLE = "differentiable"
NONE = "not returned"


def probes(subject: Subject) -> Iterator[Probe]:
    claims = subject.claims
    promised = next(iter(_values(subject))) if claims.lse else None
    yield Probe("lse is", promised, partial(_value, subject))
    if not claims.lse:
        return
    yield Probe("the layout of lse", "(batch, heads, seqlen_q), float32", partial(_layout, subject))
    if claims.dropout:
        yield Probe("dropout changes lse", "not at all", partial(_with_dropout, subject))
    if claims.backward:
        promised = DIFFERENTIABLE if claims.lse_gradient else None
        yield Probe("the gradient of lse", promised, partial(_gradient, subject))


def _equal_keys(subject: Subject, **options: Any) -> Problem:
    """Every key of every query has the same score."""
    problem = subject.problem(subject.rows(5, KEYS), KEYS, 3, 3, **options)
    problem.q[..., 0] = SCORE / subject.scale
    problem.k[..., 0] = 1
    return problem


def _values(subject: Subject) -> dict[str, float]:
    lse = math.log(KEYS) + SCORE
    return {
        "the natural logarithm of the sum of exponentials": lse,
        "in base 2": lse / math.log(2),
        "of the unscaled scores": math.log(KEYS) + SCORE / subject.scale,
        "divided by the scale": lse / subject.scale,
        "without the maximum": math.log(KEYS),
        "the maximum alone": SCORE,
        "the sum, without a logarithm": math.exp(lse),
        "negated": -lse,
        "negated, in base 2": -lse / math.log(2),
    }


def _value(subject: Subject) -> str:
    """Also of one that is not claimed, say because its base is another."""
    lse = _lse(subject, _equal_keys(subject))
    return NONE if lse is None else recognised(lse, _values(subject))


def _lse(subject: Subject, problem: Problem) -> Tensor | None:
    with torch.no_grad():
        return subject.target.statistics(problem).lse


def _with_dropout(subject: Subject) -> str:
    without, dropped = (_lse(subject, _equal_keys(subject, **options)) for options in ({}, DROPOUT))
    if without is None or dropped is None:
        return NONE
    return recognised(dropped - without, {"not at all": 0.0}, "yes: the sum is of what was kept")


def _layout(subject: Subject) -> str:
    problem = _equal_keys(subject)
    lse = _lse(subject, problem)
    if lse is None:
        return NONE
    batch, heads, rows, _ = problem.q.shape
    names = {batch: "batch", heads: "heads", rows: "seqlen_q"}
    axes = ", ".join(names.get(size, str(size)) for size in lse.shape)
    return f"({axes}), {str(lse.dtype).removeprefix('torch.')}"


def _gradient(subject: Subject) -> str:
    """Of the sum of lse alone: dq = scale·k and dk = scale·q·rows/keys where all keys are equal; dv = 0."""
    problem = _equal_keys(subject)
    q, k, v = leaves = [x.requires_grad_() for x in problem[:3]]
    _, lse, *_ = subject.target.attend(problem._replace(q=q, k=k, v=v))
    if lse is None:
        return NONE
    if not lse.requires_grad:
        return "none: lse is detached"
    dq, dk, dv = torch.autograd.grad(lse.sum(), leaves, allow_unused=True)
    if dq is None or dk is None or not (dq.any() or dk.any()):
        return "ignored: zero"
    if dv is not None and dv.any():
        return "not zero for v"
    factors = torch.stack(
        [dq[..., 0].mean() / subject.scale, dk[..., 0].mean() * KEYS / (SCORE * q.shape[2])]
    )
    words = {DIFFERENTIABLE: 1.0, "that of lse in base 2": 1 / math.log(2), "unscaled": 1 / subject.scale}
    return recognised(factors, words)
