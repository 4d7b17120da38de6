"""What masks, biases and strides look like, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor


def _without(axis: int, start: int, step: int) -> Callable[[Tensor], Tensor]:
    """Hide every step-th row or column."""

    def hide(mask: Tensor) -> Tensor:
        hidden = torch.arange(mask.shape[axis]) % step == start
        return mask & ~hidden.view([-1 if a == axis else 1 for a in range(4)])

    return hide


def _padding(left: bool) -> Callable[[Tensor], Tensor]:
    """Batch entry b is one third longer than entry b - 1, modulo the length."""

    def pad(mask: Tensor) -> Tensor:
        batch, length = mask.shape[0], mask.shape[3]
        kept = (length * (torch.arange(batch) + 1) // 3) % (length + 1)
        real = torch.arange(length) < kept[:, None, None, None]
        return real.flip(-1) if left else real

    return pad


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda mask: mask,
    "padding_right": _padding(left=False),
    "padding_left": _padding(left=True),
    "empty_rows": _without(2, 1, 3),
    "empty_columns": _without(3, 0, 4),
    "first_entry_empty": _without(0, 0, 2),
    "nothing": torch.zeros_like,
}


def _with_hidden(bias: Tensor, generator: Generator) -> Tensor:
    return bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -torch.inf)


def _with_hidden_rows(bias: Tensor, generator: Generator) -> Tensor:
    rows = torch.arange(bias.shape[2])[:, None] % 5 == 2
    return _with_hidden(bias, generator).masked_fill(rows, -torch.inf)


BIASES: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "random": lambda bias, _: bias,
    "hidden": _with_hidden,
    "hidden_rows": _with_hidden_rows,
    "large": lambda bias, _: bias.clamp(-3, 3) * 2e4,
    "shift_down": lambda bias, _: bias - 5e4,
}


def _copied(view: Tensor, x: Tensor) -> Tensor:
    view.copy_(x)
    return view


def _sliced(x: Tensor) -> Tensor:
    batch, heads, seqlen, head_dim = x.shape
    return _copied(x.new_zeros(batch, heads + 1, 2 * seqlen, head_dim + 3)[:, 1:, ::2, 2:-1], x)


def _interleaved(x: Tensor) -> Tensor:
    batch, heads, seqlen, head_dim = x.shape
    return _copied(x.new_zeros(batch, seqlen, 3, heads, head_dim)[:, :, 1].transpose(1, 2), x)


def _misaligned(x: Tensor) -> Tensor:
    return _copied(x.new_zeros(x.numel() + 1)[1:].view(x.shape), x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bhsd": lambda x: x,
    "bshd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": _sliced,
    "interleaved": _interleaved,
    "misaligned": _misaligned,
    "last_stride_2": lambda x: _copied(x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2], x),
    "head_dim_outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "expanded_heads": lambda x: x[:, :1].expand(x.shape),
    "expanded_batch": lambda x: x[:1].expand(x.shape),
}
