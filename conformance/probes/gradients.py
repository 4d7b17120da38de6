"""What do gradients carry? The scale, softcap's slope, sums over heads and a bias's axes, out's rounding.

Also which key head a query head reads, forward: the other half of grouped-query attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Problem
from ..guard import RAISABLE
from .subject import Probe, Subject, recognised

SHARED = "query heads 0, 1 share key head 0; 2, 3 share key head 1"
INTERLEAVED = "interleaved: query heads 0, 2 share key head 0; 1, 3 share key head 1"

RIGHT, REFUSED = "right", "right, or refused"

UNROUNDED = "the mean of dP, unrounded"


def probes(subject: Subject) -> Iterator[Probe]:
    claims = subject.claims
    if claims.gqa:
        yield Probe("4 query heads, 2 key heads", SHARED, partial(_head_order, subject))
    if not claims.backward:
        return
    if claims.gqa:
        for name in ("dk", "dv"):
            promised = "the sum over the query heads of its group"
            question = f"{name} of a key head that is shared"
            yield Probe(question, promised, partial(_over_group, subject, name))
    for name in ("dq", "dk"):
        yield Probe(f"{name} is", "scaled once", partial(_scaled, subject, name))
    if claims.softcap:
        yield Probe("softcap in backward", "differentiated", partial(_softcap, subject))
    narrow = [dtype for dtype in claims.dtypes if dtype.itemsize == 2]
    if claims.precise and narrow:
        yield Probe("delta with precise is", UNROUNDED, partial(_precise, subject, narrow[0]))
    for question, claimed, look in (
        ("second derivatives", claims.double_backward, _twice),
        ("forward-mode AD", claims.jvp, _forward_mode),
    ):
        promised = RIGHT if claimed else REFUSED
        yield Probe(question, promised, partial(_right_or_refused, subject, promised, look))
    if claims.bias_gradient:
        yield Probe(
            "the gradient of a bias that is shared", "summed over the axes it lacks", partial(_bias, subject)
        )


def _head_order(subject: Subject) -> str:
    """Key head h draws all weight to key h, and value head h holds h + 1 times the identity."""
    problem = subject.problem(4, 4, 4, 2)
    problem.q[..., 0] = 30 / subject.scale
    for head in range(2):
        problem.k[:, head, head, 0] = 1
        problem.v[:, head, range(4), range(4)] = head + 1
    out = subject.evaluate(problem).out
    assert out is not None
    key_heads, value_heads = out[:, :, 0].argmax(-1), out[:, :, 0].amax(-1).round().long() - 1
    orders = {"shared": [0, 0, 1, 1], "interleaved": [0, 1, 0, 1]}
    words = dict(zip((SHARED, INTERLEAVED), (torch.tensor(order) for order in orders.values())))
    read = [recognised(x.cpu(), words, f"key heads {x[0].tolist()}") for x in (key_heads, value_heads)]
    return read[0] if read[0] == read[1] else f"of keys {read[0]}; of values {read[1]}"


def _uniform(subject: Subject, heads_q: int = 2, **options: Any) -> Problem:
    """Two keys of equal weight, the second with a value of 1: dS is -1/4 and 1/4 times dout."""
    problem = subject.problem(2, 2, heads_q, 2, **options)
    problem.v[:, :, 1, 0] = 1
    problem.dout[..., 0] = 1
    return problem


def _over_group(subject: Subject, name: str) -> str:
    """Each query head's dout is another power of two, so the sum tells who took part."""
    problem = _uniform(subject, heads_q=4)
    problem.q[..., 0] = 4
    parts = torch.tensor([1.0, 2.0, 4.0, 8.0])
    problem.dout[..., 0] *= parts.to(problem.dout)[:, None]
    x = getattr(subject.evaluate(problem), name)[:, :, 1, 0].float()
    found = x / (2 * subject.scale if name == "dk" else 1)
    words = {
        "the sum over the query heads of its group": [3.0, 12.0],
        "the sum over interleaved query heads": [5.0, 10.0],
        "of only the first query head of its group": [1.0, 4.0],
        "of only the last query head of its group": [2.0, 8.0],
        "the mean over the query heads of its group": [1.5, 6.0],
    }
    return recognised(found.cpu(), {text: torch.tensor(value) for text, value in words.items()})


def _scaled(subject: Subject, name: str) -> str:
    problem = _uniform(subject)
    (problem.k[:, :, 1] if name == "dq" else problem.q)[..., 0] = 4
    found = _second(getattr(subject.evaluate(problem), name)) / (1 if name == "dq" else 2)
    scale = subject.scale
    words = {"scaled once": scale, "lacking the scale": 1.0, "scaled twice": scale**2, "zero": 0.0}
    return recognised(found, words)


def _second(x: Tensor) -> Tensor:
    return x[:, :, 1, 0]


def _softcap(subject: Subject) -> str:
    """Both scores equal softcap, where its slope is 1 - tanh(1)^2."""
    problem = _uniform(subject, softcap=2.0)
    problem.q[..., 0] = 2 / subject.scale
    problem.k[..., 0] = 1
    dk = subject.evaluate(problem).dk
    assert dk is not None
    words = {"differentiated": 1 - math.tanh(1) ** 2, "not differentiated": 1.0}
    return recognised(_second(dk), words)


def _precise(subject: Subject, dtype: torch.dtype) -> str:
    """Values 1 and the next number, of equal weight: out lies between them, and rounds to 1."""
    eps = torch.finfo(dtype).eps
    problem = subject.problem(2, 2, dtype=dtype, precise=True)
    problem.q[..., 0] = 4
    problem.v[..., 0] = 1
    problem.v[:, :, 1, 0] += eps
    problem.dout[..., 0] = 1
    dk = subject.evaluate(problem).dk
    assert dk is not None
    found = dk[:, :, 0, 0].float() / (-2 * subject.scale * eps)
    return recognised(found, {UNROUNDED: 1.0, "made from the rounded out": 0.0})


def _right_or_refused(subject: Subject, promised: str, look: Callable[[Subject], str]) -> str:
    """What a look says; where nothing is claimed an exception, if not of the call itself, is as good."""
    if promised == RIGHT:
        return look(subject)
    call, q, _ = _one_score(subject)
    call(q)
    try:
        found = look(subject)
    except RAISABLE:
        return REFUSED
    return REFUSED if found == RIGHT else found


def _one_score(subject: Subject) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
    """out of queries whose score of the second key exceeds the first's by 1, those queries, and the slope of
    that score: out is its sigmoid, in the first channel."""
    problem = _uniform(subject)
    problem.k[:, :, 1, 0] = 4
    slope = 4 * subject.scale
    problem.q[..., 0] = 1 / slope

    def call(q: Tensor) -> Tensor:
        return subject.target.attend(problem._replace(q=q, want=()))[0]

    return call, problem.q, slope


_SIGMOID = 1 / (1 + math.exp(-1))
_FIRST, _SECOND = _SIGMOID * (1 - _SIGMOID), _SIGMOID * (1 - _SIGMOID) * (1 - 2 * _SIGMOID)


def _twice(subject: Subject) -> str:
    """The gradient of a gradient that reads q itself, and dout, which follows q too."""
    call, q, slope = _one_score(subject)
    q.requires_grad_()
    loss = call(q)[..., 0].square().sum() / 2
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    (ddq,) = torch.autograd.grad(dq[..., 0].sum(), q)
    words = {
        RIGHT: _FIRST**2 + _SIGMOID * _SECOND,
        "silently wrong: through dout alone": _FIRST**2,
        "silently wrong: zero": 0.0,
    }
    return recognised(ddq[..., 0] / slope**2, words)


def _forward_mode(subject: Subject) -> str:
    call, q, slope = _one_score(subject)
    tangent = torch.zeros_like(q)
    tangent[..., 0] = 1
    moved = torch.func.jvp(call, (q,), (tangent,))[1]
    return recognised(moved[..., 0] / slope, {RIGHT: _FIRST, "silently wrong: zero": 0.0})


def _bias(subject: Subject) -> str:
    bias = torch.zeros(2, dtype=subject.dtype, device=subject.device)
    problem = _uniform(subject, bias=bias)
    dbias = subject.evaluate(problem).dbias
    assert dbias is not None
    words = {
        "summed over the axes it lacks": subject.batch * 2 * 2 / 4,
        "averaged over the axes it lacks": 1 / 4,
        "zero": 0.0,
    }
    return recognised(dbias.flatten()[1], words)
