"""What only the backward kernels can get wrong: tiles, launches, far addresses, sums over broadcast axes.

That they are right on every case of the list is asked in test_implementations.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime import interpreter

from undivided import Documents, from_predicate
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import Case, Extra, Problem
from undivided.conformance.evaluation import expected
from undivided.conformance.memory import fenced, poisoned_allocations
from undivided.conformance.oracle import Results
from undivided.kernels.functional import prepare
from undivided.kernels.sequences import Sequences
from undivided.kernels.spec import N_GRADIENTS, Gradients, Needs
from undivided.kernels.triton.backward import attention_backward, backward_launches
from undivided.kernels.triton.config import Kernel, TileConfig
from undivided.kernels.triton.forward import attention_forward

EVERYTHING = Needs(*[True] * N_GRADIENTS)
HALF, SINGLE = torch.float16, torch.float32


def backward(
    problem: Problem,
    needs: Needs = EVERYTHING,
    config: dict[Kernel, TileConfig] | None = None,
) -> Gradients:
    inputs, spec = problem.prepared()
    out, lse, _ = attention_forward(inputs, spec)
    return attention_backward(problem.dout, problem.dlse, out, lse, inputs, spec, needs, config)


def tiles(block_q: int, block_k: int) -> dict[Kernel, TileConfig]:
    row = TileConfig(block_q, block_k, num_warps=4, num_stages=1)
    return {"dkdv": row, "dq": row, "dbias": row}


def assert_same(a: Gradients, b: Gradients) -> None:
    """Bitwise, and finite: two NaN are not the same."""
    for name, x, y in zip(Gradients._fields, a, b):
        assert (x is None and y is None) or torch.equal(x, y), name


def assert_right(gradients: Gradients, problem: Problem) -> None:
    assert_within_budget(Results(None, None, *gradients), expected(problem), "kernel")


TILED = [
    Case("window", seqlen_q=70, seqlen_k=90, window=(9, 4), heads_q=2, heads_kv=1),
    Case("causal", seqlen_q=70, seqlen_k=50, causal=True, bias=Extra("hidden_rows", "hqk")),
    Case(
        "dropout", batch=1, seqlen_q=37, seqlen_k=70, dropout_p=0.3, mask=Extra("random", "qk"), softcap=3.0
    ),
]


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16), (128, 32)], ids=str)
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_any_tile_size_is_right_and_stays_inside(
    case: Case, blocks: tuple[int, int], device: torch.device
) -> None:
    """First or last tile of a range miscounted, dropout bits that depend on tiles, a tile overshooting.

    (hazard S12)
    """
    problem = case.build(SINGLE, device)
    options = {n: fenced(x) if isinstance(x, Tensor) else x for n, x in problem.options.items()}
    problem = problem._replace(
        options=options, **{n: fenced(getattr(problem, n)) for n in ("q", "k", "v", "dout", "dlse")}
    )
    with poisoned_allocations():
        gradients = backward(problem, config=tiles(*blocks))
    assert_right(gradients, problem)


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 1), (6, 2)], ids=str)
def test_groups_of_query_heads(heads: tuple[int, int], device: torch.device) -> None:
    """dk and dv that miss heads of the group, or take those of its neighbour (hazard N19)."""
    heads_q, heads_kv = heads
    problem = Case("group", batch=2, heads_q=heads_q, heads_kv=heads_kv, causal=True).build(HALF, device)
    assert_right(backward(problem), problem)


@pytest.mark.parametrize("seqlen_q", [1, 127, 129])
def test_row_statistics_of_every_head(seqlen_q: int, device: torch.device) -> None:
    """Statistics are padded per head: one head reading those of another, or the padding's (hazard S12)."""
    problem = Case("rows", batch=2, heads_q=3, heads_kv=1, seqlen_q=seqlen_q, seqlen_k=20).build(
        SINGLE, device
    )
    assert_right(backward(problem), problem)


@pytest.mark.parametrize("head_dims", [(160, 24), (24, 160)], ids=str)
def test_large_heads_have_dk_and_dv_apart(head_dims: tuple[int, int], device: torch.device) -> None:
    """The launch for dk overwriting dv, or needing what only the other computes."""
    problem = Case("large", head_dim=head_dims[0], head_dim_v=head_dims[1], causal=True).build(SINGLE, device)
    assert len(launches(problem, EVERYTHING)) == 4
    assert_right(backward(problem), problem)


def test_dout_of_a_sum(device: torch.device) -> None:
    """`out.sum().backward()`: dout has stride 0 everywhere. And a transposed one (hazard L1, L2)."""
    problem = Case("sum", batch=2, heads_q=2, heads_kv=2, causal=True, head_dim=24).build(SINGLE, device)
    for dout in (torch.ones((), device=device).expand(problem.dout.shape), problem.dout.mT.contiguous().mT):
        assert dout.stride(-1) != 1
        dense = dout.clone(memory_format=torch.contiguous_format)
        assert_same(backward(problem._replace(dout=dout)), backward(problem._replace(dout=dense)))


def test_dlse_may_be_absent_or_expanded(device: torch.device) -> None:
    """A pointer to nothing, or dlse read with the strides of lse."""
    problem = Case("dlse", batch=2).build(SINGLE, device)
    zeros = torch.zeros((), device=device).expand(problem.dlse.shape)
    assert_same(backward(problem._replace(dlse=None)), backward(problem._replace(dlse=zeros)))


def launches(problem: Problem, needs: Needs) -> list[str]:
    inputs, spec = problem.prepared()
    out, lse = torch.zeros_like(problem.dout), torch.zeros_like(problem.dlse)  # nothing runs
    described = backward_launches(problem.dout, problem.dlse, out, lse, inputs, spec, needs)[1]
    return [launch.kernel.__name__ for launch in described]


def test_only_what_is_needed_is_computed(device: torch.device) -> None:
    """Gradients that change with what else is asked; kernels launched for nobody."""
    problem = Case(
        "needs", heads_q=2, heads_kv=1, seqlen_q=20, bias=Extra(axes="hk"), alibi="h", sinks=True, causal=True
    ).build(SINGLE, device)
    everything = backward(problem)
    for asked in itertools.product((False, True), repeat=N_GRADIENTS - 1):
        needs = Needs(*asked)  # no kernel has a table
        wanted = Gradients(*(x if need else None for x, need in zip(everything, needs)))
        assert_same(backward(problem, needs), wanted)
        q, k, v, bias, _, slopes, _ = needs
        assert len(launches(problem, needs)) == any(needs) + (q or slopes) + (k or v) + bias


@pytest.mark.parametrize("axes", ["".join(a) for n in range(5) for a in itertools.combinations("bhqk", n)])
def test_dbias_of_every_broadcast(axes: str, device: torch.device) -> None:
    """A sum that misses a batch entry, head or tile; a tile of the bias that nobody writes (hazard N23)."""
    case = Case("bias", batch=2, heads_q=4, heads_kv=2, seqlen_q=35, window=(20, 8), key_lengths=(33, 21))
    case = Case(**{**vars(case), "bias": Extra(axes=axes)})
    problem = case.build(HALF, device)
    with poisoned_allocations():
        gradients = backward(problem, Needs(dbias=True))
    assert_right(gradients, problem)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, torch.float64], ids=str)
def test_dbias_has_the_dtype_of_bias(dtype: torch.dtype, device: torch.device) -> None:
    """Accumulated in the bias' dtype instead of fp32, or stored in q's (hazard N23)."""
    case = Case("bias", batch=2, seqlen_q=70, bias=Extra(axes="k", dtype=dtype))
    problem = case.build(HALF, device)
    gradients = backward(problem)
    assert gradients.dbias.dtype == dtype
    assert_right(gradients, problem)


def test_the_same_bits_on_every_run(device: torch.device) -> None:
    """Atomics, or a race between programs (hazard R1)."""
    case = Case("race", heads_q=6, heads_kv=2, seqlen_q=50, causal=True, bias=Extra(axes="k"))
    problem = case.build(HALF, device)
    first = backward(problem)
    for _ in range(100 if device.type == "cuda" else 1):
        assert_same(backward(problem), first)


@pytest.fixture(scope="module")
def far_memory(device: torch.device) -> Tensor:
    """2^32 elements and some; only the pages that are touched exist."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 16 * 2**30:
        pytest.skip("needs 8 GiB that a GPU does not allocate lazily")
    return torch.empty(2**32 + 2**21, dtype=HALF, device=device)


def far(x: Tensor, axis: int, memory: Tensor, start: int) -> Tensor:
    """x with the last index of an axis 2^31 elements away; 32-bit addresses would wrap to 0 instead."""
    strides = list(x.contiguous().stride())
    strides[axis] = -(-(2**31) // (x.shape[axis] - 1))
    return memory.as_strided(x.shape, strides, 2**31 + start).copy_(x)


@pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "row", "column"])
def test_addresses_have_64_bits(axis: int, far_memory: Tensor, device: torch.device) -> None:
    """index · stride beyond 2^31 computed in 32 bits: silent garbage long before it crashes (hazard S10)."""
    case = Case("far", batch=3, heads_q=3, heads_kv=3, seqlen_q=18, seqlen_k=19, bias=Extra(axes="bhqk"))
    near = case.build(HALF, device)
    names = ("q", "k", "v", "dout")
    step = max(getattr(near, name).numel() for name in names)
    moved = {n: far(getattr(near, n), axis, far_memory, i * step) for i, n in enumerate(names)}
    bias = far(near.options["bias"], axis, far_memory, len(names) * step)
    gradients = backward(near._replace(**moved, options={**near.options, "bias": bias}))
    assert_same(gradients, backward(near))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks Triton's interpreter what it loads")
@pytest.mark.parametrize(
    ("cu_seqlens", "listed"),
    [([0, 32, 64, 70], False), ([70, 70, 70, 70], False), ([0, 32, 64, 70], True)],
    ids=str,
)
def test_tiles_that_nobody_needs_load_nothing_outside(
    cu_seqlens: list[int], listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a packed axis' spare tiles, whose sequence is -1, as an index; and a start at the very end."""
    total, sequences = cu_seqlens[-1], len(cu_seqlens) - 1
    q = torch.randn(total, 1, 16)
    mask = Documents(torch.zeros(sequences, total, dtype=torch.int64))
    inputs, spec = prepare(
        q, q, q, {"mask": mask & from_predicate(lambda b, h, q, k: q >= k) if listed else mask},
        sequences=Sequences(torch.tensor(cu_seqlens)),
    )  # fmt: skip
    around = {
        "slopes": torch.ones(3 * sequences, 1),
        "key_lengths": torch.ones(3 * sequences, dtype=torch.int32),
    }
    for name in ("tiles", "visits_q", "visits_k") if listed else ("ranges", "key_ranges"):
        x = getattr(inputs, name)
        assert x is not None
        around[name] = torch.cat([x] * 3)
    inputs = inputs._replace(**{name: x.tensor_split(3)[1] for name, x in around.items()})
    loaded: list[np.ndarray] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(interpreter_module, name)

        def load(self, ptrs: np.ndarray, mask: np.ndarray, *rest: Any) -> np.ndarray:
            loaded.append(ptrs[mask].ravel())
            return interpreter_module.load(ptrs, mask, *rest)

    interpreter_module = interpreter._interpreter
    monkeypatch.setattr(interpreter, "_interpreter", Watched())
    out, lse, _ = attention_forward(inputs, spec)
    attention_backward(torch.ones_like(out), None, out, lse, inputs, spec, EVERYTHING)
    addresses = np.concatenate(loaded)
    for name, x in around.items():
        before, _, after = x.tensor_split(3)
        for outside in (before, after):
            first, size = outside.data_ptr(), outside.nbytes
            assert not ((addresses >= first) & (addresses < first + size)).any(), name
