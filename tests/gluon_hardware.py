"""What a Hopper multiprocessor does behind a Gluon kernel's back, at the worst possible time.

- A copy into shared memory poisons its target when it is issued and lands at a random time; a copy out of it
  reads at a random time before the wait for it.
- A warpgroup's product reads its operands in shared memory at a random time between its issue and the wait
  that retires it; those of one warpgroup in order. Its accumulator can be used after that wait only.
- An mbarrier counts arrivals and bytes, and knows only the parity of its phase. A named barrier counts
  threads.
- What a partition wrote to shared memory is seen by copies and products after its own fence only.

Not modelled: layouts, registers, the threads inside a partition, barriers that the compiler inserts, other
programs on the device at the same time, speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gluon_partitions import Partition, Pending, Scheduler, SimulationError

WARP = 32


def require(good: bool, what: str) -> None:
    """SimulationError unless good."""
    if not good:
        raise SimulationError(what)


def poison(x: Tensor) -> None:
    """What must not be read: NaN, or the largest integer."""
    x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)


class MBarrier:
    """Completes a phase when everybody has arrived and all bytes that were announced are there."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.parity = 0

    def arrive(self, count: int = 1) -> None:
        require(self.missing >= count, "more arrivals at an mbarrier than its count")
        self.missing -= count
        self._complete()

    def announce(self, n_bytes: int) -> None:
        self.bytes += n_bytes
        self.arrive()

    def receive(self, n_bytes: int) -> None:
        self.bytes -= n_bytes
        require(self.bytes >= 0 or self.missing > 0, "more bytes arrive at an mbarrier than were announced")
        self._complete()

    def _complete(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.parity ^= 1
            self.missing = self.count

    def __str__(self) -> str:
        return f"in parity {self.parity}, {self.missing} arrivals and {self.bytes} bytes missing"


@dataclass
class NamedBarrier:
    """How many threads have come, and how often it has been passed."""

    threads: int = 0
    generation: int = 0


@dataclass
class Allocation:
    """Shared memory as it was allocated. unfenced: by partition, which elements it wrote since its fence."""

    unfenced: dict[Partition, Tensor] = field(default_factory=dict)
    barriers: dict[int, MBarrier] = field(default_factory=dict)


class InFlight(Protocol):
    """A product of a warpgroup."""

    @property
    def done(self) -> bool: ...
    def finish(self) -> None: ...


class Block:
    """One program of a one-dimensional grid: its partitions, its shared memory, what is in flight."""

    def __init__(self, program: int, programs: int, seed: object) -> None:
        self.program, self.programs = program, programs
        self.scheduler = Scheduler(seed)
        self.allocations: list[Allocation] = []
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.products: dict[Partition, list[InFlight]] = {}
        self.stores: dict[Partition, list[Pending]] = {}

    def fence(self) -> None:
        """Copies and products see what this partition has written."""
        for allocation in self.allocations:
            allocation.unfenced.pop(self.scheduler.current, None)

    def named_barrier(self, number: int, threads: int, wait: bool) -> None:
        """bar.sync, or bar.arrive."""
        require(0 < number < 16, f"named barrier {number}: there are 1 ... 15, and 0 is everybody's")
        barrier = self.named_barriers.setdefault(number, NamedBarrier())
        barrier.threads += WARP * self.scheduler.current.warps
        require(barrier.threads <= threads, f"more than {threads} threads at named barrier {number}")
        before = barrier.generation
        if barrier.threads == threads:
            barrier.threads = 0
            barrier.generation += 1
        if wait:
            self.scheduler.pause(
                lambda: barrier.generation > before,
                lambda: f"named barrier {number}, {barrier.threads} of {threads} threads there",
            )
        else:
            self.scheduler.pause()

    def start_product(self, product: InFlight) -> None:
        in_flight = self.products.setdefault(self.scheduler.current, [])
        in_flight.append(product)
        kind = f"product of {self.scheduler.current.name}"

        def all_before_it() -> bool:
            return all(x.done for x in in_flight[: in_flight.index(product)])

        self.scheduler.pending.append(Pending(kind, product.finish, all_before_it))
        self.scheduler.pause()

    def wait_products(self, outstanding: int) -> None:
        """Retire the oldest ones until so many are left."""
        in_flight = self.products.setdefault(self.scheduler.current, [])
        oldest = in_flight[: max(len(in_flight) - outstanding, 0)]
        self.scheduler.pause(lambda: all(x.done for x in oldest), lambda: "products")
        del in_flight[: len(oldest)]

    def start_store(self, act: Callable[[], None]) -> None:
        pending = Pending("copy out of shared memory", act)
        self.stores.setdefault(self.scheduler.current, []).append(pending)
        self.scheduler.pending.append(pending)
        self.scheduler.pause()

    def wait_stores(self, outstanding: int) -> None:
        mine = self.stores.setdefault(self.scheduler.current, [])

        def left() -> int:
            return sum(x in self.scheduler.pending for x in mine)

        self.scheduler.pause(lambda: left() <= outstanding, lambda: f"copies out, {left()} left")
