"""Traps for stray reads and forgotten writes: what must not be touched is NaN, and NaN spreads.

They work wherever the numbers can be looked at, so also for kernels in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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


def fenced_whole(x: Tensor) -> Tensor:
    """x, contiguous, with canaries before and after it only: for who takes no strides."""
    return fenced(x.reshape(-1)).view(x.shape)


def far_apart(tensors: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Copies whose last index along an axis lies 2^31 elements behind the first.

    They share a buffer of 2^32 elements; on a CPU only its touched pages exist. An offset that is cut to
    32 bits finds poison that lies 2^31 elements before them. Sizes of that axis must be 2 or more.
    """
    room = sum(x.numel() for x in tensors)
    buffer = tensors[0].new_empty(2**32 + 2 * room)
    poison(buffer[:room])
    far, start = [], 2**31
    for x in tensors:
        strides = list(torch.empty(x.shape, device="meta").stride())
        strides[axis] = -(-(2**31) // (x.shape[axis] - 1))
        far.append(buffer.as_strided(x.shape, strides, start).copy_(x))
        start += x.numel()
    return far


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
