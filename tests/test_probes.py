"""Do probes find the right words, for our implementations and for other people's conventions?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from undivided.conformance.adapters import ours, resolve
from undivided.conformance.cases import Case, Extra
from undivided.conformance.evaluation import evaluate, expected
from undivided.conformance.probes import probe
from undivided.conformance.probes.visibility import ALIGNED
from undivided.conformance.target import Capabilities, Target, target
from undivided.conformance.verdict import Observation
from undivided.conformance.yardstick import PASSES, two_times_rule

UNPROMISED = "one of two batch entries, asked alone, gives"


def found(asked: Target) -> dict[str, Observation]:
    return {observation.question: observation for observation in probe(asked)}


@pytest.mark.parametrize("impl", ["reference", "fallback"])
def test_ours_do_what_they_promise(impl: str) -> None:
    """A convention of ours that is not what the contract says; a probe that is wrong about it."""
    observations = probe(ours(impl))
    assert not [o for o in observations if o.ok is False]
    assert [o.question for o in observations if o.ok is None] == [UNPROMISED]
    assert len({o.question for o in observations}) == len(observations) > 40


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernels_do_what_they_promise(device: torch.device) -> None:
    """The same of Triton's kernels; in the interpreter without what takes it minutes, long sequences."""
    kernels = ours("triton")
    if device.type == "cpu":
        short = replace(kernels.capabilities, dtypes=(torch.float32,), dropout=False, same_dropout=False)
        kernels = replace(kernels, capabilities=short)
    assert [o.question for o in probe(kernels, device) if o.ok is not True] == [UNPROMISED]


MODEST: dict[str, Any] = {"nan_in_hidden_keys": False, "mask_and_causal": False}


@pytest.mark.parametrize("backend", ["torch-math", "torch-flash"])
def test_pytorch_is_right_by_its_own_convention(backend: str) -> None:
    """Top-left alignment called a bug although nothing else was promised."""
    words = found(resolve(backend, "cpu", **MODEST))
    assert words["causal, 6 queries and 10 keys"].found.startswith(ALIGNED["top-left"])
    assert words["a row that sees nothing, by mask"].found == "out 0, gradients 0"
    assert words["NaN in values hidden by mask"].found == "reaches out, dq, dk"
    assert all(o.ok is not False for o in words.values())


def test_pytorch_backends_disagree_about_a_mask_with_causal() -> None:
    """The same call raises or works, by backend: asked though nobody claims it, judged by nobody."""
    targets = (resolve(backend, "cpu", **MODEST) for backend in ("torch-math", "torch-flash"))
    raised, worked = (found(asked)["a mask and causal"] for asked in targets)
    assert raised.found.startswith("raises RuntimeError")
    assert worked.found == "both hold"
    assert raised.ok is worked.ok is None


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_is_understood() -> None:
    """Blocks, score functions and an lse beside out: another way of saying the same."""
    words = found(resolve("torch-flex", "cpu", **MODEST))
    assert words["a row that sees nothing, by causal"].found == "out 0, lse -inf"
    assert words["NaN in values hidden by window"].found == "reaches out"
    assert not [o for o in words.values() if o.ok is False]


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), torch.inf)
    return torch.softmax(scores, -1).masked_fill(empty, 0.0) @ v, lse


def flash_2(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """lse +inf where a row sees nothing, and no gradient through it."""
    out, lse = plain(q, k, v, mask)
    return out, lse.detach()


def base_2(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out, lse = plain(q, k, v, mask)
    return out, lse / math.log(2)


F32: dict[str, Any] = {"dtypes": (torch.float32,), "scale": False, "mask": True, "nan_in_hidden_keys": False}


def test_plus_infinity_on_empty_rows_is_described() -> None:
    """flash-attn 2's convention: wrong only for who promises ours."""
    question = "a row that sees nothing, by mask"
    described = found(target(flash_2, lse=True, empty_rows=False, **F32))
    assert described[question].found == "out 0, lse +inf, gradients 0"
    assert described[question].ok is None
    assert described["the gradient of lse"].found == "none: lse is detached"
    assert all(o.ok is not False for o in described.values())
    assert found(target(flash_2, lse=True, **F32))[question].ok is False


def test_another_base_of_lse_is_described() -> None:
    """An lse that is claimed is ours; one that is not is still worth a word."""
    described, claimed = (found(target(base_2, lse=lse, **F32))["lse is"] for lse in (False, True))
    assert described.found == claimed.found == "in base 2"
    assert (described.ok, claimed.ok) == (None, False)


def test_only_what_is_claimed_is_passed() -> None:
    """A function of three arguments that is called with a fourth."""

    def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[0] == 1
        assert q.shape[2] == k.shape[2]
        assert q.shape[3] == v.shape[3] == 24
        return plain(q, k, v, None)[0]

    claims: dict[str, Any] = {"head_dims": (24,), "scale": False, "batch": False, "rectangular": False}
    words = found(target(bare, dtypes=(torch.float16,), **claims))
    assert words.pop("scores of float16 inputs").found == "rounded to 16 bits before the softmax"
    assert words.pop("lse is").found == "not returned"
    assert all(o.ok for o in words.values())


def test_how_many_entries_there_are_may_decide_the_bits() -> None:
    """A kernel that splits its sums by the size of the batch: right each time, and never the same."""

    def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        parts = zip(weights.chunk(q.shape[0], -1), v.chunk(q.shape[0], -2))
        return torch.stack([w @ x for w, x in parts]).sum(0)

    observation = found(target(split, dtypes=(torch.float32,), scale=False))[UNPROMISED]
    assert observation.found.startswith("other bits of out")
    assert observation.ok is None


def test_what_raises_is_an_answer() -> None:
    """A check that dies with the function it checks."""

    def broken(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        raise RuntimeError("out of shared memory\nand a long story")

    for observation in probe(target(broken, causal=True, empty_rows=False, lse=True)):
        assert observation.found == "raises RuntimeError: out of shared memory"
        assert observation.ok is False or observation.promised is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_yardstick_of_plain_pytorch_is_one(dtype: torch.dtype) -> None:
    """A rule whose yardstick is not what it says: PyTorch, every step in the dtype of q."""
    problem = Case("plain", causal=True, scale=1.0, bias=Extra(axes="hqk")).build(dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor, **_: object) -> Tensor:
        return F.softmax((q @ k.mT + bias).masked_fill(hidden, -torch.inf), -1) @ v

    hidden = torch.ones(33, 33, dtype=torch.bool).triu(1)
    plain_pytorch = target(attend, dtypes=(dtype,), causal=True, bias=True, bias_gradient=True)
    claims = plain_pytorch.capabilities
    ratios = two_times_rule(problem, evaluate(plain_pytorch, problem), expected(problem, claims), claims)
    assert ratios == dict.fromkeys(PASSES.keys() - {"dsinks", "dslopes", "dtable"}, 1.0)


def test_the_yardstick_takes_every_case() -> None:
    """Empty rows, empty tensors, dropout of everything: no NaN, and our own implementation passes."""
    for case in (
        Case("empty rows", mask=Extra("empty_rows", "q"), softcap=1.0),
        Case("no keys", seqlen_k=0),
        Case("all dropped", dropout_p=1.0),
        Case("dropout", dropout_p=0.3, heads_q=4),
    ):
        problem = case.build(torch.bfloat16)
        ratios = two_times_rule(
            problem, evaluate(ours("fallback"), problem), expected(problem), Capabilities(lse_gradient=True)
        )
        assert all(ratio <= PASSES[output] for output, ratio in ratios.items()), (case.name, ratios)


class _DetachedBackward(torch.autograd.Function):
    """Saves what autograd cannot trace back to its inputs: the second derivative is there, and wrong."""

    @staticmethod
    def forward(ctx: Any, *x: Tensor) -> Tensor:
        ctx.inputs = [y.detach() for y in x]
        return F.scaled_dot_product_attention(*x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = [y.clone().requires_grad_() for y in ctx.inputs]
            q, k, v = x
            out = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
            return torch.autograd.grad(out, x, dout, create_graph=True)


@torch.library.custom_op("undivided_tests::attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _backward_of_operator(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x = [y.detach().requires_grad_() for y in ctx.saved_tensors]
        return torch.autograd.grad(F.scaled_dot_product_attention(*x), x, dout)


_operator.register_autograd(
    _backward_of_operator, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def test_silently_wrong_second_derivatives_are_named() -> None:
    """A gradient penalty whose gradient is wrong, and tangents of zero (hazard A3): nobody claimed either,
    and refusing would have been right."""
    words = found(target(_DetachedBackward.apply))
    assert words["second derivatives"].found == "silently wrong: through dout alone"
    assert words["second derivatives"].ok is False
    assert words["forward-mode AD"].ok, "it is refused"
    words = found(target(lambda q, k, v: _operator(q, k, v)))
    assert words["forward-mode AD"].found == "silently wrong: zero"
    assert words["forward-mode AD"].ok is False
