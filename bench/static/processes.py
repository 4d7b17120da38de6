"""Compiling in several processes at once."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .report import Row


def in_processes(
    work: Callable[..., list[Row]],
    cases: Sequence[tuple[Any, ...]],
    jobs: int,
    remarks: Callable[[Row], Iterable[str]],
) -> list[Row]:
    """The rows of work(*case), in the order of the cases; says on stderr how far it is, with remarks."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        pending = {pool.submit(work, *case): case for case in cases}
        for done, future in enumerate(concurrent.futures.as_completed(pending), 1):
            name = " ".join(map(str, pending[future]))
            made = future.result()
            print(f"[{done}/{len(cases)}] {name}: {len(made)} kernels", file=sys.stderr)
            for row in made:
                for remark in remarks(row):
                    print(f"    {remark}", file=sys.stderr)
    return [row for future in pending for row in future.result()]
