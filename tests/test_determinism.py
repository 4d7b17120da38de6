"""The same bits: on every run, whatever PyTorch is told about determinism, and in whatever batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from undivided import ALiBi, attention_varlen
from undivided.conformance.adapters import ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import Case, Extra, Problem
from undivided.conformance.evaluation import evaluate, expected
from undivided.conformance.mask_objects import OBJECTS
from undivided.conformance.oracle import Results
from undivided.kernels import dispatch, fallback, fallback_blocks, fallback_problems
from undivided.kernels.spec import AttentionSpec, Inputs, Needs
from undivided.kernels.spec import of_entries as of_some

NATIVE = torch.cuda.is_available()
INTERPRETED = not NATIVE
IMPLEMENTATIONS = ("reference", "fallback", "triton")
ODD = Case("odd sizes", batch=2, heads_q=3, heads_kv=1, seqlen_q=35, seqlen_k=67, head_dim=20)
OPTIONS = (
    ODD,
    replace(ODD, name="causal, sinks", causal=True, sinks=True),
    replace(ODD, name="window, softcap", window=(20, 3), softcap=2.0),
    replace(ODD, name="lengths", key_lengths=(67, 30, 0), bias=Extra(axes="hk")),
    replace(ODD, name="mask, scalar bias", mask=Extra("empty_rows", "bqk"), bias=Extra(axes="")),
    replace(ODD, name="dropout, ALiBi", dropout_p=0.3, alibi="h"),
    replace(ODD, name="documents", mask_object="causal documents"),
    replace(ODD, name="relative, precise", relative=(8, True), precise=True),
    replace(ODD, name="packed", packed=((5, 33), (0, 9), (17, 17)), alibi="h"),
)
"""Each option, and each gradient that sums over the batch."""


def bits(x: Tensor | None) -> Tensor | None:
    """Of a float tensor, as integers: NaN equals itself, and 0 is not -0."""
    return (
        None
        if x is None
        else x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    )


def differing(a: Results, b: Results) -> list[str]:
    """Names of the outputs whose bits differ."""
    pairs = zip(Results._fields, map(bits, a), map(bits, b))
    return [name for name, x, y in pairs if not (x is y or torch.equal(x, y))]


def cases_of(cases: Sequence[Case]) -> list[Any]:
    """Each implementation with what it claims to take; interpreted kernels with a few, with all in `full`."""
    params = []
    for impl in IMPLEMENTATIONS:
        claimed = [case for case in cases if ours(impl).refusal(case, torch.float32) is None]
        for index, case in enumerate(claimed):
            slow = impl == "triton" and INTERPRETED and index % 4 != 0
            marks = [pytest.mark.full] if slow else []
            params.append(pytest.param(impl, case, id=f"{impl}-{case.name}", marks=marks))
    return params


@pytest.fixture(params=[False, True], ids=["as it is", "deterministic mode"])
def mode(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """May be changed by the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("impl", "case"), cases_of(OPTIONS))
@pytest.mark.usefixtures("threads")
def test_every_run_gives_the_same_bits(impl: str, case: Case, mode: bool, device: torch.device) -> None:
    """Atomics, threads that add up in the order of their arrival (hazard R1) (hazard R2)."""
    small = impl == "triton" and INTERPRETED
    case = replace(case, seqlen_q=17, seqlen_k=33, batch=1) if small else case
    for dtype in (torch.float32,) if impl == "reference" else (torch.float16, torch.float32):
        problem = case.build(dtype, device)
        for count in (2,) if mode or small else (1, 2, 3):
            torch.set_num_threads(count)
            first = evaluate(ours(impl), problem)
            for _ in range(2 if small else 20):
                assert differing(first, evaluate(ours(impl), problem)) == []


BATCHES = (
    Case("odd sizes", heads_q=3, heads_kv=1, seqlen_q=35, seqlen_k=67, head_dim=20),
    Case("one row of many keys", heads_q=1, heads_kv=1, seqlen_q=1, seqlen_k=301, head_dim=64),
    Case("decode", heads_q=8, heads_kv=2, seqlen_q=1, seqlen_k=1300, head_dim=64),
    Case("one head", heads_q=1, heads_kv=1, seqlen_q=65, seqlen_k=129, head_dim=64),
    Case("causal", heads_q=4, heads_kv=2, seqlen_q=70, seqlen_k=90, head_dim=40, causal=True),
    Case("many strips", heads_q=2, heads_kv=1, seqlen_q=500, seqlen_k=500, window=(40, 0)),
    Case("lengths", seqlen_q=33, seqlen_k=129, key_lengths=(129, 40, 40, 0, 1, 128, 129)),
    Case("lengths of groups", heads_q=4, heads_kv=2, causal=True, key_lengths=(33, 20, 7)),
    Case("masks", heads_q=4, heads_kv=2, seqlen_k=70, mask=Extra("random", "bqk")),
    Case("one mask, biases", seqlen_k=70, mask=Extra("empty_columns", "k"), bias=Extra(axes="bhqk")),
    Case("softcap", heads_q=4, heads_kv=2, seqlen_q=150, seqlen_k=600, softcap=2.0, sinks=True),
    Case("ALiBi", seqlen_q=50, seqlen_k=129, alibi="bh", top_left=True, window=(60, 10)),
    Case("relative", seqlen_q=50, seqlen_k=129, relative=(8, True), precise=True),
)


def of_entries(results: Results, entries: list[int] | slice) -> Results:
    """What a batch entry gives: not the sums over the batch."""
    return Results(*(None if x is None else x[entries] for x in results[:5]))


@pytest.mark.parametrize(("impl", "case"), cases_of(BATCHES))
def test_an_entry_gives_the_same_bits_in_every_batch(impl: str, case: Case, device: torch.device) -> None:
    """Blocks sized or threads split by the batch, an entry touched by its neighbours (hazard R3)."""
    small = impl == "triton" and INTERPRETED
    rows, others = 33, [[0], [6], [3, 1], [4, 2, 6], [6, 3, 0, 5, 1, 2, 4]]
    if small:
        rows, others = 17, [[2], [1, 0], [2, 0, 1]]
        case = replace(case, seqlen_k=min(case.seqlen_k, 33), head_dim=16)
    case = replace(case, batch=len(others[-1]), seqlen_q=min(case.seqlen_q, rows))
    for dtype in (torch.float32,) if impl == "reference" or small else (torch.float16, torch.float32):
        problem = replace(case, batch_invariant=True).build(dtype, device)
        whole = evaluate(ours(impl), problem)
        for entries in others:
            part = evaluate(ours(impl), problem.of_entries(entries))
            assert differing(of_entries(part, slice(None)), of_entries(whole, entries)) == [], entries


@pytest.mark.parametrize(("impl", "case"), cases_of([c for c in BATCHES if c.mask or c.key_lengths]))
def test_neighbours_may_hold_anything(impl: str, case: Case, device: torch.device) -> None:
    """NaN in another entry, which makes everybody look at his hidden keys, changes how they are treated."""
    case = replace(case, batch=2, seqlen_q=min(case.seqlen_q, 17), seqlen_k=33, head_dim=16)
    problem = replace(case, batch_invariant=True).build(torch.float32, device)
    k, v = problem.k.clone(), problem.v.clone()
    k[1], v[1] = torch.nan, torch.inf
    clean, spoiled = (evaluate(ours(impl), x) for x in (problem, problem._replace(k=k, v=v)))
    assert differing(of_entries(clean, [0]), of_entries(spoiled, [0])) == []


def gradients(inputs: Inputs, spec: AttentionSpec, problem: Problem, here: slice, impl: str) -> Results:
    """out, lse, dq, dk and dv of some batch entries, by the path of a public call."""
    own = of_some(inputs, here)
    leaves = [x.detach().requires_grad_() for x in own[:3]]
    out, lse, *_ = dispatch.run(own._replace(q=leaves[0], k=leaves[1], v=leaves[2]), spec, impl)
    grads = torch.autograd.grad((out, lse), leaves, (problem.dout[here], problem.dlse[here]))
    return Results(out.detach(), lse.detach(), *grads)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", OBJECTS)
def test_mask_objects_say_nothing_of_neighbours(mask: str, impl: str, device: torch.device) -> None:
    """Blocks that are visited because another entry sees something there (hazard R3)."""
    case = Case("mask", batch=3, seqlen_q=17, seqlen_k=33, mask_object=mask, batch_invariant=True)
    problem = case.build(torch.float32, device)
    inputs, spec = problem.prepared()
    if dispatch.unsupported_reasons(impl, inputs, spec):
        pytest.skip("not computed by it")
    whole = gradients(inputs, spec, problem, slice(0, 3), impl)
    for entry in range(3):
        alone = gradients(inputs, spec, problem, slice(entry, entry + 1), impl)
        assert differing(alone, of_entries(whole, [entry])) == []


class Packings:
    """Sequences of their own numbers, and what each gives in a call that packs some of them."""

    lengths = ((17, 17), (0, 9), (5, 33), (40, 7), (17, 17), (1, 50))
    """(rows, keys)"""
    options: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": {},
        "causal, key_lengths": {"causal": True, "key_lengths": torch.tensor([17, 3, 20, 0, 9, 50])},
        "window, softcap": {"window": (20, 3), "softcap": 2.0, "precise": True},
        "mask": {"mask": torch.arange(40 * 50).view(40, 50) % 3 > 0, "bias": ALiBi(torch.tensor([0.5, 0.1]))},
    }

    def __init__(self, impl: str, options: str, dtype: torch.dtype, device: torch.device) -> None:
        self.impl, self.given = impl, self.options[options]
        generator = torch.Generator().manual_seed(0)
        self.sequences = [
            [
                torch.randn(n, *shape, generator=generator).to(device, dtype if len(shape) > 1 else None)
                for n, *shape in ((rows, 2, 16), (keys, 1, 16), (keys, 1, 16), (rows, 2, 16), (rows, 2))
            ]
            for rows, keys in self.lengths
        ]
        """q, k, v, dout, dlse of each"""

    def results(self, numbers: Sequence[int], spare: int = 0) -> dict[int, Results]:
        """Of each packed sequence; spare: tokens of nobody, NaN, behind the last one."""
        lengths = [self.lengths[i] for i in numbers]
        columns = [[*column] for column in zip(*(self.sequences[i] for i in numbers))]
        packed = [torch.cat([*x, x[0].new_full((spare, *x[0].shape[1:]), torch.nan)]) for x in columns]
        *leaves, dout, dlse = packed
        device = dout.device
        cu_q, cu_k = torch.tensor([(0, 0), *lengths]).cumsum(0).to(device, torch.int32).unbind(1)
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.given.items()}
        if "key_lengths" in options:
            options["key_lengths"] = options["key_lengths"][[*numbers]]
        if "bias" in options:
            options["bias"] = ALiBi(options["bias"].slopes.to(device))
        leaves = [x.requires_grad_() for x in leaves]
        options |= {"max_seqlen_q": 40, "max_seqlen_k": 50, "deterministic": "batch", "impl": self.impl}
        stats = attention_varlen(*leaves, cu_q.contiguous(), cu_k.contiguous(), want=("lse",), **options)
        seen = slice(0, len(dout) - spare)  # what nobody owns has lse -inf, and no gradient to pass on
        gradients = torch.autograd.grad((stats.out[seen], stats.lse[seen]), leaves, (dout[seen], dlse[seen]))
        of_q, of_k = ([*map(int, x)] for x in zip(*lengths))
        found = [
            x.detach()[: sum(sizes)].split(sizes)
            for x, sizes in zip((stats.out, stats.lse, *gradients), (of_q, of_q, of_q, of_k, of_k))
        ]
        return {i: Results(*parts) for i, *parts in zip(numbers, *found)}


def packings() -> list[Any]:
    """Interpreted kernels with one, with all in `full`."""
    pairs = itertools.product(IMPLEMENTATIONS, Packings.options)
    params = []
    for impl, name in pairs:
        slow = impl == "triton" and INTERPRETED and name != "causal, key_lengths"
        params.append(pytest.param(impl, name, marks=[pytest.mark.full] if slow else []))
    return params


@pytest.mark.parametrize(("impl", "options"), packings())
def test_a_sequence_gives_the_same_bits_in_every_packing(
    impl: str, options: str, device: torch.device
) -> None:
    """Neighbours of equal length made one batch, blocks or threads shared out by the total (hazard R3)."""
    small = impl == "triton" and INTERPRETED
    others = [[4, 0], [2, 5, 3]] if small else [[0, 4], [2, 1, 0], [3, 5, 4, 2], [5, 4, 3, 2, 1, 0]]
    for dtype in (torch.float32,) if small else (torch.float32, torch.bfloat16):
        packings = Packings(impl, options, dtype, device)
        alone = {i: packings.results([i])[i] for i in range(len(Packings.lengths))}
        for numbers in others:
            for i, found in packings.results(numbers, spare=len(numbers) % 3).items():
                assert differing(found, alone[i]) == [], (numbers, i)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_counts_entries_by_their_place(impl: str, device: torch.device) -> None:
    """Entries computed one by one that all drop what the first one drops."""
    case = Case("dropout", batch=3, heads_q=2, seqlen_q=17, seqlen_k=33, dropout_p=0.4, key_lengths=(33, 9))
    problem = replace(case, batch_invariant=True).build(torch.float32, device)
    whole = evaluate(ours(impl), problem)
    assert_within_budget(whole, expected(problem), ours(impl).capabilities.arithmetic)
    first = evaluate(ours(impl), problem.of_entries([0, 1]))
    assert differing(of_entries(first, slice(None)), of_entries(whole, [0, 1])) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.name)
def test_entries_one_by_one_are_right(case: Case, dtype: torch.dtype) -> None:
    """Sums over the batch, the gradient of a shared bias say, that hold the last entry only."""
    problem = replace(case, batch=3, batch_invariant=True).build(dtype)
    assert_within_budget(evaluate(ours("fallback"), problem), expected(problem), "wide")


UNORDERED = (
    "bincount cumprod cumsum embedding_bag grid_sampler histc index_add index_copy index_put kthvalue "
    "max_unpool median nll_loss put_ scatter_add scatter_reduce upsample"
)
"""Operators, and backwards of such, that PyTorch calls nondeterministic on a GPU
(`torch.use_deterministic_algorithms`). gather is not: its backward, scatter_add, is."""


class Heard(TorchDispatchMode):
    """The names of all operators that are called with floats: sums of integers are exact in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in args):
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.name)
def test_nothing_that_is_unordered_on_a_gpu_is_called(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU: matmuls, lengths as a mask. A scatter there adds up in any order (hazard R2)."""
    monkeypatch.setattr(fallback_blocks.FlashEngine, "takes", lambda inputs, spec: False)
    monkeypatch.setattr(
        fallback_problems, "alike", lambda inputs, spec: iter([(slice(None), inputs, inputs.k.shape[2])])
    )
    problem = case.build(torch.float16)
    inputs, spec = problem.prepared()
    with Heard() as heard, torch.no_grad():
        out, lse, _ = fallback.attention_forward(inputs, spec._replace(want_max=True))
        everything = Needs(*(x is not None for x in inputs[: len(Needs._fields)]))
        fallback.attention_backward(problem.dout, problem.dlse, out, lse, inputs, spec, everything)
    assert "bmm.default" in heard.names
    assert [name for name in heard.names if any(word in name for word in UNORDERED.split())] == []
