"""The forward pass on Hopper: one warp loads, two or three warpgroups compute, 64 query rows each.

The structure is that of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, sections 3.1 and 3.2): loads by
the copy engine into a ring of tiles; groups that take turns at the tensor cores; and inside a group the
products of one tile of keys under way while the softmax of the next is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import descriptors
from ..hopper import padded
from ..spec import AttentionSpec, Inputs, like
from ..triton import replay
from ..triton.launch import positive_scale
from ..triton.softmax import LOG2E
from ..triton.visible import position_bounds
from . import compat, positions
from .config import FORWARD, REGISTERS, ForwardTile
from .launch import HopperLaunch, Tile

GROUP_ROWS = gl.constexpr(64)
FIRST_TURN = gl.constexpr(8)
"""Number of the first group's hardware barrier."""
HUGE_SCORE = gl.constexpr(2.0**27)
"""Above it, fp32 can no longer hold a base-2 score to less than one unit."""
L2_FOR_KEYS = 32 * 2**20


@gluon.jit
def _load(
    tensors, buffers, barriers, sizes, group, bounds,
    GROUPS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: queries once, then tiles of keys and values, last first, as rings have room."""
    q_desc, k_desc, v_desc = tensors
    q_tiles, k_tiles, v_tiles, _ = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    seqlen_q, seqlen_k, heads_q, planes, together = sizes
    shift, left, right = bounds
    ROWS: gl.constexpr = GROUP_ROWS * GROUPS
    first_row, batch, head = positions.whose_rows(
        seqlen_q, heads_q, planes, together, ROWS, right is not None
    )
    first, n_tiles = positions.tiles_of_keys(first_row, seqlen_q, seqlen_k, shift, left, right, ROWS, BLOCK_K)
    for g in gl.static_range(GROUPS):
        mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
        compat.load_tile(
            q_desc, [batch, head, first_row + g * GROUP_ROWS, 0], q_full.index(g), q_tiles.index(g)
        )
    for j in range(n_tiles):
        start = (first + n_tiles - 1 - j) * BLOCK_K
        stage = j % STAGES
        phase = ((j // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        compat.load_tile(k_desc, [batch, head // group, start, 0], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        compat.load_tile(v_desc, [batch, head // group, start, 0], v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def _softmax(s, row_max, row_sum, unit):
    """One step of the running softmax: as `online_softmax` of the Triton kernels, and for its reasons."""
    next_max = gl.maximum(row_max, gl.max(s, 1))
    row_unit = gl.where(gl.abs(next_max * unit) > HUGE_SCORE, _power_of_two(unit), unit)
    top = gl.where(next_max == float("-inf"), 0.0, next_max)
    p = gl.exp2(s * row_unit[:, None] - (top * row_unit)[:, None])
    alpha = gl.exp2((row_max - top) * row_unit)
    return p, alpha, next_max, row_sum * alpha + gl.sum(p, 1)


@gluon.jit
def _power_of_two(x):
    """Largest power of two that is at most x > 0."""
    return (x.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)


@gluon.jit
def _scores(q, k_tiles, stage, BLOCK_K: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Begin q·kᵀ, [GROUP_ROWS, BLOCK_K]."""
    s = gl.zeros([GROUP_ROWS, BLOCK_K], gl.float32, layout=LAYOUT)
    k = k_tiles.index(stage).reshape([BLOCK_K, HEAD_DIM])
    return warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _compute(
    outputs, sinks_ptr, buffers, barriers, unit, scale, sizes, bounds,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """A warpgroup that computes: its 64 rows of the outputs."""
    out_desc, lse_ptr, max_ptr = outputs
    DTYPE: gl.constexpr = out_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BLOCK_K, 16])
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, HEAD_DIM_V, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT_LAYOUT, k_width=2)
    ROWS: gl.constexpr = GROUP_ROWS * GROUPS
    MY_TURN: gl.constexpr = FIRST_TURN + GROUP
    NEXT_TURN: gl.constexpr = FIRST_TURN + (GROUP + 1) % GROUPS
    TWO_GROUPS: gl.constexpr = 256  # threads: the one that waits and the one that lets it
    q_tiles, k_tiles, v_tiles, out_tiles = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    seqlen_q, seqlen_k, heads_q, planes, together = sizes
    shift, left, right = bounds
    first_row, batch, head = positions.whose_rows(
        seqlen_q, heads_q, planes, together, ROWS, right is not None
    )
    first, n_tiles = positions.tiles_of_keys(first_row, seqlen_q, seqlen_k, shift, left, right, ROWS, BLOCK_K)
    first_row += GROUP * GROUP_ROWS
    whole_lo, whole_hi = positions.keys_seen_by_all(first_row, seqlen_k, shift, left, right, GROUP_ROWS)
    last_start = (first + n_tiles - 1) * BLOCK_K

    q = q_tiles.index(GROUP).reshape([GROUP_ROWS, HEAD_DIM])
    out_tile = out_tiles.index(GROUP)
    acc = gl.zeros([GROUP_ROWS, HEAD_DIM_V], gl.float32, layout=OUT_LAYOUT)
    row_max = gl.full([GROUP_ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    row_sum = gl.full([GROUP_ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    mbarrier.wait(q_full.index(GROUP), 0)
    if TAKE_TURNS and GROUP == GROUPS - 1:  # somebody must let the first group begin
        compat.pass_by(FIRST_TURN, TWO_GROUPS)

    if n_tiles > 0:
        mbarrier.wait(k_full.index(0), 0)
        s = _scores(q, k_tiles, 0, BLOCK_K, HEAD_DIM, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(0), count=1)
        s = positions.hide_keys(
            s, last_start, first_row, seqlen_k, shift, left, right, GROUP_ROWS, BLOCK_K, S_LAYOUT
        )
        p, alpha, row_max, row_sum = _softmax(s, row_max, row_sum, unit)
        weights = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
        mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=n_tiles > 1)
        for j in range(1, n_tiles):
            stage = j % STAGES
            before = (j - 1) % STAGES
            if TAKE_TURNS:
                compat.meet(MY_TURN, TWO_GROUPS)
            s = _scores(q, k_tiles, stage, BLOCK_K, HEAD_DIM, S_LAYOUT)
            mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
            v = v_tiles.index(before).reshape([BLOCK_K, HEAD_DIM_V])
            acc = warpgroup_mma(weights, v, acc, is_async=True)
            if TAKE_TURNS:
                compat.pass_by(NEXT_TURN, TWO_GROUPS)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if left is not None or right is not None:
                start = last_start - j * BLOCK_K
                if (start < whole_lo) | (start + BLOCK_K > whole_hi):
                    s = positions.hide_keys(
                        s, start, first_row, seqlen_k, shift, left, right, GROUP_ROWS, BLOCK_K, S_LAYOUT
                    )
            p, alpha, row_max, row_sum = _softmax(s, row_max, row_sum, unit)
            # The assembler lifts a wait for products above arithmetic of the same basic block. This wait,
            # needed in the next round, ends the block: acc is waited for only after the exponentials.
            mbarrier.wait(k_full.index((j + 1) % STAGES), ((j + 1) // STAGES) & 1, pred=j + 1 < n_tiles)
            weights = p.to(DTYPE)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT_LAYOUT))[:, None]
            weights = gl.convert_layout(weights, P_LAYOUT)
        last = (n_tiles - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((n_tiles - 1) // STAGES) & 1)
        v = v_tiles.index(last).reshape([BLOCK_K, HEAD_DIM_V])
        acc = warpgroup_mma(weights, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

    lse = row_max * scale + gl.log(row_sum)
    share = 1.0 / row_sum
    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + head).to(gl.float32)
        top = gl.maximum(lse, sink)
        total = top + gl.log(gl.exp(lse - top) + gl.exp(sink - top))
        share = share * gl.exp(lse - total)
        lse = total
    empty = row_sum == 0.0
    lse = gl.where(empty, float("-inf"), lse)
    # A row that sees nothing may have met the NaN of a key that its neighbours see.
    share = gl.where(empty, 0.0, share)
    share = gl.convert_layout(share, gl.SliceLayout(1, OUT_LAYOUT))[:, None]
    out = gl.where(share == 0.0, 0.0, acc * share)
    out_tile.reshape([GROUP_ROWS, HEAD_DIM_V]).store(out.to(DTYPE))
    fence_async_shared()
    compat.store_tile(out_desc, [batch, head, first_row, 0], out_tile)
    rows = first_row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    before = (batch * heads_q + head).to(gl.int64) * seqlen_q
    gl.store(lse_ptr + before + rows, lse, mask=rows < seqlen_q)
    if max_ptr is not None:
        gl.store(max_ptr + before + rows, row_max * scale, mask=rows < seqlen_q)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "seqlen_q",
        "seqlen_k",
        "shift",
        "left",
        "right",
        "heads_q",
        "group",
        "planes",
        "together",
    ]
)
def _forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, max_ptr, sinks_ptr, unit, scale,
    seqlen_q, seqlen_k, shift, left, right, heads_q, group, planes, together,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, BLOCK_K: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, TAKE_TURNS: gl.constexpr,
    REGISTERS_COMPUTE: gl.constexpr, REGISTERS_LOAD: gl.constexpr,
):  # fmt: skip
    """out = softmax(scores) · v and lse of 64 query rows for each group; unit is scale·log2 e > 0."""
    DTYPE: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(DTYPE, [GROUPS, 1, 1, GROUP_ROWS, HEAD_DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_K, HEAD_DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_K, HEAD_DIM_V], v_desc.layout)
    if HEAD_DIM_V == HEAD_DIM:
        out_tiles = q_tiles  # read for the last time when out is complete
    else:
        out_tiles = gl.allocate_shared_memory(DTYPE, [GROUPS, 1, 1, GROUP_ROWS, HEAD_DIM_V], out_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(g), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=GROUPS)
        mbarrier.init(v_empty.index(stage), count=GROUPS)
    tensors = (q_desc, k_desc, v_desc)
    outputs = (out_desc, lse_ptr, max_ptr)
    buffers = (q_tiles, k_tiles, v_tiles, out_tiles)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    sizes = (seqlen_q, seqlen_k, heads_q, planes, together)
    bounds = (shift, left, right)
    # Tuples of arguments stand inline: assigned to a variable, their constants would become tensors.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (outputs, sinks_ptr, buffers, barriers, unit, scale, sizes, bounds,
                            0, GROUPS, BLOCK_K, STAGES, HEAD_DIM, HEAD_DIM_V, TAKE_TURNS)),
                (_compute, (outputs, sinks_ptr, buffers, barriers, unit, scale, sizes, bounds,
                            1, GROUPS, BLOCK_K, STAGES, HEAD_DIM, HEAD_DIM_V, TAKE_TURNS)),
                (_load, (tensors, buffers, barriers, sizes, group, bounds, GROUPS, BLOCK_K, STAGES)),
            ],
            [4, 1],
            [REGISTERS_COMPUTE, REGISTERS_LOAD],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (outputs, sinks_ptr, buffers, barriers, unit, scale, sizes, bounds,
                            0, GROUPS, BLOCK_K, STAGES, HEAD_DIM, HEAD_DIM_V, TAKE_TURNS)),
                (_compute, (outputs, sinks_ptr, buffers, barriers, unit, scale, sizes, bounds,
                            1, GROUPS, BLOCK_K, STAGES, HEAD_DIM, HEAD_DIM_V, TAKE_TURNS)),
                (_compute, (outputs, sinks_ptr, buffers, barriers, unit, scale, sizes, bounds,
                            2, GROUPS, BLOCK_K, STAGES, HEAD_DIM, HEAD_DIM_V, TAKE_TURNS)),
                (_load, (tensors, buffers, barriers, sizes, group, bounds, GROUPS, BLOCK_K, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS_COMPUTE, REGISTERS_COMPUTE, REGISTERS_LOAD],
        )  # fmt: skip


def attention_forward(
    inputs: Inputs, spec: AttentionSpec, tile: ForwardTile | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, max_logit) of one call, outside autograd; as the Triton kernels' `attention_forward`."""
    q = inputs.q
    out = like(q, inputs.v.shape[3])
    inputs = boxed(inputs)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    max_logit = torch.empty_like(lse) if spec.want_max else None
    replay.run(
        (_forward_kernel, spec, tile),
        (*inputs, out, lse, max_logit),
        q.device,
        lambda: [forward_launch(inputs, spec, out, lse, tile, max_logit)],
    )
    return out, lse, max_logit


def forward_launch(
    inputs: Inputs,
    spec: AttentionSpec,
    out: Tensor,
    lse: Tensor,
    tile: ForwardTile | None = None,
    max_logit: Tensor | None = None,
) -> HopperLaunch:
    """The launch that fills out, lse and max_logit; with meta tensors, one to compile only."""
    q, k, v, sinks = inputs.q, inputs.k, inputs.v, inputs.sinks
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1:3]
    head_dim, head_dim_v = padded(head_dim), padded(v.shape[3])
    tile = tile or FORWARD[head_dim]
    rows, keys = (1, 1, GROUP_ROWS.value), (1, 1, tile.block_k)
    shift, left, right = position_bounds(inputs, spec)
    group = heads_q // heads_kv
    arguments: dict[str, Any] = {
        "q_desc": Tile(q, (*rows, head_dim)),
        "k_desc": Tile(k, (*keys, head_dim)),
        "v_desc": Tile(v, (*keys, head_dim_v)),
        "out_desc": Tile(out, (*rows, head_dim_v)),
        "lse_ptr": lse,
        "max_ptr": max_logit,
        "sinks_ptr": None if sinks is None else sinks.contiguous(),
        "unit": positive_scale(spec.scale) * LOG2E.value,
        "scale": positive_scale(spec.scale),
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "shift": shift,
        "left": left,
        "right": right,
        "heads_q": heads_q,
        "group": group,
        "planes": batch * heads_q,
        # Bounded, for int32: it is multiplied by the number of tiles.
        "together": min(
            batch * heads_q, group * max(1, L2_FOR_KEYS // (2 * k[0, 0].numel() * k.element_size()))
        ),
    }
    compute, load = REGISTERS[tile.groups]
    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_K": tile.block_k,
        "GROUPS": tile.groups,
        "STAGES": tile.stages,
        "TAKE_TURNS": tile.take_turns,
        "REGISTERS_COMPUTE": compute,
        "REGISTERS_LOAD": load,
    }
    programs = batch * heads_q * -(-seqlen_q // (GROUP_ROWS.value * tile.groups))
    return HopperLaunch(_forward_kernel, programs, arguments, constants)


def boxed(inputs: Inputs) -> Inputs:
    """The call with q, k and v of which boxes can be moved."""
    q, k, v = map(descriptors.laid_out, inputs[:3])
    return inputs._replace(q=q, k=k, v=v)
