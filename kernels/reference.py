"""The definition of attention: eager, differentiable, in any float dtype.

Reads like the formula and keeps S x S tensors: the specification and, in float64, the oracle.
Nothing falls back to it. Ordinary autograd differentiates it, to any order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import packed
from .biases import distances, looked_up
from .philox import kept
from .spec import AttentionSpec, Inputs, of_entries, wide_dtype
from .visibility import visible


def attention(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """(out, lse) by the formula.

    s = softcap·tanh(scale·q·kᵀ/softcap) + bias; p = softmax over visible keys and the sink;
    out = dropout(p)·v. Computes in float32, or float64 for float64 inputs; out has q's dtype. lse is -inf for
    a row that sees no key. With `batch_invariant` entries are computed one by one.
    """
    if inputs.spans_q is not None:
        out, lse = packed.concatenated(attention, inputs, spec)
        return out, lse
    if spec.batch_invariant and inputs.q.shape[0] > 1:
        out, lse = (torch.cat(x) for x in zip(*(attention(*alone) for alone in _entries(inputs, spec))))
        return out, lse
    s, v = _scores_and_values(inputs, spec)
    s, alive = _with_sinks(s, inputs)
    lse = torch.logsumexp(s, dim=-1, keepdim=True)
    p = torch.softmax(s, dim=-1)  # not exp(s - lse): where |s| is large, lse has no digits left
    p = p[..., : v.shape[2]]
    if spec.dropout_p > 0.0:
        p = _dropout(p, inputs, spec)
    out = torch.where(alive, p @ v, 0.0)
    lse = torch.where(alive, lse, -torch.inf)
    return out.to(inputs.q.dtype), lse.squeeze(-1)


def statistics(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(max_logit, entropy, key_mass) by their formulas, of the softmax before dropout.

    max_logit = max s over keys; entropy = -Σ p·ln p over keys, for p with the sink in the denominator;
    key_mass = Σ p over rows. A row that sees no key has -inf and 0, and adds nothing. Only entropy has a
    gradient.
    """
    if inputs.spans_q is not None:
        max_logit, entropy = packed.concatenated(lambda *own: statistics(*own)[:2], inputs, spec)
        (key_mass,) = packed.concatenated(lambda *own: statistics(*own)[2:], inputs, spec, of_keys=True)
        return max_logit, entropy, key_mass
    if spec.batch_invariant and inputs.q.shape[0] > 1:
        of_entries = zip(*(statistics(*alone) for alone in _entries(inputs, spec)))
        max_logit, entropy, key_mass = (torch.cat(x) for x in of_entries)
        return max_logit, entropy, key_mass
    scores, _ = _scores_and_values(inputs, spec)
    s, alive = _with_sinks(scores, inputs)
    log_p = torch.log_softmax(s, dim=-1)[..., : scores.shape[-1]]
    p = torch.where(alive, log_p.exp(), 0.0)
    entropy = -(p * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1)
    nobody = scores.new_full((*scores.shape[:-1], 1), -torch.inf)  # a maximum wants at least one
    return torch.cat([scores, nobody], -1).detach().amax(-1), entropy, p.detach().sum(2)


def _with_sinks(s: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Scores with the sink's behind them, 0 in rows that see no key; and which rows see one."""
    alive = ~(s == -torch.inf).all(-1, keepdim=True)
    s = torch.where(alive, s, 0.0)
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(s.dtype)[:, None, None]
        s = torch.cat([s, sinks.expand(*s.shape[:3], 1)], dim=-1)
    return s, alive


def _scores_and_values(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """s, -inf where hidden, and v, 0 where nobody looks; wide, a head for each query head."""
    q, k, v, bias = inputs.q, inputs.k, inputs.v, inputs.bias
    wide = wide_dtype(q)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    ok = visible(inputs, spec)
    if ok is not None:
        ok = ok[(None,) * (4 - ok.ndim)]
        q = torch.where(ok.any(-1, keepdim=True), q, 0.0)
        seen = ok.flatten(1, 2).any(1)[:, None, :, None]  # by any row of the batch entry
        k, v = torch.where(seen, k, 0.0), torch.where(seen, v, 0.0)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    s = spec.scale * (q @ k.transpose(-1, -2))
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if bias is not None:
        bias = bias.to(wide)
        s = s + (bias if ok is None else torch.where(ok, bias, 0.0))
    if inputs.slopes is not None:
        s = s - inputs.slopes.to(wide)[..., None, None] * distances(inputs, spec)
    if inputs.table is not None:
        s = s + looked_up(inputs, spec).to(wide)
    return s if ok is None else torch.where(ok, s, -torch.inf), v


def _entries(inputs: Inputs, spec: AttentionSpec) -> Iterator[tuple[Inputs, AttentionSpec]]:
    """Each batch entry as a problem of its own. What entries share gets a gradient from each: wide, to be
    rounded once."""
    wide = wide_dtype(inputs.q)
    shared = inputs.bias, inputs.sinks, inputs.slopes, inputs.table
    bias, sinks, slopes, table = (None if x is None else x.to(wide) for x in shared)
    inputs = inputs._replace(bias=bias, sinks=sinks, slopes=slopes, table=table)
    for i in range(inputs.q.shape[0]):
        yield of_entries(inputs, slice(i, i + 1)), spec._replace(first_entry=spec.first_entry + i)


def _dropout(p: Tensor, inputs: Inputs, spec: AttentionSpec) -> Tensor:
    if spec.dropout_p == 1.0:
        return p * 0.0
    keep = kept(inputs, spec, slice(0, p.shape[2]), slice(0, p.shape[3]))
    assert keep is not None
    return torch.where(keep, p / (1.0 - spec.dropout_p), 0.0)
