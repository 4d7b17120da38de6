"""Where nothing is to be seen: rows without keys, and NaN in keys that nobody may see."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..cases import Problem
from ..oracle import Results
from .subject import Probe, Subject, recognised

NOTHING = "reaches nothing"


class Hiding(NamedTuple):
    """A problem in which something is hidden: the rows that see nothing, or the keys that nobody sees."""

    how: str
    problem: Problem
    hidden: Tensor


def probes(subject: Subject) -> Iterator[Probe]:
    claims = subject.claims
    parts = ["out 0"] + ["lse -inf"] * claims.lse + ["gradients 0"] * claims.backward
    promised = ", ".join(parts) if claims.empty_rows else None
    for hiding in _empty_rows(subject):
        question = f"a row that sees nothing, by {hiding.how}"
        yield Probe(question, promised, partial(_of_empty_rows, subject, hiding))
    for hiding in _hidden_keys(subject):
        for name in ("k", "v"):
            question = f"NaN in {'keys' if name == 'k' else 'values'} hidden by {hiding.how}"
            promised = NOTHING if claims.nan_in_hidden_keys else None
            yield Probe(question, promised, partial(_of_nan, subject, hiding, name))
    if claims.batch:
        yield Probe("one of two batch entries, asked alone, gives", None, partial(_alone, subject))


def _empty_rows(subject: Subject) -> Iterator[Hiding]:
    """hidden: bool (batch, 1, rows)."""
    claims = subject.claims
    if claims.mask:
        mask = subject.tensor([[True], [False], [True], [True]]).expand(4, 4).contiguous()
        yield Hiding("mask", subject.problem(4, 4, mask=mask), ~mask[:, 0])
    if claims.key_lengths:
        lengths = subject.tensor([0, 3][: subject.batch]).int()
        yield Hiding("key_lengths", subject.problem(4, 4, key_lengths=lengths), (lengths == 0)[:, None, None])
    if claims.causal and claims.rectangular and "bottom-right" in claims.alignments:
        problem = subject.problem(5, 3, top_left=False, causal=True)
        yield Hiding("causal", problem, torch.arange(5, device=subject.device) < 2)


def _hidden_keys(subject: Subject) -> Iterator[Hiding]:
    """hidden: bool, broadcasts to (batch, heads, keys)."""
    claims = subject.claims
    if claims.mask:
        mask = subject.tensor([True, True, False, True]).expand(4, 4).contiguous()
        yield Hiding("mask", subject.problem(4, 4, mask=mask), ~mask[0])
    if claims.key_lengths:
        lengths = subject.tensor([2, 3][: subject.batch]).int()
        keys = torch.arange(4, device=subject.device)
        problem = subject.problem(4, 4, key_lengths=lengths)
        yield Hiding("key_lengths", problem, (keys >= lengths[:, None])[:, None])
    if not claims.rectangular:
        return
    keys = torch.arange(8, device=subject.device)
    if claims.causal and "top-left" in claims.alignments:
        yield Hiding("causal", subject.problem(3, 8, top_left=True, causal=True), keys >= 3)
    if claims.window and "bottom-right" in claims.alignments:
        yield Hiding("window", subject.problem(3, 8, top_left=False, window=(2, 0)), keys < 3)


def _filled(problem: Problem) -> Problem:
    """Ordinary numbers, nowhere 0 and nowhere all alike."""
    generator = torch.Generator().manual_seed(0)

    def fill(x: Tensor) -> Tensor:
        return (torch.rand(x.shape, generator=generator) + 0.5).to(x.device, x.dtype)

    q, k, v, dout = map(fill, (*problem[:3], problem.dout))
    return problem._replace(q=q, k=k, v=v, dout=dout)


def _of_empty_rows(subject: Subject, hiding: Hiding) -> str:
    """Only the empty rows have a dout, so that nothing may come back from them."""
    problem = _filled(hiding.problem)
    empty = hiding.hidden.expand(problem.q.shape[:3])
    results = subject.evaluate(problem._replace(dout=problem.dout.where(empty[..., None], 0.0)))
    assert results.out is not None
    heads = problem.v.float().mean(2, keepdim=True).expand_as(results.out)
    words = {"out 0": torch.zeros_like(heads[empty]), "out the mean of all values": heads[empty]}
    found = [recognised(results.out[empty], words, "out neither 0 nor a mean").replace("NaN", "out NaN")]
    if results.lse is not None:
        values = results.lse[empty].unique().tolist()
        found.append(f"lse {', '.join(f'{x:+g}' for x in values[:1] if x)}" if any(values) else "lse 0")
    gradients = [x for x in results[2:5] if x is not None]
    if gradients:
        nan, nonzero = (any(bool(f(x).any()) for x in gradients) for f in (torch.isnan, torch.abs))
        found.append("gradients NaN" if nan else "gradients not 0" if nonzero else "gradients 0")
    return ", ".join(found)


def _alone(subject: Subject) -> str:
    """Batch invariance: how many others there are decides nothing, not even an order of sums."""
    cols = 67
    problem = _filled(subject.problem(subject.rows(5, cols), cols))
    alone = problem.mapped(lambda x: x[:1])
    pairs = zip(Results._fields, subject.evaluate(problem), subject.evaluate(alone))
    others = [name for name, x, y in pairs if x is not None and y is not None and not torch.equal(x[:1], y)]
    return f"other bits of {', '.join(others)}" if others else "the same bits"


def _of_nan(subject: Subject, hiding: Hiding, name: str) -> str:
    problem = _filled(hiding.problem)
    x = getattr(problem, name)
    dirty = x.masked_fill(hiding.hidden.expand(x.shape[:3])[..., None], torch.nan)
    results = subject.evaluate(problem._replace(**{name: dirty}))
    reached = [n for n, y in zip(Results._fields, results) if y is not None and y.isnan().any()]
    return f"reaches {', '.join(reached)}" if reached else NOTHING
