"""How functions are compared fairly: in one process, in turns, by the median over turns.

A machine that slows down for a while slows every member of a turn, so ratios survive it where times do
not. On a GPU there are two figures: the device's time of a call, and the host's, until the call returns.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]
Samples = dict[str, list[float]]
"""Seconds per call by name, one entry per turn."""

CPU = torch.device("cpu")
FLUSH_BYTES = 256 * 2**20  # several times any GPU's L2
FEWEST_TURNS = 5
LONGEST_HOST_S = 5e-3
"""A call that keeps the host longer, if only because it waits for the GPU, cannot be queued as a whole."""
LEAST_BUSY_S = 1e-4
CYCLES_PER_S = 3e9  # no GPU has a faster clock, so none is busy for less than was asked
TRIES, HOST_CALLS = 3, 5


class Spread(NamedTuple):
    """20th, 50th and 80th percentile, interpolated linearly between samples."""

    p20: float
    median: float
    p80: float


def spread(samples: list[float]) -> Spread:
    """Where three fifths of the samples lie."""
    low, _, _, high = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(low, statistics.median(samples), high)


def in_turns(
    runs: Mapping[str, Run],
    device: torch.device = CPU,
    *,
    turns: int = 15,
    min_sample_s: float = 2e-3,
    budget_s: float = 30.0,
) -> Samples:
    """Time functions in turns; who goes first rotates.

    A sample repeats a function until it takes min_sample_s; on a GPU it is the device's time of one call,
    between events, after the L2 cache was flushed; the host's is in it only where `host_s` is more than
    LONGEST_HOST_S. At least 5 turns; then `turns` if budget_s allows, and more for short functions, until a
    second has passed.
    """
    repeats = {name: _repeats(run, device, min_sample_s) for name, run in runs.items()}
    sample = _on_gpu(device, _busy_s(runs.values())) if device.type == "cuda" else _on_host
    samples: Samples = {name: [] for name in runs}
    order = list(runs)
    start = time.perf_counter()
    for turn in itertools.count():
        elapsed_s = time.perf_counter() - start
        if turn >= FEWEST_TURNS and (elapsed_s > budget_s or (turn >= turns and elapsed_s > 1.0)):
            return samples
        first = turn % max(1, len(order))
        for name in order[first:] + order[:first]:
            samples[name].append(sample(runs[name], repeats[name]))
    raise AssertionError("unreachable: the loop ends by its budget")


def speedup(samples: Samples, ours: str = "ours", theirs: str = "theirs") -> float:
    """How many times as fast ours is: the median over turns."""
    return statistics.median(b / a for a, b in zip(samples[ours], samples[theirs], strict=True))


def extra_s(samples: Samples, ours: str = "ours", theirs: str = "theirs") -> float:
    """Seconds a call of ours takes longer: the median over turns."""
    return statistics.median(a - b for a, b in zip(samples[ours], samples[theirs], strict=True))


def host_s(run: Run) -> float:
    """Seconds until a call returns while a GPU is busy with something else: the median of a few.

    At least LONGEST_HOST_S if it waits for the GPU. The call is one that was made before: nothing is left to
    compile.
    """
    taken = []
    for _ in range(HOST_CALLS):
        synchronize()
        _keep_busy(LONGEST_HOST_S)
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    synchronize()
    return statistics.median(taken)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _repeats(run: Run, device: torch.device, min_sample_s: float) -> int:
    """Calls that make a sample, once everything is loaded, compiled and allocated."""
    _on_host(run, 1)
    if device.type == "cuda" or _on_host(run, 1) > min_sample_s:
        return 1
    return max(1, round(min_sample_s / max(_on_host(run, 3), 1e-9)))


def _on_host(run: Run, repeats: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeats


def _keep_busy(seconds: float) -> None:
    """Give the GPU something to do for at least so long; the host goes on."""
    torch.cuda._sleep(round(seconds * CYCLES_PER_S))


def _busy_s(runs: Iterable[Run]) -> float:
    """How long a GPU must be busy for the host to queue any of the calls, twice over; the same for each,
    since a GPU that has rested is a faster one. Calls that cannot be queued have no say."""
    longest = max((taken for taken in map(host_s, runs) if taken < LONGEST_HOST_S), default=0.0)
    return LEAST_BUSY_S + 2 * longest


def _on_gpu(device: torch.device, busy_s: float) -> Callable[[Run, int], float]:
    """Samples of the device's time: the GPU comes to a call once the host has queued all of it."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def sample(run: Run, repeats: int) -> float:
        for _ in range(TRIES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            _keep_busy(busy_s)
            begin.record()
            for _ in range(repeats):
                run()
            end.record()
            was_queued = not begin.query()
            end.synchronize()
            if was_queued:  # else the host was held up, and the GPU waited for it
                break
        return float(begin.elapsed_time(end)) * 1e-3 / repeats

    return sample
