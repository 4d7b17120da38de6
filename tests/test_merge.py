"""merge: attention over parts of the keys is attention over all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from undivided import attention, merge
from undivided.kernels.spec import AttentionStats


def stats(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> AttentionStats:
    return attention(q, k, v, want=("lse",), **options)


def parts(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 3, 7, 8), (2, 3, 12, 8), (2, 3, 12, 6))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def test_parts_make_the_whole_with_every_gradient() -> None:
    """A share taken of the wrong part, or a gradient through lse lost."""
    q, k, v = parts()
    a, b = (stats(q, k[:, :, cols], v[:, :, cols]) for cols in (slice(0, 5), slice(5, 12)))
    out, lse = merge(a.out, a.lse, b.out, b.lse)
    whole = stats(q, k, v)
    cotangents = torch.randn_like(out), torch.randn_like(lse)
    torch.testing.assert_close((out, lse), whole[:2])
    ours = torch.autograd.grad((out, lse), (q, k, v), cotangents)
    torch.testing.assert_close(ours, torch.autograd.grad(whole[:2], (q, k, v), cotangents))


def test_it_does_not_matter_who_merges_first() -> None:
    """Ring attention gets its parts in any order."""
    q, k, v = parts(torch.float32)
    a, b, c = (stats(q, k[:, :, x : x + 4], v[:, :, x : x + 4])[:2] for x in (0, 4, 8))
    torch.testing.assert_close(merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merge(*a, *b), merge(*b, *a), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_an_empty_part_changes_nothing(dtype: torch.dtype) -> None:
    """NaN from -inf - -inf or from what an empty part holds; a sign of zero lost; gradients of NaN.

    (hazard N3)
    """
    out = torch.tensor([[-0.0, 1.5], [2.0, -3.0]], dtype=dtype, requires_grad=True)
    lse = torch.tensor([100.0, -torch.inf], requires_grad=True)
    rest, nothing = torch.full((2, 2), torch.nan, dtype=dtype), torch.full((2,), -torch.inf)
    for merged, merged_lse in (merge(out, lse, rest, nothing), merge(rest, nothing, out, lse)):
        assert torch.equal(merged[0].view(torch.uint8), out[0].view(torch.uint8))
        assert torch.equal(merged_lse, lse)
        dout, dlse = torch.autograd.grad((merged.sum(), merged_lse[0]), (out, lse), retain_graph=True)
        assert torch.equal(dout[0], torch.ones(2, dtype=dtype))
        assert dout.isfinite().all()
        assert torch.equal(dlse, torch.tensor([1.0, 0.0]))
    both, lse_of_both = merge(rest, nothing, rest, nothing)
    assert torch.equal(both, torch.zeros_like(both))
    assert torch.equal(lse_of_both, nothing)


@pytest.mark.parametrize("levels", [(0.0, 100.0), (100.0, 0.0), (-torch.inf, 100.0), (-100.0, -torch.inf)])
def test_derivatives_stay_finite_where_one_part_outweighs_the_other(levels: tuple[float, float]) -> None:
    """The second derivative of logaddexp is inf / inf there."""
    lse_a, lse_b = (torch.tensor([x], requires_grad=True) for x in levels)
    out_a, out_b = (torch.randn(1, 3, requires_grad=True) for _ in range(2))
    leaves = (lse_a, lse_b, out_a, out_b)
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    first = torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert all(bool(g.isfinite().all()) for g in (*first, *second))


def test_shares_do_not_depend_on_the_level() -> None:
    """exp(lse_b - lse) takes in the rounding of lse, which is large where lse is."""
    lse_a = torch.full((1,), 2.0**17)
    out, _ = merge(torch.ones(1, 1), lse_a, torch.zeros(1, 1), lse_a + 0.5)
    torch.testing.assert_close(out[0], torch.sigmoid(torch.tensor([-0.5])))


def test_wider_parts_keep_their_digits() -> None:
    """float64 out beside a float32 lse, rounded on the way."""
    out = torch.randn(4, 3, dtype=torch.float64)
    empty = torch.full((4,), -torch.inf)
    assert torch.equal(merge(out, torch.zeros(4), 0 * out, empty)[0], out)


def test_differentiable_twice() -> None:
    out_a, out_b = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lse_a, lse_b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(merge, (out_a, lse_a, out_b, lse_b))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lse_b": torch.zeros(2, 4)}, ValueError, r"lse_b must have the shape of out without its last axis"),
        ({"out_b": torch.zeros(2, 3, 5)}, ValueError, r"out_b must have the shape of out_a, \(2, 3, 4\)"),
        ({"lse_a": torch.zeros(2, 3).half()}, TypeError, r"lse_a must have a dtype out of"),
        ({"out_a": 3.0}, TypeError, r"out_a must be a torch.Tensor, got float"),
        (
            {"lse_b": torch.zeros(2, 3, device="meta")},
            ValueError,
            r"lse_b must be on cpu like out_a, got meta",
        ),
    ],
)
def test_wrong_parts(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"out_a": torch.zeros(2, 3, 4), "lse_a": torch.zeros(2, 3)}
    given |= {"out_b": torch.zeros(2, 3, 4), "lse_b": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=words):
        merge(**given)
