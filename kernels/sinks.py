"""Attention sinks: one learned logit per query head that joins the softmax's denominator, and no value.

Xiao et al. 2023, section 3; gpt-oss model card, section 2. A sink takes the share exp(sink - lse) of a row's
weight. Operators mark a row that sees no key by lse -inf, with a sink too: that is how backward knows it;
`lse_of_empty_rows` says what the caller is told.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .visibility import owners


def join(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) with the sinks in the denominator, from (out, lse) over the keys alone, in wide dtype.

    out: (batch, heads_q, rows, head_dim_v); lse: (batch, heads_q, rows); sinks: (heads_q,).
    """
    per_row, empty = _per_row(sinks, lse), lse == -torch.inf
    share = torch.sigmoid(lse - per_row).masked_fill(empty, 0.0)
    return out * share[..., None], torch.logaddexp(lse, per_row).masked_fill(empty, -torch.inf)


def gradient(delta: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of the sinks: the backward of any score, for one that has no value.

    dS = P·(dP - delta) with dP = 0, summed over batch and rows. delta = rowsum(out·dout) - dlse and lse, with
    the sink in it: (batch, heads_q, rows); both may hold anything where lse is -inf.
    """
    share = torch.exp(_per_row(sinks, lse) - lse)
    shares = torch.where(lse == -torch.inf, 0.0, -share * delta)
    return shares.sum((0, 2)).to(sinks.dtype)


def lse_of_empty_rows(lse: Tensor, sinks: Tensor, spans_q: Tensor | None = None) -> Tensor:
    """lse as the contract has it: where there is no key, the sink is the whole denominator.

    Packed, rows that no sequence owns keep -inf.
    """
    empty = lse == -torch.inf
    if spans_q is not None:
        empty = empty & owners(spans_q, lse.shape[2])[2]
    return torch.where(empty, _per_row(sinks, lse), lse)


def _per_row(sinks: Tensor, lse: Tensor) -> Tensor:
    return sinks.to(lse.dtype)[:, None]
