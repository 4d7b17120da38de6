"""Attention over a union of keys from attention over its parts.

Every place that meets keys in parts and adds them up comes here: blocks of the fallback, keys on several
devices, a prefix that many sequences share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import DTYPES
from .validation import check_tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over the union of two disjoint sets of keys (Dao et al. 2022, section 3.1).

    out: (..., rows, head_dim_v); lse: (..., rows), natural logarithm, float32 or float64, -inf for a row
    whose part is empty. Computed in the widest of their dtypes, returned in those of out_a and lse_a.
    Associative up to rounding; differentiable, to any order. An empty part changes nothing, bit for bit,
    whatever its out holds. At most one part may have sinks in its lse.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit together; the message names the argument.
    """
    _check(out_a, lse_a, out_b, lse_b)
    wide = torch.float32
    for x in (out_a, lse_a, out_b, lse_b):
        wide = torch.promote_types(wide, x.dtype)
    out, lse = merged(out_a.to(wide), lse_a.to(wide), out_b.to(wide), lse_b.to(wide))
    return out.to(out_a.dtype), lse.to(lse_a.dtype)


def merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` of tensors that fit together and share a wide dtype."""
    a_is_empty, b_is_empty = (x == -torch.inf for x in (lse_a, lse_b))
    # Rows with an empty part are replaced at the end: until then they may hold anything but NaN, whose
    # gradient would survive the replacement.
    level_a, level_b = lse_a.masked_fill(a_is_empty, 0.0), lse_b.masked_fill(b_is_empty, 0.0)
    lse = torch.logsumexp(torch.stack([level_a, level_b]), 0)  # logaddexp's second derivative overflows
    share = torch.sigmoid(level_b - level_a)  # exp(level_b - lse) would take in the rounding of lse
    of_a, of_b = a_is_empty[..., None], b_is_empty[..., None]
    out = torch.lerp(out_a.masked_fill(of_a, 0.0), out_b.masked_fill(of_b, 0.0), share[..., None])
    out = torch.where(of_b, out_a.masked_fill(of_a, 0.0), torch.where(of_a, out_b, out))
    return out, torch.where(b_is_empty, lse_a, torch.where(a_is_empty, lse_b, lse))


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in given.items():
        check_tensor(name, x)
        allowed = DTYPES if name.startswith("out") else (torch.float32, torch.float64)
        if x.dtype not in allowed:
            raise TypeError(f"{name} must have a dtype out of {allowed}, got {x.dtype}")
        if x.device != out_a.device:
            raise ValueError(f"{name} must be on {out_a.device} like out_a, got {x.device}")
    for name, x, like in (("lse_a", lse_a, out_a), ("lse_b", lse_b, out_b)):
        rows = tuple(like.shape[:-1])
        if x.shape != rows:
            found = tuple(x.shape)
            raise ValueError(f"{name} must have the shape of out without its last axis, {rows}, got {found}")
    if out_b.shape != out_a.shape:
        shape = tuple(out_a.shape)
        raise ValueError(f"out_b must have the shape of out_a, {shape}, got {tuple(out_b.shape)}")
