"""Eight kinds of numbers, each of which shows a rounding error that the others hide.

Tests that only draw `randn` pass kernels that are wrong for real activations: values with a common
mean, similar keys, one large channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Operands(NamedTuple):
    """What enters the arithmetic, all (batch, heads, seqlen, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def _randn(x: Operands, generator: Generator) -> Operands:
    return x


def _uniform(x: Operands, generator: Generator) -> Operands:
    """All positive: dp and delta are nearly equal, so dq is a difference of large numbers."""
    return Operands(*(torch.rand(t.shape, generator=generator) for t in x))


def _peaky(x: Operands, generator: Generator) -> Operands:
    """A softmax close to one-hot: errors of single scores are not averaged away."""
    return x._replace(q=4 * x.q)


def _tiny(x: Operands, generator: Generator) -> Operands:
    """Close to what fp16 cannot hold: underflow of P, dS and the gradients."""
    return Operands(*(t * 2.0**-10 for t in x))


def _mean_v(x: Operands, generator: Generator) -> Operands:
    """Values with a common mean: it cancels in dq only if delta is as exact as dp."""
    return x._replace(v=x.v + 8)


def _ones_v(x: Operands, generator: Generator) -> Operands:
    """Constant values: out must be exactly constant, dq and dk nearly vanish."""
    return x._replace(v=torch.ones_like(x.v))


def _low_rank(x: Operands, generator: Generator) -> Operands:
    """All rows of k, v and dout nearly the same: the scores hardly differ and dq nearly vanishes."""
    return Operands(x.q, *(t[:, :, :1] * (1 + 0.01 * t[..., :1]) for t in x[1:]))


def _outlier_channel(x: Operands, generator: Generator) -> Operands:
    """One channel much larger than the others, as trained models have in k and v."""
    return x._replace(k=_enlarge_first(x.k), v=_enlarge_first(x.v))


def _enlarge_first(x: Tensor) -> Tensor:
    factor = torch.ones(x.shape[-1])
    factor[0] = 16
    return x * factor


DISTRIBUTIONS: dict[str, Callable[[Operands, Generator], Operands]] = {
    "randn": _randn,
    "uniform": _uniform,
    "peaky": _peaky,
    "tiny": _tiny,
    "mean_v": _mean_v,
    "ones_v": _ones_v,
    "low_rank": _low_rank,
    "outlier_channel": _outlier_channel,
}


def draw(name: str, shapes: tuple[tuple[int, ...], ...], generator: Generator) -> Operands:
    """float32 operands of the four shapes, on the CPU so that every device gets the same numbers."""
    randn = Operands(*(torch.randn(shape, generator=generator) for shape in shapes))
    return DISTRIBUTIONS[name](randn, generator)
