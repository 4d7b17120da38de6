"""Put a target to a problem: run it forward and backward, and ask the oracle the same question."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.biases import ALiBi, RelativeBias
from ..kernels.spec import STATISTICS
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
    stats = target.statistics(problem._replace(q=q, k=k, v=v, options=options))
    # what is not claimed may be anything, say weights
    claimed = {"out", *(name for name in STATISTICS if getattr(claims, name))}
    answers = {name: x for name, x in stats._asdict().items() if name in claimed}
    given = {name: x for name, x in answers.items() if x is not None or name == "out"}
    rows = tuple(q.shape[:3])
    shapes = {"out": (*rows, v.shape[3]), "key_mass": (*rows[:2], k.shape[2])}
    for name, x in given.items():
        _require_tensor(name, x, shapes.get(name, rows))
    results = {name: x.detach() for name, x in given.items()}
    if not claims.backward:
        return Results(**results)
    out = stats.out
    require(out.requires_grad, "out carries no gradient")
    outputs, grads = [out], [problem.dout]
    for name, differentiable, grad in (
        ("lse", claims.lse_gradient, problem.dlse),
        ("entropy", claims.entropy_gradient and _is_asked(problem.dentropy), problem.dentropy),
    ):
        if differentiable:
            require(name in given, f"a gradient of {name} is claimed, and no {name} returned")
            require(given[name].requires_grad, f"a gradient of {name} is claimed, and {name} carries none")
            outputs.append(given[name])
            grads.append(grad)
    found = dict(zip(names, torch.autograd.grad(outputs, leaves, grads, allow_unused=True)))
    for name, x in found.items():
        require(x is not None, f"no gradient comes back to {name}")
    if "bias" in found:
        found["bias"] = found["bias"][(None,) * (4 - found["bias"].ndim)]
    if "slopes" in found:
        found["slopes"] = found["slopes"][(None,) * (2 - found["slopes"].ndim)]
    return Results(**results, **{f"d{name}": x for name, x in found.items()})


def _is_asked(grad: Tensor) -> bool:
    """Whether it is a gradient of anything; of a fake one nobody knows the values."""
    return type(grad) is not Tensor or bool(grad.any())


def _require_tensor(name: str, x: object, shape: tuple[int, ...]) -> None:
    require(isinstance(x, Tensor), f"{name} is {type(x).__name__}, not a tensor")
    assert isinstance(x, Tensor)
    require(tuple(x.shape) == shape, f"{name} has shape {tuple(x.shape)}, not {shape}")


def expected(problem: Problem, claims: Capabilities | None = None) -> Oracle:
    """The oracle's answer to the same question: of lse and entropy with the gradients that are claimed."""
    inputs, spec = problem.prepared()
    dlse = problem.dlse if claims is None or claims.lse_gradient else None
    dentropy = problem.dentropy if claims is None or claims.entropy_gradient else None
    return solve(inputs, spec, problem.dout, dlse, dentropy)
