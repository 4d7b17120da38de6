"""A plugin for pytest: asks first what GPUs are needed for, notes every answer, ends in time.

For gpu_tests.py. With pytest-xdist the workers ask and the process above them, which alone sees a worker
die, writes the journal. Nothing here imports triton: tests/conftest.py decides how before.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from . import gpu_tests

TAIL = 2000  # characters of a failure that the journal keeps
_CACHE_BYTES = 2**30  # what a process may keep for itself: all share one GPU
_BEFORE = pytest.StashKey[
    dict[str, str]
]()  # what earlier runs answered; workers that start later see the same


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU lane")
    group.addoption("--gpu-journal", help="the file for answers")
    group.addoption("--gpu-until", type=float, help="start no test after this time")


def pytest_configure(config: pytest.Config) -> None:
    if _is_worker(config):
        config.stash[_BEFORE] = config.workerinput["before"]  # type: ignore[attr-defined]
        torch.set_num_threads(1)
        return
    journal = gpu_tests.Journal(Path(config.getoption("gpu_journal")), config.rootpath)
    before = journal.standing()
    config.stash[_BEFORE] = {
        **dict.fromkeys(before.passed, "passed"),
        **dict.fromkeys(before.skipped, "skipped"),
        **{verdict.test: verdict.status for verdict in before.failed},
    }
    config.pluginmanager.register(Recorder(journal))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of pytest-xdist: what a worker is told."""
    node.workerinput["before"] = node.config.stash[_BEFORE]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What has not passed: what concerns kernels first, last what was asked before; else as chance has it.

    An early end then is a fair sample.
    """
    before = config.stash[_BEFORE]

    def turn(item: pytest.Item) -> tuple[bool, bool, int]:
        is_kernel = any(gpu_tests.concerns(item.nodeid, name) for name in gpu_tests.KERNELS)
        return item.nodeid in before, not is_kernel, zlib.crc32(item.nodeid.encode())

    passed = [item for item in items if before.get(item.nodeid) == "passed"]
    if passed:
        config.hook.pytest_deselected(items=passed)
    items[:] = sorted((item for item in items if before.get(item.nodeid) != "passed"), key=turn)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    """What a kernel did wrong is found at the next synchronisation: let that be in the same test."""
    result = yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """After a fault of the GPU the process is of no use any more; pytest-xdist starts another."""
    result = yield
    if _context_is_broken():
        if _is_worker(item.config):
            os._exit(3)
        item.session.shouldstop = "the GPU refuses this process after a fault"
    elif torch.cuda.is_initialized() and torch.cuda.memory_reserved() > _CACHE_BYTES:
        torch.cuda.empty_cache()
    if time.time() > item.config.getoption("gpu_until"):
        item.session.shouldstop = "the time is over"
    return result


class Recorder:
    """Writes the journal: one line for each test, once it is over or its worker died."""

    def __init__(self, journal: gpu_tests.Journal) -> None:
        self._journal = journal
        self._has_begun = False
        self._uncollected: dict[str, str] = {}
        self._phases: dict[str, list[pytest.TestReport]] = {}
        self._failed: set[str] = set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._uncollected[report.nodeid] = report.longreprtext

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._begin(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._begin([item.nodeid for item in session.items])

    def _begin(self, tests: Sequence[str]) -> None:
        if self._has_begun:  # by another worker
            return
        self._has_begun = True
        self._journal.begin([*tests, *self._uncollected])
        for file, text in self._uncollected.items():
            self._journal.add(file, "failed", 0.0, text[-TAIL:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._phases.setdefault(report.nodeid, []).append(report)
        if report.when in ("setup", "call"):
            return
        # "teardown", or what pytest-xdist says of a test whose worker died, maybe after all of that.
        phases = self._phases.pop(report.nodeid)
        if report.nodeid in self._failed:
            return
        status = next((s for s in ("failed", "skipped") if any(p.outcome == s for p in phases)), "passed")
        tail = "\n".join(phase.longreprtext for phase in phases if phase.failed)[-TAIL:]
        if status == "failed":
            self._failed.add(report.nodeid)
        self._journal.add(report.nodeid, status, sum(phase.duration for phase in phases), tail)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _context_is_broken() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
