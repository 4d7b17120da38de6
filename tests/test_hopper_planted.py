"""Are bugs in the kernels for Hopper noticed? Each is planted in their source, which the simulator then runs.

What is left out changes nothing that could be seen: a key tile released before the product that reads it is
kept from its loader by the value tile before; a barrier may let the groups begin in another order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="the kernels are written in it")

from gluon_partitions import SimulationError
from gluon_simulator import Edit
from simulated_hopper import simulated_hopper
from undivided.conformance.budget import measure
from undivided.conformance.cases import Case
from undivided.conformance.oracle import Oracle, Results, solve
from undivided.kernels.gluon.config import BackwardTile, ForwardTile
from undivided.kernels.gluon.hopper_backward import backward_launch
from undivided.kernels.gluon.hopper_forward import attention_forward
from undivided.kernels.spec import AttentionSpec, Inputs

SEEDS = 40
"""Orders of events in which a bug must show."""
CAUSAL = Case("causal", heads_kv=1, seqlen_q=200, seqlen_k=460, head_dim=64, causal=True)
WINDOW = Case("window", heads_kv=1, seqlen_q=200, seqlen_k=330, head_dim=64, window=(140, 70))


class Asked(NamedTuple):
    """A problem, the answer, and what the backward kernel is told of rows: lse in base 2, and delta."""

    inputs: Inputs
    spec: AttentionSpec
    dout: Tensor
    offset: Tensor
    delta: Tensor
    oracle: Oracle


@functools.cache
def asked(case: Case) -> Asked:
    problem = case.build(torch.float16)
    inputs, spec = problem.prepared()
    oracle = solve(inputs, spec, problem.dout)
    out, lse = oracle.value.out, oracle.value.lse
    assert out is not None
    assert lse is not None
    offset = (lse / torch.log(torch.tensor(2.0))).float()
    delta = (out * problem.dout).sum(-1).float()
    return Asked(inputs, spec, problem.dout, offset, delta, oracle)


def forward(case: Case) -> Results:
    inputs, spec, *_ = asked(case)
    out, lse, _ = attention_forward(inputs, spec, ForwardTile(64, 2, 2))
    return Results(out, lse)


def backward(case: Case, stages_ds: int) -> Results:
    inputs, spec, dout, offset, delta, _ = asked(case)
    dq = torch.zeros(inputs.q.shape)
    dk, dv = torch.empty_like(inputs.k), torch.empty_like(inputs.v)
    tile = BackwardTile(64, 2, 2, stages_ds)
    launch = backward_launch(dout, offset, delta, inputs, spec, dq, dk, dv, tile)
    launch.run(dout.device)
    return Results(dq=dq.mul(spec.scale).half(), dk=dk, dv=dv)


def outcome(kernel: str, case: Case, seed: int, edits: tuple[Edit, ...]) -> str:
    """What came of a run: right, wrong, or what broke."""
    try:
        with simulated_hopper(seed, edits):
            found = forward(case) if kernel == "forward" else backward(case, 1 + (kernel == "backward"))
    except SimulationError as error:
        return f"{type(error).__name__}: {error}"
    return "right" if all(x.ok for x in measure(found, asked(case).oracle, "kernel")) else "wrong"


class Bug(NamedTuple):
    """kernel: "forward", "backward", or "backward, one dS" for one tile of dS instead of two."""

    kernel: str
    module: str
    old: str
    new: str
    expected: str = "wrong"
    case: Case = CAUSAL


F, B, P = "hopper_forward", "hopper_backward", "positions"
SUMMED = "            acc = warpgroup_mma_wait(0, deps=[acc])\n"
RELEASE_V = "            mbarrier.arrive(v_empty.index(before), count=1)\n"
DK_SUMMED = "        dk = warpgroup_mma_wait(0, deps=[dk])\n"
RELEASE_Q = "        mbarrier.arrive(q_empty.index(stage), count=1)\n"
BUGS = {
    "values are read before they have landed": Bug(
        "forward", F, "            mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)\n", ""
    ),
    "the last values are read before they have landed": Bug(
        "forward", F, "        mbarrier.wait(v_full.index(last), ((n_tiles - 1) // STAGES) & 1)\n", ""
    ),
    "keys are read before they have landed": Bug("forward", F, "pred=j + 1 < n_tiles", "pred=False"),
    "queries are read before they have landed": Bug(
        "forward", F, "    mbarrier.wait(q_full.index(GROUP), 0)\n", ""
    ),
    "the wait for the next keys is not skipped at the end": Bug(
        "forward", F, ", pred=j + 1 < n_tiles)", ")", "DeadlockError"
    ),
    "the loader begins in the wrong phase": Bug(
        "forward", F, "phase = ((j // STAGES) & 1) ^ 1", "phase = (j // STAGES) & 1", "DeadlockError"
    ),
    "the phase of values is that of keys": Bug(
        "forward", F, "((j - 1) // STAGES) & 1)", "(j // STAGES) & 1)", "DeadlockError"
    ),
    "one group is enough to release values": Bug(
        "forward",
        F,
        "mbarrier.init(v_empty.index(stage), count=GROUPS)",
        "mbarrier.init(v_empty.index(stage), count=1)",
        "DeadlockError",
    ),
    "values are released before the product that reads them": Bug(
        "forward", F, SUMMED + RELEASE_V, RELEASE_V + SUMMED
    ),
    "values are never released": Bug("forward", F, RELEASE_V, "", "DeadlockError"),
    "scores are used in flight": Bug(
        "forward",
        F,
        "s = warpgroup_mma_wait(1, deps=[s])",
        "s = warpgroup_mma_wait(2, deps=[s])",
        "in flight",
    ),
    "the sum is scaled in flight": Bug(
        "forward",
        F,
        "            acc = warpgroup_mma_wait(0, deps=[acc])\n            mbarrier",
        "            mbarrier",
        "in flight",
    ),
    "out is copied without a fence": Bug("forward", F, "    fence_async_shared()\n", "", "without a fence"),
    "the program ends while out is copied": Bug("forward", F, "    tma.store_wait(0)\n", "", "ends before"),
    "nobody lets the first group begin": Bug(
        "forward", F, "        compat.pass_by(FIRST_TURN, TWO_GROUPS)\n", "        pass\n", "DeadlockError"
    ),
    "a turn is passed to oneself": Bug(
        "forward", F, "FIRST_TURN + (GROUP + 1) % GROUPS", "FIRST_TURN + GROUP", "DeadlockError"
    ),
    "the sum is not scaled when the maximum grows": Bug(
        "forward",
        F,
        "            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT_LAYOUT))[:, None]\n",
        "",
    ),
    "a row sees one key too few": Bug(
        "forward", P, "cols[None, :] <= last[:, None]", "cols[None, :] < last[:, None]"
    ),
    "a row sees one key too many": Bug(
        "forward",
        P,
        "last = gl.minimum(rows + right, seqlen_k - 1)",
        "last = gl.minimum(rows + right + 1, seqlen_k - 1)",
    ),
    "keys past the end are seen": Bug(
        "forward", P, "last = gl.minimum(rows + right, seqlen_k - 1)", "last = rows + right", case=WINDOW
    ),
    "a window is one key too wide": Bug(
        "forward", P, "(rows - left)[:, None]", "(rows - left - 1)[:, None]", case=WINDOW
    ),
    "a tile that is partly hidden counts as whole": Bug(
        "forward", P, "hi = gl.minimum(first_row + shift + right + 1, seqlen_k)", "hi = seqlen_k"
    ),
    "the first tile of a window is skipped": Bug(
        "forward",
        P,
        "lo = gl.maximum(first_row + shift - left, 0)",
        "lo = gl.maximum(first_row + shift - left + 64, 0)",
        case=WINDOW,
    ),
    "heads are taken for batch entries": Bug(
        "forward",
        P,
        "plane // heads_q, plane % heads_q",
        "plane % heads_q, plane // heads_q",
        "outside its tensor",
    ),
    "lse of rows past the end is stored": Bug(
        "forward",
        F,
        "gl.store(lse_ptr + before + rows, lse, mask=rows < seqlen_q)",
        "gl.store(lse_ptr + before + rows, lse)",
        "outside its tensor",
    ),
    "keys and values are not waited for": Bug("backward", B, "    mbarrier.wait(kv_full.index(0), 0)\n", ""),
    "too few bytes are announced": Bug(
        "backward",
        B,
        "q_desc.block_type.nbytes + offset_desc.block_type.nbytes",
        "q_desc.block_type.nbytes",
        "more bytes",
    ),
    "too many bytes are announced": Bug(
        "backward",
        B,
        "dout_desc.block_type.nbytes + delta_desc.block_type.nbytes",
        "2 * dout_desc.block_type.nbytes",
        "DeadlockError",
    ),
    "statistics are read before they have landed": Bug(
        "backward, one dS",
        B,
        "        mbarrier.wait(dout_full.index(dout_stage), (j // STAGES_DOUT) & 1)\n        dp",
        "        dp",
    ),
    "dS is multiplied before the other group has written": Bug(
        "backward", B, "        compat.meet(DS_WRITTEN, BOTH_GROUPS)\n        dq", "        dq"
    ),
    "dS is overwritten before the other group has read": Bug(
        "backward, one dS", B, "            compat.meet(DS_READ, BOTH_GROUPS)\n", "            pass\n"
    ),
    "dS is multiplied without a fence": Bug(
        "backward",
        B,
        "        fence_async_shared()\n        compat.meet(DS_WRITTEN",
        "        compat.meet(DS_WRITTEN",
        "without a fence",
    ),
    "dq is added without a fence": Bug(
        "backward",
        B,
        "        fence_async_shared()\n        compat.add_tile",
        "        compat.add_tile",
        "without a fence",
    ),
    "dq is overwritten while it is added": Bug(
        "backward", B, "        tma.store_wait(0)\n        dq_tile", "        dq_tile"
    ),
    "dq is used in flight": Bug(
        "backward", B, "dv, dq = warpgroup_mma_wait(1", "dv, dq = warpgroup_mma_wait(2", "in flight"
    ),
    "queries are released before the product that reads them": Bug(
        "backward", B, DK_SUMMED + RELEASE_Q, RELEASE_Q + DK_SUMMED
    ),
    "dk is stored over keys that the other group reads": Bug(
        "backward", B, "    compat.meet(DS_WRITTEN, BOTH_GROUPS)  # nobody", "    # nobody"
    ),
    "dk is copied without a fence": Bug(
        "backward",
        B,
        "    fence_async_shared()\n    compat.store_tile",
        "    compat.store_tile",
        "without a fence",
    ),
    "the heads of a group are not all walked through": Bug(
        "backward", B, "for j in range(n_tiles * group)", "for j in range(n_tiles)"
    ),
    "rows before the first that see a key are left out one too many": Bug(
        "backward",
        P,
        "lo = gl.maximum(first_key - right - shift, 0)",
        "lo = gl.maximum(first_key - right - shift + 64, 0)",
    ),
    "a tile of rows that is partly hidden counts as whole": Bug(
        "backward",
        P,
        "(first_row + shift + right >= first_key + KEYS - 1)",
        "(first_row + shift + right >= first_key)",
    ),
    "a key sees one row too few": Bug(
        "backward", P, "keys[:, None] <= last[None, :]", "keys[:, None] < last[None, :]"
    ),
    "a window's rows are one too many": Bug(
        "backward", P, "(rows - left)[None, :]", "(rows - left - 1)[None, :]", case=WINDOW
    ),
    "the last rows of a window are skipped": Bug(
        "backward",
        P,
        "hi = gl.minimum(gl.minimum(first_key + KEYS, seqlen_k) + left - shift, seqlen_q)",
        "hi = gl.minimum(first_key + left - shift, seqlen_q)",
        case=WINDOW,
    ),
}
"""By what is wrong. All must show: what does not is either no bug or not modelled."""


@pytest.mark.parametrize("kernel", ["forward", "backward", "backward, one dS"])
@pytest.mark.parametrize("case", [CAUSAL, WINDOW], ids=lambda case: case.name)
def test_without_a_bug_all_is_right(kernel: str, case: Case) -> None:
    """Bugs that are noticed because the kernel was wrong before."""
    assert {outcome(kernel, case, seed, ()) for seed in range(4)} == {"right"}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_shows(bug: str) -> None:
    """A mistake that conformance without a GPU would let through."""
    kernel, *edit, expected, case = BUGS[bug]
    outcomes = set()
    for seed in range(SEEDS):
        outcomes.add(outcome(kernel, case, seed, (Edit(*edit),)))
        if any(expected in found for found in outcomes):
            return
    pytest.fail(f"{expected!r} is none of {outcomes}")
