"""What are the statistics beside lse? Of which scores and weights, in which unit, with which gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..cases import Problem
from .subject import Probe, Subject, recognised

KEYS, SCORE, BIAS = 8, 2.0, 3.0
NONE = "not returned"
LARGEST, SINK = "the largest score", "of weights that the sink has made smaller"
BEFORE_DROPOUT, DIFFERENTIABLE = "the sum of weights before dropout", "differentiable"


def probes(subject: Subject) -> Iterator[Probe]:
    claims = subject.claims
    if claims.max_logit:
        yield Probe("max_logit is", LARGEST, partial(_max_logit, subject))
    if claims.entropy:
        yield Probe("entropy is", "in nats", partial(_entropy, subject))
        if claims.sinks:
            yield Probe("entropy with a sink is", SINK, partial(_with_sink, subject))
        if claims.entropy_gradient:
            yield Probe("the gradient of entropy", DIFFERENTIABLE, partial(_gradient, subject))
    if claims.key_mass and claims.dropout:
        yield Probe("key_mass with dropout is", BEFORE_DROPOUT, partial(_key_mass, subject))


def _equal_keys(subject: Subject, **options: Any) -> Problem:
    """Every key of every query has the same score."""
    problem = subject.problem(subject.rows(5, KEYS), KEYS, **options)
    problem.q[..., 0] = SCORE / subject.scale
    problem.k[..., 0] = 1
    return problem


def _max_logit(subject: Subject) -> str:
    """Of keys that all have a bias, where there may be one: the sum comes last."""
    problem = _equal_keys(subject)
    if subject.claims.bias:
        bias = torch.full((KEYS,), BIAS, dtype=subject.dtype, device=subject.device)
        problem = problem._replace(options={**problem.options, "bias": bias})
    found = subject.evaluate(problem).max_logit
    words = {
        LARGEST: SCORE + BIAS * subject.claims.bias,
        "the largest score before the bias": SCORE,
        "in base 2": (SCORE + BIAS * subject.claims.bias) / math.log(2),
        "of the unscaled scores": SCORE / subject.scale + BIAS * subject.claims.bias,
    }
    return NONE if found is None else recognised(found, words)


def _entropy(subject: Subject) -> str:
    found = subject.evaluate(_equal_keys(subject)).entropy
    nats = math.log(KEYS)
    words = {"in nats": nats, "in bits": nats / math.log(2), "negated": -nats, "the perplexity": KEYS}
    return NONE if found is None else recognised(found, words)


def _with_sink(subject: Subject) -> str:
    """A sink with the score of the keys: one of KEYS + 1 equal weights."""
    sinks = torch.full((2,), SCORE, dtype=subject.dtype, device=subject.device)
    found = subject.evaluate(_equal_keys(subject, sinks=sinks)).entropy
    of_all = math.log(KEYS + 1)
    words = {
        SINK: of_all * KEYS / (KEYS + 1),
        "as if there were no sink": math.log(KEYS),
        "of the keys and the sink": of_all,
    }
    return NONE if found is None else recognised(found, words)


def _gradient(subject: Subject) -> str:
    """Of the sum of entropies where scores are 0 and 1: dS = -p·(1 - p) for the key with the higher one."""
    problem = subject.problem(2, 2)
    problem.q[..., 0] = 1 / subject.scale
    problem.k[:, :, 1, 0] = 1
    problem.dentropy.fill_(1)
    dk = subject.evaluate(problem).dk
    assert dk is not None
    found, p = dk[:, :, 1, 0].float() / 2, 1 / (1 + math.exp(-1))
    slope = -p * (1 - p)
    words = {DIFFERENTIABLE: slope, "ignored: zero": 0.0, "that of bits": slope / math.log(2)}
    return recognised(found, words)


def _key_mass(subject: Subject) -> str:
    problem = _equal_keys(subject, dropout_p=0.5, seed=3)
    found, rows = subject.evaluate(problem).key_mass, problem.q.shape[2]
    words = {BEFORE_DROPOUT: rows / KEYS, "the mean over rows": 1 / KEYS}
    return NONE if found is None else recognised(found, words, "what was kept")
