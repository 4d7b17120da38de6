"""Strips that lie alike, as one call of PyTorch's operator: windows have many, and each call its price."""

from __future__ import annotations

from torch import Tensor

from .fallback_blocks import Block, FlashEngine, operand
from .fallback_plan import Run
from .fallback_problems import Engine, Problem


def runs_of(problem: Problem, engine: Engine) -> tuple[Run, ...]:
    """The strips; as runs where few calls of the operator per batch entry do all strips of a run."""
    inputs, spec = problem.inputs, problem.spec
    as_it_is = inputs.q.element_size() > 2 or FlashEngine.stays_narrow(inputs, spec)
    fewer_calls = any(run.times > inputs.q.shape[0] for run in problem.runs)
    if problem.band is not None and inputs.sinks is None and as_it_is and fewer_calls:
        return problem.runs
    return tuple(Run(strip, 1) for strip in problem.strips)


def forward_run(problem: Problem, run: Run, out: Tensor, lse: Tensor) -> None:
    """Fill in what a run of strips with one part each gives: they share a mask, and become the batch.

    Their keys overlap, and the operator may copy what it reads: so many strips at a time that they read each
    key about twice.
    """
    (part,), rows = run.strip.parts, run.strip.rows
    n_rows, n_cols = rows.stop - rows.start, part.cols.stop - part.cols.start
    bias = problem.band.of(rows, part.cols) if problem.band is not None and part.visible == "some" else None
    batch, _, seqlen_k, head_dim_v = problem.inputs.v.shape
    width, at_once = max(problem.inputs.q.shape[3], head_dim_v), max(1, 2 * seqlen_k // n_cols)
    for entry in range(batch):
        q, k, v = (operand(x[entry], width) for x in problem.inputs[:3])
        for first in range(0, run.times, at_once):
            times, moved = min(at_once, run.times - first), first * n_rows
            of_rows = slice(rows.start + moved, rows.start + moved + times * n_rows)
            of_cols = slice(part.cols.start + moved, part.cols.stop + moved + (times - 1) * n_rows)
            strips = q[:, of_rows].unflatten(1, (times, n_rows)).transpose(0, 1)
            keys, values = (x[:, of_cols].unfold(1, n_cols, n_rows).permute(1, 0, 3, 2) for x in (k, v))
            block = Block(strips, keys, values, bias=bias, none_empty=True)
            part_of_out, part_of_lse = FlashEngine.forward(block, problem.spec)
            for target, x in ((out, part_of_out[..., :head_dim_v]), (lse, part_of_lse)):
                target = target[problem.entries][entry, :, of_rows]
                target.unflatten(1, (times, n_rows)).copy_(x.transpose(0, 1))
