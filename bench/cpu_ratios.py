"""Attention on a CPU against PyTorch's own in the same process: measured, required, kept or missed.

    python -m undivided.bench.cpu_ratios [--json PATH]

Prints a table, writes a JSON, and ends with status 1 if a required figure was missed. Run it on a quiet
machine. Sizes are (batch, heads, seqlen, head_dim) = (1, 8, 4096, 64) unless the name says otherwise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conformance.cases import Case
from ..extras import missing
from ..kernels.functional import attention, attention_varlen, prepare
from ..kernels.masks import Causal, Documents
from .environment import environment
from .memory import STATUS, peak
from .peers import OURS
from .results import Ratio, Results, Unit, read, write
from .timing import Run, extra_s, in_turns, speedup, spread

DECODE = "decode 32/8 heads, 8k keys, d 128"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LONGEST = 32768


class Pair(NamedTuple):
    """Two ways to the same result, and how much faster ours has to be."""

    name: str
    ours: Run
    theirs: Run
    required: float | None = None
    unit: Unit = "times as fast"


def pairs() -> Iterator[Pair]:
    """What is timed. Required figures: README, section on speed."""
    for name, dtype in DTYPES.items():
        for causal in (False, True):
            kind = "causal" if causal else "full"
            q, k, v = _tensors(dtype, heads=8, seqlen=4096)
            ours, theirs = partial(attention, causal=causal), partial(_sdpa, is_causal=causal)
            yield Pair(f"forward, {kind}, {name}", partial(ours, q, k, v), partial(theirs, q, k, v), 0.95)
            q, k, v = _tensors(dtype, heads=8, seqlen=2048)
            yield _training(f"forward + backward 2k, {kind}, {name}", (q, k, v), ours, theirs, None)
        window = (255, 0)
        q, k, v = _tensors(dtype, heads=8, seqlen=4096)
        yield Pair(
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
        q, k, v = _tensors(dtype, heads=8, seqlen=1024)
        yield Pair(
            f"forward 1k, dropout 0.1, {name}",
            partial(attention, q, k, v, dropout_p=0.1),
            partial(_sdpa, q, k, v, dropout_p=0.1),
        )
        yield _packed_documents(name, dtype, documents=16, seqlen=512)
        k, v = (torch.randn(1, 8, 8192, 128, dtype=dtype) for _ in range(2))
        q = torch.randn(1, 32, 1, 128, dtype=dtype)
        yield Pair(
            f"{DECODE}, {name}",
            partial(attention, q, k, v),
            partial(_sdpa, q, k, v, enable_gqa=True),
            2.5 if dtype == torch.float32 else 0.95,
        )
        q, k, v = _tensors(dtype, heads=8, seqlen=4)
        yield Pair(
            f"small call (1, 8, 4, 64), {name}",
            partial(attention, q, k, v),
            partial(_sdpa, q, k, v),
            60.0,
            "us more",
        )


def measure(pair: Pair, budget_s: float = 30.0) -> Ratio:
    """Time one pair."""
    samples = in_turns({"ours": pair.ours, "theirs": pair.theirs}, budget_s=budget_s)
    measured = extra_s(samples) * 1e6 if pair.unit == "us more" else speedup(samples)
    ours_ms, theirs_ms = (spread(samples[who]).median * 1e3 for who in ("ours", "theirs"))
    return Ratio(pair.name, measured, pair.unit, pair.required, ours_ms, theirs_ms)


def measure_decode_without_bf16_instructions() -> Ratio:
    """Decoding in bf16 as on a CPU without products of bf16, where PyTorch's takes ten times as long.

    MKL and oneDNN read these variables when they start, hence the process of its own.
    """
    plain = {"MKL_ENABLE_INSTRUCTIONS": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ratios.json"
        command = [sys.executable, "-m", "undivided.bench.cpu_ratios"]
        command += ["--only", f"{DECODE}, bf16", "--json", str(file)]
        subprocess.run(command, capture_output=True, check=False, env=os.environ | plain)
        (ratio, *_) = read(file).ratios
    name = f"{DECODE}, bf16, without its instructions"
    return Ratio(name, ratio.measured, ratio.unit, 8.0, ratio.ours_ms, ratio.theirs_ms)


def measure_mask(budget_s: float = 5.0) -> Ratio:
    """Making what a call needs of a mask object."""
    q = torch.zeros(1, 1, 1, 64).expand(1, 8, LONGEST, 64)
    documents = torch.arange(LONGEST) // 700

    def make() -> object:
        return prepare(q, q, q, {"mask": Documents(documents) & Causal()})

    made_ms = spread(in_turns({"ours": make}, budget_s=budget_s)["ours"]).median * 1e3
    return Ratio(f"mask of documents, causal, {LONGEST}", made_ms, "ms", 50.0)


def measure_memory(width: int) -> Ratio:
    """Peak memory of a training step with a window, above a short one's (Linux)."""
    name = f"memory, forward + backward, window {width} of {LONGEST}, fp32"
    case = Case(name, 1, 8, 8, LONGEST, LONGEST, head_dim=64, window=(width - 1, 0))
    found = peak(case, torch.float32, OURS)
    if found.peak_bytes is None:
        raise RuntimeError(f"{name}: {found.reason}")
    return Ratio(name, found.peak_bytes / 2**20, "MiB", 2048.0)


def measure_all(budget_s: float = 30.0) -> Iterator[tuple[str, Callable[[], Ratio]]]:
    """Every figure: its name, and what measures it."""
    for pair in pairs():
        yield pair.name, partial(measure, pair, budget_s)
    yield "decoding without bf16 instructions", measure_decode_without_bf16_instructions
    yield "mask of documents", measure_mask
    if STATUS.exists():
        for width in (256, 1024):
            yield f"memory, window {width}", partial(measure_memory, width)


def main() -> int:
    """Measure everything; 0 if no required figure was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results and the environment here")
    parser.add_argument("--only", default="", help="measure what has this in its name")
    arguments = parser.parse_args()
    if message := missing("bench", "rich"):
        parser.error(message)
    from rich.console import Console

    from .report import ratio_table

    torch.manual_seed(0)
    console = Console()
    ratios = []
    for name, run in measure_all():
        if arguments.only in name:
            console.print(f"[dim]{name} …")
            ratios.append(run())
    console.print(ratio_table(ratios))
    if arguments.json is not None:
        write(Results(environment(), ratios=tuple(ratios)), arguments.json)
    return 0 if all(ratio.ok for ratio in ratios) else 1


def _training(name: str, leaves: tuple[Tensor, ...], ours: Run, theirs: Run, required: float | None) -> Pair:
    """A pair of forward and backward passes."""
    leaves = tuple(x.requires_grad_() for x in leaves)
    dout = torch.randn_like(leaves[0])

    def step(run: Run) -> Any:
        return torch.autograd.grad(run(*leaves), leaves, dout)

    return Pair(name, partial(step, ours), partial(step, theirs), required)


def _packed_documents(name: str, dtype: torch.dtype, documents: int, seqlen: int) -> Pair:
    """Documents one behind the other, for PyTorch under the mask that keeps them apart."""
    total = documents * seqlen
    q, k, v = (torch.randn(total, 8, 64, dtype=dtype) for _ in range(3))
    document = torch.arange(total) // seqlen
    dense = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return Pair(
        f"forward, {documents} packed documents of {seqlen}, {name}",
        partial(attention_varlen, q, k, v, torch.arange(documents + 1) * seqlen),
        partial(_sdpa, *dense, attn_mask=document[:, None] == document),
        8.0,
    )


def _tensors(dtype: torch.dtype, heads: int, seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, heads, seqlen, 64, dtype=dtype) for _ in range(3))
    return q, k, v


def _window_mask(seqlen: int, width: int) -> Tensor:
    """A query and the width - 1 keys before it, as the dense mask PyTorch needs."""
    i = torch.arange(seqlen)
    return (i <= i[:, None]) & (i > i[:, None] - width)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


if __name__ == "__main__":
    sys.exit(main())
