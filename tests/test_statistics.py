"""Statistics of a call: max_logit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from undivided import ALiBi, attention
from undivided.kernels.spec import AttentionStats

INF = math.inf


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def qkv(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Two query heads share a key head; nothing is a power of two."""
    return draw(2, 4, 5, 8, dtype=dtype), draw(2, 2, 7, 8, dtype=dtype), draw(2, 2, 7, 6, dtype=dtype)


def stats(*args: Tensor, want: tuple[str, ...], **options: Any) -> AttentionStats:
    return attention(*args, want=want, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 0), "scale": -0.7},
    "mask": {"mask": torch.arange(35).view(5, 7) % 3 != 1},
    "nothing": {"mask": torch.arange(5)[:, None] != 3},
    "lengths": {"key_lengths": torch.tensor([3, 0])},
    "bias": {"bias": torch.linspace(-3, 3, 35).view(5, 7)},
    "alibi": {"bias": (torch.linspace(-3, 3, 7), ALiBi.of_heads(4)), "softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 8, 4), "scale": 0.0},
    "softcap": {"softcap": 0.7, "dropout_p": 0.4, "seed": 3},
}


def dense_scores(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """By hand, -inf where hidden."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    s = options.get("scale", q.shape[3] ** -0.5) * (q @ k.repeat_interleave(2, 1).mT)
    if "softcap" in options:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    ahead = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    bias = options.get("bias", ())
    for one in bias if isinstance(bias, tuple) else (bias,):
        s = s + (one if isinstance(one, Tensor) else -one.slopes[:, None, None] * ahead.abs())
    seen = options.get("mask", torch.tensor(True)) & (ahead <= (0 if options.get("causal") else seqlen_k))
    if "window" in options:
        left, right = options["window"]
        seen = seen & (ahead >= -left) & (ahead <= right)
    if "key_lengths" in options:
        seen = seen & (torch.arange(seqlen_k) < options["key_lengths"][:, None, None, None])
    return s.masked_fill(~seen, -INF)


@pytest.mark.parametrize("impl", ["reference", "fallback"])
@pytest.mark.parametrize("name", OPTIONS)
def test_max_logit_is_the_largest_score(name: str, impl: str) -> None:
    """One before the bias or the softcap, of hidden keys, of the sink, or NaN where there is none."""
    q, k, v = qkv()
    found = stats(q, k, v, want=("max_logit",), impl=impl, **OPTIONS[name])
    assert found.lse is None
    torch.testing.assert_close(found.max_logit, dense_scores(q, k, OPTIONS[name]).amax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_kernel_has_the_largest_score(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """A maximum in units of products, or of q negated for a negative scale."""
    on_device = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in OPTIONS[name].items()}
    if name == "alibi":
        bias, alibi = on_device["bias"]
        on_device["bias"] = bias.to(device), ALiBi(alibi.slopes.to(device))
    q, k, v = (x.to(device) for x in qkv(dtype))
    found = stats(q, k, v, want=("max_logit", "lse"), impl="triton", **on_device)
    expected = stats(q, k, v, want=("max_logit", "lse"), impl="fallback", **on_device)
    torch.testing.assert_close(found.max_logit, expected.max_logit)
    assert torch.equal(found.lse, stats(q, k, v, want=("lse",), impl="triton", **on_device).lse)


def test_max_logit_has_no_gradient() -> None:
    """A gradient of zeros that looks like one."""
    q, k, v = (x.requires_grad_() for x in qkv())
    for impl in ("reference", "fallback"):
        found = stats(q, k, v, want=("max_logit",), impl=impl)
        assert not found.max_logit.requires_grad
        assert found.out.requires_grad


def test_qk_clip() -> None:
    """What training with MuonClip needs (Kimi K2 report, section 2.1): the largest score of each head."""
    q, k, v = qkv(torch.float32)
    found = stats(q, k, v, want=("max_logit",), causal=True)
    largest = dense_scores(q, k, {"causal": True}).amax((0, 2, 3))
    torch.testing.assert_close(found.max_logit.amax((0, 2)), largest)
