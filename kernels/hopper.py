"""What the Hopper kernels of `gluon` take, and where they go first; asked without importing Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re

import torch

from . import descriptors
from .spec import AttentionSpec, Inputs
from .tracing import constant_when_traced

TRITONS = ("3.6", "3.9")
"""From the first to the last in which the kernels were compiled and looked at."""
ASSEMBLER = (13, 3)
"""Older ones may use a register again that a product under way still reads (release notes of CUDA 13.3)."""
MAX_HEAD_DIM, MAX_HEAD_DIM_BACKWARD = 256, 128
FASTER: dict[str, frozenset[tuple[int, bool]]] = {
    "forward": frozenset({(128, False), (128, True)}),
    "backward": frozenset({(128, False), (128, True)}),
}
"""(padded head_dim, whether causal) where a committed file of results shows them right, and at least 1.15
times as fast as the other kernels: bench/results/nvidia-h200-2026-11-26.json."""
SHORTEST = 512
"""Sequences that were timed."""


def unsupported_reasons(inputs: Inputs, spec: AttentionSpec) -> list[str]:
    """Why the kernels cannot take a call; empty if they can."""
    q, v = inputs.q, inputs.v
    reasons = list(machine_reasons(q.device))
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {str(q.dtype).removeprefix('torch.')} is not of 16 bits")
    for name, head_dim in (("head_dim", q.shape[-1]), ("head_dim of v", v.shape[-1])):
        if head_dim > MAX_HEAD_DIM:
            reasons.append(f"{name} {head_dim} is larger than {MAX_HEAD_DIM}")
        if head_dim % 8:
            reasons.append(f"{name} {head_dim} is no multiple of 8: no box can be written to such rows")
    if padded(q.shape[-1]) < padded(v.shape[-1]):
        reasons.append(f"head_dim {q.shape[-1]} takes smaller tiles than that of v, {v.shape[-1]}")
    asked = (
        ("bias", inputs.bias is not None),
        ("ALiBi", inputs.slopes is not None),
        ("RelativeBias", inputs.table is not None),
        ("mask", inputs.mask is not None),
        ("a mask object", inputs.ranges is not None or inputs.tiles is not None),
        ("key_lengths", inputs.key_lengths is not None),
        ("packed sequences", inputs.spans_q is not None),
        ("softcap", spec.softcap is not None),
        ("dropout", spec.dropout_p > 0),
        ("a negative scale", spec.scale < 0),
    )
    reasons += [f"{name}: not in these kernels" for name, is_asked in asked if is_asked]
    if not reasons and (found := descriptors.why_not(inputs, spec)):
        reasons.append(found)
    return reasons


def has_backward(inputs: Inputs, spec: AttentionSpec) -> bool:
    """Whether the backward kernel takes the call too; else that of `triton` does.

    It adds up dq in no fixed order, from the rounded out; and what q and dout hold in a row that sees nothing
    would reach a product.
    """
    seqlen_q, seqlen_k = inputs.q.shape[2], inputs.k.shape[2]
    first = spec.shift(seqlen_q, seqlen_k)
    every_row_sees = (spec.right is None or first + spec.right >= 0) and (
        spec.left is None or first + seqlen_q - 1 - spec.left < seqlen_k
    )
    head_dim, head_dim_v = padded(inputs.q.shape[-1]), padded(inputs.v.shape[-1])
    small = head_dim == head_dim_v <= MAX_HEAD_DIM_BACKWARD
    in_order = spec.deterministic or torch.are_deterministic_algorithms_enabled()  # since forward, perhaps
    return small and every_row_sees and not in_order and not spec.precise


def is_faster(direction: str, inputs: Inputs, spec: AttentionSpec) -> bool:
    """Whether the kernels go first where nobody names an implementation.

    The variable UNDIVIDED_HOPPER decides if it is 1, wherever they take the call, or 0, nowhere; a graph of
    torch.compile keeps what it was.
    """
    switch = os.environ.get("UNDIVIDED_HOPPER")
    if switch in ("0", "1"):
        return switch == "1"
    short = min(inputs.q.shape[2], inputs.k.shape[2]) < SHORTEST
    head_dim, head_dim_v = padded(inputs.q.shape[-1]), padded(inputs.v.shape[-1])
    kind = head_dim, spec.right == 0
    return (
        not short
        and head_dim == head_dim_v
        and spec.left is None
        and spec.right in (None, 0)
        and kind in FASTER[direction]
    )


def padded(head_dim: int) -> int:
    """Columns of a tile that holds a head."""
    return next((size for size in (64, 128) if head_dim <= size), 256)


@constant_when_traced
def machine_reasons(device: torch.device) -> tuple[str, ...]:
    """Reasons that lie in the machine."""
    return _ask_the_machine(device)


@functools.cache
def _ask_the_machine(device: torch.device) -> tuple[str, ...]:
    if device.type == "meta":
        return ("a meta tensor does not say for which GPU",)
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return ("no Hopper GPU (compute capability 9.0)",)
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ("triton is not installed",)
    if not _number(TRITONS[0]) <= _number(version) <= _number(TRITONS[1]):
        return (f"tested with Triton {TRITONS[0]} to {TRITONS[1]}, not {version}",)
    assembler = importlib.import_module(".gluon.compat", __package__).assembler_version()
    if _number(assembler) < ASSEMBLER:
        needed = ".".join(map(str, ASSEMBLER))
        return (
            f"ptxas {assembler} may use registers again that a product still reads: {needed} is needed, in "
            "TRITON_PTXAS_PATH",
        )
    return ()


def _number(version: str) -> tuple[int, ...]:
    """(3, 6) of "3.6.0+git"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
