"""Host time of a call up to the driver, in microseconds, without a GPU: the driver is a stand-in.

`python -m undivided.bench.launch_cost`. Measured is what Python, PyTorch and Triton do: validation, the
choice, the operator, autograd, filling in arguments, Triton's specialisation of them and its launcher in C.
What the driver adds, a few microseconds for each launch, comes on top.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from ..kernels import dispatch, hopper
from ..kernels.functional import attention, prepare
from ..kernels.spec import AttentionOptions

REPEATS, BATCH = 300, 3


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: that would measure the interpreter")
    torch.set_num_threads(1)
    print(json.dumps(measure(), indent=1))


def host_us() -> dict[str, float]:
    """The same from a process of its own: it wants one thread, and Triton compiling. Empty without Triton."""
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "undivided.bench.launch_cost"]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    figures: dict[str, float] = json.loads(done.stdout) if done.returncode == 0 else {}
    return figures


def measure() -> dict[str, float]:
    """Microseconds per call, by what was called.

    CPU tensors stand for a GPU's: they cost the host as much, and the tiles they get do not matter.
    """
    from ..kernels.triton import replay
    from .static.idle_gpu import idle_gpu  # imports triton, which need not be there
    from .static.targets import TARGETS

    q, k, v = (torch.randn(1, 2, 16, 128, dtype=torch.float16, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    options: AttentionOptions = {"causal": True}

    def forward(impl: str) -> None:
        with torch.no_grad():
            attention(q, k, v, causal=True, impl=impl)

    def new_forward(impl: str) -> None:
        replay.forget()
        forward(impl)

    def forward_backward(impl: str) -> None:
        torch.autograd.grad(attention(q, k, v, causal=True, impl=impl), (q, k, v), dout)

    def sdpa() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), dout)

    figures = {"validation": microseconds(lambda: prepare(q, k, v, options))}
    with (
        tempfile.TemporaryDirectory() as folder,
        idle_gpu(TARGETS["sm_90"], Path(folder)),
        mock.patch.object(dispatch, "_ask_the_machine", _no_reasons),
        mock.patch.object(hopper, "_ask_the_machine", _no_reasons),
    ):
        for impl in ("triton", "gluon"):
            for name, call in (
                ("forward", forward),
                ("forward of a shape not seen before", new_forward),
                ("forward + backward", forward_backward),
            ):
                figures[f"{impl}, {name}"] = microseconds(functools.partial(call, impl))
    figures["PyTorch's SDPA on these 16 x 16 scores, forward + backward"] = microseconds(sdpa)
    return figures


def _no_reasons(device: torch.device) -> tuple[str, ...]:
    """What the machine would answer; a mock takes longer than what is measured."""
    return ()


def microseconds(call: Callable[[], Any]) -> float:
    """The least of many batches, after a warm-up that compiles: what else the machine does only adds."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        samples.append((time.perf_counter() - start) / BATCH)
    return round(min(samples) * 1e6, 1)


if __name__ == "__main__":
    main()
