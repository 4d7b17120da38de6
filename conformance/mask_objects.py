"""Mask objects to ask about, by name: each form that a call may make of one, and what people combine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..kernels.mask_algebra import Mask
from ..kernels.masks import Causal, Documents, FirstKeys, PrefixLM, Window, from_predicate

Sizes = Mapping[str, int]
"""Of the axes "b", "h", "q" and "k"."""


def _documents(sizes: Sizes) -> Mask:
    """Three or four in each entry, of other lengths in each; the first key of the first entry is padding."""
    key, entry = torch.arange(sizes["k"]), torch.arange(sizes["b"])[:, None]
    ids = (3 * key + 2 * entry) // max(sizes["k"], 1)
    ids[:1, :1] = -1
    return Documents(ids)


def _prefixes(sizes: Sizes) -> Mask:
    return PrefixLM((torch.arange(sizes["b"]) + 1) * sizes["k"] // 3 % (sizes["k"] + 1))


def _scattered(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((5 * q + 3 * k + h + b) % 7 < 4) & ((q // 64 + k // 128) % 2 == 0)


OBJECTS: dict[str, Callable[[Sizes, str], Mask]] = {
    "causal": lambda _, align: Causal(align),
    "window": lambda _, align: Window(7, 3),
    "prefix": lambda sizes, _: _prefixes(sizes),
    "documents": lambda sizes, _: _documents(sizes),
    "causal documents": lambda sizes, align: _documents(sizes) & Causal(align),
    "streaming": lambda _, align: (Window(6, 0) | FirstKeys(3)) & Causal(align),
    "predicate": lambda *_: from_predicate(_scattered),
}
"""Makers, given the sizes and the alignment of the call."""
