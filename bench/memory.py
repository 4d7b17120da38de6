"""Peak memory of a forward and backward pass, each in a process of its own; and how it grows.

    python -m undivided.bench.memory < pickled (case, dtype, peer)

prints the bytes above what a short sequence takes. On Linux, or on a GPU.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from ..conformance.cases import Case
from .peers import OURS, UnavailableError, find
from .results import Peak

STATUS = Path("/proc/self/status")
NAME = "window 256, 1 head, fp32; for torch-flash a dense mask"
CURVE = Case(NAME, heads_q=1, heads_kv=1, head_dim=64, window=(255, 0))
SEQLENS = (1024, 4096, 16384, 32768)
DENSE = "torch-flash"
DENSE_BYTES = 6
"""Per score: the mask as bools, once more as float32, and room; to refuse in time what would not fit."""
SHORT = 512


def curve() -> list[Peak]:
    """Ours, which knows a window, beside PyTorch's, which needs it as a dense mask; 1k to 32k.

    On a CPU two at a time where there is room, each on one thread: with one head there is little to share,
    and threads that wait for each other after every product would take minutes beside anything else.
    """
    points = [
        (replace(CURVE, seqlen_q=seqlen, seqlen_k=seqlen), peer)
        for seqlen in SEQLENS
        for peer in (OURS, DENSE)
    ]
    room = 0.7 * _free_bytes()
    together = 1 if torch.cuda.is_available() or sum(_needed_bytes(*point) for point in points) > room else 2
    longest_first = sorted(points, key=lambda point: _needed_bytes(*point), reverse=True)
    with ThreadPoolExecutor(together) as pool:
        found = {point: pool.submit(_peak_if_it_fits, *point, room) for point in longest_first}
        return [found[point].result() for point in points]


def _needed_bytes(case: Case, peer: str) -> int:
    """What a dense mask takes; the rest is little beside it."""
    return DENSE_BYTES * case.seqlen_k**2 if peer == DENSE else 0


def _peak_if_it_fits(case: Case, peer: str, room: float) -> Peak:
    needed = _needed_bytes(case, peer)
    if needed > room:
        free = room / 0.7
        reason = f"takes about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        return Peak(case.name, case.seqlen_k, peer, reason=reason)
    return peak(case, torch.float32, peer, threads=1)


def peak(case: Case, dtype: torch.dtype, peer: str, threads: int | None = None) -> Peak:
    """Measure one peer on one case, forward and backward, inputs included; on as many threads as here."""
    done = subprocess.run(
        [sys.executable, "-m", "undivided.bench.memory"],
        input=pickle.dumps((case, dtype, peer)),
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads or torch.get_num_threads())},
    )
    if done.returncode == 0:
        return Peak(case.name, case.seqlen_k, peer, int(done.stdout))
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"ended with status {done.returncode}"
    return Peak(case.name, case.seqlen_k, peer, reason=reason)


def main() -> int:
    """What runs in the process of its own."""
    case, dtype, peer = pickle.load(sys.stdin.buffer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not STATUS.exists():
        print(f"peak memory is read from {STATUS}, which is not there", file=sys.stderr)
        return 1
    try:
        _step(replace(case, batch=1, seqlen_q=SHORT, seqlen_k=SHORT), dtype, peer, device)
        before = _peak_bytes(device)
        _step(case, dtype, peer, device)
    except (UnavailableError, NotImplementedError, RuntimeError) as error:
        print(str(error).strip().partition("\n")[0], file=sys.stderr)
        return 1
    print(_peak_bytes(device) - before)
    return 0


def _step(case: Case, dtype: torch.dtype, peer: str, device: torch.device) -> None:
    problem = case.build(dtype, device)
    leaves = [x.detach().requires_grad_() for x in problem[:3]]
    out = find(peer)(case, problem).attend(*leaves)
    torch.autograd.grad(out, leaves, problem.dout)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kib("VmHWM", STATUS) * 1024


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return _kib("MemAvailable", Path("/proc/meminfo")) * 1024


def _kib(name: str, file: Path) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0


if __name__ == "__main__":
    sys.exit(main())
