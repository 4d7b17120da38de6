"""The attention inside `torch.nn.MultiheadAttention` as targets: its projections are identities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward

from .cases import Problem
from .target import Capabilities, Target


def multihead(weights: bool, device: torch.device) -> Target:
    """With need_weights=True it computes otherwise than without, empty rows for example."""

    def attend(problem: Problem) -> tuple[Tensor, None]:
        batch, heads, seqlen_q, head_dim = problem.q.shape
        width = heads * head_dim
        q, k, v = (x.permute(2, 0, 1, 3).reshape(x.shape[2], batch, width) for x in problem[:3])
        eye = torch.eye(width, dtype=q.dtype, device=q.device)
        out, _ = multi_head_attention_forward(
            q,
            k,
            v,
            width,
            heads,
            in_proj_weight=eye.repeat(3, 1),
            in_proj_bias=None,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=eye,
            out_proj_bias=None,
            attn_mask=_attn_mask(problem),
            need_weights=weights,
        )
        return out.view(seqlen_q, batch, heads, head_dim).permute(1, 2, 0, 3), None

    claims = Capabilities(scale=False, mask=True, bias=True, bias_gradient=True)
    name = "torch-mha-weights" if weights else "torch-mha"
    return Target(name, attend, claims, f"nn.MultiheadAttention in training, need_weights={weights}")


def _attn_mask(problem: Problem) -> Tensor | None:
    """(batch * heads, seqlen_q, seqlen_k); of a boolean one True means hidden."""
    mask, bias = problem.options.get("mask"), problem.options.get("bias")
    assert bias is None or isinstance(bias, Tensor), "no ALiBi is claimed"
    assert mask is None or isinstance(mask, Tensor), "no mask object is claimed"
    hidden = None if mask is None else ~mask
    if bias is not None:
        hidden = bias if hidden is None else bias.masked_fill(hidden, -torch.inf)
    if hidden is None:
        return None
    shape = (*problem.q.shape[:3], problem.k.shape[2])
    return hidden.expand(shape).reshape(-1, *shape[2:])
