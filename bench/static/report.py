"""The figures of one compiled kernel: what it takes of a multiprocessor and what its main loop issues."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import triton

from .instructions import MATRIX, classify, product_of
from .loops import hot_loops
from .sass import Instruction, disassemble
from .targets import Target

# Matrix products per score element: q·kᵀ and p·v forward; s, dp, dv, dk; s, dp, dq.
PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3}


@dataclass(frozen=True)
class Loop:
    """One iteration of a hot loop, as one warp issues it."""

    instructions: int
    matrix: int
    exp2: int
    ffma: int
    spills: int
    matrix_flops: float  # the warp's share
    slots: float | None
    """Instructions other than matrix ones per 32 scores: per score and thread. The least for a
    forward is 4.5 + head_dim / block_k (max, FFMA, exp2, sum, half a conversion, rescaling)."""


@dataclass(frozen=True)
class Figures:
    """What the compiler made of one kernel for one architecture."""

    registers: int
    spills: int  # instructions that load or store a spilled register
    spills_in_loops: int
    shared: int  # bytes per CTA
    num_warps: int
    num_stages: int
    ctas_per_sm: int | None
    matrix: tuple[str, ...]  # kinds of matrix instruction: HMMA, HGMMA, UTCHMMA, v_mfma
    main_loop: Loop | None  # the unmasked one: most matrix work, then fewest other instructions


@dataclass(frozen=True)
class Variant:
    """A call, as far as the compiler can tell calls apart."""

    head_dim: int
    dtype: str
    options: str  # a key of variants.OPTIONS

    def __str__(self) -> str:
        return f"{self.dtype} d{self.head_dim} {self.options}"


@dataclass(frozen=True)
class Row:
    """What became of one kernel of one variant on one architecture."""

    architecture: str
    kernel: str
    variant: Variant
    figures: Figures | None
    error: str | None = None
    triton: str = triton.__version__


def figures(kernel: Any, target: Target, products: int | None = None, head_dim: int | None = None) -> Figures:
    """Read a CompiledKernel. `products` per score element and `head_dim` turn counts into slots per score."""
    if target.triton.backend == "hip":
        return _amd(kernel)
    function, registers = disassemble(kernel.asm["cubin"])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    loops = [_loop(path, products, head_dim) for path in hot_loops(function)]
    return Figures(
        registers=registers,
        spills=sum(classify(ins) == "spill" for ins in function.instructions),
        spills_in_loops=sum(loop.spills for loop in loops),
        shared=shared,
        num_warps=warps,
        num_stages=kernel.metadata.num_stages,
        ctas_per_sm=target.ctas_per_sm(warps, registers, shared),
        matrix=tuple(sorted({ins.base for ins in function.instructions if ins.base in MATRIX})),
        main_loop=min(
            loops, key=lambda loop: (-loop.matrix_flops, -loop.matrix, loop.instructions), default=None
        ),
    )


def _loop(path: tuple[Instruction, ...], products: int | None, head_dim: int | None) -> Loop:
    classes = Counter(map(classify, path))
    flops = sum(product.flops_per_warp for ins in path if (product := product_of(ins)))
    scores = flops / (2 * products * head_dim) if products and head_dim else 0.0
    return Loop(
        instructions=len(path),
        matrix=classes["matrix"],
        exp2=classes["exp2"],
        ffma=classes["ffma"],
        spills=classes["spill"],
        matrix_flops=flops,
        slots=32 * (len(path) - classes["matrix"]) / scores if scores else None,
    )


def _amd(kernel: Any) -> Figures:
    """The assembler's own metadata; its loops are not looked into."""
    text = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembly names no {name}")
        return int(found.group(1))

    return Figures(
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        spills_in_loops=0,
        shared=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        ctas_per_sm=None,
        matrix=("v_mfma",) if "v_mfma" in text else (),
        main_loop=None,
    )
