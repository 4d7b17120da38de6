"""ALiBi: what the suite's cases cannot see, because the reference shares it; and several biases at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from undivided import ALiBi, RelativeBias, attention


@pytest.fixture(params=["reference", "fallback", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def qkv(device: torch.device, seqlen_q: int = 9, seqlen_k: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 4, seqlen_q, 16), (2, 2, seqlen_k, 16), (2, 2, seqlen_k, 16))
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi_is_a_bias_of_distances(per_batch: bool, impl: str, device: torch.device) -> None:
    """Distances from the wrong position, a sign, slopes of another head or batch entry, and dslopes."""
    q, k, v = qkv(device)
    slopes = torch.rand((2, 4) if per_batch else (4,), device=device, requires_grad=True)
    distance = (torch.arange(9, device=device)[:, None] + 3 - torch.arange(12, device=device)).abs()
    dense = -slopes[..., None, None] * distance
    out = attention(q, k, v, bias=ALiBi(slopes), causal=True, impl=impl)
    expected = attention(q, k, v, bias=dense, causal=True, impl="reference")
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v, slopes), dout)
    theirs = torch.autograd.grad(expected, (q, k, v, slopes), dout)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_several_biases_are_added(impl: str, device: torch.device) -> None:
    """One of them forgotten, or the gradient of one lost."""
    q, k, v = qkv(device)
    keys, heads = (torch.randn(s, device=device, requires_grad=True) for s in ((12,), (4, 9, 1)))
    slopes = torch.rand(4, device=device, requires_grad=True)
    distance = (torch.arange(9, device=device)[:, None] + 3 - torch.arange(12, device=device)).abs()
    out = attention(q, k, v, bias=(keys, ALiBi(slopes), heads), impl=impl)
    dense = keys + heads - slopes[:, None, None] * distance
    expected = attention(q, k, v, bias=dense, impl="reference")
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, (keys, heads, slopes), dout)
    for x, y in zip(ours, torch.autograd.grad(expected, (keys, heads, slopes), dout), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_biases_are_added_in_float32(dtype: torch.dtype) -> None:
    """A sum in 16 bits, which rounds, and overflows where a mask meets a mask (hazard N18)."""
    q, k, v = qkv(torch.device("cpu"))
    a, b = (4 * torch.randn(9, 12).to(dtype) for _ in range(2))
    expected = attention(q, k, v, bias=a.float() + b.float(), impl="reference")
    torch.testing.assert_close(attention(q, k, v, bias=(a, b), impl="reference"), expected)
    lowest = torch.full((12,), torch.finfo(dtype).min, dtype=dtype)
    assert attention(q, k, v, bias=(lowest, lowest)).isfinite().all()


def test_the_gradient_of_slopes_alone(impl: str, device: torch.device) -> None:
    """A gradient that somebody computes only on the way to dq."""
    q, k, v = (x.detach() for x in qkv(device))
    slopes = torch.rand(4, device=device, requires_grad=True)
    (alone,) = torch.autograd.grad(attention(q, k, v, bias=ALiBi(slopes), impl=impl).sin().sum(), slopes)
    q.requires_grad_()
    both = attention(q, k, v, bias=ALiBi(slopes), impl=impl).sin().sum()
    torch.testing.assert_close(alone, torch.autograd.grad(both, (slopes, q))[0])


def test_the_slopes_of_the_paper() -> None:
    """Press et al. 2022, section 3: 1/2 ... 1/256 for 8 heads; for 12, those of 8 and 4 of those of 16."""
    torch.testing.assert_close(ALiBi.of_heads(8).slopes, 2.0 ** -torch.arange(1.0, 9.0))
    expected = torch.cat([2.0 ** -torch.arange(1.0, 9.0), 2.0 ** -torch.arange(0.5, 4.0)])
    torch.testing.assert_close(ALiBi.of_heads(12).slopes, expected)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        ALiBi.of_heads(0)


@pytest.mark.parametrize(
    ("bias", "error", "words"),
    [
        (ALiBi([0.5] * 4), TypeError, r"the slopes of ALiBi must be a torch.Tensor, got list"),
        (ALiBi(torch.zeros(4, dtype=torch.int64)), TypeError, r"slopes of ALiBi must be a float tensor"),
        (ALiBi(torch.zeros(3)), ValueError, r"\(heads_q,\) or \(batch, heads_q\) = \(2, 4\), got \(3,\)"),
        (ALiBi(torch.zeros(3, 4)), ValueError, r"= \(2, 4\), got \(3, 4\)"),
        ((ALiBi(torch.zeros(4)), ALiBi(torch.zeros(4))), ValueError, "bias may hold one ALiBi, got several"),
        (
            (torch.zeros(12), 3.0),
            TypeError,
            r"bias must be a tensor, ALiBi, RelativeBias, or a tuple of them, got float",
        ),
        ((torch.zeros(12), torch.zeros(5)), ValueError, r"bias must broadcast.*got shape \(5,\)"),
        ("alibi", TypeError, r"bias must be a tensor, ALiBi, RelativeBias, or a tuple of them, got str"),
    ],
)
def test_wrong_biases(bias: Any, error: type[Exception], words: str) -> None:
    q, k, v = qkv(torch.device("cpu"))
    with pytest.raises(error, match=words):
        attention(q, k, v, bias=bias)


def relative(table: torch.Tensor, bidirectional: bool = True, max_distance: int = 20) -> RelativeBias:
    return RelativeBias(table, bidirectional, max_distance)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("implementation", ["reference", "fallback"])
def test_a_relative_bias_is_t5s(implementation: str, bidirectional: bool) -> None:
    """A bucket too far, the wrong side, another head's number, or a gradient that lands in another bucket."""
    attention_of_t5 = pytest.importorskip("transformers").models.t5.modeling_t5.T5Attention
    q, k, v = qkv(torch.device("cpu"), 60, 75)
    table = torch.randn(8, 4, requires_grad=True)
    ahead = torch.arange(75) - torch.arange(60)[:, None] - 15
    bucket = attention_of_t5._relative_position_bucket(ahead, bidirectional, num_buckets=8, max_distance=20)
    dense = table[bucket].permute(2, 0, 1)
    options: dict[str, Any] = {"causal": not bidirectional}
    out = attention(q, k, v, bias=relative(table, bidirectional), impl=implementation, **options)
    expected = attention(q, k, v, bias=dense, impl="reference", **options)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v, table), dout)
    theirs = torch.autograd.grad(expected, (q, k, v, table), dout)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


def test_kernels_say_that_they_have_no_relative_bias(device: torch.device) -> None:
    """An order that is followed without the bias."""
    q, k, v = qkv(device)
    with pytest.raises(
        NotImplementedError, match="a RelativeBias is computed by the reference and the fallback"
    ):
        attention(q, k, v, bias=relative(torch.zeros(8, 4, device=device)), impl="triton")
    assert attention(q, k, v, bias=relative(torch.zeros(8, 4, device=device))).shape == q.shape


@pytest.mark.parametrize(
    ("bias", "error", "words"),
    [
        (
            relative(torch.zeros(8, 3)),
            ValueError,
            r"\(buckets, heads_q\) = \(buckets, 4\), with an even number",
        ),
        (relative(torch.zeros(7, 4)), ValueError, r"an even number of buckets from 4 on, got \(7, 4\)"),
        (relative(torch.zeros(1, 4), False), ValueError, r"with 2 buckets or more, got \(1, 4\)"),
        (relative(torch.zeros(8)), ValueError, r"got \(8,\)"),
        (relative(torch.zeros(8, 4).long()), TypeError, "table of RelativeBias must be a float tensor"),
        (
            relative(torch.zeros(8, 4), True, 2),
            ValueError,
            "max_distance of RelativeBias must be an int above 2",
        ),
        (relative(torch.zeros(8, 4), 1), TypeError, "bidirectional must be a bool, got 1"),
        ((relative(torch.zeros(8, 4)),) * 2, ValueError, "bias may hold one RelativeBias, got several"),
    ],
)
def test_wrong_relative_biases(bias: Any, error: type[Exception], words: str) -> None:
    q, k, v = qkv(torch.device("cpu"))
    with pytest.raises(error, match=words):
        attention(q, k, v, bias=bias)
