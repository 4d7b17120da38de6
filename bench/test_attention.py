"""`pytest bench`: attention beside PyTorch's, on the device there is, for pytest-benchmark's tables.

pytest bench -n0 --benchmark-group-by=param:shape,param:step,param:dtype,param:causal
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from undivided import attention
from undivided.bench.timing import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # batch, heads, seqlen, head_dim
    "cuda": [(4, 16, 4096, 128), (1, 16, 16384, 128), (64, 16, 512, 64)],
    "cpu": [(1, 8, 1024, 64), (4, 8, 256, 64), (1, 8, 4, 64)],
}
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "undivided": lambda q, k, v, causal: attention(q, k, v, causal=causal),
    "torch": lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("step", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=lambda shape: "x".join(map(str, shape)))
def test_attention(
    benchmark: Any, shape: tuple[int, ...], step: str, dtype: torch.dtype, causal: bool, name: str
) -> None:
    training = step != "forward"
    q, k, v = (torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=training) for _ in range(3))
    dout = torch.randn(shape, dtype=dtype, device=DEVICE)
    forward = partial(IMPLEMENTATIONS[name], q, k, v, causal)

    def run() -> Tensor:
        out = forward()
        if training:
            torch.autograd.grad(out, (q, k, v), dout)
        synchronize()
        return out

    assert benchmark(run).shape == shape
