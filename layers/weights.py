"""Attention weights as a tensor, for callers who ask to see them.

Fused attention never holds them. From its lse each weight is one exponential away, so they are computed
only as far as the answer is large: head by head when heads are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.functional import prepare
from ..kernels.masks import visible
from ..kernels.philox import keep_mask
from ..kernels.spec import AttentionOptions, AttentionSpec, Inputs


def attention_weights(
    q: Tensor, k: Tensor, lse: Tensor, options: AttentionOptions, *, average: bool
) -> Tensor:
    """What `attention(q, k, v, want=("lse",), **options)` multiplied v with; differentiable.

    q: (batch, heads, seqlen_q, head_dim); k: (batch, heads, seqlen_k, head_dim); lse: of that call, as
    must be the seed in `options` if there is dropout. Returns (batch, seqlen_q, seqlen_k) with `average`,
    the mean over heads, else (batch, heads, seqlen_q, seqlen_k); dropped weights are 0, the others scaled
    by 1/(1 - p); 0 in rows that see nothing. Computed in lse's dtype; of the dtype softmax would have, which
    is q's, but may differ under autocast.
    """
    inputs, spec = prepare(q, k, k, options)
    heads = q.shape[1]
    dtype = torch.softmax(q.new_zeros(1), dim=0).dtype
    if not average:
        return _weights(inputs, lse, spec, 0, heads).to(dtype)
    total = torch.zeros((), dtype=lse.dtype, device=lse.device)
    for head in range(heads):
        # Recomputed in backward: autograd would otherwise keep every head's weights.
        one: Tensor = checkpoint(
            _weights, inputs, lse, spec, head, 1, use_reentrant=False, preserve_rng_state=False
        )
        total = total + one.squeeze(1)
    return (total / heads).to(dtype)


def _weights(inputs: Inputs, lse: Tensor, spec: AttentionSpec, first: int, count: int) -> Tensor:
    """dropout(exp(s - lse)) of heads first ... first + count - 1, in the dtype of lse."""
    inputs, planes = _of_heads(inputs, first, count), inputs.q.shape[1]
    lse = lse[:, first : first + count, :, None]
    with torch.autocast(lse.device.type, enabled=False):
        s = spec.scale * (inputs.q.to(lse.dtype) @ inputs.k.to(lse.dtype).mT)
    if inputs.bias is not None:
        s = s + inputs.bias.to(lse.dtype)
    ok = visible(inputs, spec)
    if ok is not None:
        s = torch.where(ok, s, -torch.inf)
    # In an empty row s and lse are -inf, and their difference is NaN.
    p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse))
    if spec.dropout_p == 1.0:
        return p * 0.0
    if inputs.seed is None:
        return p
    batch, _, seqlen_q, seqlen_k = p.shape
    rows, cols = range(seqlen_q), range(seqlen_k)
    keep = [
        keep_mask(inputs.seed, spec.dropout_p, 1, count, rows, cols, first_plane=index * planes + first)
        for index in range(batch)
    ]
    return torch.where(torch.cat(keep), p / (1.0 - spec.dropout_p), 0.0)


def _of_heads(inputs: Inputs, first: int, count: int) -> Inputs:
    def cut(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else x[:, first : first + count]

    heads = slice(first, first + count)
    return inputs._replace(
        q=inputs.q[:, heads], k=inputs.k[:, heads], bias=cut(inputs.bias), mask=cut(inputs.mask)
    )
