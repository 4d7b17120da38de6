"""One shape on one GPU: the package and PyTorch's own kernels side by side, first right, then timed.

`python -m undivided.bench.gpu_sweep CASE` prints a JSON object per implementation and direction as
soon as it is known, so that a hang loses only what comes after it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import attention
from ..conformance import budget, oracle
from ..kernels import flops
from ..kernels.spec import AttentionSpec, Inputs

TOKENS, HIDDEN = 16384, 2048
MATH_LIMIT = 2048  # the math backend keeps every score
FLUSH_BYTES = 256 * 2**20  # several times any L2
TARGET_SECONDS = 0.4  # per measurement


@dataclass(frozen=True)
class Case:
    """A self-attention shape: TOKENS tokens in sequences of `seqlen`, bfloat16."""

    head_dim: int
    seqlen: int
    causal: bool = False
    heads_q: int = 0  # 0: as many as make HIDDEN
    heads_kv: int = 0  # 0: as heads_q
    window: int | None = None  # keys before the query, causal

    @property
    def name(self) -> str:
        q, kv = self.heads
        parts = [f"hd{self.head_dim}", f"s{self.seqlen}", "causal" if self.causal else "full"]
        parts += [f"gqa{q}-{kv}"] * (q != kv) + [f"w{self.window}"] * (self.window is not None)
        return "_".join(parts)

    @property
    def heads(self) -> tuple[int, int]:
        q = self.heads_q or HIDDEN // self.head_dim
        return q, self.heads_kv or q

    @property
    def spec(self) -> AttentionSpec:
        right = 0 if self.causal or self.window is not None else None
        return AttentionSpec(self.head_dim**-0.5, left=self.window, right=right)

    def tensors(self, device: torch.device, tokens: int = TOKENS) -> tuple[Tensor, ...]:
        """q, k, v (requiring gradients) and dout: normal random numbers, fresh at every call."""
        heads_q, heads_kv = self.heads
        batch = tokens // self.seqlen
        q, k, v, dout = (
            torch.randn(batch, heads, self.seqlen, self.head_dim, dtype=torch.bfloat16, device=device)
            for heads in (heads_q, heads_kv, heads_kv, heads_q)
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


# The order is that of interest: what is measured when the time is short comes first.
CASES = {
    case.name: case
    for case in (
        *(Case(128, seqlen, causal) for seqlen in (4096, 16384, 1024) for causal in (False, True)),
        *(Case(64, seqlen, causal) for seqlen in (4096, 1024) for causal in (False, True)),
        Case(128, 4096, causal=True, heads_q=64, heads_kv=8),
        Case(128, 16384, causal=True, window=4096),
        *(Case(256, 4096, causal) for causal in (False, True)),
        *(
            Case(head_dim, seqlen, causal)
            for seqlen in (2048, 8192, 512, 16384, 1024)
            for head_dim in (128, 64, 256)
            for causal in (False, True)
        ),
    )
}


def peers(case: Case, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Everybody who can compute the case, the package last."""
    found: dict[str, Callable[..., Any]] = {}
    if case.window is None:
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        if case.seqlen <= MATH_LIMIT:
            backends.append(SDPBackend.MATH)
        for backend in backends:
            found[f"sdpa {backend.name.lower()}"] = functools.partial(_sdpa, case, backend)
    if device.type == "cuda":
        found["flex_attention"] = functools.partial(_flex, case)
    window = None if case.window is None else (case.window, 0)
    impl = "triton" if device.type == "cuda" else "auto"
    found["undivided"] = functools.partial(attention, causal=case.causal, window=window, impl=impl)
    return found


def _sdpa(case: Case, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=q.shape[1] != k.shape[1]
        )


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    compiled, block_mask = _flex_parts(case, q.device)
    return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _flex_parts(case: Case, device: torch.device) -> tuple[Callable[..., Any], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        seen = row >= col
        return seen if case.window is None else seen & (row - col <= case.window)

    masked = case.causal or case.window is not None
    size = case.seqlen
    block_mask = create_block_mask(visible, None, None, size, size, device=str(device)) if masked else None
    return torch.compile(flex_attention, dynamic=False), block_mask


def measure(case: Case, device: torch.device, tokens: int = TOKENS) -> Iterator[dict[str, Any]]:
    """A record per implementation and direction: constants of the error budget, then times.

    Times of the package are only taken where its results are within budget; the constants of the
    others are noted, not judged.
    """
    q, k, v, dout = case.tensors(device, tokens)
    truth = _truth(case, q, k, v, dout)
    work = {
        "forward": flops.forward_flops(q.shape, k.shape, v.shape, case.spec),
        "backward": flops.backward_flops(q.shape, k.shape, v.shape, case.spec),
    }
    for name, call in peers(case, device).items():
        record: dict[str, Any] = {"case": case.name, "implementation": name}
        try:
            out = call(q, k, v)
            grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        except Exception as reason:  # a peer that refuses a shape is a finding, not an end
            yield record | {"unavailable": f"{type(reason).__name__}: {reason}".splitlines()[0]}
            continue
        findings = _judge(truth, case, out, grads)
        record["constants"] = {finding.output: round(finding.constant, 3) for finding in findings}
        wrong = [str(finding) for finding in findings if not finding.ok]
        if wrong and name == "undivided":
            yield record | {"wrong": wrong}
            continue
        runs: dict[str, Callable[[], Any]] = {
            "forward": _without_gradients(functools.partial(call, q, k, v)),
            "backward": functools.partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True),
        }
        for direction, run in runs.items():
            low, median, high = seconds(run, device)
            yield record | {
                "direction": direction,
                "median_ms": round(median * 1e3, 4),
                "p20_ms": round(low * 1e3, 4),
                "p80_ms": round(high * 1e3, 4),
                "tflops": float(f"{work[direction] / median * 1e-12:.4g}"),
                "clocks": clocks(device),
            }


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def _truth(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> oracle.Oracle:
    q, k, v, dout = _one_group(case, [q, k, v, dout])
    return oracle.solve(Inputs(q, k, v), case.spec, dout)


def _judge(truth: oracle.Oracle, case: Case, out: Tensor, grads: tuple[Tensor, ...]) -> list[budget.Finding]:
    dq, dk, dv, out = _one_group(case, [*grads, out])
    return budget.measure(oracle.Results(out=out, dq=dq, dk=dk, dv=dv), truth, "kernel")


def _one_group(case: Case, like_qkvq: Sequence[Tensor]) -> list[Tensor]:
    """One batch entry and one key head with its query heads: float64 needs every score at once."""
    heads_q, heads_kv = case.heads
    group = heads_q // heads_kv
    return [x.detach()[:1, :heads] for x, heads in zip(like_qkvq, (group, 1, 1, group))]


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of repeated runs, the L2 cache flushed before each."""
    if device.type == "cpu":
        return _percentiles([_host_seconds(run) for _ in range(5)])
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    estimate = time.perf_counter() - began
    repeats = max(10, min(200, int(TARGET_SECONDS / estimate)))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return _percentiles([start.elapsed_time(end) * 1e-3 for start, end in pairs])


def _host_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _percentiles(samples: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(samples, n=5)
    return fifths[0], statistics.median(samples), fifths[3]


def clocks(device: torch.device) -> str | None:
    """SM clock, memory clock, power and temperature, if nvidia-smi is there to say so."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def main() -> int:
    """Measure one case on the GPU; one JSON object a line. 1 if our own result is wrong or missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES, metavar="CASE")
    case = CASES[parser.parse_args().case]
    failed = False
    for record in measure(case, torch.device("cuda")):
        print(json.dumps(record), flush=True)
        failed |= record["implementation"] == "undivided" and ("wrong" in record or "unavailable" in record)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
