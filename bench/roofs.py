"""What this machine can do at best, measured, and how much of it a problem needs.

A roof is not the maker's figure: a matrix product and a copy of random data, in this process, today.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..conformance.cases import Problem
from ..kernels.explain import explain
from ..kernels.flops import backward_flops, forward_flops
from ..kernels.visibility import visible
from .timing import CPU, Run, in_turns, spread

MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "both")
ROWS = 1024  # of a mask, counted at a time


class Work(NamedTuple):
    """What a pass cannot avoid: useful floating point operations, bytes read or written once."""

    flops: int
    bytes: int


def work(problem: Problem) -> dict[str, Work]:
    """By direction; both: a forward pass and the backward pass after it.

    Operations are counted from the scores that are visible, whatever hides the others. Backward: five
    products instead of two (the scores once more), and the forward's tensors, dout, dq, dk and dv.
    """
    q, k, v, options = problem[:4]
    inputs, spec = problem.prepared()
    everything = spec._replace(left=None, right=None)
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    seen = visible_scores(problem)
    forward, backward = (
        round(count(inputs, everything) * seen / max(1, scores)) for count in (forward_flops, backward_flops)
    )
    moved = explain(q, k, v, **options).bytes_forward
    gradients = sum(x.numel() * x.element_size() for x in (problem.dout, q, k, v))
    return {
        FORWARD: Work(forward, moved),
        BACKWARD: Work(backward, moved + gradients),
        BOTH: Work(forward + backward, 2 * moved + gradients),
    }


def visible_scores(problem: Problem) -> int:
    """(query, key) pairs that causal, window, mask and key_lengths leave, over batch and heads."""
    inputs, spec = problem.prepared()
    batch, heads, seqlen_q, _ = inputs.q.shape
    count = 0
    for start in range(0, seqlen_q, ROWS):
        rows = slice(start, min(start + ROWS, seqlen_q))
        every = batch * heads * (rows.stop - rows.start) * inputs.k.shape[2]
        ok = visible(inputs, spec, rows)
        count += every if ok is None else int(ok.sum()) * (every // ok.numel())
    return count


def matmul_roof(dtype: torch.dtype, device: torch.device = CPU) -> float:
    """TFLOP/s of a square product of random matrices."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2e-12 * size**3 / _best_s(lambda: a @ b, device)


def copy_roof(device: torch.device = CPU) -> float:
    """GB/s, read and written, of a copy far larger than any cache."""
    size = COPY_BYTES[device.type]
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e-9 * size / _best_s(lambda: target.copy_(source), device)


def _best_s(run: Run, device: torch.device) -> float:
    """A roof is what is reached when nothing disturbs: the 20th percentile, not the median."""
    return spread(in_turns({"roof": run}, device, budget_s=2.0)["roof"]).p20
