"""The kernels for Hopper, simulated: values, every gradient, memory, in orders of events drawn from seeds."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="the kernels are written in it")

from hopper_cases import TILED
from simulated_hopper import attend, is_taken, is_taken_backward, simulated_hopper
from undivided import attention
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import CASES, Case, Problem
from undivided.conformance.evaluation import expected
from undivided.conformance.memory import CANARIES, Watch, poisoned_allocations
from undivided.conformance.oracle import Oracle, Results
from undivided.kernels.gluon.config import BACKWARD, FORWARD, BackwardTile, ForwardTile
from undivided.kernels.gluon.hopper_backward import attention_backward
from undivided.kernels.gluon.hopper_forward import attention_forward
from undivided.kernels.spec import Needs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton does not interpret")

HALF, BRAIN = torch.float16, torch.bfloat16


@functools.lru_cache(maxsize=4)
def asked(case: Case, dtype: torch.dtype) -> tuple[Problem, Oracle]:
    """The same question in several orders of events is answered once."""
    problem = case.build(dtype)
    return problem, expected(problem)


def check(case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    problem, oracle = asked(case, dtype)
    assert_within_budget(attend(problem, seed), oracle, "kernel")


def conformance_cases() -> list[object]:
    """Every other one in one dtype and order, all in both and two with `full`; the interpreter is slow."""
    params = []
    for index, case in enumerate(case for case in CASES if is_taken(case)):
        native = is_taken_backward(case)
        for dtype, seed in itertools.product((HALF, BRAIN), range(2)):
            if dtype == BRAIN and not native:
                continue
            sampled = native and seed == 0 and index % 4 == (0 if dtype == HALF else 2)
            name = f"{dtype}-{seed}-{case.name}".replace("torch.", "")
            params.append(
                pytest.param(case, dtype, seed, id=name, marks=[] if sampled else [pytest.mark.full])
            )
    return params


@pytest.mark.parametrize(("case", "dtype", "seed"), conformance_cases())
def test_conformance_within_budget(case: Case, dtype: torch.dtype, seed: int) -> None:
    """Any wrong value or gradient, in any element."""
    check(case, dtype, seed)


@pytest.mark.parametrize("dtype", [HALF, pytest.param(BRAIN, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_many_tiles_within_budget(case: Case, dtype: torch.dtype) -> None:
    """A ring that goes round wrongly, a tile that is skipped or not masked."""
    assert is_taken(case)
    assert is_taken_backward(case)
    check(case, dtype)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_many_orders_within_budget(case: Case, seed: int) -> None:
    """A hand-over that only fails where somebody is far ahead."""
    check(case, HALF, seed)


@pytest.mark.parametrize("case", TILED[1:3], ids=lambda case: case.name)
def test_both_kernels_run(case: Case) -> None:
    """Cases that pass because others compute them."""
    problem = case.build(HALF)
    q, k, v = (x.requires_grad_() for x in problem[:3])
    with simulated_hopper() as launched:
        attention(q, k, v, causal=True, impl="gluon").backward(problem.dout)
    assert launched == ["_forward_kernel", "_backward_kernel"]


@pytest.mark.parametrize(
    "head_dims",
    [
        (16, 16),
        (24, 64),
        (64, 40),
        (72, 128),
        (128, 80),
        (136, 136),
        (256, 256),
        (192, 128),
        (128, 64),
        (200, 24),
    ],
    ids=str,
)
def test_head_dims(head_dims: tuple[int, int]) -> None:
    """Padding of a head that reaches out, or what is beside it in memory; head_dims of k and v mixed up."""
    case = Case("head_dim", seqlen_q=70, seqlen_k=200, head_dim=head_dims[0], head_dim_v=head_dims[1])
    problem = case.build(BRAIN)
    oracle = expected(problem)
    if not is_taken_backward(case):
        q, k, v = problem[:3]
        with simulated_hopper(), torch.no_grad():
            stats = attention(q, k, v, want=("lse",), impl="gluon")
        assert_within_budget(Results(stats.out, stats.lse), oracle, "kernel")
    else:
        assert_within_budget(attend(problem), oracle, "kernel")


FORWARD_TILES = [
    *dict.fromkeys(FORWARD.values()),
    ForwardTile(64, 2, 3),
    ForwardTile(128, 2, 2, take_turns=False),
    ForwardTile(64, 3, 3),
]
BACKWARD_TILES = [
    *dict.fromkeys(BACKWARD.values()),
    BackwardTile(64, 1, 1, 1),
    BackwardTile(64, 2, 1, 1),
    BackwardTile(128, 3, 2, 2),
]


@pytest.mark.parametrize("tile", FORWARD_TILES, ids=str)
def test_any_forward_tile_is_right(tile: ForwardTile) -> None:
    """Groups, stages or turns that only work in the numbers that the table has now."""
    for case in (TILED[2], TILED[4]):
        problem, oracle = asked(case, HALF)
        with simulated_hopper(tile):
            out, lse, _ = attention_forward(*problem.prepared(), tile)
        assert_within_budget(Results(out, lse), oracle, "kernel")


@pytest.mark.parametrize("tile", BACKWARD_TILES, ids=str)
def test_any_backward_tile_is_right(tile: BackwardTile) -> None:
    """Stages that only work in the numbers that the table has now."""
    problem, oracle = asked(TILED[1], HALF)
    inputs, spec = problem.prepared()
    with simulated_hopper(tile):
        out, lse, _ = attention_forward(inputs, spec)
        needs = Needs(dq=True, dk=True, dv=True)
        grads = attention_backward(problem.dout, problem.dlse, out, lse, inputs, spec, needs, tile)
    assert_within_budget(Results(dq=grads.dq, dk=grads.dk, dv=grads.dv), oracle, "kernel")


def test_the_same_bits_in_every_order() -> None:
    """Results of forward, dk and dv that depend on who was first. (Sums of dq may, in the last bit.)"""
    problem = TILED[2].build(HALF)
    first = attend(problem, 0)
    for seed in range(1, 6):
        for name, x, y in zip(Results._fields, first, attend(problem, seed)):
            assert name == "dq" or x is None or torch.equal(x, y), name


def test_the_gradient_of_lse_alone() -> None:
    """A dlse that is lost, or that needs a dout (hazard N21)."""
    problem = TILED[1].build(HALF)
    alone = problem._replace(dout=torch.zeros_like(problem.dout))
    assert_within_budget(attend(alone), expected(alone), "kernel")


def boxed(x: Tensor) -> Tensor:
    """x inside a buffer of NaN: around every row, head and entry, where boxes can still be moved."""
    batch, heads, seqlen, head_dim = x.shape
    buffer = x.new_full((batch + 2, heads + 2, seqlen + 2, head_dim + 16), torch.nan)
    view = buffer[1:-1, 1:-1, 1:-1, 8:-8]
    return view.copy_(x)


@pytest.mark.parametrize("case", [TILED[1], TILED[10], TILED[11]], ids=lambda case: case.name)
def test_nothing_outside_is_read_or_written(case: Case) -> None:
    """A box that is too large, a head that runs into the next, a row past the end (hazard S12)."""
    problem = case.build(HALF)
    given = Watch()

    def watched(x: Tensor) -> Tensor:
        return given.over(boxed(x) if x.ndim == 4 else x.clone())

    with poisoned_allocations() as allocated:
        results = attend(problem.mapped(watched))
    assert_within_budget(results, expected(problem), "kernel")
    assert not given.written_outside()
    assert not allocated.written_outside()


def test_inputs_are_not_modified() -> None:
    """dk stored where k lies (hazard L12)."""
    problem = TILED[1].build(HALF)
    before = problem.mapped(torch.clone)
    attend(problem)
    for x, y in zip(problem, before):
        assert not isinstance(x, Tensor) or torch.equal(x, y)


@pytest.mark.parametrize("poisoned", [False, True], ids=["finite", "nan"])
def test_rows_that_see_nothing(poisoned: bool) -> None:
    """NaN of such a row's q, dout or dlse, or of the keys beside it, in anything (hazard N1)."""
    case = Case("causal", seqlen_q=230, seqlen_k=60, head_dim=64, causal=True)
    problem = case.build(HALF)
    clean = attend(problem)
    assert_within_budget(clean, expected(problem), "kernel")
    empty = clean.lse == -torch.inf
    assert empty.sum() == 2 * 170
    if not poisoned:
        return

    def trap(x: Tensor) -> Tensor:
        return x.masked_fill(empty if x.ndim == 3 else empty[..., None], torch.nan)

    dirty = problem._replace(q=trap(problem.q), dout=trap(problem.dout), dlse=trap(problem.dlse))
    for x, y in zip(attend(dirty), clean):
        assert (x is None and y is None) or torch.equal(x, y)


def test_rows_that_see_nothing_beside_nan_in_keys() -> None:
    """0·NaN: such a row in a tile with rows that see, of keys that hold anything."""
    problem = Case("causal", seqlen_q=70, seqlen_k=20, head_dim=64, causal=True).build(HALF)
    k, v = torch.full_like(problem.k, math.nan), torch.full_like(problem.v, math.inf)
    with simulated_hopper():
        stats = attention(problem.q, k, v, causal=True, want=("lse",), impl="gluon")
    assert stats.lse is not None
    assert not stats.out[:, :, :50].any()
    assert bool((stats.lse[:, :, :50] == -torch.inf).all())


STRIDES = {
    "of a sum": lambda x: torch.ones_like(x[:1, :1, :1, :1]).expand(x.shape),
    "transposed": lambda x: x.mT.contiguous().mT,
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "in steps": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_of_dout(strides: str) -> None:
    """A gradient that no box can read: stride 0, another order, another address (hazards L1, L2)."""
    problem = Case("dout", seqlen_q=70, seqlen_k=90, head_dim=64).build(HALF)
    strided: Problem = problem._replace(dout=STRIDES[strides](problem.dout))
    assert_within_budget(attend(strided), expected(strided), "kernel")


@pytest.mark.parametrize("head_dim", [20, 44, 100])
def test_rows_of_no_multiple_of_16_bytes(head_dim: int) -> None:
    """Inputs that boxes can read, as slices of something wider; results of their shape cannot be written."""
    wide = torch.randn(1, 2, 70, 128, dtype=HALF)
    q = wide[..., :head_dim]
    with simulated_hopper() as launched, pytest.raises(NotImplementedError, match="no multiple of 8"):
        attention(q, q, q, impl="gluon")
    assert not launched


def test_scores_beyond_the_precision_of_the_exponent() -> None:
    """exp2(s·unit - offset) is not 1 at the maximum of huge scores (hazard N5)."""
    x = torch.full((1, 1, 100, 64), 60000.0, dtype=HALF)
    with simulated_hopper():
        stats = attention(x, x, x, want=("lse",), impl="gluon")
    assert stats.lse is not None
    assert torch.equal(stats.out, x)
    assert torch.isfinite(stats.lse).all()


def test_canaries_are_wide_enough_for_boxes() -> None:
    """Canaries after which nothing is aligned, so that nothing would be asked."""
    assert CANARIES * HALF.itemsize % 16 == 0


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40))
def test_drawn_problems(seed: int) -> None:
    """Shapes that nobody thought of."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    causal, heads_kv, seqlen_k = bool(integer(0, 1)), integer(1, 2), integer(1, 700)
    case = Case(
        f"drawn {seed}",
        batch=integer(1, 2),
        heads_q=heads_kv * integer(1, 3),
        heads_kv=heads_kv,
        seqlen_q=integer(1, min(seqlen_k, 400)) if causal else integer(1, 400),
        seqlen_k=seqlen_k,
        head_dim=8 * integer(2, 16),
        causal=causal,
        sinks=bool(integer(0, 1)),
    )
    case = replace(case, layout=("bhsd", "bshd")[integer(0, 1)])
    check(case, (HALF, BRAIN)[seed % 2], seed)


@pytest.mark.parametrize("asked", ["argument", "mode", "nobody"])
def test_sums_in_any_order_only_where_nobody_asks_for_the_same_bits(asked: str) -> None:
    """dq of programs that add up as they come, in PyTorch's deterministic mode."""
    problem = Case("causal", seqlen_q=40, seqlen_k=40, head_dim=64, causal=True).build(HALF)
    q, k, v = (x.requires_grad_() for x in problem[:3])
    before = torch.are_deterministic_algorithms_enabled()
    with simulated_hopper() as launched:
        torch.use_deterministic_algorithms(asked == "mode")
        try:
            out = attention(q, k, v, causal=True, impl="gluon", deterministic=asked == "argument" or None)
        finally:
            torch.use_deterministic_algorithms(before)
        out.backward(problem.dout)
    assert launched == ["_forward_kernel"] + ["_backward_kernel"] * (asked == "nobody")
