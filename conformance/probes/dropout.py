"""What does dropout drop? Single elements or more at once, how many, and the same ones in backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.philox import keep_mask
from .subject import Probe, Subject, Weights, recognised

LENGTH = 160
"""Queries and keys: more than the largest tile of usual kernels."""
DROPOUT_P, SEED = 0.3, 2**40 + 5
SINGLE = "single elements, each on its own"
RATE = "p of the weights, and the others are divided by 1 - p"
REPLAYED = "the same elements; another seed others"
SAME = "the elements that forward drops"
OF_KEPT = "those of the weights that forward kept"
OURS = "those of this package"


def probes(subject: Subject) -> Iterator[Probe]:
    claims = subject.claims
    if not claims.dropout:
        return
    problem = subject.problem(LENGTH, LENGTH, dropout_p=DROPOUT_P, seed=SEED)

    @functools.cache
    def read(seed: int = SEED, again: bool = False) -> Weights:
        return subject.weights(problem._replace(options={**problem.options, "seed": seed}))

    yield Probe("dropout drops", SINGLE, lambda: _granularity(read().forward))
    yield Probe(f"with dropout_p = {DROPOUT_P} it drops", RATE, lambda: _rate(read().forward))
    yield Probe(
        "the same seed drops", REPLAYED, lambda: _replay(read(), read(again=True), read(seed=SEED + 1))
    )
    if claims.backward:
        yield Probe("backward drops", SAME, lambda: _backward(read(), subject.head_dim))
        yield Probe("dq and dk with dropout are", OF_KEPT, lambda: _score_gradients(subject))
    yield Probe(
        "the elements dropped are", OURS if claims.same_dropout else None, lambda: _whose(read().forward)
    )


def _granularity(weights: Tensor) -> str:
    keep = weights > 0
    if keep.all():
        return "nothing"
    if not keep.any():
        return "everything"
    found = []
    if keep.shape[0] > 1 and (keep == keep[:1]).all():
        found.append("the same elements in every batch entry")
    if (keep == keep[:, :1]).all():
        found.append("the same elements in every head")
    for axis, name, all_at_once in ((3, "keys", "whole rows"), (2, "queries", "whole columns")):
        period = _period(keep.movedim(axis, 0))
        if period is not None:
            found.append(all_at_once if period == 1 else f"a pattern repeated every {period} {name}")
    return "; ".join(found) or SINGLE


def _period(keep: Tensor) -> int | None:
    """The smallest shift along the first axis that changes nothing."""
    lags = range(1, len(keep) // 2 + 1)
    return next((lag for lag in lags if torch.equal(keep[lag:], keep[:-lag])), None)


def _rate(weights: Tensor) -> str:
    """Six standard deviations: a false alarm in 10^9, and no drift of one percent passes unnoticed."""
    kept = weights[weights > 0]
    rate = 1 - kept.numel() / weights.numel()
    factor = float(kept.mean()) * weights.shape[-1]
    limit = 6 * math.sqrt(DROPOUT_P * (1 - DROPOUT_P) / weights.numel())
    shares = "p of the weights" if abs(rate - DROPOUT_P) < limit else f"{rate:.3f} of the weights"
    rescaled = abs(factor * (1 - DROPOUT_P) - 1) < 0.01
    return f"{shares}, and the others are " + (
        "divided by 1 - p"
        if rescaled
        else "not rescaled"
        if abs(factor - 1) < 0.01
        else f"multiplied by {factor:.3f}"
    )


def _replay(first: Weights, again: Weights, other: Weights) -> str:
    a, b, c = (weights.forward > 0 for weights in (first, again, other))
    same = "the same elements" if torch.equal(a, b) else "other elements each time"
    return f"{same}; another seed {'the same too' if torch.equal(a, c) else 'others'}"


def _backward(weights: Weights, block: int) -> str:
    """Blocks on the diagonal come from one call each: this does not rely on the same seed."""
    assert weights.backward is not None
    forward, backward = (_diagonal_blocks(x > 0, block) for x in (weights.forward, weights.backward))
    if all(map(torch.equal, forward, backward)):
        return SAME
    return "nothing" if all(x.all() for x in backward) else "other elements than forward"


def _diagonal_blocks(x: Tensor, block: int) -> list[Tensor]:
    starts = range(0, x.shape[-1], block)
    return [x[..., i : i + block, i : i + block] for i in starts]


def _score_gradients(subject: Subject) -> str:
    """Values that are an identity show in one call what forward kept, and so what dq and dk must be."""
    size = subject.head_dim
    problem = subject.problem(size, size, dropout_p=DROPOUT_P, seed=SEED)
    generator = torch.Generator().manual_seed(0)
    q, k, dout = (torch.randn(x.shape, generator=generator).to(x) for x in (*problem[:2], problem.dout))
    v = torch.eye(size).to(q).expand_as(q).contiguous()
    results = subject.evaluate(problem._replace(q=q, k=k, v=v, dout=dout))
    assert results.out is not None
    assert results.dq is not None
    assert results.dk is not None
    q, k, dout = q.double(), k.double(), dout.double()
    p = torch.softmax(q @ k.mT * subject.scale, -1)
    kept = (results.out > 0) / (1 - DROPOUT_P)
    found = torch.stack([results.dq, results.dk]).double()

    def gradients(kept: Tensor | float, kept_in_sum: Tensor | float) -> Tensor:
        ds = p * (kept * dout - (kept_in_sum * p * dout).sum(-1, keepdim=True)) * subject.scale
        return torch.stack([ds @ k, ds.mT @ q])

    words = {
        OF_KEPT: gradients(kept, kept),
        "those of all weights: dropout is forgotten": gradients(1.0, 1.0),
        "those of all weights but in delta: dropout is forgotten there": gradients(1.0, kept),
        "those of the kept weights but in delta": gradients(kept, 1.0),
    }
    size_of = words[OF_KEPT].abs().max()
    return recognised(found / size_of, {text: x / size_of for text, x in words.items()}, tolerance=0.02)


def _whose(weights: Tensor) -> str:
    batch, heads, rows, cols = weights.shape
    keep = keep_mask(torch.tensor(SEED), DROPOUT_P, batch, heads, range(rows), range(cols))
    return OURS if torch.equal(weights.cpu() > 0, keep) else "its own"
