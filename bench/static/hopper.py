"""The Hopper kernels of `gluon` in the lane: which variants are compiled, and what must be true of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import hopper as takes
from ...kernels import spec as contract
from ...kernels.gluon import config
from ...kernels.gluon.hopper_backward import backward_launch
from ...kernels.gluon.hopper_forward import GROUP_ROWS, forward_launch
from ...kernels.gluon.launch import HopperLaunch
from ...kernels.options import make_spec
from ...kernels.validation import make_inputs
from . import model
from .absent_gpu import absent_gpu
from .assembly import listening
from .report import Row, Variant, figures, name_of, root_cause
from .targets import TARGETS

ARCHITECTURE = "sm_90"
BATCH, HEADS_Q, HEADS_KV, SEQLEN = 2, 8, 2, 2048
WARPS_OF_A_GROUP = 4

SPILLED = {
    ("forward", 64, "plain"): 16,
    ("forward", 64, "causal"): 36,
    ("forward", 64, "window"): 172,
    ("forward", 64, "all"): 124,
    ("backward", 128, "plain"): 68,
    ("backward", 128, "causal"): 136,
    ("backward", 128, "window"): 368,
    ("backward", 128, "all"): 368,
}
"""(kernel, head_dim, options) -> bytes that it may spill, where 0 will not do: the most that it spills under
Triton 3.6.0 with ptxas 12.8 or 13.4, and under 3.9.0 with ptxas 13.4."""


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


OPTIONS: dict[str, contract.AttentionOptions] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (512, 0)},
    "all": {"window": (512, 0), "sinks": _tensor(HEADS_Q)},  # and max_logit
}


NARROW_V = {192: 128}
"""head_dim -> that of v, where models have them differ (DeepSeek-V3: 128 channels, and 64 with positions)."""


def full() -> list[tuple[str, Variant]]:
    """Everything that ships."""
    cases = [
        *itertools.product(config.FORWARD, ("bfloat16",), OPTIONS),
        *itertools.product(config.FORWARD, ("float16",), ("plain",)),
        *itertools.product(NARROW_V, ("bfloat16",), OPTIONS),
    ]
    return [(ARCHITECTURE, Variant(*case, implementation="gluon")) for case in cases]


def sample() -> list[tuple[str, Variant]]:
    """What a change is checked with."""
    cases = itertools.product((64, 128), ("bfloat16",), ("plain", "causal"))
    return [(ARCHITECTURE, Variant(*case, implementation="gluon")) for case in cases]


def launches(
    variant: Variant, forward: config.ForwardTile | None = None, backward: config.BackwardTile | None = None
) -> list[HopperLaunch]:
    """`launches_of` a call that is such a variant."""
    dtype = getattr(torch, variant.dtype)
    q = _tensor(BATCH, HEADS_Q, SEQLEN, variant.head_dim, dtype=dtype)
    head_dims = variant.head_dim, NARROW_V.get(variant.head_dim, variant.head_dim)
    k, v = (_tensor(BATCH, HEADS_KV, SEQLEN, head_dim, dtype=dtype) for head_dim in head_dims)
    options: contract.AttentionOptions = {**contract.DEFAULTS, **OPTIONS[variant.options]}
    inputs = make_inputs(q, k, v, options)
    spec = make_spec(variant.head_dim, options, top_left=False, tf32=False)
    return launches_of(inputs, spec._replace(want_max=variant.options == "all"), forward, backward)


def launches_of(
    inputs: contract.Inputs,
    spec: contract.AttentionSpec,
    forward: config.ForwardTile | None = None,
    backward: config.BackwardTile | None = None,
) -> list[HopperLaunch]:
    """Of a forward and, where it has a kernel, of a backward, on tensors without data.

    forward, backward: tiles; None takes the table's.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse, max_logit, offset, delta = (_tensor(*q.shape[:3]) for _ in range(4))
    made = [forward_launch(inputs, spec, out, lse, forward, max_logit if spec.want_max else None)]
    if takes.has_backward(inputs, spec):
        dout, dk, dv, dq_sum = out, torch.empty_like(k), torch.empty_like(v), _tensor(*q.shape)
        made.append(backward_launch(dout, offset, delta, inputs, spec, dq_sum, dk, dv, backward))
    return made


def unsupported_reasons(inputs: contract.Inputs, spec: contract.AttentionSpec) -> list[str]:
    """Why the kernels cannot take a call on the GPU they are for."""
    of_this_machine = takes.machine_reasons(inputs.q.device)
    return [reason for reason in takes.unsupported_reasons(inputs, spec) if reason not in of_this_machine]


def compile_launch(launch: HopperLaunch, variant: Variant) -> Row:
    """Compile one kernel, and listen to the assembler."""
    target, name = TARGETS[ARCHITECTURE], name_of(launch.kernel)
    launch.kernel.device_caches.clear()  # what this process has compiled would not be assembled again
    try:
        with absent_gpu(target) as launched, listening(target.triton.arch) as said:
            launch.start()
    except Exception as reason:  # whatever the compiler raises is what the row reports
        return Row(ARCHITECTURE, name, variant, None, root_cause(reason))
    tile = _tile(launch.constants)
    head_dim = launch.constants["HEAD_DIM"]
    work = model.work(name, head_dim, launch.constants.get("HEAD_DIM_V", head_dim), tile)
    found = figures(launched[0].kernel, target, work, tile)
    stages = launch.constants["STAGES" if "STAGES" in launch.constants else "STAGES_Q"]
    found = replace(found, num_stages=stages, assembly=said[launch.kernel.__name__])
    return Row(ARCHITECTURE, name, variant, found)


def _tile(constants: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and keys that all groups together work on in one round."""
    if "GROUPS" in constants:
        return GROUP_ROWS.value * constants["GROUPS"], constants["BLOCK_K"]
    return constants["BLOCK_Q"], config.KEYS


def failures(row: Row) -> Iterator[str]:
    """Every gate of these kernels that the row misses, beside those of all kernels."""
    found = row.figures
    if found is None or found.assembly is None or found.tile is None or found.work is None:
        raise ValueError(f"{row.kernel} {row.variant} was not compiled by compile_launch")
    assembler, spilled, serialised = found.assembly
    if serialised:
        yield f"products wait for each other: {' '.join(serialised)} of {assembler}"
    limit = SPILLED.get((row.kernel, row.variant.head_dim, row.variant.options), 0)
    if spilled > limit:
        yield f"{spilled} bytes spilled, at most {limit}"
    computed = WARPS_OF_A_GROUP * sum(loop.matrix_flops for loop in found.loops)
    useful = found.tile[0] * found.tile[1] * found.work.flops
    if computed != useful:
        yield f"{computed:.0f} FLOPs in the main loops of all groups, {useful:.0f} are useful"
    exp2 = sum(loop.count("exp2") for loop in found.loops)
    under = sum(loop.exp2_under_product or 0 for loop in found.loops)
    if under != exp2 or not exp2:
        yield f"{under} of {exp2} exponentials lie under a product"
