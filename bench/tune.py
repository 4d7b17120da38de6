"""Which tiles would suit a kernel: compile candidates, let a static model rank them, time the best on a GPU.

Prints rows for `kernels/triton/config.py`; a person commits the winner, with the GPU and the date.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..conformance.cases import Case
from ..kernels.evidence import architecture as architecture_of
from .static.model import RATES, Issued, bound, work
from .timing import Run, in_turns, spread

KERNELS = ("forward", "dkdv", "dq")
HEAD_DIMS = (64, 128)
BLOCKS_Q, BLOCKS_K, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
CASE = Case("timed", batch=2, heads_q=16, heads_kv=16, seqlen_q=4096, seqlen_k=4096)
SHAPES_ONLY = Case("compiled", seqlen_q=2048, seqlen_k=2048)
RANKED_BY_MODEL = "Ranked by a model of compiler output, not by a GPU: none of these was timed."

FLOPS_PER_CLOCK = {name: rates.tensor for name, rates in RATES.items()}  # where the model is known
REGISTERS = 255  # of a thread
COLUMNS = ("architecture", "kernel", "row", "registers", "shared KiB", "CTAs/SM", "slots", "clocks", "ms")
UNKNOWN = Issued(slots=0.0)


@dataclass(frozen=True)
class Candidate:
    """A row that the table could have, for bf16, causal or not, and what is known of it.

    issued: what the compiler made of a score. clocks: per score and multiprocessor, by the model. ms: by
    a GPU.
    """

    architecture: str
    kernel: str
    head_dim: int
    tile: tuple[int, int, int, int]  # block_q, block_k, num_warps, num_stages
    registers: int = 0
    spills_in_loops: int = 0
    shared: int = 0
    ctas_per_sm: int = 0
    issued: Issued = UNKNOWN
    clocks: float = float("inf")
    ms: float | None = None

    @property
    def row(self) -> str:
        """As it stands in the table."""
        return f"{self.head_dim}: TileConfig({', '.join(map(str, self.tile))}),"


def tune(
    architecture: str,
    kernels: Sequence[str] = KERNELS,
    head_dims: Sequence[int] = HEAD_DIMS,
    console: Console | None = None,
    best: int = 4,
    jobs: int | None = None,
) -> list[Candidate]:
    """Search, print, and return the best of each kernel and head dimension, the winner first."""
    console = console or Console()
    worth_it = [
        Candidate(architecture, kernel, head_dim, tile)
        for kernel, head_dim in itertools.product(kernels, head_dims)
        for tile in itertools.product(BLOCKS_Q, BLOCKS_K, WARPS, STAGES)
        if may_fit(head_dim, tile)
    ]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=spawn) as pool:
        work = pool.map(compiled, worth_it)
        ranked = list(track(work, "compiling", len(worth_it), console=console, transient=True))
    on_gpu = torch.cuda.is_available() and architecture_of(torch.device("cuda")) == architecture
    found: list[Candidate] = []
    for kind in itertools.product(kernels, head_dims):
        fit = [x for x in ranked if (x.kernel, x.head_dim) == kind and x.clocks < float("inf")]
        fit.sort(key=lambda x: x.clocks)
        found += timed(fit[: 3 * best])[:best] if on_gpu else fit[:best]
    console.print(table(found))
    if not on_gpu:
        console.print(RANKED_BY_MODEL, style="yellow")
    return found


def may_fit(head_dim: int, tile: tuple[int, int, int, int]) -> bool:
    """Whether a thread's share of the scores and of one accumulator leaves it registers for anything else."""
    block_q, block_k, num_warps, _ = tile
    threads = 32 * num_warps
    scores, accumulator = block_q * block_k / threads, max(block_q, block_k) * head_dim / threads
    return scores >= 8 and scores + accumulator <= REGISTERS - 60


def compiled(candidate: Candidate) -> Candidate:
    """What the compiler makes of it; clocks stay infinite if it does not compile, fit, or spills."""
    from .static.absent_gpu import absent_gpu
    from .static.report import figures
    from .static.targets import TARGETS

    target = TARGETS[candidate.architecture]
    with absent_gpu(target) as launches:
        try:
            _call(candidate, torch.device("meta"))()
            measured = figures(launches[-1].kernel, target)
        except Exception:  # whatever the compiler raises: a tile that it refuses is no candidate
            return candidate
    issued = None if measured.main_loop is None else measured.main_loop.issued
    if issued is None or not measured.ctas_per_sm:
        return candidate
    known = replace(
        candidate,
        registers=measured.registers,
        spills_in_loops=measured.spills_in_loops or 0,
        shared=measured.shared,
        ctas_per_sm=measured.ctas_per_sm,
        issued=issued,
    )
    if measured.spills_in_loops or measured.shared > target.shared_per_cta:
        return known
    return replace(known, clocks=clocks_per_score(known))


def clocks_per_score(candidate: Candidate) -> float:
    """By the model that `undivided inspect` shows."""
    block_q, block_k, _, num_stages = candidate.tile
    asked = work(candidate.kernel, candidate.head_dim, candidate.head_dim, (block_q, block_k))
    assert asked is not None, "every kernel with a tile to search walks over scores"
    found = bound(candidate.architecture, asked, candidate.issued, candidate.ctas_per_sm, num_stages)
    return float("inf") if found is None else found.clocks


def timed(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The same, fastest first, on the GPU that is there."""
    device = torch.device("cuda")
    runs: dict[str, Run] = {x.row: _call(x, device) for x in candidates}
    samples = in_turns(runs, device, budget_s=10.0)
    known = [replace(x, ms=spread(samples[x.row]).median * 1e3) for x in candidates]
    return sorted(known, key=lambda x: x.ms or 0.0)


def _call(candidate: Candidate, device: torch.device) -> Run:
    """The kernel with these tiles; what it needs of a forward pass is computed before."""
    from ..kernels.spec import Needs
    from ..kernels.triton import attention_backward, attention_forward
    from ..kernels.triton.config import TileConfig

    case = replace(SHAPES_ONLY if device.type == "meta" else CASE, head_dim=candidate.head_dim)
    config = TileConfig(*candidate.tile)
    problem = case.build(torch.bfloat16, device)
    inputs, spec = problem.prepared()
    if candidate.kernel == "forward":
        return lambda: attention_forward(inputs, spec, config)
    out, lse = problem.dout.clone(), problem.dlse.clone()
    if device.type == "cuda":
        out, lse, _ = attention_forward(inputs, spec)
    needs = Needs(dq=True) if candidate.kernel == "dq" else Needs(dk=True, dv=True)
    tiles: Any = {candidate.kernel: config}
    return lambda: attention_backward(problem.dout, None, out, lse, inputs, spec, needs, tiles)


def table(candidates: Sequence[Candidate]) -> Table:
    """Rows as config.py has them, with what speaks for them."""
    made = Table(*COLUMNS)
    for x in candidates:
        made.add_row(
            *(x.architecture, x.kernel, x.row, str(x.registers), f"{x.shared / 1024:.0f}"),
            *(str(x.ctas_per_sm), f"{x.issued.slots:.1f}", f"{x.clocks:.3f}"),
            "" if x.ms is None else f"{x.ms:.3f}",
        )
    return made
