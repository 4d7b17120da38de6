"""What does a RelativeBias add? Of which bucket and head, from where positions count, what its table gets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...kernels.biases import RelativeBias
from ..cases import Problem
from .subject import Probe, Subject, recognised

TABLE = torch.arange(16).mul(7).remainder(16).view(8, 2) / 8
"""(buckets, heads); no two entries are alike."""
MAX_DISTANCE = 20
STANDING = {
    "bottom-right": "the last query standing at the last key",
    "top-left": "query 0 standing at key 0",
}
SUMMED = "the sum of dS over each head's scores in the bucket, over batch and rows"


def probes(subject: Subject) -> Iterator[Probe]:
    if not subject.claims.relative_bias:
        return
    for bidirectional, name in ((True, "a RelativeBias adds"), (False, "of one side, it adds")):
        promised = next(iter(_words(subject, bidirectional, 1, 1)))
        yield Probe(name, promised, partial(_added, subject, bidirectional))
    if subject.claims.backward:
        yield Probe("the gradient of a RelativeBias's table", SUMMED, partial(_gradient, subject))


def _problem(subject: Subject, rows: int, cols: int, table: Tensor, bidirectional: bool = True) -> Problem:
    bias = RelativeBias(table.to(subject.device, subject.dtype), bidirectional, MAX_DISTANCE)
    return subject.problem(rows, cols, bias=bias)


def _added(subject: Subject, bidirectional: bool) -> str:
    """Of each key, relative to the first one, by head and query."""
    cols = 12
    rows = subject.rows(6, cols)
    weights = subject.weights(_problem(subject, rows, cols, TABLE, bidirectional)).forward
    words = _words(subject, bidirectional, rows, cols)
    return recognised((weights / weights[..., :1]).log().cpu(), words)


def _words(subject: Subject, bidirectional: bool, rows: int, cols: int) -> dict[str, Tensor]:
    alignment = subject.claims.alignments[0]
    shifts = {"bottom-right": cols - rows, "top-left": 0}
    offset = torch.arange(cols) - torch.arange(rows)[:, None]
    ahead = offset - shifts[alignment]
    n_buckets = TABLE.shape[0]

    def added(buckets: Tensor, table: Tensor = TABLE) -> Tensor:
        bias = table.T[:, buckets.clamp(0, n_buckets - 1)]
        return bias - bias[..., :1]

    exact = _buckets(ahead, bidirectional)
    meaning = "the entry of its head for T5's bucket of key - p"
    words = {f"{meaning}, {STANDING[alignment]}": added(exact)}
    words |= {
        f"{meaning}, {STANDING[name]}": added(_buckets(offset - shift, bidirectional))
        for name, shift in shifts.items()
    }
    ignored = "both sides have buckets" if not bidirectional else "keys after the query share bucket 0"
    return words | {
        f"{ignored}: bidirectional is ignored": added(_buckets(ahead, not bidirectional)),
        "the bucket of p - key: before and after are swapped": added(_buckets(-ahead, bidirectional)),
        "a table read with heads and buckets mixed": added(exact, TABLE.reshape(2, n_buckets).T),
        "the next bucket: one too high": added(exact + 1),
        "the bucket before it: one too low": added(exact - 1),
        "buckets of equal width: far keys share no logarithmic ones": added(
            _buckets(ahead, bidirectional, logarithmic=False)
        ),
        "multiplied by the scale": added(exact) * subject.scale,
        "nothing: it is ignored": torch.zeros(1),
    }


def _buckets(ahead: Tensor, bidirectional: bool, logarithmic: bool = True) -> Tensor:
    """T5's, written for few buckets: those of one side, then, if bidirectional, of keys after the query."""
    side = TABLE.shape[0] // (2 if bidirectional else 1)
    exact = side // 2
    distance = ahead.abs() if bidirectional else -ahead.clamp_max(0)
    growth = (distance.clamp_min(1).double() / exact).log() / math.log(MAX_DISTANCE / exact)
    far = exact + (growth * (side - exact)).long() if logarithmic else distance
    first = side * (ahead > 0) if bidirectional else 0
    return first + torch.where(distance < exact, distance, far).clamp_max(side - 1)


def _gradient(subject: Subject) -> str:
    """Two equal keys, values 0 and 1: dS of the second is dout/4, of the first as much less."""
    problem = _problem(subject, 2, 2, torch.zeros_like(TABLE))
    problem.v[:, :, 1, 0] = 1
    problem.dout[..., 0] = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=subject.device)
    dtable = subject.evaluate(problem).dtable
    assert dtable is not None
    first, second = problem.dout[0, ..., 0].float().cpu().T / 4  # of the rows, by head
    itself, before, after = 0, 1, TABLE.shape[0] // 2 + 1  # bucket of a key at, before and after the query
    one = torch.zeros_like(TABLE)
    one[itself], one[before], one[after] = second - first, -second, first
    last = one.clone()
    last[itself] = second
    words = {
        SUMMED: one * subject.batch,
        "the mean over the batch": one,
        "of one score in each bucket: the others are overwritten": last,
        "heads and buckets mixed": one.T.reshape(TABLE.shape) * subject.batch,
        "before and after swapped": one[[0, after, 2, 3, 4, before, 6, 7]] * subject.batch,
        "of the wrong sign": -one * subject.batch,
        "zero": torch.zeros(1),
    }
    return recognised(dtable.cpu(), words)
