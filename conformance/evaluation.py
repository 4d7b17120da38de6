"""Put a target to a problem: run it forward and backward, and ask the oracle the same question."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.biases import ALiBi, RelativeBias
from .cases import Problem
from .guard import require
from .oracle import Oracle, Results, solve
from .target import Capabilities, Target


def evaluate(target: Target, problem: Problem) -> Results:
    """What the target claims to compute: out, lse, and the gradients of its inputs through both."""
    claims, options = target.capabilities, problem.options
    q, k, v = leaves = [x.detach().requires_grad_(claims.backward) for x in problem[:3]]
    names = ["q", "k", "v"]

    def leaf(name: str, x: Tensor, claimed: bool) -> Tensor:
        if not claimed:
            return x
        leaves.append(x.detach().requires_grad_(claims.backward))
        names.append(name)
        return leaves[-1]

    sinks, biases = options.get("sinks"), options.get("bias")
    if sinks is not None:
        options = {**options, "sinks": leaf("sinks", sinks, claims.sinks)}
    if biases is not None:
        several = biases if isinstance(biases, tuple) else (biases,)
        fresh = tuple(
            ALiBi(leaf("slopes", x.slopes, claims.alibi))
            if isinstance(x, ALiBi)
            else replace(x, table=leaf("table", x.table, claims.relative_bias))
            if isinstance(x, RelativeBias)
            else leaf("bias", x, claims.bias_gradient)
            for x in several
        )
        options = {**options, "bias": fresh if len(fresh) > 1 else fresh[0]}
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
    found = dict(zip(names, torch.autograd.grad(outputs, leaves, grads, allow_unused=True)))
    for name, x in found.items():
        require(x is not None, f"no gradient comes back to {name}")
    if "bias" in found:
        found["bias"] = found["bias"][(None,) * (4 - found["bias"].ndim)]
    if "slopes" in found:
        found["slopes"] = found["slopes"][(None,) * (2 - found["slopes"].ndim)]
    return Results(results.out, results.lse, **{f"d{name}": x for name, x in found.items()})


def _require_tensor(name: str, x: object, shape: tuple[int, ...]) -> None:
    require(isinstance(x, Tensor), f"{name} is {type(x).__name__}, not a tensor")
    assert isinstance(x, Tensor)
    require(tuple(x.shape) == shape, f"{name} has shape {tuple(x.shape)}, not {shape}")


def expected(problem: Problem, claims: Capabilities | None = None) -> Oracle:
    """The oracle's answer to the same question: without a gradient of lse where none is claimed."""
    inputs, spec = problem.prepared()
    dlse = problem.dlse if claims is None or claims.lse_gradient else None
    return solve(inputs, spec, problem.dout, dlse)
