"""What only the fallback can get wrong: its plan of blocks, its two engines, its memory."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undivided import attention
from undivided.conformance import cases as conformance_cases
from undivided.conformance.adapters import ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import Case, Extra
from undivided.conformance.distributions import DISTRIBUTIONS
from undivided.conformance.evaluation import evaluate, expected
from undivided.conformance.oracle import Results, solve
from undivided.conformance.target import EVERYTHING, Target, target
from undivided.kernels import fallback_blocks, fallback_problems, functional
from undivided.kernels.fallback_plan import Limits, plan
from undivided.kernels.spec import STATISTICS, AttentionOptions, AttentionSpec, Inputs
from undivided.kernels.visibility import visible

SIDE = st.none() | st.integers(0, 25)
CPU = torch.device("cpu")


@settings(deadline=None, max_examples=200)
@given(
    left=SIDE,
    right=SIDE,
    top_left=st.booleans(),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40)),
    elementwise=st.booleans(),
    limits=st.builds(Limits, st.integers(1, 12), st.integers(1, 12), st.booleans()),
)
def test_plan_holds_every_visible_pair_once(
    left: int | None,
    right: int | None,
    top_left: bool,
    sizes: tuple[int, int, int],
    elementwise: bool,
    limits: Limits,
) -> None:
    """A block counted twice, left out, or called fully visible when it is not."""
    seqlen_q, seqlen_k, stop = sizes
    stop = min(stop, seqlen_k)
    spec = AttentionSpec(1.0, left, right, top_left)
    q, k = (torch.zeros(1, 1, n, 1) for n in (seqlen_q, seqlen_k))
    ok = visible(Inputs(q, k, k), spec)
    allowed = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool) if ok is None else ok.clone()
    allowed[:, stop:] = False

    count = torch.zeros(seqlen_q, seqlen_k, dtype=torch.int64)
    for rows, parts in plan(spec, seqlen_q, seqlen_k, stop, elementwise, limits):
        assert parts
        for part in parts:
            here = torch.ones_like(count[rows, part.cols], dtype=torch.bool)
            if part.visible == "causal":
                here = here.tril()
            elif part.visible == "some":
                here = allowed[rows, part.cols]
            assert not (elementwise and part.visible != "some")
            count[rows, part.cols] += here
    assert torch.equal(count, allowed.long())


CASES = [
    Case("plain", seqlen_q=40, seqlen_k=50, head_dim_v=24),
    Case("bottom right", seqlen_q=40, seqlen_k=90, causal=True, heads_q=4),
    Case("nothing seen first", seqlen_q=50, seqlen_k=20, causal=True),
    Case("keys nobody sees", seqlen_q=20, seqlen_k=50, causal=True, top_left=True),
    Case("window", seqlen_q=70, seqlen_k=70, window=(9, 3)),
    Case("window of many strips", batch=2, heads_q=4, seqlen_q=700, seqlen_k=720, window=(100, 3)),
    Case("relative", batch=2, heads_q=4, seqlen_q=70, seqlen_k=90, relative=(12, True), causal=True),
    Case("ALiBi", batch=2, heads_q=4, seqlen_q=70, seqlen_k=90, alibi="bh", window=(20, 5)),
    Case("window and lengths", batch=2, seqlen_q=600, seqlen_k=600, window=(50, 0), key_lengths=(599, 333)),
    Case("lengths", batch=4, key_lengths=(33, 7, 7, 0), causal=True),
    Case("mask", batch=2, heads_q=4, mask=Extra("random", "bqk")),
    Case("bias", heads_q=4, bias=Extra("random", "hqk"), causal=True),
    Case("softcap", softcap=2.0, seqlen_q=60),
    Case("dropout", batch=2, heads_q=4, dropout_p=0.3, key_lengths=(20, 33)),
    Case("decode", heads_q=8, seqlen_q=1, seqlen_k=100, mask=Extra("random", "hqk"), head_dim_v=8),
    Case("few rows", heads_q=8, seqlen_q=3, seqlen_k=100, causal=True, bias=Extra("random", "qk")),
]


def check(case: Case, dtype: torch.dtype) -> None:
    problem = case.build(dtype)
    assert_within_budget(evaluate(ours("fallback"), problem), expected(problem), "wide")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("engine", ["operator", "matmul"])
def test_many_small_blocks(
    case: Case, dtype: torch.dtype, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging and summing go wrong only where a row has several blocks: long inputs, or small limits.

    Without the operator the other engine runs, as it does on every device but a CPU.
    """
    for limit in ("_MASK_ELEMENTS", "_BLOCK_ELEMENTS", "_CONVERTED_ELEMENTS"):
        monkeypatch.setattr(fallback_blocks, limit, 256)
    monkeypatch.setattr(fallback_blocks, "_COLS", 16)
    if engine == "matmul":
        monkeypatch.setattr(fallback_blocks.FlashEngine, "takes", lambda inputs, spec: False)
    check(case, dtype)


@pytest.mark.parametrize("engine", ["operator", "matmul"])
def test_lengths_as_a_mask(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other devices cannot read key_lengths without waiting: they mask, and hidden keys stay harmless."""
    monkeypatch.setattr(
        fallback_problems, "alike", lambda inputs, spec: iter([(slice(None), inputs, inputs.k.shape[2])])
    )
    if engine == "matmul":
        monkeypatch.setattr(fallback_blocks.FlashEngine, "takes", lambda inputs, spec: False)
    case = Case("lengths", batch=3, heads_q=4, key_lengths=(33, 7, 0), causal=True)
    problem = case.build(torch.float32)
    k, v = problem.k.clone(), problem.v.clone()
    k[1, :, 7:], v[2] = torch.nan, torch.inf
    actual = evaluate(ours("fallback"), problem._replace(k=k, v=v))
    assert_within_budget(actual, expected(problem), "wide")


def test_row_emptied_by_bias_and_causal_together() -> None:
    """The operator calls such a row's lse 0; -inf in the part of the bias that causal leaves."""
    problem = Case("", seqlen_q=20, seqlen_k=20, causal=True).build(torch.float32)
    bias = torch.zeros(20, 20)
    bias[:8, :8] = -torch.inf
    problem = problem._replace(options={**problem.options, "bias": bias})
    actual = evaluate(ours("fallback"), problem)
    assert actual.lse is not None
    assert (actual.lse[:, :, :8] == -torch.inf).all()
    assert_within_budget(actual, expected(problem), "wide")


def test_rows_that_blas_cannot_step_over() -> None:
    """Keys expanded along the sequence have a row stride of 0; the operator hands it to BLAS."""
    problem = Case("", seqlen_q=9, seqlen_k=9).build(torch.float32)
    k = problem.k[:, :, :1].expand(-1, -1, 9, -1)
    problem = problem._replace(k=k)
    assert_within_budget(evaluate(ours("fallback"), problem), expected(problem), "wide")


_STEP = """
import re, torch, undivided
from undivided.kernels import fallback_blocks
torch.set_num_threads(1)
fallback_blocks.multiplies_bf16 = lambda: True
def step(seqlen):
    sizes = dict(seqlen_q=seqlen, seqlen_k=seqlen, head_dim_v=16, dtype=torch.float32) | SIZES
    seqlen_q, seqlen_k, head_dim_v, dtype = sizes.values()
    shapes = (seqlen_q, 16), (seqlen_k, 16), (seqlen_k, head_dim_v)
    q, k, v = (torch.randn(1, 2, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    undivided.attention(q, k, v, **OPTIONS).sum().backward()
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
step(4096)
before = peak()
step(8192)
print(peak() - before)
"""
LINEAR = {
    "window": ("{'window': (127, 0)}", "{}"),
    "wide window": ("{'window': (seqlen // 2, 0)}", "{}"),
    "wide window, another head_dim of v": ("{'window': (seqlen // 2, 0)}", "{'head_dim_v': 8}"),
    "wide window, bf16": ("{'window': (seqlen // 2, 0)}", "{'dtype': torch.bfloat16}"),
    "causal, more keys, bf16": (
        "{'causal': True}",
        "{'seqlen_k': 3 * seqlen // 2, 'dtype': torch.bfloat16}",
    ),
    "softcap": ("{'causal': True, 'softcap': 5.0}", "{}"),
    "mask": ("{'mask': torch.ones(seqlen) > 0}", "{}"),
    "ALiBi": ("{'bias': undivided.ALiBi(torch.ones(2))}", "{}"),
    "relative positions": ("{'bias': undivided.RelativeBias(torch.ones(32, 2, requires_grad=True))}", "{}"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc: getrusage inherits pytest's")
@pytest.mark.parametrize("kind", LINEAR)
def test_memory_is_linear(kind: str) -> None:
    """A matrix of scores, or a mask of that size: 2 heads x 8192² x 4 bytes would be 512 MiB.

    Masks of all strips, kept, would be a quarter of that; keys of all strips, copied, a tenth. The engine of
    matrix products has a dozen temporaries of 8 MiB, which the allocator may lay anywhere.
    """
    options, sizes = LINEAR[kind]
    limit = 128 * 1024 if kind in ("softcap", "relative positions") else 48 * 1024
    program = _STEP.replace("OPTIONS", options).replace("SIZES", sizes)
    command = [sys.executable, "-c", program]
    for _ in range(3):  # what the allocator could not use again only ever adds
        finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        if int(finished.stdout) < limit:
            return
    raise AssertionError(f"{finished.stdout} KiB more at the peak")


@pytest.fixture
def matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bf16 itself, or one that believes so."""
    monkeypatch.setattr(fallback_blocks, "multiplies_bf16", lambda: True)


def without_lse() -> Target:
    """The fallback for those who want no lse: it may then stay in 16 bits."""
    claims: dict[str, Any] = {name: True for name, claim in vars(EVERYTHING).items() if claim is True}
    claims |= dict.fromkeys(("packed", "lse", "lse_gradient", "entropy_gradient", *STATISTICS), False)
    return target(functools.partial(attention, impl="fallback"), "fallback", **claims)


NARROW = [
    *(
        x
        for x in conformance_cases.CASES
        if not x.top_left and without_lse().refusal(x, torch.bfloat16) is None
    ),
    *(Case(f"long {x}", seqlen_q=900, seqlen_k=1000, distribution=x, causal=True) for x in DISTRIBUTIONS),
    Case("long", heads_q=4, seqlen_q=1100, seqlen_k=1100, head_dim=64, head_dim_v=40),
    Case("long causal", seqlen_q=800, seqlen_k=800, head_dim=64, causal=True),
    Case("long window", batch=2, heads_q=4, seqlen_q=900, seqlen_k=900, window=(130, 7)),
    Case("long mask", batch=2, seqlen_q=600, seqlen_k=700, mask=Extra("empty_rows", "bqk"), causal=True),
    Case(
        "long lengths",
        batch=3,
        seqlen_q=300,
        seqlen_k=700,
        key_lengths=(0, 650, 33),
        bias=Extra("random", "qk"),
    ),
]


@pytest.mark.usefixtures("matrix_instructions")
@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
def test_bf16_as_it_is_is_as_good_as_a_kernel(case: Case) -> None:
    """P may be rounded once and out once; parts that are rounded before they are merged, a bias or an lse
    rounded to 16 bits, or a dv summed in them would be outside."""
    problem = case.build(torch.bfloat16)
    narrow = without_lse()
    actual = evaluate(narrow, problem)
    assert_within_budget(actual, expected(problem, narrow.capabilities), "kernel")


@pytest.mark.usefixtures("matrix_instructions")
@pytest.mark.parametrize(
    "case", [Case("full"), Case("square causal", causal=True), Case("window", window=(9, 0))]
)
def test_bf16_stays_bf16_only_where_nobody_reads_lse(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion to float32 costs two thirds of the speed; an lse of the 16-bit operator is off by 5e-5."""
    seen = []
    flash = fallback_blocks._flash
    monkeypatch.setattr(
        fallback_blocks,
        "_flash",
        lambda q, *rest, **kwargs: seen.append(q.dtype) or flash(q, *rest, **kwargs),
    )
    q, k, v, options, *_ = case.build(torch.bfloat16)
    attention(q, k, v, **options)
    attention(q.requires_grad_(), k, v, **options).sum().backward()
    assert {*seen} == {torch.bfloat16}
    seen.clear()
    attention(q, k, v, want=("lse",), **options)
    assert {*seen} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (40, 0)}, {"causal": True}], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_narrow_decoding_is_as_good_as_a_kernel(
    rows: int, options: AttentionOptions, dtype: torch.dtype
) -> None:
    """Without lse few rows are computed in 16 bits: P may be rounded, scores may not."""
    q, k, v = (torch.randn(2, h, s, 64, dtype=dtype) for h, s in ((8, rows), (2, 700), (2, 700)))
    inputs, spec = functional.prepare(q, k, v, options)
    out = attention(q, k, v, **options)
    assert_within_budget(Results(out), solve(inputs, spec), "kernel")
    precise = attention(q, k, v, want=("lse",), **options)
    assert precise.lse is not None
    assert_within_budget(Results(precise.out, precise.lse), solve(inputs, spec), "wide")
