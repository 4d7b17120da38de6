"""attention_weights: what attention multiplied v with, for chosen rows and heads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from undivided import ALiBi, RelativeBias, TopWeights, attention, attention_weights
from undivided.kernels import weights as room

BATCH, HEADS, ROWS, KEYS = 2, 4, 9, 12


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((BATCH, HEADS, ROWS, 8), (BATCH, 2, KEYS, 8))
    q, k = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1)},
    "mask": {"mask": torch.arange(ROWS)[:, None] % 3 != 1},
    "mask of keys": {"mask": torch.rand(BATCH, 1, 1, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4},
    "lengths": {"key_lengths": torch.tensor([0, 7])},
    "bias": {"bias": torch.randn(HEADS, ROWS, 1, dtype=torch.float64)},
    "alibi and bias": {"bias": (ALiBi(torch.rand(BATCH, HEADS)), torch.randn(KEYS))},
    "relative": {"bias": RelativeBias(torch.randn(8, HEADS)), "causal": True},
    "softcap": {"softcap": 0.7, "scale": -1.5},
    "sinks": {"sinks": torch.randn(HEADS), "causal": True},
    "dropout": {"dropout_p": 0.4, "seed": 11},
    "all dropped": {"dropout_p": 1.0, "seed": 11},
}


def everything(q: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
    """The weights as attention itself shows them: applied to an identity."""
    eye = torch.eye(KEYS, dtype=q.dtype).expand(BATCH, 2, -1, -1)
    return attention(q, k, eye, **options)


def lse_of(q: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
    lse = attention(q, k, k, want=("lse",), **options).lse
    assert lse is not None
    return lse


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_they_are_what_v_is_multiplied_with(options: dict[str, Any]) -> None:
    """An option forgotten; a row, head or dropout bit of another one; NaN in a row that sees nothing."""
    q, k = tensors()
    whole, lse = everything(q, k, **options), lse_of(q, k, **options)
    torch.testing.assert_close(attention_weights(q, k, lse, **options), whole)
    rows, heads = [8, 0, -3], torch.tensor([3, 1])
    some = attention_weights(q, k, lse, rows=rows, heads=heads, **options)
    torch.testing.assert_close(some, whole[:, [3, 1]][:, :, rows])
    mean = attention_weights(q, k, lse, rows=slice(None, None, -2), reduce="mean", **options)
    torch.testing.assert_close(mean, whole.mean(1).flip(1)[:, ::2])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_the_largest(reduce: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of another block of rows, or of another head."""
    monkeypatch.setattr(room, "_BLOCK_ELEMENTS", 4 * BATCH * HEADS * KEYS)  # several blocks
    q, k = tensors()
    whole, lse = everything(q, k, **options), lse_of(q, k, **options)
    whole = whole.mean(1) if reduce else whole
    found = attention_weights(q, k, lse, reduce=reduce, topk=3, **options)
    assert isinstance(found, TopWeights)
    torch.testing.assert_close(found.values, whole.topk(3, -1).values)
    torch.testing.assert_close(whole.gather(-1, found.keys), found.values)


@pytest.mark.parametrize("ask", [{}, {"reduce": "mean"}, {"topk": 2}, {"rows": 4, "heads": [2, 2]}], ids=str)
def test_they_are_differentiable(ask: dict[str, Any]) -> None:
    """A gradient through lse, the bias or the recomputation that is lost."""
    q, k = tensors()
    slopes, bias = torch.rand(HEADS).double().requires_grad_(), torch.randn(KEYS).double().requires_grad_()
    options = {"bias": (ALiBi(slopes), bias), "causal": True}
    leaves = (q, k, slopes, bias)

    def answer(whole: torch.Tensor) -> torch.Tensor:
        whole = whole[:, [2, 2]][:, :, [4]] if "rows" in ask else whole
        whole = whole.mean(1) if "reduce" in ask else whole
        return whole.topk(2, -1).values if "topk" in ask else whole

    ours = attention_weights(q, k, lse_of(q, k, **options), **ask, **options)
    ours = ours.values if isinstance(ours, TopWeights) else ours
    theirs = answer(everything(q, k, impl="reference", **options))
    cotangent = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, cotangent), torch.autograd.grad(theirs, leaves, cotangent)
    )


PROGRAM = """
import re, torch, undivided
torch.set_num_threads(1)
def ask(seqlen):
    q, k = (torch.randn(1, 4, seqlen, 16, requires_grad=True) for _ in range(2))
    lse = undivided.attention(q, k, k, want=("lse",), causal=True).lse
    found = undivided.attention_weights(q, k, lse, topk=4, causal=True)
    found.values.sum().backward()
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
ask(512)
before = peak()
ask(8192)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc: getrusage inherits pytest's")
def test_the_largest_take_memory_linear_in_the_sequence() -> None:
    """All weights at once would be 4 heads x 8192² x 4 bytes, a GiB, and again in backward."""
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(finished.stdout) < 300 * 1024, f"{finished.stdout} KiB more at the peak"


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"rows": [9]}, IndexError, r"rows must lie in \[-9, 9\), got \[9\]"),
        ({"heads": -5}, IndexError, r"heads must lie in \[-4, 4\), got -5"),
        ({"rows": 1.5}, TypeError, r"rows must be an int, a slice, ints, an int tensor or None, got 1.5"),
        ({"rows": torch.ones(9, dtype=torch.bool)}, TypeError, r"rows must be an int, a slice"),
        ({"reduce": "sum"}, ValueError, r"reduce must be None or 'mean', got 'sum'"),
        ({"topk": 13}, ValueError, r"topk must be an int from 1 to seqlen_k = 12, or None, got 13"),
        ({"lse": torch.zeros(2, 4, 8)}, ValueError, r"lse must have shape \(batch, heads_q, seqlen_q\)"),
        (
            {"lse": torch.zeros(2, 4, 9).half()},
            TypeError,
            r"lse must be float32 or float64, got torch.float16",
        ),
        ({"colour": 1}, TypeError, r"unknown option 'colour'"),
    ],
)
def test_wrong_questions(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    q, k = tensors()
    lse = wrong.pop("lse", torch.zeros(2, 4, 9))
    with pytest.raises(error, match=words):
        attention_weights(q, k, lse, **wrong)
