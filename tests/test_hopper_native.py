"""The kernels for Hopper where they run: values, every gradient, the same bits again and again.

What needs no such GPU is asked in test_hopper.py.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="the kernels are written in it")

from hopper_cases import TILED
from undivided import attention
from undivided.conformance.adapters import ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import CASES, Case
from undivided.conformance.evaluation import evaluate, expected
from undivided.kernels import hopper

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    bool(hopper.machine_reasons(HERE)), reason="; ".join(hopper.machine_reasons(HERE))
)
DTYPES = [torch.float16, torch.bfloat16]
LONG = [
    Case(f"long, {head_dim}, {'causal' if causal else 'full'}", 1, 4, 2, 4100, 4100, head_dim, causal=causal)
    for head_dim in (64, 128, 256)
    for causal in (False, True)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *TILED, *LONG], ids=lambda case: f"gluon-{case.name}")
def test_within_budget(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Any wrong value or gradient, in any element."""
    problem = case.build(dtype, device)._replace(want=("lse", "max_logit", "entropy"))
    if refused := hopper.unsupported_reasons(*problem.prepared()):
        pytest.skip("; ".join(refused))
    assert_within_budget(evaluate(ours("gluon"), problem), expected(problem), "kernel")


@pytest.mark.parametrize("head_dim", range(16, 257, 24), ids=lambda head_dim: f"gluon-{head_dim}")
def test_head_dims(head_dim: int, device: torch.device) -> None:
    """Padding of a head that reaches out."""
    case = Case("head_dim", 2, 4, 2, 150, 270, head_dim, causal=True)
    problem = case.build(torch.bfloat16, device)._replace(want=("lse",))
    assert_within_budget(evaluate(ours("gluon"), problem), expected(problem), "kernel")


@pytest.mark.parametrize("case", [TILED[2], *LONG[2:4]], ids=lambda case: f"gluon-{case.name}")
def test_the_same_bits_again_and_again(case: Case, device: torch.device) -> None:
    """A race: two partitions that do not wait for each other. (Sums of dq may differ in the last bits.)"""
    problem = case.build(torch.bfloat16, device)
    q, k, v = (x.requires_grad_() for x in problem[:3])

    def run() -> list[torch.Tensor]:
        out = attention(q, k, v, causal=case.causal, impl="gluon")
        return [out.detach(), *torch.autograd.grad(out, (k, v), problem.dout)]

    first = run()
    for _ in range(50):
        assert all(map(torch.equal, first, run()))
