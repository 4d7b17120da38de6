"""The suite on a GPU goes on test by test, whatever ends a run. Shown on a small suite; no GPU needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from undivided.bench import gpu_tests, lane
from undivided.bench.gpu_tests import Journal, Standing

TAKES = "device: " + "torch.device"  # in one piece it would make this file one of those that are asked
CONFTEST = """
import pathlib, pytest, torch

@pytest.fixture
def device(request):
    with open("asked", "a") as file:  # in a write of its own: there are several processes
        file.write(request.node.name + "\\n")
    return torch.device("cpu")

@pytest.fixture
def is_mended():
    return pathlib.Path("mended").exists()
"""
PLAIN = f"""
import pytest, torch

@pytest.mark.parametrize("i", range(6))
def test_fallback(i: int, {TAKES}) -> None:
    pass
"""
WRONG = f"""
import os, pytest, torch

@pytest.mark.parametrize("impl", ["triton"])
def test_wrong(impl, {TAKES}, is_mended) -> None:
    assert is_mended, "C = 17.5"

def test_crash({TAKES}, is_mended) -> None:
    if not is_mended:
        os._exit(11)

def test_fault({TAKES}, is_mended, monkeypatch) -> None:
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    if not is_mended:
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

def test_skip({TAKES}) -> None:
    pytest.skip("no such GPU")

@pytest.mark.full
def test_full({TAKES}) -> None:
    assert False
"""
UNREADABLE = f"import no_such_module  # {TAKES}"
HOUSE = "def test_house() -> None:\n    assert False"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A house with a kernel and a suite."""
    settings = '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\nmarkers = ["full", "compile"]'
    contents = {
        "pyproject.toml": settings,
        "kernels/triton/forward.py": "",
        "tests/conftest.py": CONFTEST,
        "tests/test_fallback.py": PLAIN,
        "tests/test_house.py": HOUSE,
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return tmp_path


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is without pytest-xdist."""
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)


def ask(root: Path, seconds: float = 100.0) -> Standing:
    outcome = gpu_tests.run(root / "work" / "journal", seconds, root, workers=2)
    assert outcome.status == "passed", outcome.tail
    return Journal(root / "work" / "journal", root).standing()


def asked(root: Path) -> list[str]:
    """The tests that were run since the last time."""
    names = (root / "asked").read_text().split()
    (root / "asked").unlink()
    return sorted(names)


PLAINS = [f"test_fallback[{i}]" for i in range(6)]


def test_every_end_of_a_test_is_noted(root: Path) -> None:
    """A failure, a worker that died, a fault of the GPU after a test passed: each could hide others."""
    (root / "tests" / "test_wrong.py").write_text(WRONG)
    (root / "tests" / "test_unreadable.py").write_text(UNREADABLE)
    first = ask(root)
    assert len(first.passed) == 6
    assert first.skipped == ["tests/test_wrong.py::test_skip"]
    assert first.complete
    failed = {verdict.test: verdict.tail for verdict in first.failed}
    words = {
        "tests/test_unreadable.py": "no_such_module",
        "tests/test_wrong.py::test_wrong[triton]": "C = 17.5",
        "tests/test_wrong.py::test_crash": "crashed",
        "tests/test_wrong.py::test_fault": "an illegal memory access",
    }
    assert failed.keys() == words.keys()
    for test, word in words.items():
        assert word in failed[test]
    assert asked(root) == ["test_crash", *PLAINS, "test_fault", "test_skip", "test_wrong[triton]"]

    (root / "mended").touch()
    (root / "tests" / "test_unreadable.py").unlink()
    second = ask(root)
    # What passed is not asked again; what was skipped might be possible now.
    assert asked(root) == ["test_crash", "test_fault", "test_skip", "test_wrong[triton]"]
    assert second.complete
    assert second.failed == []
    assert len(second.passed) == 9
    assert sorted(second.unsteady) == sorted(words.keys() - {"tests/test_unreadable.py"})


@pytest.mark.usefixtures("one_process")
def test_answers_for_other_sources_do_not_count(root: Path) -> None:
    """Other kernels: everything is asked again; another file of tests: what is in it.

    Kernels come first, or an early end would leave them out, and what failed last.
    """
    path, tiny = root / "work" / "journal", root / "tests" / "test_triton_tiny.py"
    tiny.write_text(PLAIN.replace("pass", "assert i != 2"))
    assert len(ask(root).passed) == 11
    plain = root / "tests" / "test_fallback.py"
    plain.write_text(PLAIN + "\n")
    edited = Journal(path, root).standing()
    assert (len(edited.passed), len(edited.failed), edited.left) == (5, 1, None)
    asked(root)
    assert len(ask(root).passed) == 11
    assert asked(root) == sorted([*PLAINS, "test_fallback[2]"])
    first, second = (json.loads(line)["asking"] for line in path.read_text().splitlines() if "asking" in line)
    assert ["triton" in test for test in first] == [True] * 6 + [False] * 6
    assert first != sorted(first)
    assert ["triton" in test for test in second] == [False] * 6 + [True]

    (root / "kernels" / "triton" / "forward.py").write_text("BLOCK = 64")
    assert Journal(path, root).standing() == Standing([], [], [], None, [])


def test_a_killed_run_goes_on(root: Path) -> None:
    """What had an answer keeps it, half a line spoils nothing, what was being asked is asked again."""
    hang = f"import time, torch\n\ndef test_hang({TAKES}, is_mended) -> None:\n"
    (root / "tests" / "test_hang.py").write_text(hang + "    time.sleep(0 if is_mended else 600)")
    path = root / "work" / "journal"
    command = gpu_tests.command(path, time.time() + 600, root, workers=2)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while not (path.exists() and '"passed"' in path.read_text()) and time.monotonic() < end:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = Journal(path, root).standing()
    assert first.passed
    assert first.failed == []
    assert "tests/test_hang.py::test_hang" in (first.left or ())
    with path.open("a") as file:
        file.write('\n{"test": "tests/test_pl')
    (root / "mended").touch()
    asked(root)
    second = ask(root)
    assert second.complete
    assert len(second.passed) == 7
    assert not {test.partition("::")[2] for test in first.passed} & set(asked(root))


def test_the_end_of_the_time_is_not_the_end_of_a_test(root: Path) -> None:
    """Tests under way are answered, no others start, nobody has to be killed."""
    path = root / "work" / "journal"
    command = gpu_tests.command(path, time.time(), root, workers=2)
    outcome = lane.perform(lane.Task("tests", command, 100.0, passing=(2,)))
    assert outcome.status == "passed", outcome.tail
    standing = Journal(path, root).standing()
    assert len(standing.passed) in (1, 2)
    assert len(standing.passed) + len(standing.left or ()) == 6
    assert asked(root) == sorted(test.partition("::")[2] for test in standing.passed)


@pytest.mark.usefixtures("one_process")
def test_a_fault_ends_the_only_process(root: Path) -> None:
    """What came after it there would fail for its sake."""
    (root / "tests" / "test_wrong.py").write_text(WRONG.replace("os._exit(11)", "assert False"))
    first = ask(root)
    assert first.failed[-1].test.endswith("::test_fault")
    assert first.left


def test_the_suite_is_what_uses_the_device() -> None:
    """A file too few, and kernels count as shown that were not asked; about the house a GPU says nothing."""
    names = {file.name for file in gpu_tests.files()}
    assert {"test_implementations.py", "test_triton_forward.py", "test_triton_launch.py"} <= names
    assert not names & {"test_packaging.py", "test_pages.py", "test_bench.py", "test_demo.py"}
    assert Path(__file__).name not in names
