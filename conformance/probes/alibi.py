"""What does ALiBi add? With which sign, from where distances count, and what its slopes get back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...kernels.biases import ALiBi
from ..cases import Problem
from .subject import Probe, Subject, recognised

SLOPES = (0.5, 0.25)
PROMISED = {
    "bottom-right": "-slope·|p - key|, the last query standing at the last key",
    "top-left": "-slope·|p - key|, query 0 standing at key 0",
}


def probes(subject: Subject) -> Iterator[Probe]:
    if not subject.claims.alibi:
        return
    alignment = subject.claims.alignments[0]
    yield Probe("ALiBi adds", PROMISED[alignment], partial(_added, subject))
    if subject.claims.backward:
        promised = "-Σ dS·|p - key| over batch, rows and keys"
        yield Probe("the gradient of ALiBi's slopes", promised, partial(_gradient, subject))


def _problem(subject: Subject, rows: int, cols: int) -> Problem:
    slopes = torch.tensor(SLOPES, device=subject.device).to(subject.dtype)
    return subject.problem(rows, cols, bias=ALiBi(slopes))


def _added(subject: Subject) -> str:
    """Of each key, relative to the first one, by head and query."""
    cols = 5
    rows = subject.rows(3, cols)
    weights = subject.weights(_problem(subject, rows, cols)).forward
    found = (weights / weights[..., :1]).log().cpu()
    slopes = torch.tensor(SLOPES)[:, None, None]

    def relative(shift: int, sign: float, absolute: bool = True) -> Tensor:
        distance = torch.arange(cols) - torch.arange(rows)[:, None] - shift
        added = sign * slopes * (distance.abs() if absolute else distance)
        return added - added[..., :1]

    words = {
        PROMISED[subject.claims.alignments[0]]: relative(_shift(subject, rows, cols), -1),
        PROMISED["bottom-right"]: relative(cols - rows, -1),
        PROMISED["top-left"]: relative(0, -1),
        "slope·|p - key|: far keys are preferred": relative(_shift(subject, rows, cols), 1),
        "slope·(key - p), with a sign: keys to come are preferred": relative(0, 1, absolute=False),
        "nothing: it is ignored": torch.zeros(1),
    }
    return recognised(found, words)


def _shift(subject: Subject, rows: int, cols: int) -> int:
    return 0 if subject.claims.alignments[0] == "top-left" else cols - rows


def _gradient(subject: Subject) -> str:
    """Two keys, values 0 and 1: dS of the second is p·(1 - p), of the first as much less."""
    problem = _problem(subject, 2, 2)
    problem.v[:, :, 1, 0] = 1
    problem.dout[..., 0] = torch.tensor([1.0, 2.0], device=subject.device)
    dslopes = subject.evaluate(problem).dslopes
    assert dslopes is not None
    near = torch.sigmoid(torch.tensor(SLOPES))  # of the key at the query's own position
    move = near * (1 - near)  # row 0 stands at key 0, row 1 at key 1
    one = (-1 + 2) * move
    words = {
        "-Σ dS·|p - key| over batch, rows and keys": one * subject.batch,
        "the mean over the batch": one,
        "of the wrong sign": -one * subject.batch,
        "zero": torch.zeros(1),
    }
    return recognised(dslopes.cpu(), words)
