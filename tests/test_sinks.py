"""Attention sinks: what the suite's cases cannot see, because the reference shares it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from undivided import attention
from undivided.kernels.spec import AttentionStats

IMPLEMENTATIONS = ["reference", "fallback", "triton"]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tensors(device: torch.device, seqlen_q: int = 9, seqlen_k: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 4, seqlen_q, 16), (2, 2, seqlen_k, 16), (2, 2, seqlen_k, 16), (4,))
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


def stats(*qkv: torch.Tensor, **options: Any) -> AttentionStats:
    return attention(*qkv, want=("lse",), **options)


def test_a_sink_is_a_key_without_a_value(impl: str, device: torch.device) -> None:
    """A sink scaled like a score, put into the numerator, or missing from lse."""
    q, k, v, sinks = tensors(device)
    scores = 0.25 * q.double() @ k.double().repeat_interleave(2, 1).mT
    scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(2, 4, 9, 1)], -1)
    out = torch.softmax(scores, -1)[..., :-1] @ v.double().repeat_interleave(2, 1)
    lse = torch.logsumexp(scores, -1)
    actual = stats(q, k, v, sinks=sinks, impl=impl)
    torch.testing.assert_close(actual.out.double(), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.lse.double(), lse, rtol=1e-6, atol=1e-6)

    cotangents = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), (q, k, v, sinks), cotangents)
    ours = torch.autograd.grad(actual[:2], (q, k, v, sinks), [x.float() for x in cotangents])
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_row_without_keys_has_its_sink_alone(impl: str, device: torch.device) -> None:
    """lse of -inf beside a sink; a NaN of an empty row that reaches a gradient; dlse lost on its way."""
    q, k, v, sinks = tensors(device, seqlen_q=12, seqlen_k=5)
    with torch.no_grad():
        q[:, :, :7] = torch.nan
    actual = stats(q, k, v, sinks=sinks, causal=True, impl=impl)
    assert torch.equal(actual.out[:, :, :7], torch.zeros_like(actual.out[:, :, :7]))
    assert torch.equal(actual.lse[:, :, :7], sinks[:, None].expand(2, 4, 7))
    dout = torch.ones_like(actual.out)
    dout[:, :, :7] = torch.nan
    dq, dk, dv, dsinks = torch.autograd.grad(
        actual[:2], (q, k, v, sinks), (dout, torch.ones_like(actual.lse))
    )
    assert torch.equal(dq[:, :, :7], torch.zeros_like(dq[:, :, :7]))
    assert all(bool(x.isfinite().all()) for x in (dk, dv, dsinks))
    rows = stats(q[:, :, 7:], k, v, sinks=sinks, causal=True, impl=impl)
    (others,) = torch.autograd.grad(rows[:2], sinks, (dout[:, :, 7:], torch.ones_like(rows.lse)))
    torch.testing.assert_close(dsinks, others + 2 * 7)


@pytest.mark.parametrize("size", [-torch.inf, -1e4, 1e4])
def test_extreme_sinks(size: float, impl: str, device: torch.device) -> None:
    """exp(sink - lse) overflows unless the larger of the two is taken out first."""
    q, k, v, sinks = tensors(device)
    sinks = torch.full_like(sinks, size).requires_grad_()
    actual = stats(q, k, v, sinks=sinks, impl=impl)
    plain = stats(q, k, v, impl=impl)
    expected = torch.zeros_like(plain.out) if size > 0 else plain.out
    torch.testing.assert_close(actual.out, expected)
    torch.testing.assert_close(actual.lse, plain.lse if size < 0 else torch.full_like(plain.lse, size))
    grads = torch.autograd.grad(actual.out.sum() + actual.lse.sum(), (q, k, v, sinks))
    assert all(bool(x.isfinite().all()) for x in grads)
    torch.testing.assert_close(grads[3], torch.full_like(sinks, 18.0 if size > 0 else 0.0))


def test_sinks_of_another_dtype_keep_it(impl: str, device: torch.device) -> None:
    """Parameters stay float32 where activations are 16-bit, and so must their gradient."""
    q, k, v, sinks = tensors(device)
    out = attention(q.half(), k.half(), v.half(), sinks=sinks, impl=impl)
    assert out.dtype == torch.float16
    (dsinks,) = torch.autograd.grad(out.float().sum(), sinks)
    assert dsinks.dtype == torch.float32


def test_torch_func_differentiates_and_maps(device: torch.device) -> None:
    """A mapped sink folded into the batch, where every example would get the sum of all gradients."""
    q, k, v, sinks = (x.detach() for x in tensors(device))

    def loss(sinks: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, sinks=sinks, impl="fallback").sin().sum()

    many = torch.stack([sinks, sinks + 1])
    mapped = torch.func.vmap(torch.func.grad(loss))(many)
    for x, y in zip(many, mapped, strict=True):
        torch.testing.assert_close(torch.func.grad(loss)(x), y)


@pytest.mark.parametrize(
    ("sinks", "error", "words"),
    [
        ([0.0] * 4, TypeError, r"sinks must be a torch.Tensor, got list"),
        (torch.zeros(4, dtype=torch.int64), TypeError, r"sinks must be a float tensor, got torch.int64"),
        (torch.zeros(2), ValueError, r"sinks must have shape \(heads_q,\) = \(4,\), got \(2,\)"),
        (torch.zeros(4, 1), ValueError, r"sinks must have shape \(heads_q,\) = \(4,\), got \(4, 1\)"),
        (torch.zeros(4, device="meta"), ValueError, r"sinks must be on cpu like q, got meta"),
    ],
)
def test_wrong_sinks(sinks: Any, error: type[Exception], words: str) -> None:
    q, k, v, _ = tensors(torch.device("cpu"))
    with pytest.raises(error, match=words):
        attention(q, k, v, sinks=sinks)


def test_both_parts_of_a_gradient_are_rounded_once() -> None:
    """Rows with keys and rows without give a sink its gradient on two ways: three roundings to 16 bits."""
    sinks = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    q, k, v = torch.zeros(3, 2, 1, 1, 1, dtype=torch.float16)
    lengths = torch.tensor([0, 1])
    stats = attention(q, k, v, key_lengths=lengths, sinks=sinks, want=("lse",), impl="fallback")
    # 2049 of the row without keys and half of 1.2: 2050 in float16, where 2049 alone is 2048
    stats.lse.backward(torch.tensor([2049.0, 1.2]).view(2, 1, 1))
    assert sinks.grad is not None
    assert sinks.grad.tolist() == [2050.0]
