"""One suite for every implementation: values and all gradients of every case, within the budget.

Nothing here is written for one implementation. A failure names the output, the element and the C.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from undivided.conformance.adapters import ARITHMETIC, ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import CASES, Case, Extra
from undivided.conformance.combinations import combinations
from undivided.conformance.evaluation import evaluate, expected
from undivided.conformance.patterns import BIASES, LAYOUTS, MASKS

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
NATIVE = torch.cuda.is_available()
# bf16 needs a GPU: numpy, which carries the interpreter, has no such type
TRITON_DTYPES = (HALF, BRAIN, SINGLE) if NATIVE else (HALF, SINGLE)
DTYPES = {"reference": (SINGLE, DOUBLE), "fallback": (HALF, BRAIN, SINGLE, DOUBLE), "triton": TRITON_DTYPES}


def check(impl: str, dtype: torch.dtype, case: Case, device: torch.device, seed: int = 0) -> None:
    problem = case.build(dtype, device, seed)
    actual = evaluate(ours(impl), problem)
    assert actual.out.dtype == dtype
    assert actual.lse.dtype == (DOUBLE if dtype == DOUBLE else SINGLE)
    assert_within_budget(actual, expected(problem), ARITHMETIC[impl])


def every_case() -> list[object]:
    """Interpreting a kernel takes seconds: each case runs in one dtype then, in all of them with `full`."""
    params = []
    for index, case in enumerate(CASES):
        for impl, dtypes in DTYPES.items():
            if ours(impl).refusal(case, dtypes[0]) == "relative_bias":  # a dispatch test says who refuses
                continue
            for dtype in dtypes:
                interpreted = impl == "triton" and not NATIVE
                marks = [pytest.mark.full] if interpreted and dtype != dtypes[index % len(dtypes)] else []
                name = f"{impl}-{dtype}-{case.name}".replace("torch.", "")
                params.append(pytest.param(impl, dtype, case, id=name, marks=marks))
    return params


@pytest.mark.parametrize(("impl", "dtype", "case"), every_case())
def test_within_budget(impl: str, dtype: torch.dtype, case: Case, device: torch.device) -> None:
    """Any wrong value or gradient, in any element (hazard N19, S4, S5, L4, L7)."""
    if case.bias is not None and case.bias.dtype == BRAIN and impl == "triton" and not NATIVE:
        pytest.skip("the interpreter truncates what it stores in bf16")
    check(impl, dtype, case, device)


INTERPRETED = 12
"""How many combinations are asked of interpreted kernels without `full`; the first ones have most pairs."""


def every_combination() -> list[object]:
    """Each in one of the dtypes it is claimed for, in all of them with `full`."""
    params = []
    for impl in DTYPES:
        target = ours(impl)
        interpreted = impl == "triton" and not NATIVE
        for index, case in enumerate(combinations(target)):
            dtypes = [dtype for dtype in DTYPES[impl] if target.refusal(case, dtype) is None]
            for dtype in dtypes:
                sampled = dtype == dtypes[index % len(dtypes)] and not (interpreted and index >= INTERPRETED)
                marks = [] if sampled else [pytest.mark.full]
                name = f"{impl}-{dtype}-{case.name}".replace("torch.", "")
                params.append(pytest.param(impl, dtype, case, id=name, marks=marks))
    return params


@pytest.mark.parametrize(("impl", "dtype", "case"), every_combination())
def test_combinations_within_budget(impl: str, dtype: torch.dtype, case: Case, device: torch.device) -> None:
    """Two options of which each is right without the other."""
    check(impl, dtype, case, device)


LARGE = [
    Case("long", heads_q=1, heads_kv=1, seqlen_q=1111, seqlen_k=2222, head_dim=64, causal=True),
    Case("long window", heads_q=1, heads_kv=1, seqlen_q=2000, seqlen_k=2000, window=(257, 0)),
    Case("long dropout", seqlen_q=1025, seqlen_k=1023, head_dim=80, dropout_p=0.2),
    Case("long bias", seqlen_q=777, seqlen_k=1500, bias=Extra(axes="hqk"), softcap=20.0),
    Case("many heads", batch=2, heads_q=12, heads_kv=4, seqlen_q=257, seqlen_k=513, head_dim=128),
]


@pytest.mark.full
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("impl", ["fallback", "triton"])
def test_large_problems(impl: str, dtype: torch.dtype, case: Case, device: torch.device) -> None:
    """Errors that need many tiles: a running maximum lost, an accumulation in low precision."""
    if impl == "triton" and not NATIVE:
        pytest.skip("hours in the interpreter")
    check(impl, dtype, case, device)


@st.composite
def any_case(draw: st.DrawFn, longest: int) -> Case:
    """Shapes, strides and options that nobody thought of."""
    heads_kv = draw(st.integers(1, 3))
    axes = st.lists(st.sampled_from("bhqk"), unique=True).map("".join)
    seqlen_k = draw(st.integers(1, longest))
    side = st.none() | st.integers(0, longest)
    return Case(
        "drawn",
        batch=draw(st.integers(1, 2)),
        heads_q=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        seqlen_q=draw(st.integers(1, longest)),
        seqlen_k=seqlen_k,
        head_dim=draw(st.sampled_from([1, 2, 8, 17, 32, 40, 64])),
        head_dim_v=draw(st.none() | st.sampled_from([1, 5, 16, 48])),
        causal=draw(st.booleans()),
        top_left=draw(st.booleans()),
        window=draw(st.none() | st.tuples(side, side)),
        key_lengths=draw(st.none() | st.lists(st.integers(0, seqlen_k), min_size=2, max_size=2).map(tuple)),
        mask=draw(st.none() | st.builds(Extra, st.sampled_from(sorted(MASKS)), axes)),
        bias=draw(st.none() | st.builds(Extra, st.sampled_from(["random", "hidden", "hidden_rows"]), axes)),
        softcap=draw(st.none() | st.sampled_from([0.7, 20.0])),
        sinks=draw(st.booleans()),
        alibi=draw(st.sampled_from(["", "", "h", "bh"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
        scale=draw(st.none() | st.sampled_from([-0.3, 0.0, 1.0])),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
    )


drawn = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@settings(drawn, max_examples=150)
@given(case=any_case(longest=80), dtype=st.sampled_from(DTYPES["fallback"]), seed=st.integers(0, 9))
def test_fallback_on_any_case(case: Case, dtype: torch.dtype, seed: int) -> None:
    """Combinations that no list contains."""
    check("fallback", dtype, case, torch.device("cpu"), seed)


@settings(drawn, max_examples=12)
@given(case=any_case(longest=40), dtype=st.sampled_from(TRITON_DTYPES), seed=st.integers(0, 9))
def test_triton_on_any_case(case: Case, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """Combinations that no list contains."""
    check("triton", dtype, case, device, seed)


@pytest.mark.full
@settings(drawn, max_examples=100)
@given(case=any_case(longest=80), dtype=st.sampled_from(TRITON_DTYPES), seed=st.integers(0, 9))
def test_triton_on_many_cases(case: Case, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """Combinations that no list contains."""
    check("triton", dtype, case, device, seed)


def test_every_pattern_is_asked() -> None:
    """A mask, bias or layout that is defined and then forgotten by the list of cases."""
    assert {case.mask.pattern for case in CASES if case.mask} == set(MASKS)
    assert {case.bias.pattern for case in CASES if case.bias} == set(BIASES)
    assert {case.layout for case in CASES} == set(LAYOUTS)
    assert len({case.name for case in CASES}) == len(CASES)
