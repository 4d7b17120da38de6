"""Traps for stray reads and forgotten writes: what must not be touched is NaN, and NaN spreads.

They work wherever the numbers can be looked at, so also for kernels in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

CANARIES = 64
"""Poisoned elements before and after every tensor; a tile that overshoots by rows reads these first."""


def poison(x: Tensor) -> Tensor:
    """Fill x with what nobody may rely on: NaN, True, or the largest integer."""
    if x.is_floating_point():
        return x.fill_(torch.nan)
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


def fenced(x: Tensor) -> Tensor:
    """x with the same values and strides, inside a buffer that is poison everywhere else.

    Every axis is embedded with room around it, so rows, heads and batch entries have canaries
    between them too; axes of stride 0 keep it.
    """
    stored = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    order = sorted(range(x.ndim), key=lambda axis: (-stored.stride()[axis], axis))
    sizes = [stored.shape[axis] + 3 for axis in order]
    length = torch.Size(sizes).numel()
    buffer = poison(x.new_empty(length + 2 * CANARIES))[CANARIES : CANARIES + length].view(sizes)
    inverse = [order.index(axis) for axis in range(x.ndim)]
    view = buffer.permute(inverse)[tuple(slice(1, 1 + n) for n in stored.shape)]
    view.copy_(stored)
    return view.expand(x.shape)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within it, tensors that PyTorch would leave uninitialised are poison: a forgotten element shows."""
    makers: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    makers += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    with contextlib.ExitStack() as patches:
        for owner, name in makers:
            patches.enter_context(mock.patch.object(owner, name, _poisoning(getattr(owner, name))))
        yield


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return poison(allocate(*args, **kwargs))

    return poisoned
