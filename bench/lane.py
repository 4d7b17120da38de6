"""Tasks in processes of their own, each with a time-out, noted in a journal so that a later call goes on.

For machines that are there for minutes at a time, and for kernels that may hang: a hang ends one task.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TAIL = 4000  # characters of output that the journal keeps


class Task(NamedTuple):
    """A command that may take `seconds`; it passed if its exit status is among `passing`."""

    name: str
    command: Sequence[str]
    seconds: float
    passing: tuple[int, ...] = (0,)


class Outcome(NamedTuple):
    """What became of a task. records: the lines of its output that are JSON objects."""

    name: str
    status: str  # "passed", "failed", "timed out"
    seconds: float
    tail: str
    records: list[dict[str, Any]]


def journal_of(path: Path) -> list[Outcome]:
    """The tasks that are done."""
    return [Outcome(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def require(tasks: Iterable[Task], seconds: float) -> None:
    """A budget in which each of them can start.

    Raises:
        ValueError: a task that `run` would never start within `seconds`.
    """
    for task in tasks:
        if task.seconds > seconds:
            raise ValueError(f"{task.name} may take {task.seconds:.0f} s, the budget is {seconds:.0f} s")


def run(tasks: Iterable[Task], journal: Path, seconds: float) -> bool:
    """Run what the journal does not name yet, within `seconds`; whether everything is done.

    A task starts only if its whole time-out still fits, so none is cut short by the budget.
    """
    end = time.monotonic() + seconds
    done = {outcome.name for outcome in journal_of(journal)}
    journal.parent.mkdir(parents=True, exist_ok=True)
    complete = True
    for task in tasks:
        if task.name in done:
            continue
        if time.monotonic() + task.seconds > end:
            complete = False
            continue
        outcome = perform(task)
        with journal.open("a") as file:
            file.write(json.dumps(outcome._asdict()) + "\n")
        print(f"{outcome.status:10} {outcome.seconds:6.1f} s  {task.name}", flush=True)
    return complete


def perform(task: Task) -> Outcome:
    """Run one task; past its time-out, its whole process group is killed."""
    start = time.monotonic()
    process = subprocess.Popen(
        task.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=task.seconds)
        status = "passed" if process.returncode in task.passing else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "timed out"
    elapsed = round(time.monotonic() - start, 1)
    return Outcome(task.name, status, elapsed, output[-TAIL:], _records(output))


def _records(output: str) -> list[dict[str, Any]]:
    records = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a killed process
                continue
    return records
