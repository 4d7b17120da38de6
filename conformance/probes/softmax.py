"""What are the weights a softmax of? Scale, softcap and bias, in which order and how exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..cases import Problem
from .subject import Probe, Subject, recognised

ONE_SOFTMAX = "one softmax over all keys"
FLOAT32 = "kept in float32"


def probes(subject: Subject) -> Iterator[Probe]:
    claims, scale = subject.claims, subject.scale

    def of_two_keys(question: str, problem: Problem, words: dict[str, float]) -> Probe:
        return Probe(
            question,
            next(iter(words)),
            lambda: recognised(subject.score_difference(problem), words),
        )

    def two_keys(score: float, **options: Any) -> Problem:
        """The second key's score is higher by this much, before any scale."""
        problem = subject.problem(2, 2, **options)
        problem.q[..., 0] = 1
        problem.k[:, :, 1, 0] = score
        return problem

    words = {"1/sqrt(head_dim)": 8 * scale, "1: scores are not scaled": 8.0, "1/head_dim": 8 * scale**2}
    yield of_two_keys("the default scale", two_keys(8), words)
    if claims.scale:
        words = {
            "as given": 3.0,
            "ignored: 1/sqrt(head_dim)": 4 * scale,
            "multiplied with 1/sqrt(head_dim)": 3 * scale,
        }
        yield of_two_keys("a given scale", two_keys(4, scale=0.75), words)
    if claims.softcap:
        words = {
            "softcap·tanh(score / softcap)": 2 * math.tanh(1.5),
            "ignored": 3.0,
            "tanh(score / softcap), not multiplied by softcap": math.tanh(1.5),
            "of the scores before their scale": 2 * math.tanh(1.5 / scale) * scale,
        }
        yield of_two_keys("softcap", two_keys(3 / scale, softcap=2.0), words)
    if claims.bias:
        bias = torch.tensor([0.0, 3.0]).expand(2, 2).to(subject.device, subject.dtype).contiguous()
        words = {"after the scale": 3.0, "before the scale": 3 * scale, "never: it is ignored": 0.0}
        yield of_two_keys("bias is added", two_keys(0, bias=bias), words)
        if claims.softcap:
            words = {
                "softcap first, then bias": 3.0,
                "bias first: softcap squashes it": 2 * math.tanh(1.5),
                "bias is ignored": 0.0,
            }
            yield of_two_keys("softcap and bias", two_keys(0, bias=bias, softcap=2.0), words)

    yield Probe("scores that rise along the keys", ONE_SOFTMAX, partial(_rising, subject))
    for dtype in claims.dtypes:
        if dtype != torch.float64:
            name = str(dtype).removeprefix("torch.")
            yield Probe(f"scores of {name} inputs", FLOAT32, partial(_exactness, subject, dtype))


def _rising(subject: Subject) -> str:
    """The running maximum grows with every tile."""
    cols = 200
    problem = subject.problem(subject.rows(2, cols), cols)
    problem.q[..., 0] = 1 / subject.scale
    problem.k[..., 0] = torch.arange(cols) / 32
    expected = torch.softmax(problem.k[:1, :1, None, :, 0].float(), -1).squeeze(2)
    weights = subject.weights(problem).forward
    ratio = weights / expected
    too_heavy = bool(weights.all()) and float(ratio[..., 0].min()) > 1.1 * float(ratio[..., -1].max())
    early = "early keys weigh too much: sums are not rescaled when the maximum grows"
    return recognised(ratio, {ONE_SOFTMAX: 1.0}, early if too_heavy else None)


def _exactness(subject: Subject, dtype: torch.dtype) -> str:
    """Two scores that differ by 8 before their scale, near 16384: the same, or far apart, in 16 bits.

    With float32 inputs their difference is one of products that tf32, of 11 bits, rounds.
    """
    problem = subject.problem(2, 2, dtype=dtype)
    wide = dtype == torch.float32
    q, keys = [128, 1], [[128, 0], [128, 8]]
    if wide:
        q, keys = [2049, 2048], [[0, 0], [8, -8]]
    problem.q[..., :2] = subject.tensor(q)
    problem.k[..., :2] = subject.tensor(keys)
    rounded = "products rounded to tf32 or less" if wide else "rounded to 16 bits before the softmax"
    return recognised(subject.score_difference(problem), {FLOAT32: 8 * subject.scale}, rounded)
