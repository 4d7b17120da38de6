"""One case, every peer: first right, then timed, in turns, in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..conformance import budget
from ..conformance.cases import Case, Problem
from ..conformance.evaluation import expected
from ..conformance.oracle import Results
from ..conformance.target import Capabilities
from ..conformance.yardstick import PASSES, two_times_rule
from ..kernels.spec import AttentionOptions
from .environment import clocks
from .peers import OURS, Peer, Ready, UnavailableError
from .results import Record
from .roofs import BOTH, FORWARD, Work, work
from .timing import LONGEST_HOST_S, Run, host_s, in_turns, spread

LARGEST_TRUTH = 2**27
"""Scores the oracle is asked for at once: it keeps about ten float64 matrices of them."""

WITH_HOST = "the host's time is inside: the call waits for the GPU, or is long to queue"

NO_LSE = Capabilities()
"""Nobody is asked for lse here, so its gradient plays no part."""


class Effort(NamedTuple):
    """How long a direction of a case is measured: turns, unless they take longer than budget_s."""

    turns: int = 15
    budget_s: float = 3.0


class Roofs(NamedTuple):
    """TFLOP/s of a matrix product, GB/s of a copy, on this machine."""

    matmul: float
    copy: float


def measure(
    case: Case,
    dtype: torch.dtype,
    directions: Sequence[str],
    peers: Mapping[str, Peer],
    device: torch.device,
    roofs: Roofs,
    effort: Effort,
) -> Iterator[Record]:
    """A record for each peer and direction; no time for one whose results are outside the error budget."""
    problem = case.build(dtype, device)
    judge = _Judge(problem, gradients=any(direction != FORWARD for direction in directions))
    needed = work(problem)
    passed: dict[str, _Contestant] = {}
    for name, peer in peers.items():
        for_all = functools.partial(Record, case.name, _name(dtype), implementation=name)
        try:
            contestant = _Contestant(peer(case, problem), problem, judge.gradients)
            verdict = judge.verdict(contestant, is_ours=name.startswith(OURS))
        except Exception as error:  # whatever other people's code raises: out of memory, a compiler's words
            yield from (for_all(d, status="n/a", reason=_reason(error)) for d in directions)
            continue
        contestant.record = functools.partial(
            for_all,
            status="wrong" if verdict.is_wrong else "timed",
            reason=verdict.reason,
            note=contestant.ready.note,
            constants=verdict.constants,
        )
        if verdict.is_wrong:
            yield from map(contestant.record, directions)
        else:
            passed[name] = contestant
    for direction in directions:
        runs: dict[str, Run] = {}
        for name, contestant in passed.items():
            try:
                runs[name] = contestant.run(direction)
                runs[name]()
            except Exception as error:  # room for one pass is not room for everybody's
                runs.pop(name, None)
                yield contestant.record(direction, status="n/a", reason=_reason(error))
        samples = in_turns(runs, device, turns=effort.turns, budget_s=effort.budget_s)
        for name, run in runs.items():
            record = passed[name].record(direction)
            yield _timed(record, samples[name], needed[direction], roofs, device, run)


class _Verdict(NamedTuple):
    """What came of a look at a peer's results. reason: what is outside the error budget."""

    is_wrong: bool
    reason: str
    constants: dict[str, float]


class _Judge:
    """The oracle's answer for a part of a problem, and the judgement of others by it.

    The part: the last batch entry and key head, which is the farthest in memory and, with padding, the
    shortest; with all its query heads, or one where that is a lot to ask; then dk and dv, sums over the
    group, are not judged.
    """

    def __init__(self, problem: Problem, gradients: bool) -> None:
        inputs, _ = problem.prepared()
        group = inputs.q.shape[1] // inputs.k.shape[1]
        self.gradients = gradients
        self.whole_group = group * inputs.q.shape[2] * inputs.k.shape[2] <= LARGEST_TRUTH
        self.heads = group if self.whole_group else 1
        options: AttentionOptions = {**problem.options, "key_lengths": _last(inputs.key_lengths)}
        options["mask"] = None if inputs.mask is None else inputs.mask[-1:, -self.heads :]
        self.part = problem._replace(
            q=problem.q[-1:, -self.heads :],
            k=problem.k[-1:, -1:],
            v=problem.v[-1:, -1:],
            dout=problem.dout[-1:, -self.heads :],
            dlse=problem.dlse[-1:, -self.heads :],
            dentropy=problem.dentropy[-1:, -self.heads :],
            options=options,
        )
        self.oracle = expected(self.part, NO_LSE)

    def verdict(self, contestant: _Contestant, is_ours: bool) -> _Verdict:
        """Ours has to keep the error budget. For others the field's own rule will do, with a remark."""
        out, *gradients = contestant.results()
        results = Results(out[-1:, -self.heads :])
        if gradients:
            dq, dk, dv = gradients
            results = results._replace(dq=dq[-1:, -self.heads :])
            if self.whole_group:
                results = results._replace(dk=dk[-1:, -1:], dv=dv[-1:, -1:])
        findings = budget.measure(results, self.oracle, contestant.ready.arithmetic)
        reason = "; ".join(str(finding) for finding in findings if not finding.ok)
        is_wrong = bool(reason)
        if is_wrong and not is_ours:
            ratios = two_times_rule(self.part, results, self.oracle, NO_LSE)
            is_wrong = any(ratio > PASSES[output] for output, ratio in ratios.items())
            reason += "" if is_wrong else "; but no worse than plain PyTorch, by the field's rule"
        return _Verdict(is_wrong, reason, {x.output: round(x.constant, 3) for x in findings})


def _reason(error: Exception) -> str:
    """Its first line; the type, too, where it is not one that says all there is to say."""
    line = str(error).strip().partition("\n")[0]
    if isinstance(error, (UnavailableError, NotImplementedError, RuntimeError)) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[-1:]


class _Contestant:
    """A peer that is ready, with the tensors that its passes start from."""

    record: Callable[..., Record]

    def __init__(self, ready: Ready, problem: Problem, gradients: bool) -> None:
        self.ready = ready
        self.leaves = tuple(x.detach().requires_grad_(gradients) for x in problem[:3])
        self.dout = problem.dout

    def results(self) -> tuple[Tensor, ...]:
        """out, and where asked for dq, dk, dv."""
        out = self.ready.attend(*self.leaves)
        if not self.leaves[0].requires_grad:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.dout)

    def run(self, direction: str) -> Run:
        """What is timed."""
        if direction == FORWARD:
            return self._forward
        if direction == BOTH:
            return self._both
        out = self.ready.attend(*self.leaves)
        return functools.partial(torch.autograd.grad, out, self.leaves, self.dout, retain_graph=True)

    def _forward(self) -> None:
        with torch.no_grad():
            self.ready.attend(*self.leaves)

    def _both(self) -> None:
        torch.autograd.grad(self.ready.attend(*self.leaves), self.leaves, self.dout)


def _timed(
    record: Record, samples: list[float], needed: Work, roofs: Roofs, device: torch.device, run: Run
) -> Record:
    p20, median, p80 = spread(samples)
    host = host_s(run) if device.type == "cuda" else None
    is_inside = host is not None and host >= LONGEST_HOST_S
    tflops, gbs = needed.flops / median * 1e-12, needed.bytes / median * 1e-9
    return replace(
        record,
        note="; ".join(filter(None, (record.note, WITH_HOST if is_inside else ""))),
        turns=len(samples),
        p20_ms=_digits(p20 * 1e3),
        median_ms=_digits(median * 1e3),
        p80_ms=_digits(p80 * 1e3),
        tflops=_digits(tflops),
        gbs=_digits(gbs),
        of_matmul=_digits(tflops / roofs.matmul),
        of_copy=_digits(gbs / roofs.copy),
        host_us=None if host is None else _digits(host * 1e6),
        peak_bytes=_gpu_peak(run, device),
        clocks=clocks(device, run),
    )


def _gpu_peak(run: Run, device: torch.device) -> int | None:
    """Above what was allocated before; on a CPU `memory` asks a process of its own."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return int(torch.cuda.max_memory_allocated(device) - before)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digits(x: float) -> float:
    return float(f"{x:.4g}")
