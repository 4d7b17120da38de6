"""The GPUs the lane compiles for, and what one multiprocessor of each can hold.

Limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; AMD CDNA 3
Instruction Set Architecture, chapter 1 (LDS of 64 KiB per compute unit).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One architecture: Triton's name for it, its limits, its best matrix instruction for 16-bit operands."""

    name: str
    triton: GPUTarget
    shared_per_cta: int  # bytes
    shared_per_sm: int  # bytes
    threads_per_sm: int
    matrix_instruction: str
    registers_per_sm: int = 65536

    def ctas_per_sm(self, num_warps: int, registers: int, shared: int) -> int:
        """How many thread blocks of a kernel are resident at once on one NVIDIA multiprocessor."""
        registers_per_warp = math.ceil(registers * 32 / 256) * 256
        return min(
            self.registers_per_sm // (registers_per_warp * num_warps),
            self.shared_per_sm // (shared + KIB),  # the driver keeps 1 KiB per block for itself
            self.threads_per_sm // (32 * num_warps),
            32,
        )


def _cuda(sm: int, shared: int, threads: int, matrix_instruction: str) -> Target:
    return Target(
        f"sm_{sm}",
        GPUTarget("cuda", sm, 32),
        shared * KIB,
        (shared + 1) * KIB,
        threads,
        matrix_instruction,
    )


TARGETS = {
    target.name: target
    for target in (
        _cuda(80, 163, 2048, "HMMA"),
        _cuda(86, 99, 1536, "HMMA"),
        _cuda(89, 99, 1536, "HMMA"),
        _cuda(90, 227, 2048, "HGMMA"),
        _cuda(100, 227, 2048, "UTCHMMA"),
        _cuda(120, 99, 1536, "HMMA"),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 2048, "v_mfma"),
    )
}
