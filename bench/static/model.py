"""What bounds a kernel's main loop: a static model of one multiprocessor, fed with what the compiler issued.

The tile search and `undivided inspect` both ask it. It knows nothing of latencies, bank conflicts, DRAM,
power or the ends of a launch: it ranks, it does not predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Matrix products per score: as long as head_dim (q·kᵀ, and what gives dq and dk), as long as head_dim_v
# (p·v, dout·vᵀ, and what gives dv). Above some head_dim dk and dv have a launch each.
PRODUCTS = {
    "forward": (1, 1),
    "dkdv": (2, 2),
    "dk": (2, 1),
    "dv": (1, 1),
    "dq": (2, 1),
    "backward": (3, 2),  # all of these at once
}
LOADS_QUERIES = ("dkdv", "dk", "dv", "backward")
"""Kernels whose programs keep keys and load query tiles; the others keep queries and load keys."""


class Rates(NamedTuple):
    """Per multiprocessor and clock: 16-bit matrix FLOPs, thread instructions by pipe, bytes."""

    tensor: int
    mufu: int  # special functions, the exponential among them
    fma: int
    alu: int
    issue: int
    shared: int
    l2: int


# CUDA C++ Programming Guide, throughput of native arithmetic instructions; L2: 80 % of nominal. Not here:
# sm_100, whose matrix instructions do not show their size; sm_86, sm_89 and sm_120, of which some GPUs
# multiply twice as fast as others.
RATES = {
    "sm_80": Rates(2048, mufu=16, fma=64, alu=64, issue=128, shared=128, l2=38),
    "sm_90": Rates(4096, mufu=16, fma=128, alu=64, issue=128, shared=128, l2=32),
}


class Work(NamedTuple):
    """What a kernel has to do per score, however it is compiled."""

    flops: float  # of its matrix products
    l2_bytes: float  # queries or keys and values; what a mask or a bias loads is left out


class Issued(NamedTuple):
    """What the compiler made of it, per score: thread instructions by pipe, and bytes of shared memory."""

    slots: float  # all but matrix instructions
    mufu: float = 0.0
    fma: float = 0.0
    alu: float = 0.0
    shared_bytes: float = 0.0


@dataclass(frozen=True)
class Bound:
    """Clocks per score of each resource, were it alone, and of all together."""

    parts: dict[str, float]
    clocks: float

    @property
    def by(self) -> str:
        """The resource that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def work(
    kernel: str, head_dim: int, head_dim_v: int, tile: tuple[int, int], element_size: int = 2
) -> Work | None:
    """Per score; None for a kernel whose main loop is not over scores. Products are padded, loads are not."""
    if kernel not in PRODUCTS:
        return None
    of_head_dim, of_head_dim_v = PRODUCTS[kernel]
    flops = 2 * (of_head_dim * _padded(head_dim) + of_head_dim_v * _padded(head_dim_v))
    block_q, block_k = tile
    met = block_k if kernel in LOADS_QUERIES else block_q  # rows that a loaded one meets
    return Work(flops, (head_dim + head_dim_v) * element_size / met)


def _padded(head_dim: int) -> int:
    """Tiles are powers of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def bound(architecture: str, work: Work, issued: Issued, ctas_per_sm: int, num_stages: int) -> Bound | None:
    """What overlaps is the longest of its parts, what does not is their sum; None without known rates.

    Loads overlap with computing from two stages on. Matrix products and other instructions overlap as far as
    there are CTAs to do both: warps of one wait for each other and do the same thing at the same time.
    """
    rates = RATES.get(architecture)
    if rates is None:
        return None
    parts = {
        "tensor": work.flops / rates.tensor,
        "mufu": issued.mufu / rates.mufu,
        "fma": issued.fma / rates.fma,
        "alu": issued.alu / rates.alu,
        "issue": issued.slots / rates.issue,
        "shared": issued.shared_bytes / rates.shared,
        "l2": work.l2_bytes / rates.l2,
    }
    matrix = max(parts["tensor"], parts["shared"])  # a product is as fast as its operands come
    other = max(parts[name] for name in ("mufu", "fma", "alu", "issue"))
    computing = max(matrix, other) + min(matrix, other) / ctas_per_sm
    loading = parts["l2"]
    return Bound(parts, computing + loading if num_stages == 1 else max(computing, loading))
