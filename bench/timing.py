"""How two functions are compared fairly: in one process, in turns, by the median of their pairs.

A machine that slows down for a while slows both halves of a pair, so ratios survive it where times do
not.
"""

from __future__ import annotations

import datetime
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]


class Pairs(NamedTuple):
    """Seconds per call, one entry per pair."""

    ours: list[float]
    theirs: list[float]

    @property
    def ours_s(self) -> float:
        return statistics.median(self.ours)

    @property
    def theirs_s(self) -> float:
        return statistics.median(self.theirs)

    @property
    def speedup(self) -> float:
        """How many times as fast ours is: the median over pairs."""
        return statistics.median(b / a for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def extra_s(self) -> float:
        """Seconds a call of ours takes longer: the median over pairs."""
        return statistics.median(a - b for a, b in zip(self.ours, self.theirs, strict=True))


def compare(
    ours: Run, theirs: Run, *, pairs: int = 15, min_sample_s: float = 2e-3, budget_s: float = 30.0
) -> Pairs:
    """Time two functions in turns; which one goes first alternates.

    A sample repeats a function until it takes min_sample_s. At least 5 pairs; then `pairs` if budget_s
    allows, and more for short functions, until a second has passed.
    """
    repeats = [max(1, round(min_sample_s / max(_warm(run), 1e-9))) for run in (ours, theirs)]
    result = Pairs([], [])
    start = time.perf_counter()
    for i in itertools.count():
        elapsed_s = time.perf_counter() - start
        if i >= 5 and (elapsed_s > budget_s or (i >= pairs and elapsed_s > 1.0)):
            break
        halves = [(ours, repeats[0], result.ours), (theirs, repeats[1], result.theirs)]
        for run, n, times in halves if i % 2 == 0 else reversed(halves):
            times.append(_sample(run, n))
    return result


def environment() -> dict[str, Any]:
    """What a figure depends on, for the JSON beside it."""
    env: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        env["gpu"] = torch.cuda.get_device_name()
        env["cuda"] = torch.version.cuda
    return env


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _sample(run: Run, repeats: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeats


def _warm(run: Run) -> float:
    """Seconds of a call once everything is loaded and allocated."""
    _sample(run, 2)
    return _sample(run, 3)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
