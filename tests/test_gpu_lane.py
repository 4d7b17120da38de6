"""The GPU lane survives what GPUs do to it: hangs, failures, running out of time. No GPU needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from undivided.bench import gpu, gpu_sweep, lane

CPU = torch.device("cpu")


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


def test_a_budget_below_a_time_out_is_refused(tmp_path: Path) -> None:
    """It would say "call again" for ever."""
    with pytest.raises(ValueError, match="slow may take 100 s"):
        lane.run([python("slow", "", seconds=100)], tmp_path / "journal", seconds=50)


def test_tasks_cover_every_file_of_tests_and_every_case() -> None:
    names = [task.name for task in gpu.tasks()]
    assert f"tests/{Path(__file__).name}" in names
    assert {name for name in names if name.startswith("sweep/")} == {f"sweep/{c}" for c in gpu_sweep.CASES}
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "case",
    [
        gpu_sweep.Case(16, 64, causal=True, heads_q=4, heads_kv=2),
        gpu_sweep.Case(16, 64, causal=True, window=7, heads_q=2),
    ],
    ids=lambda case: case.name,
)
def test_a_case_is_measured_against_its_peers(case: gpu_sweep.Case) -> None:
    """The constants of the error budget come first: a peer that computes something else shows here."""
    records = list(gpu_sweep.measure(case, CPU, tokens=128))
    ours = [record for record in records if record["implementation"] == "undivided"]
    assert [record["direction"] for record in ours] == ["forward", "backward"]
    for record in records:
        if "unavailable" not in record:
            assert record["tflops"] > 0
            assert max(record["constants"].values()) < 5
    assert json.loads(json.dumps(records)) == records


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast kernel that computes something else must not get a figure."""
    case = gpu_sweep.Case(16, 64, heads_q=2)
    right = gpu_sweep.attention
    monkeypatch.setattr(gpu_sweep, "attention", lambda *qkv, **options: 1.1 * right(*qkv, **options))
    (record,) = [r for r in gpu_sweep.measure(case, CPU, tokens=64) if r["implementation"] == "undivided"]
    assert "tflops" not in record
    assert any("out[" in sentence for sentence in record["wrong"])
    monkeypatch.setattr(gpu_sweep, "measure", lambda *_: iter([record]))
    monkeypatch.setattr("sys.argv", ["gpu_sweep", next(iter(gpu_sweep.CASES))])
    assert gpu_sweep.main() == 1, "a wrong result must fail its task"


def test_results_and_table(tmp_path: Path) -> None:
    """The committed file says where it ran; a figure keeps its case, direction and implementation."""
    record = {"case": "hd128", "direction": "forward", "implementation": "undivided", "tflops": 123.4}
    outcomes = [
        lane.Outcome("tests/test_x.py", "passed", 1.0, "3 passed", []),
        lane.Outcome("sweep/hd128", "timed out", 1.0, "noise", [record]),
    ]
    document = json.loads(gpu.write(outcomes, True, tmp_path).read_text())
    assert {"gpu", "torch", "triton", "date"} <= document["environment"].keys()
    assert document["sweep"][0]["records"] == [record]
    assert "123.4" in gpu.table(outcomes)
