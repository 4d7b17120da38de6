"""Attention on a CPU against PyTorch's own in the same process: measured, required, kept or missed.

    python -m undivided.bench.cpu_ratios [--json PATH]

Prints a table, writes a JSON, and ends with status 1 if a required figure was missed. Run it on a quiet
machine. Sizes are (batch, heads, seqlen, head_dim) = (1, 8, 4096, 64) unless the name says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import missing
from ..kernels.functional import attention
from .timing import Run, compare, environment

if TYPE_CHECKING:
    from rich.table import Table

Unit = Literal["times as fast", "us more", "MiB"]
DECODE = "decode 32/8 heads, 8k keys, d 128"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """Two ways to the same result, and how much faster ours has to be."""

    name: str
    ours: Run
    theirs: Run
    required: float | None = None
    unit: Unit = "times as fast"


class Result(NamedTuple):
    """A line of the report; times in milliseconds per call, None where nothing was timed."""

    name: str
    ours_ms: float | None
    theirs_ms: float | None
    measured: float
    unit: Unit
    required: float | None

    @property
    def ok(self) -> bool:
        if self.required is None:
            return True
        faster = self.unit == "times as fast"
        return self.measured >= self.required if faster else self.measured <= self.required


def cases() -> Iterator[Case]:
    """What is timed. Required figures: README, section on speed."""
    for name, dtype in DTYPES.items():
        for causal in (False, True):
            kind = "causal" if causal else "full"
            q, k, v = _tensors(dtype, heads=8, seqlen=4096)
            ours, theirs = partial(attention, causal=causal), partial(_sdpa, is_causal=causal)
            yield Case(f"forward, {kind}, {name}", partial(ours, q, k, v), partial(theirs, q, k, v), 0.95)
            q, k, v = _tensors(dtype, heads=8, seqlen=2048)
            yield _training(f"forward + backward 2k, {kind}, {name}", (q, k, v), ours, theirs, None)
        window = (255, 0)
        q, k, v = _tensors(dtype, heads=8, seqlen=4096)
        yield Case(
            f"forward, window 256, {name}",
            partial(attention, q, k, v, window=window),
            partial(_sdpa, q, k, v, attn_mask=_window_mask(4096, 256)),
            5.0,
        )
        q, k, v = _tensors(dtype, heads=8, seqlen=2048)
        yield _training(
            f"forward + backward 2k, window 256, {name}",
            (q, k, v),
            partial(attention, window=window),
            partial(_sdpa, attn_mask=_window_mask(2048, 256)),
            2.0,
        )
        k, v = (torch.randn(1, 8, 8192, 128, dtype=dtype) for _ in range(2))
        q = torch.randn(1, 32, 1, 128, dtype=dtype)
        yield Case(
            f"{DECODE}, {name}",
            partial(attention, q, k, v),
            partial(_sdpa, q, k, v, enable_gqa=True),
            2.5 if dtype == torch.float32 else 0.95,
        )
        q, k, v = _tensors(dtype, heads=8, seqlen=4)
        yield Case(
            f"small call (1, 8, 4, 64), {name}",
            partial(attention, q, k, v),
            partial(_sdpa, q, k, v),
            60.0,
            "us more",
        )


def measure(case: Case) -> Result:
    """Time one case."""
    pairs = compare(case.ours, case.theirs)
    measured = pairs.extra_s * 1e6 if case.unit == "us more" else pairs.speedup
    return Result(case.name, pairs.ours_s * 1e3, pairs.theirs_s * 1e3, measured, case.unit, case.required)


def measure_decode_without_bf16_instructions() -> Result:
    """Decoding in bf16 as on a CPU without products of bf16, where PyTorch's takes ten times as long.

    MKL and oneDNN read these variables when they start, hence the process of its own.
    """
    plain = {"MKL_ENABLE_INSTRUCTIONS": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ratios.json"
        command = [sys.executable, "-m", "undivided.bench.cpu_ratios"]
        command += ["--only", f"{DECODE}, bf16", "--json", str(file)]
        subprocess.run(command, capture_output=True, check=False, env=os.environ | plain)
        (result, *_) = json.loads(file.read_text())["results"]
    del result["ok"]
    return Result(**result)._replace(name=f"{DECODE}, bf16, without its instructions", required=8.0)


def measure_memory(seqlen: int = 32768) -> Result:
    """Peak memory of a training step with a window, above a short one's, in a process of its own (Linux)."""
    command = [sys.executable, "-c", _MEMORY_PROGRAM, str(seqlen)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    name = f"memory, forward + backward, window 256 of {seqlen}, fp32"
    return Result(name, None, None, float(finished.stdout) / 1024, "MiB", 2048.0)


_MEMORY_PROGRAM = """
import re, sys, torch, undivided
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def step(seqlen):
    q, k, v = (torch.randn(1, 8, seqlen, 64, requires_grad=True) for _ in range(3))
    undivided.attention(q, k, v, window=(255, 0)).sum().backward()
step(512)
before = peak()
step(int(sys.argv[1]))
print(peak() - before)
"""


def main() -> int:
    """Measure everything; 0 if no required figure was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results and the environment here")
    parser.add_argument("--only", default="", help="measure the cases whose name contains this")
    arguments = parser.parse_args()
    if message := missing("bench", "rich"):
        parser.error(message)
    from rich.console import Console

    torch.manual_seed(0)
    console = Console()
    results = []
    for case in cases():
        if arguments.only in case.name:
            console.print(f"[dim]{case.name} …")
            results.append(measure(case))
    if not arguments.only:
        console.print("[dim]decoding without bf16 instructions, memory …")
        results += [measure_decode_without_bf16_instructions(), measure_memory()]
    console.print(_table(results))
    if arguments.json is not None:
        record = [result._asdict() | {"ok": result.ok} for result in results]
        arguments.json.write_text(
            json.dumps({"environment": environment(), "results": record}, indent=1) + "\n"
        )
    return 0 if all(result.ok for result in results) else 1


def _training(name: str, leaves: tuple[Tensor, ...], ours: Run, theirs: Run, required: float | None) -> Case:
    """A case of forward and backward."""
    leaves = tuple(x.requires_grad_() for x in leaves)
    dout = torch.randn_like(leaves[0])

    def step(run: Run) -> Any:
        return torch.autograd.grad(run(*leaves), leaves, dout)

    return Case(name, partial(step, ours), partial(step, theirs), required)


def _tensors(dtype: torch.dtype, heads: int, seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, heads, seqlen, 64, dtype=dtype) for _ in range(3))
    return q, k, v


def _window_mask(seqlen: int, width: int) -> Tensor:
    """A query and the width - 1 keys before it, as the dense mask PyTorch needs."""
    i = torch.arange(seqlen)
    return (i <= i[:, None]) & (i > i[:, None] - width)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def _table(results: list[Result]) -> Table:
    from rich.table import Table

    table = Table(title="undivided.attention against F.scaled_dot_product_attention")
    for column in ("case", "ours ms", "PyTorch ms", "measured", "required", ""):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in results:
        sign = "≥" if r.unit == "times as fast" else "≤"
        table.add_row(
            r.name,
            *("" if x is None else f"{x:.3f}" for x in (r.ours_ms, r.theirs_ms)),
            f"{r.measured:.2f} {r.unit}",
            "" if r.required is None else f"{sign} {r.required:g}",
            "" if r.required is None else "[green]kept[/]" if r.ok else "[red]missed[/]",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
