"""What a SASS instruction does: its class, and for matrix instructions the shape of the product."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from .sass import Instruction

MATRIX = frozenset(
    {"HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA"}
)

_CLASSES = {
    "fmul": "FMUL FMUL2 FMUL32I",
    "fadd": "FADD FADD2 FADD32I",
    "ffma": "FFMA FFMA2 FFMA32I",
    "fmax": "FMNMX FMNMX3",
    "select": "FSEL FSETP FSET SEL",
    "convert": "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND F2FP2",
    "integer": "IADD3 IADD IMAD IMUL LEA LOP3 LOP SHF SHL SHR IABS IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX PRMT"
    " SGXT BMSK",
    "predicate": "ISETP PLOP3 P2R R2P",
    "shuffle": "SHFL REDUX CREDUX VOTE VOTEU",
    "shared": "LDS LDSM STS STSM ATOMS",
    "global": "LDG STG LDGSTS RED REDG ATOM ATOMG UTMALDG UTMASTG UTMAREDG UBLKCP",
    "tensor memory": "LDTM STTM UTCCP",
    "spill": "LDL STL",
    "barrier": "BAR DEPBAR LDGDEPBAR SYNCS WARPGROUP WARPSYNC MEMBAR FENCE ARRIVES UTCBAR BSYNC BSSY YIELD",
    "control": "BRA EXIT RET CALL BRX NOP",
}
_CLASS_OF = {base: name for name, bases in _CLASSES.items() for base in bases.split()}


def classify(instruction: Instruction) -> str:
    """The class of an instruction: "matrix", "exp2", "ffma", "spill", ..., or "other"."""
    if instruction.base in MATRIX:
        return "matrix"
    if instruction.op.startswith("MUFU.EX2"):
        return "exp2"
    return _CLASS_OF.get(instruction.base, "other")


class Product(NamedTuple):
    """An m×n×k product, computed by one warp or by the four warps of a warpgroup together."""

    m: int
    n: int
    k: int
    by: Literal["warp", "warpgroup"]

    @property
    def flops_per_warp(self) -> float:
        return 2 * self.m * self.n * self.k / (4 if self.by == "warpgroup" else 1)


_WARP_SHAPES = {"1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32)}


def product_of(instruction: Instruction) -> Product | None:
    """The shape of a matrix instruction where its mnemonic tells (HMMA, HGMMA; not tcgen05)."""
    if instruction.base not in MATRIX:
        return None
    if found := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.op):
        m, n, k = map(int, found.groups())
        return Product(m, n, k, "warpgroup")
    for modifier in instruction.op.split(".")[1:]:
        if modifier in _WARP_SHAPES:
            return Product(*_WARP_SHAPES[modifier], "warp")
    return None
