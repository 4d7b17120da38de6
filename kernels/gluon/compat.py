"""What Gluon calls differently from one Triton to the next, and what it has no name for.

Tested with Triton 3.6.0 and 3.9.0.
"""

from triton._C.libtriton import ir
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):
    load_tile, store_tile, add_tile = tma.async_load, tma.async_store, tma.async_atomic_add
else:
    load_tile, store_tile = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

    @builtin
    def add_tile(tensor_desc, coord, src, _semantic=None):
        """Add a tile in shared memory to memory: the copy engine can, the language does not say how."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


def assembler_version() -> str:
    """Of the ptxas that will assemble for Hopper: "13.4"."""
    return str(get_ptxas(90).version)


@gluon.jit
def meet(BARRIER: gl.constexpr, THREADS: gl.constexpr):
    """Wait until so many threads have come to a hardware barrier, those that only `pass_by` counted.

    All threads of the partition must call it. Barriers 0 to 7 are Triton's.
    """
    gl.inline_asm_elementwise(
        f"bar.sync {BARRIER}, {THREADS}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def pass_by(BARRIER: gl.constexpr, THREADS: gl.constexpr):
    """Be counted at a hardware barrier, and go on."""
    gl.inline_asm_elementwise(
        f"bar.arrive {BARRIER}, {THREADS}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
