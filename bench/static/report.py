"""The figures of one compiled kernel: what it takes of a multiprocessor and what its main loop issues."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton

from . import model
from .assembly import Assembly
from .in_flight import exp2_under_product
from .instructions import MATRIX, PIPES, classify, product_of, shared_bytes
from .loops import hot_loops
from .model import Bound, Issued, Work
from .sass import Instruction, disassemble
from .targets import Target


@dataclass(frozen=True)
class Loop:
    """One iteration of a hot loop, as one warp issues it."""

    instructions: int
    mix: dict[str, int]  # by class, as instructions.CLASSES has them
    matrix_flops: float  # the warp's share
    slots: float | None
    """Instructions other than matrix ones per 32 scores: per score and thread. The least for a
    forward is 4.5 + head_dim / block_k (max, FFMA, exp2, sum, half a conversion, rescaling)."""
    shared_bytes: float
    exp2_under_product: int | None  # None where the listing does not tell

    def __post_init__(self) -> None:
        """A mix that leaves something out, or counts it twice, would lead every figure below astray."""
        if sum(self.mix.values()) != self.instructions:
            raise ValueError(f"a mix of {sum(self.mix.values())} out of {self.instructions} instructions")

    def count(self, *classes: str) -> int:
        """Instructions of these classes."""
        return sum(self.mix.get(name, 0) for name in classes)

    @property
    def issued(self) -> Issued | None:
        """Per score, for the model."""
        if self.slots is None:
            return None
        of_one = self.slots / (self.instructions - self.count("matrix"))
        pipes = {name: of_one * self.count(*classes) for name, classes in PIPES.items()}
        return Issued(self.slots, **pipes, shared_bytes=of_one / 32 * self.shared_bytes)


@dataclass(frozen=True)
class Figures:
    """What the compiler made of one kernel for one architecture."""

    tile: tuple[int, int] | None  # block_q, block_k
    registers: int
    spills: int  # instructions that load or store a spilled register
    spills_in_loops: int | None  # None where loops are not looked into
    shared: int  # bytes per CTA
    num_warps: int
    num_stages: int
    ctas_per_sm: int | None
    matrix: tuple[str, ...]  # kinds of matrix instruction: HGMMA, HMMA, UTCHMMA, v_mfma
    loops: tuple[Loop, ...]  # the hot ones; none where loops are not looked into
    work: Work | None
    assembly: Assembly | None = None  # where the assembler was listened to

    @property
    def main_loop(self) -> Loop | None:
        """The unmasked one: most matrix work, then fewest other instructions."""
        return min(
            self.loops,
            key=lambda loop: (-loop.matrix_flops, -loop.count("matrix"), loop.instructions),
            default=None,
        )


@dataclass(frozen=True)
class Variant:
    """A call, as far as the compiler can tell calls apart."""

    head_dim: int
    dtype: str
    options: str  # a key of variants.OPTIONS, or the options of a call by name
    implementation: str = "triton"  # or "gluon"

    def __str__(self) -> str:
        of = "" if self.implementation == "triton" else f"{self.implementation} "
        return f"{of}{self.dtype} d{self.head_dim} {self.options}"


@dataclass(frozen=True)
class Row:
    """What became of one kernel of one variant on one architecture."""

    architecture: str
    kernel: str
    variant: Variant
    figures: Figures | None
    error: str | None = None
    triton: str = triton.__version__

    @property
    def main_loop(self) -> Loop | None:
        """Where the time goes, if it is known."""
        return None if self.figures is None else self.figures.main_loop

    @property
    def bound(self) -> Bound | None:
        """What bounds the main loop, by the model, as far as the figures for it are known.

        Not where warps have parts of their own (gluon): what the model says of overlap is of warps that all
        do the same.
        """
        if self.variant.implementation != "triton":
            return None
        figures, loop = self.figures, self.main_loop
        issued = None if loop is None else loop.issued
        if figures is None or issued is None or figures.work is None or not figures.ctas_per_sm:
            return None
        return model.bound(self.architecture, figures.work, issued, figures.ctas_per_sm, figures.num_stages)


def figures(
    kernel: Any, target: Target, work: Work | None = None, tile: tuple[int, int] | None = None
) -> Figures:
    """Read a CompiledKernel. Its work turns counts into slots per score; the Triton kernels tell theirs."""
    tile, work = tile or _tile(kernel), work or _work(kernel)
    if target.triton.backend == "hip":
        return _amd(kernel, tile, work)
    function, registers = disassemble(kernel.asm["cubin"])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    loops = tuple(loop_figures(path, work and work.flops) for path in hot_loops(function))
    return Figures(
        tile=tile,
        registers=registers,
        spills=sum(classify(ins) == "spill" for ins in function.instructions),
        spills_in_loops=sum(loop.count("spill") for loop in loops),
        shared=shared,
        num_warps=warps,
        num_stages=kernel.metadata.num_stages,
        ctas_per_sm=target.ctas_per_sm(warps, registers, shared),
        matrix=tuple(sorted({ins.base for ins in function.instructions if ins.base in MATRIX})),
        loops=loops,
        work=work,
    )


def loop_figures(path: Sequence[Instruction], flops_per_score: float | None) -> Loop:
    """One iteration, counted."""
    mix = dict(Counter(map(classify, path)))
    flops = sum(product.flops_per_warp for ins in path if (product := product_of(ins)))
    scores = flops / flops_per_score if flops_per_score else 0.0
    return Loop(
        instructions=len(path),
        mix=mix,
        matrix_flops=flops,
        slots=32 * (len(path) - mix.get("matrix", 0)) / scores if scores else None,
        shared_bytes=sum(map(shared_bytes, path)),
        exp2_under_product=exp2_under_product(path),
    )


def name_of(function: Any) -> str:
    """What a kernel is called here, of the @triton.jit function that it is made of."""
    return str(function.__name__).strip("_").removesuffix("_kernel")


def kernel_name(kernel: Any) -> str:
    """ "forward", "dkdv", ...; "dk" and "dv" where each has a launch of its own."""
    name = name_of(kernel.src.fn)
    constants = constants_of(kernel)
    alone = [half for half, other in (("dk", "dv"), ("dv", "dk")) if constants.get(f"{other}_ptr", 0) is None]
    return alone[0] if name == "dkdv" and alone else name


def root_cause(error: BaseException) -> str:
    """The last line of the innermost error: Triton's outer ones quote source code."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def constants_of(kernel: Any) -> dict[str, Any]:
    """What the compiler was told, by parameter: sizes of tiles, and None for what a call lacks."""
    names = kernel.src.fn.arg_names
    return {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}


def _tile(kernel: Any) -> tuple[int, int] | None:
    constants = constants_of(kernel)
    block_q, block_k = constants.get("BLOCK_Q"), constants.get("BLOCK_K")
    return None if block_q is None or block_k is None else (block_q, block_k)


def _work(kernel: Any) -> Work | None:
    constants, tile = constants_of(kernel), _tile(kernel)
    if tile is None or "HEAD_DIM" not in constants:
        return None
    element_size = int(re.sub(r"\D", "", kernel.src.signature["q_ptr"])) // 8  # "*bf16"
    return model.work(kernel_name(kernel), constants["HEAD_DIM"], constants["HEAD_DIM_V"], tile, element_size)


def _amd(kernel: Any, tile: tuple[int, int] | None, work: Work | None) -> Figures:
    """The assembler's own metadata; its loops are not looked into."""
    text = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembly names no {name}")
        return int(found.group(1))

    return Figures(
        tile=tile,
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        spills_in_loops=None,
        shared=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        ctas_per_sm=None,
        matrix=("v_mfma",) if "v_mfma" in text else (),
        loops=(),
        work=work,
    )
