"""A small kernel for Hopper with every kind of hand-over that a fused attention has, and nothing else.

Of x (rows, 64) and w (64, 64): y = x·w, its row sums, and the sum of yᵀ·x. A producer fills a ring of tiles
of x; two warpgroups make half of the rows of y each, exchange them, and make half of the columns of yᵀ·x.
"""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS: gl.constexpr = gl.constexpr(128)


@builtin
def copy_adding(descriptor, place, source, _semantic=None):
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, place, source.handle)


@gluon.jit
def named_barrier(NUMBER: gl.constexpr, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(
        f"bar.sync {NUMBER}, {THREADS}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tiles_of_program(n_rows):
    n_tiles = gl.cdiv(n_rows, ROWS)
    return (n_tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def load_tiles(x_tile, ring, full, empty, n_rows, STAGES: gl.constexpr):
    for step in range(tiles_of_program(n_rows)):
        row = (gl.program_id(0) + step * gl.num_programs(0)) * ROWS
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), x_tile.block_type.nbytes)
        tma.async_copy_global_to_shared(x_tile, [row, 0], full.index(stage), ring.index(stage))


@gluon.jit
def multiply(y_tile, z_tile, sums, shared, n_rows, HALF: gl.constexpr, STAGES: gl.constexpr):
    ring, w, exchange, half, full, empty = shared
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    mine = exchange.slice(HALF * 64, 64, dim=0)
    z = gl.zeros([64, 32], gl.float32, layout=narrow)
    for step in range(tiles_of_program(n_rows)):
        row = (gl.program_id(0) + step * gl.num_programs(0)) * ROWS + HALF * 64
        stage = step % STAGES
        x = ring.index(stage)
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        y = gl.zeros([64, 64], gl.float32, layout=wide)
        y = warpgroup_mma(x.slice(HALF * 64, 64, dim=0), w, y, use_acc=False, is_async=True)
        y = warpgroup_mma_wait(0, deps=[y])
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
        gl.store(sums + rows, gl.sum(y, 1), mask=rows < n_rows)
        tma.store_wait(0)
        named_barrier(1, 256)  # both have read the last exchange
        mine.store(y.to(exchange.dtype))
        fence_async_shared()
        named_barrier(2, 256)  # both have written
        z = warpgroup_mma(exchange.permute((1, 0)), x.slice(HALF * 32, 32, dim=1), z, is_async=True)
        tma.async_copy_shared_to_global(y_tile, [row, 0], mine)
        z = warpgroup_mma_wait(0, deps=[z])
        mbarrier.arrive(empty.index(stage), count=1)
    half.index(HALF).store(z)
    fence_async_shared()
    copy_adding(z_tile, [0, HALF * 32], half.index(HALF))
    tma.store_wait(0)


@gluon.jit
def toy(x_tile, w_tile, y_tile, z_tile, sums, n_rows, STAGES: gl.constexpr):
    ring = gl.allocate_shared_memory(x_tile.dtype, [STAGES, ROWS, 64], x_tile.layout)
    w = gl.allocate_shared_memory(w_tile.dtype, [64, 64], w_tile.layout)
    exchange = gl.allocate_shared_memory(y_tile.dtype, [ROWS, 64], y_tile.layout)
    half = gl.allocate_shared_memory(z_tile.dtype, [2, 64, 32], z_tile.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    there = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(there.index(0), count=1)
    mbarrier.expect(there.index(0), w_tile.block_type.nbytes)
    tma.async_copy_global_to_shared(w_tile, [0, 0], there.index(0), w)
    mbarrier.wait(there.index(0), 0)
    shared = (ring, w, exchange, half, full, empty)
    gl.warp_specialize(
        [
            (multiply, (y_tile, z_tile, sums, shared, n_rows, 0, STAGES)),
            (multiply, (y_tile, z_tile, sums, shared, n_rows, 1, STAGES)),
            (load_tiles, (x_tile, ring, full, empty, n_rows, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
