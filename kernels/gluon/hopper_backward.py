"""The backward pass on Hopper: one warp loads, two warpgroups compute, 64 keys each; one pass.

Scores are computed transposed, Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ, so that Pᵀ and dSᵀ are operands of dV and dK from
registers; only dS goes through shared memory, for dQ, which programs add up in memory in float32, in
whatever order they come (FlashAttention-3, Shah et al. 2024, arXiv 2407.08608, section 3 and appendix B.1).
The query heads of a group are walked through inside a program: dK and dV are written once.
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
from .. import sinks as attention_sinks
from ..hopper import padded
from ..spec import AttentionSpec, Gradients, Inputs, Needs, like
from ..triton import replay
from ..triton.backward import room_for_statistics, row_statistics_launch
from ..triton.launch import positive_scale
from ..triton.softmax import LOG2E
from ..triton.visible import position_bounds
from . import compat, positions
from .config import BACKWARD, KEYS, REGISTERS, BackwardTile
from .hopper_forward import boxed
from .launch import HopperLaunch, Tile

GROUP_KEYS = gl.constexpr(64)
N_KEYS = gl.constexpr(KEYS)
DS_WRITTEN = gl.constexpr(8)
DS_READ = gl.constexpr(9)
"""Hardware barriers of the two groups that compute."""
BOTH_GROUPS = gl.constexpr(256)


@gluon.jit
def _whose_keys(seqlen_k, heads_kv):
    """(first key, batch, head_kv) of a program in a one-dimensional grid."""
    tiles = gl.cdiv(seqlen_k, N_KEYS)
    plane = gl.program_id(0) // tiles
    return gl.program_id(0) % tiles * N_KEYS, plane // heads_kv, plane % heads_kv


@gluon.jit
def _next(head, tile, n_tiles):
    """The next tile of rows: of the same head, or the first of the next. A division would cost registers."""
    tile += 1
    head = gl.where(tile == n_tiles, head + 1, head)
    tile = gl.where(tile == n_tiles, 0, tile)
    return head, tile


@gluon.jit
def _load(
    tensors, buffers, barriers, sizes, bounds,
    BLOCK_Q: gl.constexpr, STAGES_Q: gl.constexpr, STAGES_DOUT: gl.constexpr,
):  # fmt: skip
    """The warp that loads: keys and values once, then tiles of queries and dout with their statistics."""
    q_desc, k_desc, v_desc, dout_desc, offset_desc, delta_desc = tensors
    k_tile, v_tile, q_tiles, dout_tiles, offsets, deltas = buffers
    kv_full, q_full, q_empty, dout_full, dout_empty = barriers
    seqlen_q, seqlen_k, heads_kv, group = sizes
    shift, left, right = bounds
    first_key, batch, head_kv = _whose_keys(seqlen_k, heads_kv)
    first, n_tiles = positions.tiles_of_rows(
        first_key, seqlen_q, seqlen_k, shift, left, right, N_KEYS, BLOCK_Q
    )
    mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    compat.load_tile(k_desc, [batch, head_kv, first_key, 0], kv_full.index(0), k_tile)
    compat.load_tile(v_desc, [batch, head_kv, first_key, 0], kv_full.index(0), v_tile)
    head = head_kv * group
    tile = 0
    for j in range(n_tiles * group):
        row = (first + tile) * BLOCK_Q
        stage = j % STAGES_Q
        mbarrier.wait(q_empty.index(stage), ((j // STAGES_Q) & 1) ^ 1)
        mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + offset_desc.block_type.nbytes)
        compat.load_tile(q_desc, [batch, head, row, 0], q_full.index(stage), q_tiles.index(stage))
        compat.load_tile(offset_desc, [batch, head, row], q_full.index(stage), offsets.index(stage))
        stage = j % STAGES_DOUT
        mbarrier.wait(dout_empty.index(stage), ((j // STAGES_DOUT) & 1) ^ 1)
        mbarrier.expect(dout_full.index(stage), dout_desc.block_type.nbytes + delta_desc.block_type.nbytes)
        compat.load_tile(dout_desc, [batch, head, row, 0], dout_full.index(stage), dout_tiles.index(stage))
        compat.load_tile(delta_desc, [batch, head, row], dout_full.index(stage), deltas.index(stage))
        head, tile = _next(head, tile, n_tiles)


@gluon.jit
def _compute(
    dq_desc, dk_desc, dv_desc, buffers, ds_tiles, dq_tiles, barriers, unit, scale, sizes, bounds,
    GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES_Q: gl.constexpr, STAGES_DOUT: gl.constexpr,
    STAGES_DS: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """A warpgroup that computes: dk and dv of its 64 keys; of dq, its half of the columns."""
    DTYPE: gl.constexpr = dk_desc.dtype
    HALF: gl.constexpr = HEAD_DIM // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BLOCK_Q, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, HEAD_DIM, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, HALF, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=DK_LAYOUT, k_width=2)
    k_tile, v_tile, q_tiles, dout_tiles, offsets, deltas = buffers
    kv_full, q_full, q_empty, dout_full, dout_empty = barriers
    seqlen_q, seqlen_k, heads_kv, group = sizes
    shift, left, right = bounds
    first_key, batch, head_kv = _whose_keys(seqlen_k, heads_kv)
    first, n_tiles = positions.tiles_of_rows(
        first_key, seqlen_q, seqlen_k, shift, left, right, N_KEYS, BLOCK_Q
    )
    first_key += GROUP * GROUP_KEYS
    all_keys = k_tile.reshape([N_KEYS, HEAD_DIM])
    k = all_keys.slice(GROUP * GROUP_KEYS, GROUP_KEYS, dim=0)
    v = v_tile.reshape([N_KEYS, HEAD_DIM]).slice(GROUP * GROUP_KEYS, GROUP_KEYS, dim=0)
    k_half = all_keys.slice(GROUP * HALF, HALF, dim=1)
    dk = gl.zeros([GROUP_KEYS, HEAD_DIM], gl.float32, layout=DK_LAYOUT)
    dv = gl.zeros([GROUP_KEYS, HEAD_DIM], gl.float32, layout=DK_LAYOUT)
    dq_tile = dq_tiles.index(GROUP)
    head = head_kv * group
    tile = 0
    mbarrier.wait(kv_full.index(0), 0)
    for j in range(n_tiles * group):
        row = (first + tile) * BLOCK_Q
        stage = j % STAGES_Q
        dout_stage = j % STAGES_DOUT
        q = q_tiles.index(stage).reshape([BLOCK_Q, HEAD_DIM])
        dout = dout_tiles.index(dout_stage).reshape([BLOCK_Q, HEAD_DIM])
        mbarrier.wait(q_full.index(stage), (j // STAGES_Q) & 1)
        s = gl.zeros([GROUP_KEYS, BLOCK_Q], gl.float32, layout=S_LAYOUT)
        s = warpgroup_mma(k, q.permute((1, 0)), s, use_acc=False, is_async=True)
        offset = offsets.index(stage).reshape([BLOCK_Q]).load(gl.SliceLayout(0, S_LAYOUT))
        mbarrier.wait(dout_full.index(dout_stage), (j // STAGES_DOUT) & 1)
        dp = gl.zeros([GROUP_KEYS, BLOCK_Q], gl.float32, layout=S_LAYOUT)
        dp = warpgroup_mma(v, dout.permute((1, 0)), dp, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if not positions.rows_see_all(row, first_key, seqlen_k, shift, left, right, GROUP_KEYS, BLOCK_Q):
            s = positions.hide_rows(
                s, row, first_key, seqlen_k, shift, left, right, GROUP_KEYS, BLOCK_Q, S_LAYOUT
            )
        p = gl.exp2(s * unit - offset[None, :])
        weights = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
        if STAGES_DS == 2:
            # Passed at once; but it ends the basic block, without which the assembler lifts the wait for dp
            # above the exponentials.
            mbarrier.wait(dout_full.index(dout_stage), (j // STAGES_DOUT) & 1)
        delta = deltas.index(dout_stage).reshape([BLOCK_Q]).load(gl.SliceLayout(0, S_LAYOUT))
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = (p * (dp - delta[None, :])).to(DTYPE)
        dv = warpgroup_mma(weights, dout, dv, is_async=True)
        ds_tile = ds_tiles.index(j % STAGES_DS)
        if STAGES_DS == 1:
            compat.meet(DS_READ, BOTH_GROUPS)
        ds_tile.slice(GROUP * GROUP_KEYS, GROUP_KEYS, dim=0).store(ds)
        fence_async_shared()
        compat.meet(DS_WRITTEN, BOTH_GROUPS)
        dq = gl.zeros([BLOCK_Q, HALF], gl.float32, layout=DQ_LAYOUT)
        dq = warpgroup_mma(ds_tile.permute((1, 0)), k_half, dq, use_acc=False, is_async=True)
        dk = warpgroup_mma(gl.convert_layout(ds, P_LAYOUT), q, dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
        mbarrier.arrive(dout_empty.index(dout_stage), count=1)
        tma.store_wait(0)
        dq_tile.reshape([BLOCK_Q, HALF]).store(dq)
        fence_async_shared()
        compat.add_tile(dq_desc, [batch, head, row, GROUP * HALF], dq_tile)
        dk = warpgroup_mma_wait(0, deps=[dk])
        mbarrier.arrive(q_empty.index(stage), count=1)
        head, tile = _next(head, tile, n_tiles)
    tma.store_wait(0)
    compat.meet(DS_WRITTEN, BOTH_GROUPS)  # nobody reads keys and values any more: their tiles take dk and dv
    k.store((dk * scale).to(DTYPE))
    v.store(dv.to(DTYPE))
    fence_async_shared()
    compat.store_tile(
        dk_desc, [batch, head_kv, first_key, 0], k_tile.slice(GROUP * GROUP_KEYS, GROUP_KEYS, dim=2)
    )
    compat.store_tile(
        dv_desc, [batch, head_kv, first_key, 0], v_tile.slice(GROUP * GROUP_KEYS, GROUP_KEYS, dim=2)
    )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "shift", "left", "right", "heads_kv", "group"])
def _backward_kernel(
    q_desc, k_desc, v_desc, dout_desc, offset_desc, delta_desc, dq_desc, dk_desc, dv_desc, unit, scale,
    seqlen_q, seqlen_k, shift, left, right, heads_kv, group,
    HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES_Q: gl.constexpr, STAGES_DOUT: gl.constexpr,
    STAGES_DS: gl.constexpr, REGISTERS_COMPUTE: gl.constexpr, REGISTERS_LOAD: gl.constexpr,
):  # fmt: skip
    """dk and dv of 128 keys, and what these add to dq / scale; offset and delta: `row_statistics_launch`."""
    DTYPE: gl.constexpr = q_desc.dtype
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_tile = gl.allocate_shared_memory(DTYPE, k_desc.block_type.shape, k_desc.layout)
    v_tile = gl.allocate_shared_memory(DTYPE, v_desc.block_type.shape, v_desc.layout)
    q_tiles = gl.allocate_shared_memory(DTYPE, [STAGES_Q, 1, 1, BLOCK_Q, HEAD_DIM], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(DTYPE, [STAGES_DOUT, 1, 1, BLOCK_Q, HEAD_DIM], dout_desc.layout)
    offsets = gl.allocate_shared_memory(gl.float32, [STAGES_Q, 1, 1, BLOCK_Q], offset_desc.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES_DOUT, 1, 1, BLOCK_Q], delta_desc.layout)
    ds_tiles = gl.allocate_shared_memory(DTYPE, [STAGES_DS, N_KEYS, BLOCK_Q], DS_LAYOUT)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, 1, BLOCK_Q, HEAD_DIM // 2], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES_Q, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES_Q, 1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES_DOUT, 1], mbarrier.MBarrierLayout())
    dout_empty = gl.allocate_shared_memory(gl.int64, [STAGES_DOUT, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    for stage in gl.static_range(STAGES_Q):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=2)
    for stage in gl.static_range(STAGES_DOUT):
        mbarrier.init(dout_full.index(stage), count=1)
        mbarrier.init(dout_empty.index(stage), count=2)
    tensors = (q_desc, k_desc, v_desc, dout_desc, offset_desc, delta_desc)
    buffers = (k_tile, v_tile, q_tiles, dout_tiles, offsets, deltas)
    barriers = (kv_full, q_full, q_empty, dout_full, dout_empty)
    sizes = (seqlen_q, seqlen_k, heads_kv, group)
    bounds = (shift, left, right)
    # Tuples of arguments stand inline: assigned to a variable, their constants would become tensors.
    gl.warp_specialize(
        [
            (_compute, (dq_desc, dk_desc, dv_desc, buffers, ds_tiles, dq_tiles, barriers, unit, scale, sizes,
                        bounds, 0, BLOCK_Q, STAGES_Q, STAGES_DOUT, STAGES_DS, HEAD_DIM)),
            (_compute, (dq_desc, dk_desc, dv_desc, buffers, ds_tiles, dq_tiles, barriers, unit, scale, sizes,
                        bounds, 1, BLOCK_Q, STAGES_Q, STAGES_DOUT, STAGES_DS, HEAD_DIM)),
            (_load, (tensors, buffers, barriers, sizes, bounds, BLOCK_Q, STAGES_Q, STAGES_DOUT)),
        ],
        [4, 1],
        [REGISTERS_COMPUTE, REGISTERS_LOAD],
    )  # fmt: skip


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Needs,
    tile: BackwardTile | None = None,
) -> Gradients:
    """Gradients of one call, outside autograd; as the Triton kernels' `attention_backward`.

    The sum of dq is in float32, one tensor of q's shape.
    """
    q, k, v, sinks = inputs.q, inputs.k, inputs.v, inputs.sinks
    inputs, dout = boxed(inputs), descriptors.laid_out(dout)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    offset, delta = room_for_statistics(lse)
    dq_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = like(k, k.shape[3]), like(v, v.shape[3])
    replay.run(
        (_backward_kernel, spec, tile),
        (*inputs, dout, dlse, out, lse, offset, delta, dq_sum, dk, dv),
        q.device,
        lambda: [
            row_statistics_launch(dout, dlse, out, lse, None, offset, delta, inputs, spec),
            backward_launch(dout, offset, delta, inputs, spec, dq_sum, dk, dv, tile),
        ],
    )
    dq = torch.mul(dq_sum, spec.scale, out=like(q, q.shape[3])) if needs.dq else None
    dsinks = None
    if sinks is not None and needs.dsinks:
        dsinks = attention_sinks.gradient(delta[..., : q.shape[2]], lse, sinks)
    return Gradients(dq, dk if needs.dk else None, dv if needs.dv else None, None, dsinks, None, None)


def backward_launch(
    dout: Tensor,
    offset: Tensor,
    delta: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    dq_sum: Tensor,
    dk: Tensor,
    dv: Tensor,
    tile: BackwardTile | None = None,
) -> HopperLaunch:
    """The launch that fills dk, dv and adds dq / scale to dq_sum; with meta tensors, one to compile only."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_kv, seqlen_k = k.shape[1:3]
    head_dim = padded(head_dim)
    tile = tile or BACKWARD[head_dim]
    shift, left, right = position_bounds(inputs, spec)
    rows, keys = (1, 1, tile.block_q, head_dim), (1, 1, KEYS, head_dim)
    group_keys = (1, 1, GROUP_KEYS.value, head_dim)
    arguments: dict[str, Any] = {
        "q_desc": Tile(q, rows),
        "k_desc": Tile(k, keys),
        "v_desc": Tile(v, keys),
        "dout_desc": Tile(dout, rows),
        "offset_desc": Tile(offset, (1, 1, tile.block_q)),
        "delta_desc": Tile(delta, (1, 1, tile.block_q)),
        "dq_desc": Tile(dq_sum, (1, 1, tile.block_q, head_dim // 2)),
        "dk_desc": Tile(dk, group_keys),
        "dv_desc": Tile(dv, group_keys),
        "unit": positive_scale(spec.scale) * LOG2E.value,
        "scale": spec.scale,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "shift": shift,
        "left": left,
        "right": right,
        "heads_kv": heads_kv,
        "group": heads_q // heads_kv,
    }
    compute, load = REGISTERS[2]
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_Q": tile.block_q,
        "STAGES_Q": tile.stages_q,
        "STAGES_DOUT": tile.stages_dout,
        "STAGES_DS": tile.stages_ds,
        "REGISTERS_COMPUTE": compute,
        "REGISTERS_LOAD": load,
    }
    programs = batch * heads_kv * -(-seqlen_k // KEYS)
    return HopperLaunch(_backward_kernel, programs, arguments, constants)
