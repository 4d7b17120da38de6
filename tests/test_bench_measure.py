"""What keeps figures of the benchmark honest: who is judged, on which part, on which GPU, at which clocks."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from undivided.bench import command, environment, measure, memory, peers, roofs, shapes, timing
from undivided.bench.results import Peak, Record
from undivided.conformance.cases import Case, Problem

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = Case("small causal", batch=2, heads_q=4, heads_kv=2, seqlen_q=16, seqlen_k=16, causal=True)


def measured(case: Case, attend: Callable[[Problem, Tensor, Tensor, Tensor], Tensor]) -> list[Record]:
    """What becomes of a peer that computes attention its own way."""

    def peer(case: Case, problem: Problem) -> peers.Ready:
        return peers.Ready(lambda q, k, v: attend(problem, q, k, v))

    effort = measure.Effort(turns=5, budget_s=0.0)
    directions = (roofs.FORWARD, roofs.BACKWARD)
    return list(
        measure.measure(case, torch.float32, directions, {"x": peer}, CPU, measure.Roofs(1, 1), effort)
    )


def right(problem: Problem, q: Tensor, k: Tensor, v: Tensor, **other: object) -> Tensor:
    return peers.attention(q, k, v, **{**problem.given_options(), **other})


def test_a_peer_that_counts_padding_is_wrong() -> None:
    """The first batch entry is as long as the batch: who was judged by it alone could ignore the lengths."""
    case = shapes.SHAPES["bert-base"].case(shapes.PADDING, "cpu", seqlen=32, batch=2)
    assert {r.status for r in measured(case, right)} == {"timed"}
    ignoring = measured(case, lambda problem, *qkv: right(problem, *qkv, key_lengths=None))
    assert {r.status for r in ignoring} == {"wrong"}


@pytest.mark.parametrize("place", [(-1, -1), (-1, 2)], ids=["last head", "last group"])
def test_what_is_wrong_far_in_memory_is_wrong(place: tuple[int, int]) -> None:
    """Offsets go wrong at the end, not at the beginning."""

    def late(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = right(problem, q, k, v).clone()
        out[place] *= 1.1
        return out

    assert {r.status for r in measured(SMALL, late)} == {"wrong"}


@pytest.mark.parametrize(
    "error", [TypeError("takes no float"), ValueError(""), KeyError("head"), OSError("x")]
)
def test_whatever_a_peer_raises_costs_it_its_figure_and_no_more(error: Exception) -> None:
    """Compilers, extensions and functions of readers raise what they like."""

    def raises(problem: Problem, *qkv: Tensor) -> Tensor:
        raise error

    found = measured(SMALL, raises)
    assert {r.status for r in found} == {"n/a"}
    assert found[0].reason.startswith(type(error).__name__)


def test_clocks_are_read_while_the_gpu_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An idle GPU's are those of no figure; and PyTorch's numbers of GPUs are not nvidia-smi's."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nsleep 0.2\necho "1980 MHz, 690.00 W $@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    properties = type("Properties", (), {"uuid": "1234-abcd"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    calls: list[int] = []
    told = environment.clocks(torch.device("cuda", 1), lambda: calls.append(1))
    assert told is not None
    assert told.startswith("1980 MHz, 690.00 W")
    assert "--id=GPU-1234-abcd" in told
    assert calls
    assert environment.clocks(CPU) is None
    program.write_text("#!/bin/sh\nexit 9\n")
    assert environment.clocks(torch.device("cuda", 1)) is None


def test_the_device_that_is_asked_for_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of another GPU would time nothing of what runs on this one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(*size))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    command._device("cuda:1")
    assert chosen == [torch.device("cuda", 1)]


def test_cuda_graphs_are_not_asked_of_a_cpu() -> None:
    problem = SMALL.build(torch.float32)
    with pytest.raises(peers.UnavailableError, match="need a CUDA device"):
        peers.find("undivided-graph")(SMALL, problem)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launch modes of a GPU")
@pytest.mark.parametrize("name", ["undivided-compiled", "undivided-graph"])
def test_launch_modes_are_right_and_timed_in_every_direction(name: str) -> None:
    effort = measure.Effort(turns=5, budget_s=0.0)
    gpu = torch.device("cuda")
    found = list(
        measure.measure(
            SMALL, torch.float16, roofs.DIRECTIONS, {name: peers.find(name)}, gpu, measure.Roofs(1, 1), effort
        )
    )
    assert [(r.direction, r.status) for r in found] == [(d, "timed") for d in roofs.DIRECTIONS]
    assert all(r.host_us and measure.WITH_HOST not in r.note for r in found)


class Machine:
    """A host and a GPU with a clock in seconds: the host queues, the GPU does one thing after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.gpu_done = 0.0
        self.busy: list[float] = []
        machine = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(machine.now, machine.gpu_done)

            def query(self) -> bool:
                return self.at <= machine.now

            def synchronize(self) -> None:
                machine.now = max(machine.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class Flush:
            def zero_(self) -> None:
                machine.launch(80e-6)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: Flush())
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def launch(self, seconds: float) -> None:
        self.gpu_done = max(self.now, self.gpu_done) + seconds

    def sleep(self, cycles: int) -> None:
        assert isinstance(cycles, int)
        self.busy.append(cycles / 1.98e9)
        self.launch(self.busy[-1])

    def wait(self) -> None:
        self.now = max(self.now, self.gpu_done)

    def call(self, host: float, gpu: float, waits: bool = False) -> timing.Run:
        """A call that keeps the host for so long before the launch, and the GPU after it."""

        def run() -> None:
            self.now += host
            self.launch(gpu)
            if waits:
                self.wait()

        return run


class TestOnAGPU:
    """The device's time and the host's are two figures."""

    @pytest.fixture(autouse=True)
    def _simulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine = Machine(monkeypatch)

    def test_the_host_is_not_in_the_devices_time(self) -> None:
        """A fast kernel behind a slow launch would look like a slow kernel."""
        slow, quick = self.machine.call(450e-6, 200e-6), self.machine.call(20e-6, 300e-6)
        samples = timing.in_turns({"slow": slow, "quick": quick}, GPU, budget_s=0.0)
        assert samples["slow"] == pytest.approx([200e-6] * timing.FEWEST_TURNS)
        assert samples["quick"] == pytest.approx([300e-6] * timing.FEWEST_TURNS)

    def test_host_time_is_without_the_gpus(self) -> None:
        """Nor with a wait for what is still queued."""
        assert timing.host_s(self.machine.call(450e-6, 9e-3)) == pytest.approx(450e-6)

    def test_everybody_finds_a_gpu_that_rested_as_long(self) -> None:
        """Its clock is the higher the longer it had nothing to do."""
        waits = self.machine.call(1e-6, 1e-3, waits=True)
        runs = {"slow": self.machine.call(450e-6, 1e-3), "quick": self.machine.call(20e-6, 1e-3), "w": waits}
        timing.in_turns(runs, GPU, turns=5, budget_s=0.0)
        rests = self.machine.busy[len(runs) * timing.HOST_CALLS :]
        assert len(set(rests)) == 1
        assert 900e-6 < rests[0] < 2e-3, "who waits for the GPU would make it rest for milliseconds"

    def test_everybody_is_warm_before_the_first_turn(self) -> None:
        """What was compiled last would run first on a GPU that had cooled meanwhile."""
        log: list[str] = []
        runs: dict[str, timing.Run] = {
            name: lambda name=name: (log.append(name), self.machine.call(1e-5, 1e-4)()) for name in "abc"
        }
        timing.in_turns(runs, GPU, turns=5, budget_s=0.0)
        before = log[: -3 * timing.FEWEST_TURNS]
        assert {name: before.count(name) for name in "abc"} == dict.fromkeys("abc", 1 + timing.HOST_CALLS)

    def test_a_call_that_was_held_up_is_made_again(self) -> None:
        """The machine does something else for a millisecond, and the GPU waits."""
        delays = iter([0.0] * (1 + timing.HOST_CALLS) + [2e-3, 2e-3] + [0.0] * 99)
        call = self.machine.call(20e-6, 300e-6)

        def run() -> None:
            self.machine.now += next(delays)
            call()

        samples = timing.in_turns({"x": run}, GPU, turns=5, budget_s=0.0)["x"]
        assert samples == pytest.approx([300e-6] * timing.FEWEST_TURNS)

    @pytest.mark.parametrize(("waits", "host"), [(False, 450e-6), (True, None)])
    def test_a_record_says_both(
        self, monkeypatch: pytest.MonkeyPatch, waits: bool, host: float | None
    ) -> None:
        """And of a call that waits for the GPU, that its time is not the device's alone."""
        monkeypatch.setattr(measure, "clocks", lambda device, run: "1980 MHz")
        monkeypatch.setattr(measure, "_gpu_peak", lambda run, device: 0)
        call = self.machine.call(450e-6, 200e-6, waits)
        asked = Record("c", "bfloat16", "forward", "x", "timed", note="dense mask")
        found = measure._timed(asked, [2e-4] * 5, roofs.Work(10**9, 10**6), measure.Roofs(1, 1), GPU, call)
        assert found.host_us is not None
        assert (measure.WITH_HOST in found.note) == waits
        assert found.note.startswith("dense mask")
        if host is not None:
            assert found.host_us == pytest.approx(host * 1e6)
        found = measure._timed(asked, [2e-4] * 5, roofs.Work(10**9, 10**6), measure.Roofs(1, 1), CPU, call)
        assert found.host_us is None


class TestMemoryCurve:
    """1k to 32k beside the dense mask, without taking more than there is."""

    @pytest.fixture(autouse=True)
    def _measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def peak(case: Case, dtype: torch.dtype, peer: str, threads: int) -> Peak:
            return Peak(case.name, case.seqlen_k, peer, case.seqlen_k)

        monkeypatch.setattr(memory, "peak", peak)

    def found(self, monkeypatch: pytest.MonkeyPatch, free: int) -> dict[tuple[int, str], int | None]:
        monkeypatch.setattr(memory, "_free_bytes", lambda: free)
        return {(p.seqlen, p.implementation): p.peak_bytes for p in memory.curve()}

    def test_both_at_every_length_in_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = [(n, who) for n in memory.SEQLENS for who in (peers.OURS, memory.DENSE)]
        found = self.found(monkeypatch, 2**40)
        assert list(found) == expected
        assert None not in found.values()

    def test_what_does_not_fit_is_not_begun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.found(monkeypatch, 2**32)
        refused = [key for key, peak in found.items() if peak is None]
        assert refused == [(32768, memory.DENSE)]


def test_the_curve_is_one_line_of_cases() -> None:
    assert memory.SEQLENS[0] == 1024
    assert memory.SEQLENS[-1] == 32768
    assert dataclasses.replace(memory.CURVE, seqlen_q=1, seqlen_k=1).window == (255, 0)
