"""Host time of a call up to the driver's launch, in microseconds. No GPU: the launches are stubbed out.

`python -m undivided.bench.launch_cost`. Measured is what Python and PyTorch do: validation, the
operator, autograd, filling in arguments, Triton's specialisation of them. The driver's own launch, a
few microseconds each, comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import ops
from ..kernels.functional import prepare
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
    figures = json.loads(done.stdout) if done.returncode == 0 else {}
    return {name: us for name, us in figures.items() if not name.startswith("launches")}


def measure() -> dict[str, float]:
    """Microseconds per call, by what was called.

    CPU tensors stand for a GPU's: they cost the host as much, and the tiles they get do not matter.
    """
    from .static.absent_gpu import absent_gpu  # imports triton, which need not be there
    from .static.targets import TARGETS

    q, k, v = (torch.randn(1, 2, 16, 64, dtype=torch.float16, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    options: AttentionOptions = {"causal": True}

    def forward() -> torch.Tensor:
        inputs, spec = prepare(q, k, v, options)
        return ops.attention(inputs, spec, "triton")[0]

    def forward_without_gradients() -> None:
        with torch.no_grad():
            forward()

    def forward_backward() -> None:
        torch.autograd.grad(forward(), (q, k, v), dout)

    def sdpa() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), dout)

    with absent_gpu(TARGETS["sm_90"]) as launches:
        figures = {
            "validation": microseconds(lambda: prepare(q, k, v, options)),
            "forward": microseconds(forward_without_gradients),
            "forward + backward": microseconds(forward_backward),
            "PyTorch's SDPA on these 16 x 16 scores, forward + backward": microseconds(sdpa),
        }
        launches.clear()
        forward_backward()
        figures["launches, forward + backward"] = len(launches)
    return figures


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
