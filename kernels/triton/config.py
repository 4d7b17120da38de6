"""Tile sizes and launch options: data, one row per kernel, architecture and head dimension.

The rows of sm_90 for plain and causal calls are the fastest of those timed on an H200 (`bench/results`),
of tiles that do not spill inside a loop. All others come from a static study: registers, spills, shared
memory, instructions per score read from the compiled kernels, and a model of how they overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from triton.runtime.driver import driver

from .. import evidence
from ..spec import AttentionSpec, Inputs

Kernel = Literal["forward", "dkdv", "dq", "dbias"]
Load = Literal["plain", "ranges", "busy", "tiles"]
"""What a call does beside the softmax: see `load_of`."""


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut into programs.

    block_q, block_k: rows and keys of a tile, powers of two >= 16. tma: load through tensor
    descriptors where strides and alignment allow it.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False


INTERPRETER = TileConfig(32, 32, num_warps=4, num_stages=1)

# Largest padded head_dim -> row. 16-bit inputs.
_AMPERE: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 4, 2),
        128: TileConfig(128, 32, 4, 2),
        256: TileConfig(64, 32, 4, 2),
        512: TileConfig(32, 16, 4, 1),
    },
    "dkdv": {
        64: TileConfig(32, 128, 8, 2),
        128: TileConfig(32, 64, 4, 2),
        256: TileConfig(64, 64, 8, 1),
        512: TileConfig(16, 32, 8, 1),
    },
    "dq": {
        64: TileConfig(128, 32, 4, 2),
        128: TileConfig(128, 64, 8, 2),
        256: TileConfig(64, 32, 8, 1),
        512: TileConfig(32, 16, 8, 1),
    },
    "dbias": {
        64: TileConfig(64, 64, 4, 2),
        128: TileConfig(32, 64, 4, 2),
        256: TileConfig(32, 64, 8, 1),
        512: TileConfig(16, 32, 8, 1),
    },
}

# 99 KB of shared memory instead of 163.
_CONSUMER: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 4, 2),
        128: TileConfig(128, 32, 4, 2),
        256: TileConfig(64, 32, 4, 1),
        512: TileConfig(32, 16, 4, 1),
    },
    "dkdv": {
        64: TileConfig(64, 64, 4, 2),
        128: TileConfig(32, 64, 4, 2),
        256: TileConfig(16, 32, 4, 1),
        512: TileConfig(16, 16, 4, 1),
    },
    "dq": {
        64: TileConfig(64, 64, 4, 2),
        128: TileConfig(64, 32, 4, 2),
        256: TileConfig(32, 32, 4, 1),
        512: TileConfig(16, 16, 4, 1),
    },
    "dbias": {
        64: TileConfig(64, 64, 4, 2),
        128: TileConfig(32, 64, 4, 2),
        256: TileConfig(32, 32, 4, 1),
        512: TileConfig(16, 16, 4, 1),
    },
}

_HOPPER: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 8, 3, tma=True),
        128: TileConfig(128, 64, 8, 3),
        256: TileConfig(128, 64, 8, 2, tma=True),
        512: TileConfig(64, 32, 8, 1),
    },
    "dkdv": {
        64: TileConfig(64, 64, 4, 2),
        128: TileConfig(64, 128, 8, 2),
        256: TileConfig(64, 128, 8, 1),
        512: TileConfig(16, 32, 8, 1),
    },
    "dq": {
        64: TileConfig(128, 64, 8, 3),
        128: TileConfig(128, 64, 8, 3),
        256: TileConfig(128, 64, 8, 1),
        512: TileConfig(32, 32, 8, 1),
    },
    "dbias": {
        64: TileConfig(64, 64, 4, 2),
        128: TileConfig(64, 64, 4, 2),
        256: TileConfig(64, 64, 8, 1),
        512: TileConfig(32, 32, 8, 1),
    },
}

# 64 KB of shared memory; 64 lanes to a warp.
_CDNA: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 4, 1),
        128: TileConfig(128, 64, 4, 1),
        256: TileConfig(64, 32, 4, 1),
        512: TileConfig(32, 16, 4, 1),
    },
    "dkdv": {
        64: TileConfig(64, 64, 4, 1),
        128: TileConfig(32, 64, 4, 1),
        256: TileConfig(16, 32, 4, 1),
        512: TileConfig(16, 16, 4, 1),
    },
    "dq": {
        64: TileConfig(64, 64, 4, 1),
        128: TileConfig(64, 32, 4, 1),
        256: TileConfig(32, 32, 4, 1),
        512: TileConfig(16, 16, 4, 1),
    },
    "dbias": {
        64: TileConfig(64, 64, 4, 1),
        128: TileConfig(32, 64, 4, 1),
        256: TileConfig(32, 32, 4, 1),
        512: TileConfig(16, 16, 4, 1),
    },
}

TABLE: Mapping[str, Mapping[Kernel, Mapping[int, TileConfig]]] = {
    "sm_80": _AMPERE,
    "sm_86": _CONSUMER,
    "sm_89": _CONSUMER,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "sm_120": _CONSUMER,
    "gfx942": _CDNA,
}

# Calls that do more per score than a softmax (mask, bias, softcap, dropout) need registers for it: their
# rows, where the one above would spill inside the loop.
_AMPERE_BUSY: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 32, 8, 2),
        128: TileConfig(64, 32, 4, 2),
        256: TileConfig(32, 32, 4, 1),
        512: TileConfig(16, 16, 4, 1),
    },
    "dkdv": {64: TileConfig(32, 64, 8, 1), 128: TileConfig(32, 64, 8, 1)},
    "dq": {64: TileConfig(32, 32, 4, 1), 128: TileConfig(64, 32, 8, 1)},
}
_HOPPER_BUSY: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 8, 2),
        128: TileConfig(128, 64, 8, 2),
        256: TileConfig(128, 32, 8, 2),
        512: TileConfig(64, 16, 8, 1),
    },
    "dkdv": {64: TileConfig(32, 64, 8, 1), 128: TileConfig(32, 64, 8, 1)},
    "dq": {64: TileConfig(64, 64, 8, 1)},
}

BUSY: Mapping[str, Mapping[Kernel, Mapping[int, TileConfig]]] = {
    "sm_80": _AMPERE_BUSY,
    "sm_86": _AMPERE_BUSY,
    "sm_89": _AMPERE_BUSY,
    "sm_90": _HOPPER_BUSY,
    "sm_100": _HOPPER_BUSY,
    "sm_120": _AMPERE_BUSY,
    "gfx942": {"forward": {128: TileConfig(64, 64, 4, 1)}},
}

# Calls that ask ranges alone, and those that go through lists of tiles, which are busy as well.
_AMPERE_RANGES: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {64: TileConfig(128, 64, 8, 2), 128: TileConfig(128, 64, 8, 2)},
    "dq": {128: TileConfig(128, 32, 8, 2)},
}
_CONSUMER_RANGES: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {64: TileConfig(128, 64, 8, 2), 128: TileConfig(128, 32, 8, 2)},
    "dq": {128: TileConfig(64, 32, 8, 2)},
}
_HOPPER_RANGES: Mapping[Kernel, Mapping[int, TileConfig]] = {"dq": {64: TileConfig(128, 64, 8, 2)}}
_HOPPER_TILES: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {128: TileConfig(128, 64, 8, 1)},
    "dq": {128: TileConfig(128, 32, 8, 2)},
}
RANGES: Mapping[str, Mapping[Kernel, Mapping[int, TileConfig]]] = {
    "sm_80": _AMPERE_RANGES,
    "sm_86": _CONSUMER_RANGES,
    "sm_89": _CONSUMER_RANGES,
    "sm_90": _HOPPER_RANGES,
    "sm_100": _HOPPER_RANGES,
    "sm_120": _CONSUMER_RANGES,
}
TILES: Mapping[str, Mapping[Kernel, Mapping[int, TileConfig]]] = {
    "sm_90": _HOPPER_TILES,
    "sm_100": _HOPPER_TILES,
}

# Later tables replace rows of earlier ones.
TABLES_FOR: Mapping[Load, tuple[Mapping[str, Mapping[Kernel, Mapping[int, TileConfig]]], ...]] = {
    "plain": (),
    "ranges": (RANGES,),
    "busy": (BUSY,),
    "tiles": (BUSY, TILES),
}

# float32 as IEEE has it is multiplied on the ordinary cores, whose operands lie in registers: the larger
# tiles that were compiled, for sm_90, spill by the hundred.
FLOAT32: Mapping[Kernel, Mapping[int, TileConfig]] = {
    "forward": {
        64: TileConfig(64, 32, 8, 1),
        128: TileConfig(32, 32, 8, 1),
        256: TileConfig(16, 32, 8, 1),
        512: TileConfig(16, 16, 8, 1),
    },
    "dkdv": {64: TileConfig(32, 32, 8, 1), 128: TileConfig(16, 32, 8, 1)},
    "dq": {64: TileConfig(64, 32, 8, 1), 128: TileConfig(32, 16, 8, 1)},
}


@lru_cache(maxsize=256)
def tile_config(
    kernel: Kernel, arch: str, head_dim: int, head_dim_v: int, dtype: torch.dtype, load: Load = "plain"
) -> TileConfig | None:
    """The row for a kernel, or None where no tile fits (head_dim above 512).

    arch: as `architecture` names it; one that is not in the table gets the row of the GPU with the
    least shared memory. float32 takes the rows of `FLOAT32`, or half the tile: its elements are twice
    as large. load: as `load_of` says.
    """
    if arch == "interpreter":
        return INTERPRETER
    rows = TABLE.get(arch, _CONSUMER)[kernel]
    for table in TABLES_FOR[load]:
        rows = {**rows, **table.get(arch, {}).get(kernel, {})}
    bucket = next((limit for limit in rows if max(head_dim, head_dim_v) <= limit), None)
    if bucket is None:
        return None
    row = rows[bucket]
    if dtype != torch.float32:
        return row
    if bucket in FLOAT32.get(kernel, {}):
        return FLOAT32[kernel][bucket]
    return replace(row, block_q=max(16, row.block_q // 2), block_k=max(16, row.block_k // 2), tma=False)


def load_of(inputs: Inputs, spec: AttentionSpec) -> Load:
    """ "busy" if each score costs more than scaling it and taking its exponential, a second range of keys
    among such; "ranges" or "tiles" if that is how the call says who sees whom."""
    if inputs.tiles is not None:
        return "tiles"
    extras = inputs.mask, inputs.bias, inputs.slopes, spec.softcap, spec.dropout_p or None
    if any(extra is not None for extra in extras):
        return "busy"
    if inputs.ranges is None:
        return "plain"
    return "ranges" if inputs.ranges.shape[1] == 2 else "busy"


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "interpreter" for CPU tensors, which only Triton's interpreter takes.

    Meta tensors are for the GPU that Triton's driver speaks of, which need not be there (bench/static).
    """
    if device.type == "meta":
        target = driver.active.get_current_target()
        return f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    return "interpreter" if device.type == "cpu" else evidence.architecture(device)
