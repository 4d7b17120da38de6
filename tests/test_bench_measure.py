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

from undivided.bench import command, environment, measure, memory, peers, roofs, shapes
from undivided.bench.results import Peak, Record
from undivided.conformance.cases import Case, Problem

CPU = torch.device("cpu")
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
