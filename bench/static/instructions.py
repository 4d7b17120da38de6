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
    "imad": "IMAD IMUL",
    "integer": "IADD3 IADD LEA LOP3 LOP SHF SHL SHR IABS IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX PRMT SGXT BMSK",
    "predicate": "ISETP PLOP3 P2R R2P",
    "move": "MOV MOV32I MOVM CS2R S2R S2UR R2UR LDC LDCU",
    "shuffle": "SHFL REDUX CREDUX VOTE VOTEU",
    "shared": "LDS LDSM STS STSM ATOMS",
    "global": "LDG STG LDGSTS RED REDG ATOM ATOMG UTMALDG UTMASTG UTMAREDG UBLKCP",
    "tensor memory": "LDTM STTM UTCCP",
    "spill": "LDL STL",
    "barrier": "BAR DEPBAR LDGDEPBAR SYNCS WARPGROUP WARPSYNC MEMBAR FENCE ARRIVES UTCBAR BSYNC BSSY YIELD",
    "control": "BRA EXIT RET CALL BRX NOP",
}
CLASSES = ("matrix", "exp2", "mufu", *_CLASSES, "uniform", "other")
_CLASS_OF = {base: name for name, bases in _CLASSES.items() for base in bases.split()}


def classify(instruction: Instruction) -> str:
    """The class of an instruction, one of CLASSES; "mufu" is any MUFU but the exponential."""
    if instruction.base in MATRIX:
        return "matrix"
    if instruction.base == "MUFU":
        return "exp2" if instruction.op.startswith("MUFU.EX2") else "mufu"
    return _CLASS_OF.get(instruction.base, "uniform" if instruction.base.startswith("U") else "other")


class Product(NamedTuple):
    """An m×n×k product, computed by one warp or by the four warps of a warpgroup together."""

    m: int
    n: int
    k: int
    by: Literal["warp", "warpgroup"]

    @property
    def flops_per_warp(self) -> float:
        return 2 * self.m * self.n * self.k / (4 if self.by == "warpgroup" else 1)


# Classes by the pipe that they occupy, as far as the model counts it.
PIPES = {
    "mufu": ("exp2", "mufu"),
    "fma": ("fmul", "fadd", "ffma", "imad"),
    "alu": ("fmax", "select", "convert", "integer", "predicate"),
}

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


def shared_bytes(instruction: Instruction) -> float:
    """Bytes of shared memory that one warp's share of an instruction moves, were no bank asked for twice.

    What the copy engine writes (TMA) is not known here.
    """
    base, op = instruction.base, instruction.op
    if product := product_of(instruction):
        if product.by == "warp":
            return 0.0  # operands are registers
        rows = product.n + (product.m if re.match(r"R\d+, *gdesc", instruction.operands) else 0)
        return rows * 32 / 4  # of 32 bytes whatever the dtype, fetched once for four warps
    if base in ("LDSM", "STSM"):
        matrices = op.rpartition(".")[2]  # of 8 x 8 elements of 16 bits
        return 128.0 * (int(matrices) if matrices in ("2", "4") else 1)
    if base in ("LDS", "STS", "LDGSTS"):
        return next((32 * bits / 8 for bits in (128, 64) if f".{bits}" in op), 128.0)
    return 128.0 if base in ("SHFL", "ATOMS") else 0.0
