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


class Watch:
    """Tensors inside larger buffers, of which nothing else may change."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def over(self, inside: Tensor) -> Tensor:
        """Remember what lies around a tensor, in its storage, as it is now."""
        buffer = inside.new_empty(0).set_(inside.untyped_storage())
        self._kept.append((inside, buffer, buffer.clone()))
        return inside

    def written_outside(self) -> bool:
        """Whether a byte between, before or after the elements of any of them is another one."""
        return any(_differ_outside(*kept) for kept in self._kept)


def _differ_outside(inside: Tensor, buffer: Tensor, before: Tensor) -> bool:
    now = buffer.clone()
    for x in (now, before):
        _placed(x, inside).zero_()
    return not torch.equal(now.view(torch.uint8), before.view(torch.uint8))


def _placed(buffer: Tensor, like: Tensor) -> Tensor:
    """Where a tensor lies in its buffer, each element once."""
    sizes = [1 if stride == 0 else size for size, stride in zip(like.shape, like.stride())]
    return buffer.as_strided(sizes, like.stride(), like.storage_offset())


UNINITIALISED: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)
FILLED: tuple[tuple[Any, str], ...] = (
    (torch, "zeros"),
    (torch, "zeros_like"),
    (torch, "full"),
    (torch, "full_like"),
    (Tensor, "new_zeros"),
    (Tensor, "new_full"),
)
"""How tensors are made in Python, by owner and name."""


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[Watch]:
    """Within it, tensors that PyTorch would leave uninitialised are poison: a forgotten element shows.

    Those and others that are made to be written have canaries before and after them, which the watch knows.
    """
    watch, empty = Watch(), torch.empty

    def surrounded(make: Callable[..., Tensor], dirty: bool) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return _with_canaries(poison(x) if dirty else x, watch, empty)

        return allocate

    with contextlib.ExitStack() as patches:
        for owner, name in (*UNINITIALISED, *FILLED):
            made = surrounded(getattr(owner, name), (owner, name) in UNINITIALISED)
            patches.enter_context(mock.patch.object(owner, name, made))
        yield watch


def _with_canaries(x: Tensor, watch: Watch, empty: Callable[..., Tensor]) -> Tensor:
    """The same, where its memory is its own and can be moved; no view, since nobody's views are."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    if traced or type(x) is not Tensor or x.layout != torch.strided or x.device.type not in ("cpu", "cuda"):
        return x
    if x.storage_offset() != 0 or x.numel() == 0 or x.is_pinned():
        return x
    length = x.untyped_storage().nbytes() // x.itemsize
    buffer = poison(empty(length + 2 * CANARIES, dtype=x.dtype, device=x.device))
    moved = empty(0, dtype=x.dtype, device=x.device)
    moved.set_(buffer.untyped_storage(), CANARIES, x.shape, x.stride())
    _placed(buffer, moved).copy_(x.as_strided(_placed(buffer, moved).shape, x.stride()))
    return watch.over(moved).requires_grad_(x.requires_grad)
