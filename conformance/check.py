"""Put an attention function to a case: run it forward and backward, and compare with the oracle.

Anything that computes (out, lse) from a `Problem` and is differentiable can be checked: ours by name,
anybody else's with a few lines that translate the options.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import dispatch
from .budget import Arithmetic
from .cases import Problem
from .oracle import Oracle, Results, solve

Attention = Callable[[Problem], tuple[Tensor, Tensor]]
"""(out, lse) of a problem, attached to its q, k, v and bias."""

ARITHMETIC: dict[str, Arithmetic] = {"reference": "wide", "fallback": "wide", "triton": "kernel"}


def ours(impl: str) -> Attention:
    """One of this package's implementations, through its public path: prepare, choose, run."""

    def attend(problem: Problem) -> tuple[Tensor, Tensor]:
        inputs, spec = problem.prepared()
        return dispatch.run(inputs, spec, dispatch.choose(impl, inputs, spec))

    return attend


def evaluate(attend: Attention, problem: Problem) -> Results:
    """out, lse and the gradients of q, k, v and bias through both."""
    names = ["q", "k", "v"]
    leaves = [getattr(problem, name).detach().requires_grad_() for name in names]
    options, bias = problem.options, problem.options.get("bias")
    if bias is not None:
        leaves.append(bias.detach().requires_grad_())
        options = {**options, "bias": leaves[-1]}
    q, k, v = leaves[:3]
    out, lse = attend(problem._replace(q=q, k=k, v=v, options=options))
    dq, dk, dv, *dbias = torch.autograd.grad((out, lse), leaves, (problem.dout, problem.dlse))
    four_axes = [x[(None,) * (4 - x.ndim)] for x in dbias]
    return Results(out.detach(), lse.detach(), dq, dk, dv, *four_axes)


def expected(problem: Problem) -> Oracle:
    """The oracle's answer to the same question."""
    inputs, spec = problem.prepared()
    return solve(inputs, spec, problem.dout, problem.dlse)
