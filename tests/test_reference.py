"""Is the definition right? Against PyTorch, against brute force, and against finite differences."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from undivided.conformance.cases import OPTIONS, Case, Extra
from undivided.kernels import reference
from undivided.kernels.spec import AttentionSpec, Inputs
from undivided.kernels.visibility import key_bounds, visible


def compare_with_pytorch(case: Case, mask: Tensor | None = None, **options: object) -> None:
    """Values and gradients, in float64, to its last digits."""
    problem = case.build(torch.float64)
    inputs, spec = problem.prepared()
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    ours, _ = reference.attention(inputs, spec)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), problem.dout) for x in (ours, theirs))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "case",
    [
        Case("square"),
        Case("rectangular", seqlen_q=7, seqlen_k=40),
        Case("wide values", head_dim=8, head_dim_v=24),
        Case("scale", scale=0.3),
    ],
    ids=lambda case: case.name,
)
def test_agrees_with_pytorch(case: Case) -> None:
    """A formula of our own."""
    compare_with_pytorch(case, scale=case.scale)


@pytest.mark.parametrize("lengths", [(33, 33), (20, 33), (33, 20)])
def test_top_left_causal_is_pytorchs(lengths: tuple[int, int]) -> None:
    """Alignment swapped between the two conventions."""
    case = Case("causal", seqlen_q=lengths[0], seqlen_k=lengths[1], causal=True, top_left=True)
    compare_with_pytorch(case, is_causal=True)


def test_grouped_heads_are_pytorchs() -> None:
    """Query heads assigned to key heads in the wrong order (hazard S9)."""
    compare_with_pytorch(Case("grouped", heads_q=6), enable_gqa=True)


@pytest.mark.parametrize("axes", ["bhqk", "qk", "bk", "h"])
def test_mask_and_bias_are_pytorchs(axes: str) -> None:
    """True meaning "hidden", or a broadcast aligned to the left."""
    mask = Case("mask", batch=2, mask=Extra("empty_rows" if "q" in axes else "random", axes))
    bias = Case("bias", batch=2, bias=Extra("random", axes))
    compare_with_pytorch(mask, mask.build(torch.float64).options["mask"])
    compare_with_pytorch(bias, bias.build(torch.float64).options["bias"])


GRADCHECK = Case("small", batch=2, seqlen_q=4, seqlen_k=5, head_dim=2, head_dim_v=3)
DIFFERENTIATED = {"plain": {}, **OPTIONS, "rows": {"mask": Extra("empty_rows", "q"), "causal": True}}


@pytest.mark.parametrize("option", DIFFERENTIATED)
def test_gradients_are_those_of_finite_differences(option: str) -> None:
    """An option that forward has and backward forgot; a second derivative that is silently wrong.

    (hazard A2)
    """
    fields = {"seqlen_k": 7} if option == "rectangular" else DIFFERENTIATED[option]
    smaller = {"key_lengths": {"key_lengths": (3, 0)}, "packed": {"packed": ((2, 4), (0, 1), (3, 2), (1, 0))}}
    fields = smaller.get(option, fields)
    inputs, spec = replace(GRADCHECK, **fields).build(torch.float64).prepared()
    leaves = [x.requires_grad_() for x in (*inputs[:3], inputs.bias) if x is not None]

    def attention(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *bias = leaves
        out, lse = reference.attention(inputs._replace(q=q, k=k, v=v, bias=bias[0] if bias else None), spec)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(attention, leaves)
    assert torch.autograd.gradgradcheck(attention, leaves)


def seen(seqlen_q: int, seqlen_k: int, **spec: object) -> list[str]:
    """Visibility as text, one line per query."""
    inputs = Inputs(torch.zeros(1, 1, seqlen_q, 1), *[torch.zeros(1, 1, seqlen_k, 1)] * 2)
    ok = visible(inputs, AttentionSpec(1.0, **spec))
    return ["".join(".x"[int(x)] for x in row) for row in ok]


def test_causal_alignment() -> None:
    """The two conventions, drawn. Bottom-right: the last query sees the last key (hazard S6)."""
    assert seen(2, 5, right=0) == ["xxxx.", "xxxxx"]
    assert seen(5, 2, right=0) == ["..", "..", "..", "x.", "xx"]
    assert seen(2, 5, right=0, top_left=True) == ["x....", "xx..."]
    assert seen(5, 2, right=0, top_left=True) == ["x.", "xx", "xx", "xx", "xx"]


def test_window_includes_both_ends() -> None:
    """A window off by one on either side."""
    assert seen(4, 4, left=1, right=1) == ["xx..", "xxx.", ".xxx", "..xx"]
    assert seen(4, 4, left=0, right=0) == ["x...", ".x..", "..x.", "...x"]
    assert seen(3, 5, left=1, right=0) == [".xx..", "..xx.", "...xx"]


@pytest.mark.parametrize("top_left", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1)])
def test_windows_against_brute_force(seqlen_q: int, seqlen_k: int, top_left: bool) -> None:
    """Every window of every small problem, and the tiles' bounds, against the sentence that defines them.

    (hazard S7)
    """
    shift = 0 if top_left else seqlen_k - seqlen_q
    for left, right in itertools.product((None, 0, 1, 3, 9), repeat=2):
        spec = AttentionSpec(1.0, left, right, top_left)
        want = [
            [
                (left is None or j >= i + shift - left) and (right is None or j <= i + shift + right)
                for j in range(seqlen_k)
            ]
            for i in range(seqlen_q)
        ]
        if (left, right) != (None, None):
            picture = ["".join(".x"[x] for x in row) for row in want]
            assert seen(seqlen_q, seqlen_k, left=left, right=right, top_left=top_left) == picture
        for first, last in itertools.combinations_with_replacement(range(seqlen_q), 2):
            lo, hi = key_bounds(first, last, spec, seqlen_q, seqlen_k)
            outside = [
                j for row in want[first : last + 1] for j in range(seqlen_k) if row[j] and not lo <= j < hi
            ]
            assert not outside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computes_wide_and_rounds_once(dtype: torch.dtype) -> None:
    """Low precision leaking into the definition."""
    inputs, spec = Case("plain", head_dim=64).build(dtype).prepared()
    out, lse = reference.attention(inputs, spec)
    wide, _ = reference.attention(Inputs(*(x.float() for x in inputs[:3])), spec)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, wide.to(dtype))
