"""The field's own rule, for readers used to it: how much worse than plain PyTorch in the same dtype?

It decides nothing here. It asks the largest error of a whole tensor only, it passes whatever PyTorch is bad
at too (scores rounded to 16 bits), and it fails where PyTorch happens to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.biases import distances, looked_up
from ..kernels.packed import concatenated
from ..kernels.philox import keep_mask
from ..kernels.sinks import lse_of_empty_rows
from ..kernels.spec import N_GRADIENTS, AttentionSpec, Gradients, Inputs
from ..kernels.visibility import visible
from .cases import Problem
from .oracle import Oracle, Results
from .target import EVERYTHING, Capabilities

PASSES = {
    "out": 2.0,
    "dq": 3.0,
    "dk": 3.0,
    "dv": 3.0,
    "dbias": 3.0,
    "dsinks": 3.0,
    "dslopes": 3.0,
    "dtable": 3.0,
}
"""The largest ratio that passes in flash-attention's tests (test_flash_attn.py), which do not ask lse."""


def two_times_rule(
    problem: Problem, results: Results, oracle: Oracle, claims: Capabilities | None = None
) -> dict[str, float]:
    """max |x - x64| over that of plain PyTorch in the dtype of q, by output; see `PASSES`.

    inf where only plain PyTorch is exact, or where an error is not a number. claims: as for `expected`,
    whose oracle this is.
    """
    plain = _plain_results(problem, claims or EVERYTHING)
    return {
        name: _ratio(getattr(results, name), getattr(plain, name), getattr(oracle.value, name))
        for name in PASSES
        if getattr(results, name) is not None and getattr(results, name).numel()
    }


def _ratio(x: Tensor, plain: Tensor, exact: Tensor) -> float:
    error, yardstick = (float((y.double() - exact).abs().max()) for y in (x, plain))
    if error == 0.0:
        return 0.0
    return error / yardstick if error < float("inf") and yardstick > 0.0 else float("inf")


def _plain_results(problem: Problem, claims: Capabilities) -> Results:
    inputs, spec = problem.prepared()
    given = dict(zip(Gradients._fields, inputs))
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    with torch.enable_grad():
        own = (leaves.get(name) for name in Gradients._fields)
        out, lse, entropy = _plain(Inputs._make([*own, *inputs[N_GRADIENTS:]]), spec)
    dlse = problem.dlse.to(lse.dtype) * claims.lse_gradient
    dentropy = problem.dentropy.to(lse.dtype) * claims.entropy_gradient
    grads = torch.autograd.grad((out, lse, entropy), [*leaves.values()], (problem.dout, dlse, dentropy))
    return Results(out.detach(), None, **dict(zip(leaves, grads)))


def _plain(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Attention as one would write it down, every step in the dtype of q: (out, lse, entropy)."""
    if inputs.spans_q is not None:
        out, lse, entropy = concatenated(_plain, inputs, spec)
        return out, lse, entropy
    q, dtype = inputs.q * spec.scale, inputs.q.dtype
    group = q.shape[1] // max(inputs.k.shape[1], 1)
    k, v = (x.repeat_interleave(group, 1) for x in (inputs.k, inputs.v))
    scores = q @ k.mT
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if inputs.bias is not None:
        scores = scores + inputs.bias.to(dtype)
    if inputs.slopes is not None:
        scores = scores - inputs.slopes.to(dtype)[..., None, None] * distances(inputs, spec).to(dtype)
    if inputs.table is not None:
        scores = scores + looked_up(inputs, spec).to(dtype)
    seen = visible(inputs, spec)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    p = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)[..., : k.shape[2]]
    entropy = -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
    if spec.dropout_p:
        assert inputs.seed is not None
        batch, heads, rows, cols = p.shape
        keep = keep_mask(
            *(inputs.seed, spec.dropout_p, batch, heads, range(rows), range(cols)), spec.first_entry * heads
        )
        p = torch.where(keep, p / (1 - spec.dropout_p), 0.0) if spec.dropout_p < 1 else p * 0.0
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty.squeeze(-1), -torch.inf)
    lse = lse if inputs.sinks is None else lse_of_empty_rows(lse, inputs.sinks)
    return p @ v, lse, entropy
