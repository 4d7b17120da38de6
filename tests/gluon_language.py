"""Gluon's device functions, on torch tensors and the `Block` that runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gluon_arithmetic import Scalar, Value
from gluon_hardware import Block, MBarrier, require
from gluon_memory import Descriptor, Pointer, Product, SharedMemory

_running: Block | None = None


def enter(block: Block | None) -> None:
    """Which program the functions of this module act on from now on."""
    global _running
    _running = block


def running() -> Block:
    """The program that runs."""
    assert _running is not None, "outside a simulation"
    return _running


def load(pointer: Pointer, mask: Tensor | bool | None = None, other: Value = None, **_: Any) -> Value:
    """What is masked holds poison unless `other` says what."""
    running().scheduler.pause()
    shape = torch.broadcast_shapes(*(x.shape for x in (pointer.offset, mask) if isinstance(x, Tensor)))
    memory, touched, active = pointer.addresses(shape, mask)
    nothing = torch.nan if memory.is_floating_point() else torch.iinfo(memory.dtype).max
    found = torch.full(shape, nothing if other is None else other, dtype=memory.dtype)
    found[active] = memory[touched]
    return Scalar(int(found.item())) if found.ndim == 0 and not found.is_floating_point() else found


def store(pointer: Pointer, value: Value, mask: Tensor | bool | None = None, **_: Any) -> None:
    running().scheduler.pause()
    value = torch.as_tensor(value)
    shape = torch.broadcast_shapes(value.shape, torch.as_tensor(pointer.offset).shape)
    memory, touched, active = pointer.addresses(shape, mask)
    memory[touched] = value.expand(shape)[active].to(memory.dtype)


def atomic_add(pointer: Pointer, value: Value, mask: Tensor | bool | None = None, **_: Any) -> Value:
    """Returns what was there, of a single address only."""
    running().scheduler.pause()
    value = torch.as_tensor(value)
    memory, touched, active = pointer.addresses(value.shape, mask)
    before = memory[touched].clone()
    memory.index_add_(0, touched, value[active].to(memory.dtype))
    return before.item() if before.numel() == 1 and value.ndim == 0 else None


NAMED_BARRIER = re.compile(r"\s*(?:bar|barrier)\.(sync|arrive)\s+(\d+),\s*(\d+);")


def inline_asm_elementwise(asm: str, *_: Any, **__: Any) -> Scalar:
    """Named barriers, and nothing else that an assembler knows."""
    found = NAMED_BARRIER.match(asm)
    require(found is not None, f"the simulator does not know {asm!r}")
    assert found is not None
    running().named_barrier(int(found[2]), int(found[3]), wait=found[1] == "sync")
    return Scalar(0)


def allocate_shared_memory(
    dtype: torch.dtype, shape: Sequence[int], layout: object = None, value: Tensor | None = None
) -> SharedMemory:
    memory = SharedMemory.allocate(running(), dtype, shape)
    if value is not None:
        memory.store(value)
    return memory


Function = tuple[Callable[..., Any], tuple[Any, ...]]


def warp_specialize(functions: Sequence[Function], warps: Sequence[int], registers: Sequence[int]) -> Any:
    """The first one goes on in this partition, the others in new ones; all end before this returns."""
    require(len(functions) == len(warps) + 1 == len(registers) + 1, "warps and registers of each worker")
    scheduler = running().scheduler

    def body(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], None]:
        return lambda: function(*arguments)

    workers = [
        scheduler.start(f"{function.__name__} {number}", body(function, arguments), n_warps)
        for number, ((function, arguments), n_warps) in enumerate(zip(functions[1:], warps), 1)
    ]
    (function, arguments), *_ = functions
    scheduler.current.name = f"{function.__name__} 0"
    result = function(*arguments)
    scheduler.pause(lambda: all(worker.finished for worker in workers), lambda: "its workers")
    return result


def mbarrier_init(memory: SharedMemory, count: int) -> None:
    memory.barrier = MBarrier(int(count))


def mbarrier_expect(memory: SharedMemory, bytes: int, pred: bool = True) -> None:
    running().scheduler.pause()
    if pred:
        memory.barrier.announce(int(bytes))


def mbarrier_arrive(memory: SharedMemory, *, count: int = 1, pred: bool = True) -> None:
    running().scheduler.pause()
    if pred:
        memory.barrier.arrive(int(count))


def mbarrier_wait(memory: SharedMemory, phase: int, pred: bool = True, deps: Sequence[object] = ()) -> None:
    """Until the current phase is of the other parity."""
    if pred:
        barrier = memory.barrier
        require(phase in (0, 1), f"a phase of {int(phase)}")
        running().scheduler.pause(
            lambda: barrier.parity != phase, lambda: f"parity {int(phase)} of an mbarrier {barrier}"
        )


def copy_in(
    descriptor: Descriptor,
    place: Sequence[int],
    barrier: SharedMemory,
    target: SharedMemory,
    pred: bool = True,
    **_: Any,
) -> None:
    if pred:
        descriptor.load(running(), place, barrier.barrier, target)


def copy_out(descriptor: Descriptor, place: Sequence[int], source: SharedMemory) -> None:
    descriptor.store(running(), place, source, add=False)


def copy_out_adding(descriptor: Descriptor, place: Sequence[int], source: SharedMemory) -> None:
    descriptor.store(running(), place, source, add=True)


def warpgroup_mma(
    a: SharedMemory | Tensor,
    b: SharedMemory,
    acc: Tensor | Product,
    *,
    use_acc: bool = True,
    precision: object = None,
    max_num_imprecise_acc: object = None,
    is_async: bool = False,
) -> Tensor | Product:
    require(a.shape[0] % 64 == 0, f"a product of {a.shape[0]} rows")
    product = Product(a, b, acc if use_acc else None)
    running().start_product(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Value] = ()) -> Value:
    running().wait_products(int(num_outstanding))
    ready = tuple(x.value if isinstance(x, Product) and x.done else x for x in deps)
    return ready[0] if len(ready) == 1 else ready


class _Builder:
    """What of the compiler's builder a kernel reaches for where a Triton has no wrapper yet."""

    @staticmethod
    def create_async_tma_reduce(
        kind: str, descriptor: Descriptor, place: Sequence[int], source: SharedMemory
    ) -> None:
        require(kind == "add", f"the simulator does not reduce by {kind}")
        copy_out_adding(descriptor, place, source)


class _Semantic:
    builder = _Builder()

    @staticmethod
    def _convert_to_ir_values(values: Sequence[int], require_i64: bool = True) -> Sequence[int]:
        return values


def builtin(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that talks to the builder; named like the original, which some compare."""

    def call(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options, _semantic=_Semantic)

    call.__name__ = function.__name__
    return call


def jit(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return function if function is not None else lambda it: it
