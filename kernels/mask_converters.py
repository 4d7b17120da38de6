"""Masks as other libraries say them, as mask objects. Imports none of these libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mask_algebra import Dense, Mask
from .masks import Causal, Predicate, Window
from .spec import DTYPES
from .validation import check_tensor


def from_block_mask(block_mask: Any) -> Mask:
    """Of torch.nn.attention.flex_attention's `BlockMask`: seen is what lies in a full block, or in another
    listed block and is shown by mask_mod. Another size of call than the block mask's is an error."""
    for name in ("mask_mod", "seq_lengths", "BLOCK_SIZE", "kv_num_blocks", "kv_indices"):
        if not hasattr(block_mask, name):
            raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
    (rows, cols), (seqlen_q, seqlen_k) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
    blocks = -(-seqlen_k // cols)
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        entry, head = (x.clamp_max(n - 1) for x, n in zip((b, h), partial.shape))
        block = entry, head, q // rows, k // cols
        return full[block] | (partial[block] & block_mask.mask_mod(b, h, q, k))

    mask_mod.__name__ = getattr(block_mask.mask_mod, "__name__", "mask_mod")
    return Predicate(mask_mod, (partial.shape[0], partial.shape[1], seqlen_q, seqlen_k))


def from_flash_attention(
    *, causal: bool = False, window_size: tuple[int | None, int | None] = (-1, -1)
) -> Mask:
    """Of flash_attn's functions: bottom-right, both ends of the window included, causal means right = 0."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    left, right = (None if side is None or side < 0 else side for side in window_size)
    if not causal:
        return Window(left, right)
    return Causal() if left is None else Window(left, None) & Causal()


def from_transformers(attention_mask: Tensor | None) -> Mask | None:
    """Of what transformers gives its attention functions; but for bool masks values are read: they may only
    hide."""
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    shape, dtype = tuple(attention_mask.shape), attention_mask.dtype
    if attention_mask.ndim == 2:
        if dtype != torch.bool and (dtype in DTYPES or bool(((attention_mask | 1) != 1).any())):
            raise ValueError(
                "attention_mask of two axes must be bool, or hold 1 (a key to be seen) and 0 as integers; "
                "numbers of packed sequences go into Documents"
            )
        return Dense(attention_mask.bool()[:, None, None])
    if attention_mask.ndim != 4:
        raise ValueError(
            "attention_mask must be (batch, seqlen_k), or have four axes that broadcast to "
            f"(batch, heads_q, seqlen_q, seqlen_k), got shape {shape}"
        )
    if dtype == torch.bool:
        return Dense(attention_mask)
    if dtype not in DTYPES:
        raise TypeError(f"attention_mask of four axes must be bool or float, got {dtype}")
    hidden = attention_mask <= torch.finfo(dtype).min
    if not bool((hidden | (attention_mask == 0)).all()):
        raise ValueError(
            f"attention_mask must hold 0, {torch.finfo(dtype).min} and -inf only; "
            "numbers that are added to the scores go into bias="
        )
    return Dense(~hidden)


def _listed(counts: Tensor, columns: Tensor, blocks: int) -> Tensor:
    """Which blocks a BlockMask lists: bool (batch, heads, blocks of rows, blocks of keys)."""
    is_listed = torch.arange(columns.shape[-1], device=columns.device) < counts[..., None]
    columns = torch.where(is_listed, columns, blocks).long()  # beyond the count they may hold anything
    listed = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=columns.device)
    return listed.scatter(-1, columns, True)[..., :blocks]
