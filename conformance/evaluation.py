"""Put a target to a problem: run it forward and backward, and ask the oracle the same question."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Problem
from .guard import require
from .oracle import Oracle, Results, solve
from .target import Capabilities, Target


def evaluate(target: Target, problem: Problem) -> Results:
    """What the target claims to compute: out, lse, and the gradients of q, k, v and bias through both."""
    claims, options, bias = target.capabilities, problem.options, problem.options.get("bias")
    leaves = [x.detach().requires_grad_(claims.backward) for x in problem[:3]]
    if bias is not None and claims.bias_gradient:
        leaves.append(bias.detach().requires_grad_(claims.backward))
        options = {**options, "bias": leaves[-1]}
    q, k, v = leaves[:3]
    out, lse = target.attend(problem._replace(q=q, k=k, v=v, options=options))
    rows = tuple(q.shape[:3])
    _require_tensor("out", out, (*rows, v.shape[3]))
    lse = lse if claims.lse else None  # what is not claimed may be anything, say weights
    if lse is not None:
        _require_tensor("lse", lse, rows)
    results = Results(out.detach(), None if lse is None else lse.detach())
    if not claims.backward:
        return results
    require(out.requires_grad, "out carries no gradient")
    outputs, grads = [out], [problem.dout]
    if claims.lse_gradient:
        require(lse is not None, "a gradient of lse is claimed, and no lse returned")
        assert lse is not None
        require(lse.requires_grad, "a gradient of lse is claimed, and lse carries none")
        outputs, grads = [out, lse], [problem.dout, problem.dlse]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    for name, x in zip(("q", "k", "v", "bias"), found):
        require(x is not None, f"no gradient comes back to {name}")
    dq, dk, dv, *dbias = found
    four_axes = [x[(None,) * (4 - x.ndim)] for x in dbias]
    return Results(*results[:2], dq, dk, dv, *four_axes)


def _require_tensor(name: str, x: object, shape: tuple[int, ...]) -> None:
    require(isinstance(x, Tensor), f"{name} is {type(x).__name__}, not a tensor")
    assert isinstance(x, Tensor)
    require(tuple(x.shape) == shape, f"{name} has shape {tuple(x.shape)}, not {shape}")


def expected(problem: Problem, claims: Capabilities | None = None) -> Oracle:
    """The oracle's answer to the same question: without a gradient of lse where none is claimed."""
    inputs, spec = problem.prepared()
    dlse = problem.dlse if claims is None or claims.lse_gradient else None
    return solve(inputs, spec, problem.dout, dlse)
