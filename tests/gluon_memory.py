"""What a simulated kernel holds: shared memory, descriptors, pointers, accumulators in flight."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gluon_hardware import Allocation, Block, MBarrier, poison, require
from gluon_partitions import Pending, SimulationError


class SharedMemory:
    """A view of an allocation, with the methods of a `shared_memory_descriptor`."""

    def __init__(self, block: Block, data: Tensor, allocation: Allocation) -> None:
        self._block, self.data, self._allocation = block, data, allocation

    @classmethod
    def allocate(cls, block: Block, dtype: torch.dtype, shape: Sequence[int]) -> SharedMemory:
        data = torch.empty(tuple(map(int, shape)), dtype=dtype)
        poison(data)
        block.allocations.append(Allocation())
        return cls(block, data, block.allocations[-1])

    @property
    def handle(self) -> SharedMemory:
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def layout(self) -> None:
        return None

    def _view(self, data: Tensor) -> SharedMemory:
        return SharedMemory(self._block, data, self._allocation)

    def index(self, index: int) -> SharedMemory:
        require(0 <= index < self.data.shape[0], f"buffer {index} of {self.data.shape[0]}")
        return self._view(self.data[int(index)])

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return self._view(self.data.view(*map(int, shape)))

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return self._view(self.data.permute(*order))

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        require(
            start >= 0 and start + length <= self.data.shape[dim], f"slice {start} + {length}, axis {dim}"
        )
        return self._view(self.data.narrow(dim, int(start), int(length)))

    def load(self, layout: object = None) -> Tensor:
        self._block.scheduler.pause()
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self._block.scheduler.pause()
        require(
            value.dtype == self.data.dtype and value.shape == self.data.shape,
            f"{value.dtype} {list(value.shape)} into shared {self.data.dtype} {self.shape}",
        )
        self.data.copy_(value)
        writer, storage = self._block.scheduler.current, self.data.untyped_storage()
        size = storage.nbytes() // self.data.element_size()
        written = self._allocation.unfenced.setdefault(writer, torch.zeros(size, dtype=torch.bool))
        self._of(written).fill_(True)

    def _of(self, flags: Tensor) -> Tensor:
        return flags.as_strided(self.data.shape, self.data.stride(), self.data.storage_offset())

    def require_fenced(self) -> None:
        """What copies and products touch was not written since the writer's last fence."""
        for writer, flags in self._allocation.unfenced.items():
            fenced = not bool(self._of(flags).any())
            require(fenced, f"a copy or product touches what {writer.name} wrote without a fence")

    @property
    def barrier(self) -> MBarrier:
        key = int(self.data.storage_offset())
        require(key in self._allocation.barriers, "an mbarrier that nobody initialised")
        return self._allocation.barriers[key]

    @barrier.setter
    def barrier(self, barrier: MBarrier) -> None:
        self._allocation.barriers[int(self.data.storage_offset())] = barrier


class Product:
    """An accumulator in flight; no tensor yet, so nothing can be done with it but wait."""

    def __init__(self, a: SharedMemory | Tensor, b: SharedMemory, acc: Tensor | Product | None) -> None:
        require(a.dtype == b.dtype, f"a product of {a.dtype} and {b.dtype}")
        self._a, self._b, self._acc = a, b, acc
        self._value: Tensor | None = None

    @property
    def done(self) -> bool:
        return self._value is not None

    @property
    def value(self) -> Tensor:
        require(self._value is not None, "an accumulator in flight is used")
        assert self._value is not None
        return self._value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise SimulationError(f"an accumulator in flight is used: {name}")

    def finish(self) -> None:
        """Read the operands, now."""
        value = _read(self._a) @ _read(self._b)
        if self._acc is not None:
            value += self._acc.value if isinstance(self._acc, Product) else self._acc
        self._value = value


def _refuse(self: Product, *_: object) -> Any:
    raise SimulationError("an accumulator in flight is used")


for _name in ("add", "sub", "mul", "truediv", "radd", "rsub", "rmul", "rtruediv", "neg", "getitem"):
    setattr(Product, f"__{_name}__", _refuse)


def _read(operand: SharedMemory | Tensor) -> Tensor:
    if isinstance(operand, SharedMemory):
        operand.require_fenced()
        return operand.data.float()
    return operand.float()


class Descriptor:
    """A tensor as the copy engine sees it: boxes that are zero outside on the way in, cut on the way out."""

    def __init__(self, tensor: Tensor, box: Sequence[int]) -> None:
        size = tensor.element_size()
        require(len(box) == tensor.ndim <= 5, f"a box {tuple(box)} of {tensor.ndim} axes")
        require(all(0 < n <= 256 for n in box), f"a box {tuple(box)} beyond 256")
        require(tensor.numel() > 0, "a descriptor of nothing")
        require(tensor.data_ptr() % 16 == 0, "a descriptor's tensor starts at no multiple of 16 bytes")
        require(tensor.stride(-1) == 1, "a descriptor's last stride is not 1")
        outer = tensor.stride()[:-1]
        require(all(n * size % 16 == 0 for n in outer), f"strides {outer} that are no multiples of 16 bytes")
        self.tensor, self.box = tensor, list(map(int, box))
        self.dtype, self.layout, self.shape = tensor.dtype, None, tensor.shape
        self.block_shape = self.box
        self.block_type = types.SimpleNamespace(nbytes=math.prod(self.box) * size, shape=self.box)

    @property
    def handle(self) -> Descriptor:
        return self

    def window(self, place: Sequence[int], shared: Tensor) -> tuple[Tensor, Tensor]:
        """What of the tensor lies in the box at a place, and where that lies in shared memory."""
        require(list(shared.shape) == self.box, f"a box {self.box} and a buffer {list(shared.shape)}")
        require(len(place) == len(self.box), f"{len(place)} coordinates for {len(self.box)} axes")
        outside, inside = [], []
        for start, length, size in zip(map(int, place), self.box, self.tensor.shape):
            first, last = min(max(start, 0), size), max(min(start + length, size), 0)
            last = max(first, last)
            outside.append(slice(first, last))
            inside.append(slice(first - start, last - start) if last > first else slice(0, 0))
        return self.tensor[tuple(outside)], shared[tuple(inside)]

    def load(self, block: Block, place: Sequence[int], barrier: MBarrier, target: SharedMemory) -> None:
        outside, inside = self.window(place, target.data)
        target.require_fenced()
        poison(target.data)

        def land() -> None:
            target.data.zero_()
            inside.copy_(outside)
            barrier.receive(self.block_type.nbytes)

        block.scheduler.pending.append(Pending("copy into shared memory", land))
        block.scheduler.pause()

    def store(self, block: Block, place: Sequence[int], source: SharedMemory, add: bool) -> None:
        outside, inside = self.window(place, source.data)

        def read() -> None:
            source.require_fenced()
            if add:
                outside.add_(inside)
            else:
                outside.copy_(inside)

        block.start_store(read)


class Pointer:
    """An address in a tensor, or a tensor of addresses. offset: in elements."""

    def __init__(self, tensor: Tensor, offset: int | Tensor = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype: Any = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: int | Tensor) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    __radd__ = __add__

    def addresses(self, shape: Sequence[int], mask: Tensor | bool | None) -> tuple[Tensor, Tensor, Tensor]:
        """(memory from the tensor's first element on, elements that are touched, bool of the shape)."""
        x = self.tensor
        room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        memory = x.as_strided((room,), (1,))
        active = torch.as_tensor(True if mask is None else mask).expand(tuple(shape))
        touched = torch.as_tensor(self.offset).long().expand(tuple(shape))[active]
        inside = touched.numel() == 0 or bool(((touched >= 0) & (touched < room)).all())
        require(inside, "an address outside its tensor's memory")
        return memory, touched, active
