"""Who is probed, and problems whose answers can be read with the naked eye.

With q = 0 all scores are equal, and with v an identity out *is* the matrix of weights: who sees whom, and
what dropout kept. With dout an identity dv is the transpose of the one that backward used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...kernels.spec import AttentionOptions
from ..cases import Problem
from ..evaluation import evaluate
from ..oracle import Results
from ..target import Capabilities, Target


class Probe(NamedTuple):
    """A question, the answer that the claims promise (None: they promise none), and how to find it.

    `look` answers in the words of `promised` if that is what it sees.
    """

    question: str
    promised: str | None
    look: Callable[[], str]


class Weights(NamedTuple):
    """What each query's output takes of each value, (batch, heads, seqlen_q, seqlen_k), in float32.

    backward: the same as the gradient of v shows it; None where no gradient is claimed.
    """

    forward: Tensor
    backward: Tensor | None


@dataclass(frozen=True)
class Subject:
    """A target on a device, and what to ask it within its claims."""

    target: Target
    device: torch.device

    @property
    def claims(self) -> Capabilities:
        return self.target.capabilities

    @property
    def dtype(self) -> torch.dtype:
        """The widest it takes, float32 first: what it does shall not drown in rounding."""
        return max(self.claims.dtypes, key=lambda d: (d == torch.float32, -torch.finfo(d).eps))

    @property
    def head_dim(self) -> int:
        """64 if it takes that, else the nearest."""
        if self.claims.head_dims is not None:
            return min(self.claims.head_dims, key=lambda d: abs(d - 64))
        return min(64, self.claims.max_head_dim)

    @property
    def scale(self) -> float:
        """The default one."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def batch(self) -> int:
        return 2 if self.claims.batch else 1

    def rows(self, wanted: int, cols: int) -> int:
        """Queries to ask about cols keys: as many as wanted, if there may be another number of them."""
        return wanted if self.claims.rectangular else cols

    def problem(
        self,
        rows: int,
        cols: int,
        heads_q: int = 2,
        heads_kv: int = 2,
        *,
        top_left: bool | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Problem:
        """Zeros everywhere. top_left: by default whatever the target claims first."""
        if top_left is None:
            top_left = self.claims.alignments[:1] == ("top-left",)
        shape = (self.batch, heads_q, rows, self.head_dim)
        q = torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        k, v = q.new_zeros(2, self.batch, heads_kv, cols, self.head_dim)
        statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
        dlse = torch.zeros(shape[:3], dtype=statistics, device=self.device)
        dout = torch.zeros_like(q)
        return Problem(q, k, v, cast(AttentionOptions, options), dout, dlse, dlse.clone(), top_left)

    def tensor(self, x: Any) -> Tensor:
        """Mask, lengths or numbers, where the target wants them."""
        return torch.as_tensor(x, device=self.device)

    def evaluate(self, problem: Problem) -> Results:
        return evaluate(self.target, problem)

    def weights(self, problem: Problem) -> Weights:
        """Read in blocks of head_dim keys and queries; a block of both comes from the same call."""
        rows, cols = problem.q.shape[2], problem.k.shape[2]
        forward, backward = [], []
        for start in range(0, max(rows, cols), self.head_dim):
            v, dout = (_identity(x, start) for x in (problem.v, problem.dout))
            results = self.evaluate(problem._replace(v=v, dout=dout))
            assert results.out is not None
            forward.append(results.out)
            if results.dv is not None:
                backward.append(results.dv.mT)
        return Weights(
            torch.cat(forward, -1)[..., :cols].float(),
            torch.cat(backward, -2)[..., :rows, :].float() if backward else None,
        )

    def score_difference(self, problem: Problem) -> Tensor:
        """Of two keys: by how much the second's score exceeds the first's, for each query."""
        first, second = self.weights(problem).forward.unbind(-1)
        return torch.log(second / first)


def _identity(x: Tensor, start: int) -> Tensor:
    """Columns start ... of an identity, in the shape and dtype of x."""
    seqlen, head_dim = x.shape[2:]
    at = torch.arange(start, start + head_dim, device=x.device)
    return (torch.arange(seqlen, device=x.device)[:, None] == at).to(x.dtype).expand_as(x).contiguous()


def recognised(
    found: Tensor,
    words: Mapping[str, Tensor | float],
    otherwise: str | None = None,
    tolerance: float = 1e-3,
) -> str:
    """The first of the words whose value is what was found, everywhere, to two digits or the tolerance."""
    found = found.detach().double()
    for text, value in words.items():
        expected = torch.as_tensor(value, device=found.device).double()
        if torch.allclose(found, expected.expand_as(found), rtol=0.02, atol=tolerance):
            return text
    if found.isnan().any():
        return "NaN"
    low, high = f"{found.min():.3g}", f"{found.max():.3g}"
    return otherwise or "something else: " + (low if low == high else f"{low} to {high}")
