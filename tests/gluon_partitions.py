"""Partitions of a kernel as threads that take turns, and what they have started, in an order drawn by a seed.

Exactly one thread or pending action moves at a time, so a seed is one interleaving and gives the same result
again. Everybody has a speed, from hardly ever to nearly always, redrawn now and then: orders in which one is
far behind or far ahead are where synchronisation fails, and a fair draw would not find them.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

SPEEDS = (0.001, 1.0, 1.0, 1000.0)
MOVES_AT_A_SPEED = 40


class SimulationError(AssertionError):
    """A kernel breaks a rule of the machine."""


class DeadlockError(SimulationError):
    """Nobody can move: what each partition waits for."""


class _AbandonedError(BaseException):
    """Unwinds the threads that are left when one has failed."""


@dataclass(eq=False)
class Partition:
    """Some warps of a program, in a thread of their own. ready: whether it may go on, None = it may."""

    name: str
    warps: int
    ready: Callable[[], bool] | None = None
    waits_for: Callable[[], str] | None = None
    finished: bool = False
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


@dataclass(eq=False)
class Pending:
    """Something that was started and happens at a time of its own. kind: what shares a speed."""

    kind: str
    act: Callable[[], None]
    ready: Callable[[], bool] | None = None


class Scheduler:
    """Runs one program."""

    def __init__(self, seed: object) -> None:
        self.pending: list[Pending] = []
        self._partitions: list[Partition] = []
        self._random = random.Random(str(seed))
        self._speeds: dict[str, float] = {}
        self._moves = 0
        self._local = threading.local()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._over = threading.Event()

    @property
    def current(self) -> Partition:
        """The partition whose thread this is."""
        partition: Partition = self._local.partition
        return partition

    def run(self, name: str, body: Callable[[], None], warps: int) -> None:
        """Run a program that starts as one partition, to its end.

        Raises:
            SimulationError: a rule is broken, nobody can move, or something is pending at the end; further,
            whatever a partition raises.
        """
        self.start(name, body, warps)
        self._hand_on()
        self._over.wait()
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def start(self, name: str, body: Callable[[], None], warps: int) -> Partition:
        """A new partition, which moves when its turn comes."""
        partition = Partition(name, warps)
        self._partitions.append(partition)
        thread = threading.Thread(target=self._thread, args=(partition, body), daemon=True)
        self._threads.append(thread)
        thread.start()
        return partition

    def pause(
        self, ready: Callable[[], bool] | None = None, waits_for: Callable[[], str] | None = None
    ) -> None:
        """Let others move; return when it is this partition's turn again and ready() holds."""
        me = self.current
        me.ready, me.waits_for = ready, waits_for
        following = self._following()
        if following is not me:
            self._wake(following)
            me.baton.acquire()
        if self._error is not None:
            raise _AbandonedError

    def _thread(self, partition: Partition, body: Callable[[], None]) -> None:
        self._local.partition = partition
        partition.baton.acquire()
        try:
            if self._error is None:
                body()
        except _AbandonedError:
            return
        except BaseException as error:
            self._error = self._error or error
        partition.finished = True
        self._hand_on()

    def _hand_on(self) -> None:
        self._wake(None if self._error is not None else self._following())

    def _wake(self, partition: Partition | None) -> None:
        if partition is not None:
            partition.baton.release()
            return
        for left in self._partitions:
            left.baton.release()
        self._over.set()

    def _following(self) -> Partition | None:
        """Whose turn it is, after what is pending and drawn before; None when all is over."""
        while True:
            awake = [p for p in self._partitions if not p.finished]
            if not awake:
                if self.pending and self._error is None:
                    kinds = sorted({x.kind for x in self.pending})
                    self._error = SimulationError(f"the program ends before its {', '.join(kinds)} does")
                return None
            able: list[Partition | Pending] = [p for p in awake if p.ready is None or p.ready()]
            able += [x for x in self.pending if x.ready is None or x.ready()]
            if not able:
                waits = "; ".join(f"{p.name} waits for {p.waits_for()}" for p in awake if p.waits_for)
                self._error = DeadlockError(f"nobody can move: {waits}")
                return None
            (drawn,) = self._random.choices(able, [self._speed(x) for x in able])
            self._moves += 1
            if self._moves % MOVES_AT_A_SPEED == 0:
                self._speeds.clear()
            if isinstance(drawn, Partition):
                drawn.ready = drawn.waits_for = None
                return drawn
            self.pending.remove(drawn)
            try:
                drawn.act()
            except Exception as error:
                self._error = error
                return None

    def _speed(self, x: Partition | Pending) -> float:
        key = x.name if isinstance(x, Partition) else x.kind
        if key not in self._speeds:
            self._speeds[key] = self._random.choice(SPEEDS)
        return self._speeds[key]
