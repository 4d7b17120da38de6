"""What is a sink? A term of the denominator: scaled or not, whose, in lse or not, with which gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..cases import Problem
from .subject import Probe, Subject, recognised

TERMS = (2.0, 6.0)
"""exp(sink) of the two heads; two keys of score 0 add 2 to each denominator."""


def probes(subject: Subject) -> Iterator[Probe]:
    claims = subject.claims
    if not claims.sinks:
        return
    yield Probe("a sink", next(iter(_shares(subject))), partial(_share, subject))
    if claims.lse:
        yield Probe("lse with a sink", "includes it", partial(_lse, subject))
    if claims.backward:
        promised = "that of a score without a value, summed over batch and rows"
        yield Probe("the gradient of a sink", promised, partial(_gradient, subject))


def _problem(subject: Subject) -> Problem:
    sinks = torch.tensor(TERMS, device=subject.device).log().to(subject.dtype)
    return subject.problem(2, 2, sinks=sinks)


def _shares(subject: Subject) -> dict[str, Tensor]:
    """What each of the two keys gets, by head."""
    terms = torch.tensor(TERMS)
    return {
        "joins the denominator, unscaled, one of each query head": 1 / (2 + terms),
        "ignored": torch.full((2,), 0.5),
        "multiplied by the scale": 1 / (2 + terms**subject.scale),
        "taken in base 2": 1 / (2 + terms ** math.log(2)),
        "the first head's for every head": 1 / (2 + terms[:1].expand(2)),
    }


def _share(subject: Subject) -> str:
    weights = subject.weights(_problem(subject)).forward
    return recognised(weights.cpu(), {text: x[:, None, None] for text, x in _shares(subject).items()})


def _lse(subject: Subject) -> str:
    lse = subject.evaluate(_problem(subject)).lse
    assert lse is not None
    words: dict[str, Tensor | float] = {
        "includes it": (2 + torch.tensor(TERMS)).log()[:, None],
        "does not include it": math.log(2),
    }
    return recognised(lse.cpu(), words)


def _gradient(subject: Subject) -> str:
    """With values 1 and dout 1 delta is the keys' share of the weight, and dS = -P·delta."""
    problem = _problem(subject)
    problem.v[..., 0] = problem.dout[..., 0] = 1
    dsinks = subject.evaluate(problem).dsinks
    assert dsinks is not None
    terms = torch.tensor(TERMS)
    one = -terms * 2 / (2 + terms) ** 2
    rows = 2 * subject.batch
    words: dict[str, Tensor | float] = {
        "that of a score without a value, summed over batch and rows": one * rows,
        "that of one row": one,
        "the mean over rows": one * subject.batch,
        "zero": 0.0,
        "of the wrong sign": -one * rows,
    }
    return recognised(dsinks.cpu(), words)
