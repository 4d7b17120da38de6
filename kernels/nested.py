"""Jagged nested tensors as packed sequences, and back; views both ways, gradients pass."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(q: Tensor, k: Tensor, v: Tensor, check: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, cu_seqlens_q, cu_seqlens_k) of nested tensors (batch, heads, ragged, head_dim).

    Raises:
        TypeError, ValueError: an argument is not such a tensor, or k and v do not belong together.
    """
    given = (("q", q), ("k", k), ("v", v))
    for name, x in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.jagged:
            kind = "nested, strided" if x.is_nested else "dense"
            raise TypeError(f"q, k and v must all be dense or all jagged nested tensors, got a {kind} {name}")
    for name, x in given:
        if x.ndim != 4 or getattr(x, "_ragged_idx", None) != 2:
            raise ValueError(
                f"{name} must be (batch, heads, ragged, head_dim), a transposed view of (batch, ragged, "
                f"heads, head_dim), got shape {tuple(x.shape)}"
            )
        if getattr(x, "_lengths", None) is not None:
            raise ValueError(f"{name} must have no holes: its lengths must follow from its offsets")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"nested q, k, v must have one batch size, got {q.shape[0]}, {k.shape[0]}, {v.shape[0]}"
        )
    if (check or k.device.type == "cpu") and not torch.equal(_offsets(k), _offsets(v)):
        raise ValueError("v must have k's lengths, got nested tensors that differ in them")
    values_q, values_k, values_v = (x.transpose(1, 2).values() for x in (q, k, v))
    return values_q, values_k, values_v, _offsets(q), _offsets(k)


def unpacked(x: Tensor, like: Tensor) -> Tensor:
    """(total, heads, ...) as nested (batch, heads, ragged, ...), with the lengths of `like`."""
    return torch.nested.nested_tensor_from_jagged(x, _offsets(like)).transpose(1, 2)


def _offsets(x: Tensor) -> Tensor:
    offsets: Tensor = x.offsets()  # type: ignore[attr-defined]
    return offsets
