"""What can be wrong with an attention function, as plain functions: ask a problem, return what it gave.

A check takes a target and a problem. It returns the worst elements it measured, which `check` judges by
the budget, or raises WrongAnswerError with what is wrong in words.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..kernels.spec import STATISTICS, AttentionStats
from ..kernels.visibility import visible
from .budget import Finding, measure
from .cases import Problem
from .evaluation import evaluate, expected
from .guard import require
from .memory import Watch, far_apart, fenced, fenced_whole, poisoned_allocations
from .oracle import Oracle, Results
from .target import Target
from .yardstick import two_times_rule

REPEATS = {"cpu": 2, "cuda": 20}
"""How often a call is repeated to see the same bits; a race between programs needs many."""

FAR_MEMORY = 20 * 2**30
"""Bytes of a GPU, which commits what it allocates, below which nothing can be put far apart."""


class Outcome(NamedTuple):
    """What a check measured. yardstick as in `Verdict`."""

    findings: list[Finding]
    yardstick: dict[str, float]


class NotAskedError(Exception):
    """This machine cannot ask the question."""


def values(target: Target, problem: Problem) -> Outcome:
    """Every element of out, lse and the gradients, against the oracle; shapes and dtypes."""
    oracle = expected(problem, target.capabilities)  # before anybody can modify q
    results = evaluate(target, problem)
    for name in STATISTICS:
        claimed, returned = getattr(target.capabilities, name), getattr(results, name) is not None
        require(returned or not claimed, f"{name} is claimed, and not returned")
    _require_dtypes(results, problem)
    findings = measure(results, oracle, target.capabilities.arithmetic)
    if oracle.dtype == torch.float64:  # plain PyTorch in float64 is the oracle
        return Outcome(findings, {})
    return Outcome(findings, two_times_rule(problem, results, oracle, target.capabilities))


def reads_nothing_outside(target: Target, problem: Problem) -> Outcome:
    """NaN around every tensor: before, after, and between its rows where strides may be anything."""
    fence = fenced if target.capabilities.any_strides else fenced_whole
    return _as_good(target, evaluate(target, problem.mapped(fence)), problem)


def writes_every_element(target: Target, problem: Problem) -> Outcome:
    """NaN in everything that PyTorch hands out uninitialised."""
    with poisoned_allocations():
        results = evaluate(target, problem)
    return _as_good(target, results, problem)


def writes_nothing_outside(target: Target, problem: Problem) -> Outcome:
    """Canaries around every tensor that is given, and every one that the target allocates in Python."""
    fence = fenced if target.capabilities.any_strides else fenced_whole
    given = Watch()
    fences = problem.mapped(lambda x: given.over(fence(x)))
    try:
        with poisoned_allocations() as allocated:
            evaluate(target, fences)
    finally:  # what it wrote there may be what made it raise
        require(not given.written_outside(), "writes outside a tensor that was given to it")
        require(not allocated.written_outside(), "writes outside a tensor that it allocated")
    return Outcome([], {})


def leaves_inputs_alone(target: Target, problem: Problem) -> Outcome:
    """q scaled in place, a mask completed in place, dout used as scratch."""
    before = problem.mapped(torch.clone)
    evaluate(target, problem)
    for (name, x), y in zip(_tensors(problem).items(), _tensors(before).values()):
        require(_same(x, y), f"modifies {name}")
    return Outcome([], {})


def repeats(target: Target, problem: Problem) -> Outcome:
    """Atomics, a race between programs, a state that is kept from call to call."""
    first = evaluate(target, problem)
    count = REPEATS.get(problem.q.device.type, 2)
    for _ in range(count):
        for name, x, y in zip(Results._fields, first, evaluate(target, problem)):
            require(_same(x, y), f"other bits of {name} in {count + 1} calls")
    return Outcome([], {})


def same_in_any_batch(target: Target, problem: Problem) -> Outcome:
    """Tiles sized, or keys split, by what the batch has to do: answers change with the load."""
    results = evaluate(target, problem)
    for entry in range(problem.q.shape[0]):
        alone = evaluate(target, problem.of_entries([entry]))
        for name, x, y in zip(Results._fields[:5], results, alone):
            of_entry = None if x is None else x[entry : entry + 1]
            require(_same(of_entry, y), f"other bits of {name} alone than in a batch")
    return Outcome([], {})


def keeps_entries_apart(target: Target, problem: Problem) -> Outcome:
    """NaN in every batch entry but the first, which must not notice."""

    def spoiled(x: Tensor) -> Tensor:
        return torch.cat([x[:1], torch.full_like(x[1:], torch.nan)])

    tensors: dict[str, Any] = {
        name: spoiled(x) for name, x in problem._asdict().items() if isinstance(x, Tensor)
    }
    dirty = problem._replace(**tensors)
    *parts, dtype = expected(problem, target.capabilities)
    value, cond, score_cond, underflow = map(_first_entry, parts)
    first = Oracle(value, cond, score_cond, underflow, dtype)
    results = [_first_entry(evaluate(target, asked)) for asked in (dirty, problem)]
    trapped, plain = (measure(x, first, target.capabilities.arithmetic) for x in results)
    return _no_worse(trapped, plain)


def ignores_hidden_keys(target: Target, problem: Problem) -> Outcome:
    """NaN and infinities in keys and values that no query of the batch entry sees; their gradient is 0."""
    hidden = hidden_keys(problem)
    if not hidden.any():  # of sizes that were made to fit the claims
        raise NotAskedError("nothing to hide")
    traps = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=problem.k.dtype, device=hidden.device)
    anything = traps[torch.arange(hidden.shape[2], device=hidden.device) % 3][:, None]
    clean, dirty = (
        problem._replace(k=torch.where(hidden, x, problem.k), v=torch.where(hidden, x, problem.v))
        for x in (torch.zeros_like(anything), anything)
    )
    return _as_good(target, evaluate(target, dirty), clean)


def reaches_far(target: Target, problem: Problem) -> Outcome:
    """index · stride beyond 2^31, computed in 32 bits: silent garbage long before it crashes."""
    device = problem.q.device
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < FAR_MEMORY:
        raise NotAskedError(f"64-bit offsets need a GPU with {FAR_MEMORY >> 30} GiB")
    findings = []
    for axis in (1, 2):  # heads, rows
        try:
            q, k, v, dout = far_apart([problem.q, problem.k, problem.v, problem.dout], axis)
        except RuntimeError as error:
            raise NotAskedError("64-bit offsets need more memory") from error
        far = problem._replace(q=q, k=k, v=v, dout=dout)
        findings += _as_good(target, evaluate(target, far), problem).findings
    return Outcome(findings, {})


def fakes_faithfully(target: Target, problem: Problem) -> Outcome:
    """What torch.compile believes of shapes, dtypes and strides, against what is."""
    real = evaluate(target, problem)
    with FakeTensorMode() as mode:
        fake = evaluate(target, problem.mapped(mode.from_tensor))
    for name, x, y in zip(Results._fields, real, fake):
        if x is None or y is None:
            require(x is y, f"fake tensors give {'no' if y is None else 'a'} {name}")
            continue
        for what, a, b in (
            ("shape", tuple(x.shape), tuple(y.shape)),
            ("dtype", x.dtype, y.dtype),
            ("strides", _strides(x), _strides(y)),
        ):
            require(a == b, f"fake tensors give {name} the {what} {b}, real ones {a}")
    return Outcome([], {})


def compiles(target: Target, problem: Problem) -> Outcome:
    """Traced into one graph by torch.compile, with the values of eager mode."""
    torch._dynamo.reset()
    attend = torch.compile(target.attend, fullgraph=True, backend="aot_eager", dynamic=False)
    return _as_good(target, evaluate(replace(target, attend=attend), problem), problem)


def hidden_keys(problem: Problem) -> Tensor:
    """Keys that no query of the batch entry sees, bool (batch, 1, seqlen_k, 1)."""
    inputs, spec = problem.prepared()
    seen = visible(inputs, spec)
    assert seen is not None, "this problem hides nothing"
    batch, heads, seqlen_q, _ = problem.q.shape
    return ~seen.expand(batch, heads, seqlen_q, -1).flatten(1, 2).any(1)[:, None, :, None]


def _as_good(target: Target, results: Results, problem: Problem) -> Outcome:
    """Results that must be those of a problem, against what the target gives when nothing is special."""
    oracle = expected(problem, target.capabilities)
    trapped, plain = (
        measure(x, oracle, target.capabilities.arithmetic) for x in (results, evaluate(target, problem))
    )
    return _no_worse(trapped, plain)


def _no_worse(trapped: list[Finding], plain: list[Finding]) -> Outcome:
    """Judged by the budget, or by twice the error without the trap: that one is for `values` to blame."""
    allowed = {finding.output: max(finding.allowed, 2 * finding.constant) for finding in plain}
    return Outcome([finding._replace(allowed=allowed[finding.output]) for finding in trapped], {})


def _require_dtypes(results: Results, problem: Problem) -> None:
    dtype = problem.q.dtype
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    for name in AttentionStats._fields:
        x, must = getattr(results, name), dtype if name == "out" else statistics
        if x is not None:
            require(x.dtype == must, f"{name} has dtype {x.dtype}, not {must}")


def _tensors(problem: Problem) -> dict[str, Tensor]:
    everything = {**problem._asdict(), **problem.options}
    return {name: x for name, x in everything.items() if isinstance(x, Tensor)}


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    """Bit for bit, but that all NaN are alike."""
    if x is None or y is None:
        return x is y
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def _first_entry(results: Results) -> Results:
    """Without the gradient of bias, which may be a sum over the entries."""
    return Results(*(None if x is None else x[:1] for x in results[:5]))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Those that mean something."""
    return tuple(stride for size, stride in zip(x.shape, x.stride()) if size > 1)
