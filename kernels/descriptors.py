"""Whether the copy engine of newer GPUs may read a call's tensors: it moves boxes, and leaves out no row."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import AttentionSpec, Inputs
from .visibility import key_bounds

UNIT = 16
"""Bytes that addresses and strides must be multiples of."""


def why_not(inputs: Inputs, spec: AttentionSpec) -> str | None:
    """What is in the way, or None; asked without addresses, which tensors that are traced do not have.

    No key may be hidden from every query of the batch entry: what it holds would reach a product.
    """
    seqlen_q, seqlen_k = inputs.q.shape[2], inputs.k.shape[2]
    hiding = inputs.mask, inputs.ranges, inputs.tiles, inputs.key_lengths, inputs.spans_q
    if any(x is not None for x in hiding):
        return "a mask, key_lengths or packed sequences may hide a key from all queries"
    if key_bounds(0, seqlen_q - 1, spec, seqlen_q, seqlen_k) != (0, seqlen_k):
        return "causal or window hides a key from all queries"
    for name, x in zip(("q", "k", "v"), inputs):
        assert x is not None
        if not 16 <= x.shape[3] <= 256:
            return f"head_dim of {name} is {x.shape[3]}, not in [16, 256]"
        if not has_strides(x):
            return f"{name} has strides {x.stride()}, not a last one of 1 and others of {UNIT} bytes"
    return None


def has_strides(x: Tensor) -> bool:
    """Whether boxes of x, which has four axes, can be moved, if its address is a multiple of `UNIT`."""
    unit = UNIT // x.element_size()
    batch, heads, seqlen, last = x.stride()
    return last == 1 and min(batch, heads, seqlen) > 0 and batch % unit == heads % unit == seqlen % unit == 0


def is_laid_out(x: Tensor) -> bool:
    """Whether boxes of x can be moved."""
    return has_strides(x) and x.data_ptr() % UNIT == 0


def laid_out(x: Tensor) -> Tensor:
    """x, or a copy of it of which boxes can be moved: a step of a slice, an expanded axis, an odd address."""
    return x if is_laid_out(x) else x.clone(memory_format=torch.contiguous_format)
