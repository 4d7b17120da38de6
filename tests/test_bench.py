"""The benchmark kit from top to bottom: fair turns, useful work, right before timed, the command.

No test asserts a time: where one is needed, it is planted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from undivided import attention
from undivided.bench import command, measure, memory, peers, results, roofs, shapes, timing, tune
from undivided.bench.results import Record
from undivided.bench.static.model import Issued
from undivided.conformance.cases import Case, Extra, Problem

CPU = torch.device("cpu")
SMALL = Case("small causal", heads_q=4, heads_kv=2, seqlen_q=16, seqlen_k=16, causal=True)
ROOFS, ONCE = measure.Roofs(1.0, 10.0), measure.Effort(turns=5, budget_s=0.0)
BOTH_PASSES = (roofs.FORWARD, roofs.BACKWARD)


def measured(
    case: Case, rivals: dict[str, peers.Peer], dtype: torch.dtype = torch.float32, **options: Any
) -> list[Record]:
    directions = options.get("directions", BOTH_PASSES)
    return list(measure.measure(case, dtype, directions, rivals, CPU, ROOFS, ONCE))


def ready(attend: Callable[..., Tensor]) -> peers.Peer:
    """A peer that computes attention its own way."""
    return lambda case, problem: peers.Ready(attend)


def test_percentiles_are_numpys() -> None:
    """p20 and p80 one sample off would be a spread that no other tool reproduces."""
    for n in (5, 6, 17):
        samples = [float(x) for x in np.random.default_rng(n).exponential(size=n)]
        assert timing.spread(samples) == pytest.approx(np.percentile(samples, [20, 50, 80]))


def test_everybody_takes_turns_and_goes_first() -> None:
    """One who always ran first would always find the caches as the last one left them."""
    calls: list[str] = []
    runs: dict[str, timing.Run] = {name: (lambda n=name: calls.append(n)) for name in "abc"}
    samples = timing.in_turns(runs, turns=5, min_sample_s=0.0, budget_s=0.0)
    assert {name: len(x) for name, x in samples.items()} == dict.fromkeys("abc", timing.FEWEST_TURNS)
    turns = ["".join(calls[-15:][i : i + 3]) for i in range(0, 15, 3)]
    assert turns == ["abc", "bca", "cab", "abc", "bca"]


def test_a_ratio_is_the_median_over_turns() -> None:
    """The ratio of medians would let one slow phase of the machine into the figure."""
    samples = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 2.0]}
    assert timing.speedup(samples) == 2.0
    assert timing.extra_s(samples) == -1.0


@pytest.mark.parametrize(
    "case",
    [
        Case("full"),
        Case("causal", causal=True, seqlen_k=50),
        Case("window", window=(5, 1)),
        Case("padding", batch=3, key_lengths=(7, 33, 12)),
        Case("mask", batch=2, mask=Extra("random", "bhqk"), causal=True),
        Case("decode", seqlen_q=1, key_lengths=(20,), heads_q=6, heads_kv=2),
    ],
    ids=lambda case: case.name,
)
def test_useful_work_is_counted_from_the_visible_scores(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask's hidden scores, or a broadcast axis counted once, would inflate or deflate TFLOP/s."""
    problem = case.build(torch.float32)
    identity = torch.eye(case.seqlen_k).expand(case.batch, case.heads_kv, -1, -1)
    seen = attention(torch.zeros_like(problem.q), torch.zeros_like(problem.k), identity, **problem.options)
    monkeypatch.setattr(roofs, "ROWS", 10)
    count = int((seen > 0).sum())
    assert roofs.visible_scores(problem) == count
    work = roofs.work(problem)
    assert work["forward"].flops == 4 * count * case.head_dim
    assert work["both"].flops == work["forward"].flops + work["backward"].flops == 14 * count * case.head_dim


def test_a_peer_that_cannot_be_loaded_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    """A table without the peer that was asked for, and status 0."""
    for name in ("nosuchmodule:f", "math:nosuch"):
        assert command.main(options("--shape", "vit-l-16", "--peers", name)) == 2
        assert f"cannot load {name}" in capsys.readouterr().err


@pytest.mark.parametrize("mask", shapes.MASKS)
def test_every_peer_that_is_here_computes_every_mask(mask: str) -> None:
    """A window turned into the wrong dense mask would be a fast peer that computes something else."""
    shape = dataclasses.replace(shapes.SHAPES["gpt-oss"], heads_q=4, heads_kv=2, window=7)
    case = shape.case(mask, "cpu", seqlen=24, batch=2)
    here = ("undivided", "undivided-reference", "torch-flash", "torch-math", "eager")
    found = measured(case, {name: peers.find(name) for name in here})
    assert [(r.implementation, r.status) for r in found] == [(name, "timed") for name in here] * 2
    hides_by_rows = mask in (shapes.WINDOW, shapes.DENSE)
    assert {r.note for r in found if r.implementation == "eager"} == {
        "dense mask" if hides_by_rows or mask != shapes.FULL else ""
    }


def test_different_head_dims_and_decoding() -> None:
    """DeepSeek's 192/128, and one query against a cache."""
    case = Case("192/128", heads_q=2, seqlen_q=8, seqlen_k=8, head_dim=192, head_dim_v=128, causal=True)
    assert {r.status for r in measured(case, {"undivided": peers.find("undivided")})} == {"timed"}
    shape = shapes.SHAPES["llama-3.1-8b-decode"]
    rivals = {name: peers.find(name) for name in ("undivided", "torch-flash")}
    found = measured(shape.case("full", "cpu", seqlen=64), rivals, directions=[roofs.FORWARD])
    assert [r.status for r in found] == ["timed", "timed"]


def test_what_is_wrong_is_marked_and_not_timed() -> None:
    """A fast kernel that computes something else must not get a figure."""
    calls: list[int] = []

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(1)
        return 1.1 * right(q, k, v)

    problem = SMALL.build(torch.float32)
    right = peers.find("undivided")(SMALL, problem).attend
    found = measured(SMALL, {"wrong": ready(wrong), "undivided": peers.find("undivided")})
    assert [(r.implementation, r.direction, r.status) for r in found] == [
        ("wrong", "forward", "wrong"),
        ("wrong", "backward", "wrong"),
        ("undivided", "forward", "timed"),
        ("undivided", "backward", "timed"),
    ]
    assert found[0].median_ms is None
    assert "out[" in found[0].reason
    assert len(calls) == 1, "it was called once, to be judged, and not again"


def test_a_wrong_gradient_is_wrong_in_both_directions() -> None:
    """A forward pass that is right must not lend its backward pass a figure."""
    problem = SMALL.build(torch.float32)
    right = peers.find("undivided")(SMALL, problem).attend
    found = measured(SMALL, {"x": ready(lambda q, k, v: right(q.detach() * 0.5 + q * 0.5, k, v))})
    assert {r.status for r in found} == {"wrong"}
    assert "dq[" in found[0].reason


def test_a_peer_by_the_fields_rule_is_timed_with_a_remark() -> None:
    """Scores rounded to bf16 are what half the field does: shown, and said; ours gets no such pardon."""
    case = Case("s", heads_q=1, heads_kv=1, seqlen_q=256, seqlen_k=256, head_dim=64, distribution="peaky")
    found = measured(case, {"eager": peers.find("eager")}, torch.bfloat16)
    assert {r.status for r in found} == {"timed"}
    assert all("by the field's rule" in r.reason for r in found)
    ours = measured(case, {"undivided-eager": peers.find("eager")}, torch.bfloat16)
    assert {r.status for r in ours} == {"wrong"}


def test_a_peer_that_refuses_or_is_missing_says_why() -> None:
    """Not an end of the run, and not a gap that nobody can explain."""

    def refuses(case: Case, problem: Problem) -> peers.Ready:
        raise peers.UnavailableError("needs another machine")

    rivals = {"a": refuses, "xformers": peers.find("xformers"), "undivided": peers.find("undivided")}
    found = {r.implementation: r for r in measured(SMALL, rivals)}
    assert (found["a"].status, found["a"].reason) == ("n/a", "needs another machine")
    assert found["xformers"].status == "n/a"
    assert found["xformers"].reason
    assert found["undivided"].status == "timed"


def test_one_that_fails_when_timed_costs_nobody_else_his_figure() -> None:
    """Out of memory comes late: when everybody's graphs are kept."""
    right = peers.find("undivided")(SMALL, SMALL.build(torch.float32)).attend
    calls = itertools.count()

    def fails_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if next(calls) > 0:
            raise torch.OutOfMemoryError("no room\nand more")
        return right(q, k, v)

    found = measured(SMALL, {"x": ready(fails_later), "undivided": peers.find("undivided")})
    assert {(r.implementation, r.status) for r in found} == {("x", "n/a"), ("undivided", "timed")}
    assert {r.reason for r in found if r.implementation == "x"} == {"no room"}


@pytest.mark.full
def test_ours_compiled_is_timed_backward_too() -> None:
    """A compiled graph gives its buffers away, and its backward pass can then be run only once."""
    found = measured(SMALL, {"undivided-compiled": peers.find("undivided-compiled")})
    assert [(r.direction, r.status) for r in found] == [("forward", "timed"), ("backward", "timed")]


def test_large_scores_are_not_asked_of_those_who_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run would end with the machine's memory."""
    monkeypatch.setitem(peers.LARGEST_SCORES, "cpu", 100)
    found = measured(SMALL, {name: peers.find(name) for name in ("eager", "torch-math", "torch-flash")})
    assert {r.implementation: r.status for r in found} == {
        "eager": "n/a",
        "torch-math": "n/a",
        "torch-flash": "timed",
    }


def test_the_oracle_is_asked_a_part_where_all_would_be_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """dk and dv are sums over the group: with one head of it, they cannot be judged, and out still is."""
    monkeypatch.setattr(measure, "LARGEST_TRUTH", 300)
    found = measured(SMALL, {"undivided": peers.find("undivided")})
    assert found[0].status == "timed"
    assert found[0].constants.keys() == {"out", "dq"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_shape_makes_a_case(device: str) -> None:
    """A shape whose heads do not divide or whose batch is 0 would be found on a GPU only."""
    for shape, mask in itertools.product(shapes.SHAPES.values(), shapes.MASKS):
        case = shape.case(mask, device)
        assert shape.source
        assert case.heads_q % case.heads_kv == 0
        assert min(case.batch, case.seqlen_q, case.seqlen_k) >= 1
    assert set(shapes.DEFAULT) <= set(shapes.SHAPES)
    assert set(peers.DEFAULT) <= set(peers.NAMES)


def test_peak_memory_is_a_process_of_its_own() -> None:
    """In this process the peak would be that of whatever ran before; the dense mask must show."""
    if not memory.STATUS.exists():
        pytest.skip("peak memory is read from /proc")
    case = dataclasses.replace(memory.CURVE, seqlen_q=4096, seqlen_k=4096)
    ours, dense = (memory.peak(case, torch.float32, name) for name in ("undivided", memory.DENSE))
    assert ours.peak_bytes is not None
    assert dense.peak_bytes is not None
    assert dense.peak_bytes > ours.peak_bytes + 4096**2
    failed = memory.peak(case, torch.float32, "xformers")
    assert failed.peak_bytes is None
    assert "xformers" in failed.reason


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs that cost nothing to measure."""
    monkeypatch.setattr(roofs, "copy_roof", lambda device: 10.0)
    monkeypatch.setattr(roofs, "matmul_roof", lambda dtype, device: 0.1)


RUN = ("--device", "cpu", "--shape", "vit-l-16", "--seqlen", "16", "--batch", "1")


@pytest.mark.usefixtures("quick")
def test_the_command_from_top_to_bottom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measure, write, load again, compare with a file in which everything was faster."""
    folder = tmp_path / "out"
    rivals = ("--peers", "undivided", "torch-flash", "xformers")
    assert command.main(options(*RUN, *rivals, "--output", str(folder))) == 0
    assert {"results.json", "report.html"} <= {file.name for file in folder.iterdir()}
    found = results.read(folder / "results.json")
    assert {"torch", "cpu", "threads", "date"} <= found.environment.keys()
    assert {r.status for r in found.records} == {"timed", "n/a"}
    assert "xformers: n/a everywhere" in capsys.readouterr().out.replace("\n", " ")

    faster = tuple(
        dataclasses.replace(r, p20_ms=1e-9, median_ms=1e-9, p80_ms=1e-9) if r.status == "timed" else r
        for r in found.records
    )
    results.write(dataclasses.replace(found, records=faster), tmp_path / "old.json")
    again = ("--load", str(folder / "results.json"), "--output", str(folder))
    assert command.main(options(*again)) == 0
    assert command.main(options(*again, "--compare", str(tmp_path / "old.json"))) == 1
    assert "regression" in capsys.readouterr().out
    assert "✗ regression" in (folder / "report.html").read_text()


@pytest.mark.usefixtures("quick")
def test_lines_are_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    """The GPU lane reads them from a process that may hang and be killed."""
    assert command.main(options(*RUN, "--peers", "undivided", "--lines")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["direction"] for line in lines] == ["forward", "backward"]


@pytest.mark.usefixtures("quick")
def test_a_wrong_result_of_ours_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A lane that ends with 0 would be taken for a pass."""
    right = peers.attention
    monkeypatch.setattr(peers, "attention", lambda *qkv, **given: 1.1 * right(*qkv, **given))
    arguments = (*RUN, "--peers", "undivided", "--output", str(tmp_path))
    assert command.main(options(*arguments)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llama-9"], "--shape must be of llama-3.1-8b"),
        (["--peers", "torch-fast"], "--peers must be of undivided"),
        (["--device", "quantum"], "--device quantum does not work here"),
        (["--load", "nowhere.json"], "nowhere.json"),
        (["--compare", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(options("--device", "cpu", *arguments)) == 2
    assert message in capsys.readouterr().err


def test_tiles_are_not_searched_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing would compile, and an empty table looks like an answer."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(options("--tune", "sm_90")) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        assert command.main(options("--tune")) == 2
        assert "cpu is here" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seqlen", "0"], ["--mask", "diagonal"], ["--dtype", "fp8"]])
def test_wrong_words_are_refused_by_the_parser(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        options(*arguments)


def candidate(**fields: Any) -> tune.Candidate:
    given = {"tile": (128, 128, 8, 2), "ctas_per_sm": 1, "issued": Issued(8.0), **fields}
    return tune.Candidate("sm_90", "forward", 128, **given)


def test_the_model_of_tiles_knows_what_hides_what() -> None:
    """Two CTAs overlap; fewer instructions are better; short tiles wait for the L2 cache."""
    alone = tune.clocks_per_score(candidate())
    assert tune.clocks_per_score(candidate(ctas_per_sm=2)) < alone
    assert tune.clocks_per_score(candidate(issued=Issued(6.0))) < alone
    assert tune.clocks_per_score(candidate(issued=Issued(8.0, mufu=2.0))) > alone, "16 exponentials a clock"
    assert alone == pytest.approx(2 * 2 * 128 / 4096 + 8 / 128), "a CTA alone takes the sum"
    assert tune.clocks_per_score(candidate(tile=(128, 128, 8, 1))) > alone, "nothing hides the loads"
    assert tune.clocks_per_score(candidate(tile=(16, 128, 4, 2), ctas_per_sm=4)) == 4 * 128 / 16 / 32


def test_tiles_that_cannot_fit_are_not_compiled() -> None:
    """The table's own rows must be among those that are."""
    assert tune.may_fit(128, (128, 128, 8, 2))
    assert tune.may_fit(64, (128, 64, 8, 3))
    assert not tune.may_fit(256, (128, 128, 4, 2))


def test_rows_are_those_of_the_table() -> None:
    """Printed to be pasted."""
    shown = candidate(clocks=0.2).row
    assert shown == "128: TileConfig(128, 128, 8, 2),"


@pytest.mark.compile
@pytest.mark.full
def test_a_candidate_is_compiled_for_a_gpu_that_is_not_here() -> None:
    """In a process of its own: this one may be the interpreter's."""
    pytest.importorskip("triton", reason="tiles are compiled by Triton")
    code = (
        "from undivided.bench import tune\n"
        "for kernel in tune.KERNELS:\n"
        "    found = tune.compiled(tune.Candidate('sm_90', kernel, 64, (64, 64, 4, 2)))\n"
        "    assert found.clocks < 1 and found.registers > 0, found\n"
    )
    surroundings = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=surroundings)
    assert done.returncode == 0, done.stderr
