"""How the Hopper kernels are cut: data, one row for each kernel and head dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class ForwardTile(NamedTuple):
    """block_k: keys of a tile. groups: warpgroups that compute, 64 rows each. stages: tiles of keys in
    shared memory, and of values. take_turns: whether two groups never issue products at the same time."""

    block_k: int
    groups: int
    stages: int
    take_turns: bool = True


class BackwardTile(NamedTuple):
    """block_q: rows of a tile. stages_q, stages_dout, stages_ds: how many of these tiles are in flight."""

    block_q: int
    stages_q: int
    stages_dout: int
    stages_ds: int


KEYS = 128
"""Of a program of the backward pass: two warpgroups, 64 keys each."""

# Largest padded head_dim -> row.
FORWARD: Mapping[int, ForwardTile] = {
    64: ForwardTile(128, 3, 2),
    128: ForwardTile(128, 2, 2),
    256: ForwardTile(64, 2, 2),
}
BACKWARD: Mapping[int, BackwardTile] = {
    64: BackwardTile(64, 2, 2, 2),
    128: BackwardTile(64, 2, 2, 2),
}
REGISTERS: Mapping[int, tuple[int, int]] = {2: (240, 24), 3: (160, 32)}
"""Groups that compute -> registers of a thread that computes, and of one that loads."""
