"""The GPU lane survives what GPUs do to it: hangs, failures, running out of time. No GPU needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from undivided.bench import command, gpu, gpu_tests, lane, results, roofs, shapes
from undivided.conformance import command as check_command
from undivided.kernels import evidence

CPU = torch.device("cpu")
TRITON, FALLBACK = (f"tests/test_implementations.py::test_it[{name}]" for name in ("triton", "fallback"))
GENERAL = "tests/test_api.py::test_empty_problems"
TESTS = (TRITON, FALLBACK, GENERAL, "tests/test_dropout.py::test_bits[reference]")


def python(name: str, code: str, seconds: float = 20.0) -> lane.Task:
    return lane.Task(name, [sys.executable, "-c", code], seconds)


def test_every_end_of_a_task_is_noted(tmp_path: Path) -> None:
    """A hang, with a child of its own, must cost its time-out and no more, and keep what was printed."""
    hang = "import subprocess, sys; print('{\"a\": 1}', flush=True); subprocess.run(['sleep', '60'])"
    tasks = [
        python("good", "print('{\"tflops\": 2}'); print('{half a rec')"),
        python("bad", "raise SystemExit('no such kernel')"),
        python("hang", hang, seconds=1.5),
    ]
    assert lane.run(tasks, tmp_path / "journal", seconds=60)
    good, bad, hung = lane.journal_of(tmp_path / "journal")
    assert (good.status, good.records) == ("passed", [{"tflops": 2}])
    assert (bad.status, "no such kernel" in bad.tail) == ("failed", True)
    assert (hung.status, hung.records) == ("timed out", [{"a": 1}])
    assert hung.seconds < 10


def test_a_later_call_goes_on(tmp_path: Path) -> None:
    """What is done is not done again; what did not fit is done at the next call."""
    note = tmp_path / "runs"
    count = f"open({str(note)!r}, 'a').write('x')"
    journal = tmp_path / "journal"
    one = python("one", count, seconds=4)
    assert lane.run([one], journal, seconds=60)
    slow = python("slow", "import time; time.sleep(1.2)", seconds=3)
    assert not lane.run([one, slow, python("two", count, seconds=4)], journal, seconds=4.5)
    assert [outcome.name for outcome in lane.journal_of(journal)] == ["one", "slow"]
    assert lane.run([one, slow, python("two", count)], journal, seconds=60)
    assert note.read_text() == "xx"


def test_a_budget_below_a_time_out_is_refused() -> None:
    """It would say "call again" for ever."""
    with pytest.raises(ValueError, match="slow may take 100 s"):
        lane.require([python("slow", "", seconds=100)], seconds=50)


def test_tasks_cover_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.hopper, "machine_reasons", lambda device: ())
    names = [task.name for task in gpu.tasks()]
    swept = {name.removeprefix("sweep/") for name in names if name.startswith("sweep/")}
    assert swept == {*shapes.SHAPES, "modes"}
    assert {name.split("/")[1] for name in names if name.startswith("check/")} == set(gpu_tests.KERNELS)
    assert len(names) == len(set(names))


def test_conformance_is_asked_of_the_kernels_in_full(tmp_path: Path) -> None:
    """Of the fallback, at the level quick or without a dtype of theirs, it would show less than it says."""
    parser = argparse.ArgumentParser()
    check_command.add_arguments(parser)
    asked = set()
    for task in gpu.checks("triton", tmp_path):
        assert task.command[1:4] == ["-m", "undivided", "check"]
        options = parser.parse_args(task.command[4:])
        assert (options.impl, options.level, options.device, options.only) == ("triton", "full", "cuda", "")
        assert options.json.parent == options.html.parent == tmp_path
        asked |= {check_command.NAMES[dtype] for dtype in options.dtype}
    assert asked == {torch.float16, torch.bfloat16, torch.float32}


def test_launch_modes_are_measured_in_every_direction() -> None:
    """Compiled and in CUDA graphs, forward, backward and both, where calls are short."""
    (modes,) = (task for task in gpu.tasks("sweep") if task.name == "sweep/modes")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(modes.command[4:])
    assert options.peers == ["undivided", "undivided-compiled", "undivided-graph"]
    assert set(options.direction) == set(roofs.DIRECTIONS)
    assert any(shapes.SHAPES[name].decode for name in options.shape)


@pytest.mark.parametrize("part", ["sweep", "tune"])
def test_the_lane_gives_orders_that_the_command_takes(part: str) -> None:
    """A renamed option would be found when a GPU is there for ten minutes."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for task in gpu.tasks(part):
        assert task.command[1:4] == ["-m", "undivided", "bench"]
        options = parser.parse_args(task.command[4:])
        assert options.lines
        assert options.tune or command.points(options, torch.device("cpu"))


def test_results_and_table(tmp_path: Path) -> None:
    """The committed file says where it ran; a figure keeps its case, direction and implementation."""
    record = {"case": "hd128", "dtype": "bfloat16", "direction": "forward", "implementation": "undivided"}
    record |= {"status": "timed", "tflops": 123.4, "host_us": 56.7}
    outcomes = [
        lane.Outcome("check/triton/float16", "passed", 1.0, "3 passed", []),
        lane.Outcome("sweep/hd128", "timed out", 1.0, "noise", [record]),
    ]
    wrong = gpu_tests.Verdict("tests/test_x.py::test_y", "failed", 1.5, "C = 3", "")
    standing = gpu_tests.Standing(["a", "b"], ["c"], [wrong], ["d"], ["a"])
    path = gpu.write(outcomes, standing, True, gpu.environment(), tmp_path)
    document = json.loads(path.read_text())
    assert {"gpu", "architecture", "torch", "triton", "date"} <= document["environment"].keys()
    assert document["sweep"][0]["records"] == [record]
    told = {"test": "tests/test_x.py::test_y", "seconds": 1.5, "tail": "C = 3"}
    assert document["tests"] == {"passed": 2, "skipped": 1, "failed": [told], "left": 1, "unsteady": ["a"]}
    assert "123.4" in gpu.table(outcomes)
    assert "56.7" in gpu.table(outcomes, "host_us", "host µs")
    assert [found.tflops for found in results.read(gpu.sweep_beside(path)).records] == [123.4]


class TestEvidence:
    """What kernels/evidence.json says of a GPU is what was shown there, and no more."""

    @pytest.fixture(autouse=True)
    def _machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """What the lane asks of a machine with a GPU; files go to a folder of their own."""
        self.where = {**gpu.environment(), "gpu": "NVIDIA H300", "architecture": "sm_95", "triton": "9.9.0"}
        self.failing: set[str] = set()
        self.left: set[str] = set()
        self.budgets: dict[str, float] = {}
        self.out, self.work = tmp_path / "out", tmp_path / "work"
        self.out.mkdir()
        file = tmp_path / "evidence.json"
        file.write_text("[]")
        evidence.records.cache_clear()
        with monkeypatch.context() as patches:
            patches.delenv("TRITON_INTERPRET", raising=False)
            patches.setenv("OUT", str(self.out))
            patches.setattr(torch.cuda, "is_available", lambda: True)
            patches.setattr(gpu, "environment", lambda: self.where)
            patches.setattr(gpu, "RESULTS", tmp_path / "results")
            patches.setattr(gpu.hopper, "machine_reasons", lambda device: ("not a Hopper GPU",))
            patches.setattr(evidence, "_FILE", file)
            patches.setattr(lane, "perform", self.perform)
            yield
        evidence.records.cache_clear()

    def perform(self, task: lane.Task) -> lane.Outcome:
        self.budgets[task.name] = task.seconds
        if task.name == "tests":
            journal = gpu_tests.Journal(Path(task.command[task.command.index("--gpu-journal") + 1]))
            journal.begin(TESTS)
            for test in sorted(set(TESTS) - self.left):
                journal.add(test, "failed" if test in self.failing else "passed", 1.0)
        return lane.Outcome(task.name, "failed" if task.name in self.failing else "passed", 1.0, "", [])

    def go(self, *arguments: str) -> int:
        return gpu.main(["--work", str(self.work), *arguments])

    def test_a_complete_pass_is_recorded(self) -> None:
        assert self.go("--only", "tests") == 0
        assert evidence.state_of("triton", "sm_95", "9.9.0") == "run natively"
        assert evidence.state_of("triton", "sm_95", "9.9.1") == evidence.NO_EVIDENCE
        assert evidence.state_of("fallback", "sm_95") == "run natively"
        assert {entry.source for entry in evidence.records()} == {
            f"bench/results/nvidia-h300-{self.where['date']}.json"
        }
        assert (self.out / "evidence.json").read_text() == evidence._FILE.read_text()

    def test_a_failure_in_the_sweep_is_another_matter(self) -> None:
        self.failing = {f"sweep/{next(iter(shapes.SHAPES))}"}
        assert self.go() == 1
        assert evidence.state_of("triton", "sm_95", "9.9.0") == "run natively"

    @pytest.mark.parametrize("is_hopper", [False, True])
    def test_conformance_is_evidence_for_the_kernels_alone(
        self, is_hopper: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And of those for GPUs of another kind nothing is asked."""
        if is_hopper:
            monkeypatch.setattr(gpu.hopper, "machine_reasons", lambda device: ())
        assert self.go("--only", "check") == 0
        assert [(x.implementation, x.architecture, x.triton, x.state) for x in evidence.records()] == [
            (implementation, "sm_95", "9.9.0", "run natively")
            for implementation in (("gluon", "triton") if is_hopper else ("triton",))
        ]

    @pytest.mark.parametrize("failing", ["check/triton/float16", *TESTS])
    def test_what_is_wrong_somewhere_has_no_evidence(self, failing: str) -> None:
        """The other half's passing must not outweigh it, unless another implementation was wrong."""
        self.failing = {failing}
        assert self.go() == 1
        is_shown = evidence.state_of("triton", "sm_95", "9.9.0") == "run natively"
        assert is_shown == ("fallback" in failing or "reference" in failing)

    def test_an_implementation_that_no_test_names_was_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One for GPUs of another kind skips its tests."""
        names = (*gpu.IMPLEMENTATIONS, "other")
        monkeypatch.setattr(gpu, "IMPLEMENTATIONS", names)
        assert self.go("--only", "tests") == 0
        assert {entry.implementation for entry in evidence.records()} == {"reference", "fallback", "triton"}

    def test_a_test_without_an_answer_is_asked_at_the_next_call(self) -> None:
        self.left = {GENERAL}
        assert self.go("--only", "tests", "--minutes", "3") == gpu.CALL_AGAIN
        assert evidence.records() == ()
        self.left = set()
        assert self.go("--only", "tests") == 0
        assert evidence.records()

    def test_a_failure_counts_before_the_last_answer(self) -> None:
        """Conformance passed; the suite, not through yet, says otherwise."""
        self.failing, self.left = {TRITON}, {FALLBACK}
        assert self.go() == gpu.CALL_AGAIN
        assert not {"triton", "fallback"} & {entry.implementation for entry in evidence.records()}

    def test_kernels_need_not_wait_for_tests_of_others(self) -> None:
        """Minutes that ended when all tests of the kernels had passed."""
        self.left = {FALLBACK}
        assert self.go("--only", "tests") == gpu.CALL_AGAIN
        ran = {entry.implementation for entry in evidence.records()}
        assert "triton" in ran
        assert "fallback" not in ran

    def test_tests_leave_time_for_what_else_is_asked(self) -> None:
        self.go("--only", "tests", "--minutes", "3")
        assert self.budgets["tests"] == 180
        self.go("--fresh", "--minutes", "8")
        assert self.budgets["tests"] == 480 - gpu.CASE_SECONDS

    def test_a_time_too_short_for_any_task_is_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.go("--minutes", "1")
        assert "--minutes 1 is too short" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [(), ("--only", "sweep")])
    def test_anything_less_is_not(self, arguments: tuple[str, ...]) -> None:
        """One test that failed, or tests that were not run."""
        self.failing = {GENERAL}
        self.go(*arguments)
        assert evidence.records() == ()

    def test_what_another_gpu_passed_does_not_count(self) -> None:
        assert self.go("--only", "tests") == 0
        self.where["architecture"] = "sm_96"
        assert self.go("--only", "sweep") == 0
        assert evidence.state_of("triton", "sm_96", "9.9.0") == evidence.NO_EVIDENCE

    def test_the_interpreter_shows_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(SystemExit):
            self.go()
