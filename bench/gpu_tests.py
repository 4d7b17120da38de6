"""The suite on a GPU: which tests, what became of each, and one run of pytest over those that are left.

Compiling kernels is what takes the time there, so there are as many processes as CPUs. gpu_plugin.py,
inside pytest, writes the journal as tests finish: a run that is killed loses what it was in the middle of.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.spec import IMPLEMENTATIONS
from . import lane
from .environment import ROOT

KERNELS = tuple(name for name in IMPLEMENTATIONS if name not in ("reference", "fallback"))
"""The implementations that are compiled for a GPU."""

# A file in which the device plays a part: its tests take the fixture, or it chooses one itself. The others
# are about the house, pages, reports, commands, or compute on the CPU wherever they run.
_ON_DEVICE = re.compile(r'\bdevice: torch\.device\b|torch\.device\("cuda" if ')
_TEST_SECONDS = 150  # a hang costs a worker no more
_GRACE_SECONDS = 15.0  # for tests under way when the time is over
_PYTEST_ENDED = (0, 1, 2, 5)  # all passed, some failed, out of time, nothing left


class Verdict(NamedTuple):
    """What became of a test. tail: of its failure; sources: what it was a test of (`Sources`)."""

    test: str
    status: str  # "passed", "failed", "skipped"
    seconds: float
    tail: str
    sources: str


class Standing(NamedTuple):
    """The suite as far as it got with the present sources; of a test that was asked twice, the last answer.

    left: tests without an answer, None before they were counted; unsteady: those that passed and failed.
    """

    passed: list[str]
    skipped: list[str]
    failed: list[Verdict]
    left: list[str] | None
    unsteady: list[str]

    @property
    def complete(self) -> bool:
        """Whether every test has an answer."""
        return self.left == []

    def __str__(self) -> str:
        left = "an unknown number" if self.left is None else len(self.left)
        return (
            f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped, {left} left"
        )


class Sources:
    """What an answer depends on: all of kernels/, and the file that the test is in.

    But the kernels for Hopper matter only to tests that name them, and to those that name none.
    What a test passed with other kernels, or when it was another test, says nothing. Other sources do not
    count (of the cases in conformance/, say): `--fresh` is for them.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        kernels = sorted(root.glob("kernels/**/*.py"))
        self._kernels = _digest([x for x in kernels if x.parent.name != "gluon" and x.name != "hopper.py"])
        self._all_kernels = _digest(kernels)
        self.of = functools.cache(self._of)

    def _of(self, test: str) -> str:
        kernels = self._all_kernels if "hopper" in test or concerns(test, "gluon") else self._kernels
        return kernels + _digest([self._root / test.partition("::")[0]])

    @property
    def whole(self) -> str:
        """Of the kernels and of all files of tests."""
        return self._kernels + _digest(files(self._root))


class Journal:
    """Lines of JSON: which tests a run of pytest is going to ask, then the answers."""

    def __init__(self, path: Path, root: Path = ROOT) -> None:
        self.path = path
        self._sources = Sources(root)

    def begin(self, tests: Iterable[str]) -> None:
        """Note what is to be asked."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append({"asking": list(tests), "sources": self._sources.whole})

    def add(self, test: str, status: str, seconds: float, tail: str = "") -> None:
        """Note an answer."""
        self._append(Verdict(test, status, round(seconds, 2), tail, self._sources.of(test))._asdict())

    def standing(self) -> Standing:
        """What the journal says of the present sources."""
        verdicts: dict[str, Verdict] = {}
        seen: dict[str, set[str]] = {}
        asked: set[str] = set()
        left: dict[str, None] | None = None
        for entry in self._entries():
            if "asking" in entry:
                is_ours = entry["sources"] == self._sources.whole
                left = dict.fromkeys(entry["asking"]) if is_ours else None
                asked = set(left or ())
            elif entry["sources"] == self._sources.of(entry["test"]):
                verdict = Verdict(**entry)
                verdicts[verdict.test] = verdict
                seen.setdefault(verdict.test, set()).add(verdict.status)
                if left is not None:
                    left.pop(verdict.test, None)
        by_status = {
            status: [verdict for verdict in verdicts.values() if verdict.status == status]
            for status in ("passed", "skipped", "failed")
        }
        return Standing(
            passed=[verdict.test for verdict in by_status["passed"]],
            skipped=[verdict.test for verdict in by_status["skipped"]],
            # What failed is asked again: if it was not, there is no such test any more.
            failed=[verdict for verdict in by_status["failed"] if left is None or verdict.test in asked],
            left=None if left is None else list(left),
            unsteady=[test for test, statuses in seen.items() if statuses >= {"passed", "failed"}],
        )

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(entry))  # first, so that half a line stays by itself

    def _entries(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # empty, or the last of a run that was killed
                continue


def files(root: Path = ROOT) -> list[Path]:
    """The files of tests in which the device plays a part."""
    return [file for file in sorted(root.glob("tests/test_*.py")) if _ON_DEVICE.search(file.read_text())]


def speaks_of(test: str, implementation: str) -> bool:
    """Whether an answer of that test is about that implementation: its name stands in the test's."""
    return implementation in test


def concerns(test: str, implementation: str) -> bool:
    """Whether that test must have passed before anything is said of that implementation: it speaks of it, or
    of none."""
    return speaks_of(test, implementation) or not any(speaks_of(test, name) for name in IMPLEMENTATIONS)


def proceed(journal: Journal, seconds: float) -> Standing:
    """Ask, within `seconds`, what has not passed yet."""
    standing = journal.standing()
    if standing.complete and not standing.failed:
        return standing
    outcome = run(journal.path, seconds)
    if outcome.status == "failed":
        print(outcome.tail)
    standing = journal.standing()
    print(f"{'tests':10} {outcome.seconds:6.1f} s  {standing}", flush=True)
    return standing


def run(journal: Path, seconds: float, root: Path = ROOT, workers: int | None = None) -> lane.Outcome:
    """One run of pytest, killed after `seconds`; "failed" means that it could not do its work."""
    until = time.time() + max(seconds - _GRACE_SECONDS, seconds / 2)
    return lane.perform(
        lane.Task("tests", command(journal, until, root, workers), seconds, passing=_PYTEST_ENDED)
    )


def command(journal: Path, until: float, root: Path = ROOT, workers: int | None = None) -> list[str]:
    """pytest with the plugin; until: the time at which to end."""
    options = [
        *("-c", str(root / "pyproject.toml"), "-p", "no:cacheprovider"),
        *("-q", "--tb=short", "--disable-warnings"),
        *("-p", "undivided.bench.gpu_plugin", "--gpu-journal", str(journal), "--gpu-until", str(until)),
        *("--continue-on-collection-errors", "-m", "not full and not compile"),
    ]
    is_parallel = find_spec("xdist") is not None
    if is_parallel:
        # In small portions, so that tests are asked in the plugin's order; a new worker for each that dies.
        options += ["-n", str(workers or os.cpu_count() or 1), "--dist", "load", "--maxschedchunk", "1"]
        options += ["--max-worker-restart", "10000"]
    if find_spec("pytest_timeout") is not None:
        # A kernel that hangs hears no signal; the other method ends the process, which may only be a worker.
        options += [
            "--timeout",
            str(_TEST_SECONDS),
            "--timeout-method",
            "thread" if is_parallel else "signal",
        ]
    return [sys.executable, "-m", "pytest", *options, *map(str, files(root))]


def _digest(sources: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sources:
        digest.update(file.name.encode() + b"\0" + (file.read_bytes() if file.exists() else b"") + b"\0")
    return digest.hexdigest()[:12]
