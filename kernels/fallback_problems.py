"""What the fallback computes: batch entries that share a plan, and the blocks of scores to visit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .fallback_band import Band
from .fallback_blocks import FlashEngine, MatmulEngine
from .fallback_plan import Run, Strip, plan, runs
from .spec import AttentionSpec, Inputs
from .visibility import visible

Engine = type[FlashEngine] | type[MatmulEngine]


class Problem(NamedTuple):
    """Batch entries with the same number of keys, and the blocks to compute for them, as strips and as runs.

    seen: (batch, 1, seqlen_k, 1), the keys that some row sees; None if the others need no care. band: the
    mask of blocks, where causal and window alone hide keys and the operator computes.
    """

    entries: slice
    inputs: Inputs
    spec: AttentionSpec
    strips: tuple[Strip, ...]
    runs: tuple[Run, ...]
    seen: Tensor | None
    band: Band | None


def problems(
    inputs: Inputs, spec: AttentionSpec, engine: Engine, poison: tuple[Tensor, ...]
) -> Iterator[Problem]:
    """Cut the batch; poison: tensors whose NaN or Inf hidden keys could carry on."""
    seqlen_q, seqlen_k = inputs.q.shape[2], inputs.k.shape[2]
    for entries, own, stop in _by_length(inputs):
        masked = any(x is not None for x in (own.mask, own.ranges, own.tiles, own.key_lengths))
        asked = spec, seqlen_q, seqlen_k, stop, masked, engine.limits(own, spec)
        strips = plan(*asked)
        seen = _seen(own, spec, strips) if masked and not _harmless(poison) else None
        nothing_added = all(x is None for x in (own.bias, own.slopes, own.table))
        is_band = engine is FlashEngine and not masked and nothing_added
        yield Problem(
            entries, own, spec, strips, runs(*asked), seen, Band(own, spec, strips) if is_band else None
        )


def _harmless(tensors: tuple[Tensor, ...]) -> bool:
    """Whether all are finite, as far as that can be known without synchronising."""
    return tensors[0].device.type == "cpu" and all(bool(x.sum(dtype=_wide(x)).isfinite()) for x in tensors)


def _by_length(inputs: Inputs) -> Iterator[tuple[slice, Inputs, int]]:
    """Runs of batch entries with equal key_lengths, without them, and that length.

    Keys past the length are then never touched. Elsewhere than on a CPU reading lengths would
    synchronise: they stay a mask.
    """
    seqlen_k = inputs.k.shape[2]
    if inputs.key_lengths is None or inputs.q.device.type != "cpu":
        yield slice(None), inputs, seqlen_k
        return
    start = 0
    for length, run in itertools.groupby(inputs.key_lengths.clamp(0, seqlen_k).tolist()):
        entries = slice(start, start + len(list(run)))
        start = entries.stop
        own = inputs._replace(
            q=inputs.q[entries],
            k=inputs.k[entries],
            v=inputs.v[entries],
            bias=None if inputs.bias is None else entries_of(inputs.bias, entries),
            slopes=None if inputs.slopes is None else entries_of(inputs.slopes, entries),
            mask=None if inputs.mask is None else entries_of(inputs.mask, entries),
            ranges=None if inputs.ranges is None else entries_of(inputs.ranges, entries),
            tiles=None if inputs.tiles is None else entries_of(inputs.tiles, entries),
            key_lengths=None,
        )
        yield entries, own, length


def _seen(inputs: Inputs, spec: AttentionSpec, strips: tuple[Strip, ...]) -> Tensor:
    """Which keys some row of the batch entry sees, [batch, 1, seqlen_k, 1]: the others may hold NaN."""
    k = inputs.k
    seen = torch.zeros(k.shape[0], 1, k.shape[2], 1, dtype=torch.bool, device=k.device)
    for strip in strips:
        for part in strip.parts:
            ok = visible(inputs, spec, strip.rows, part.cols)
            assert ok is not None
            ok = ok[(None,) * (4 - ok.ndim)]
            seen[:, 0, part.cols, 0] |= ok.flatten(1, 2).any(1)
    return seen


def entries_of(x: Tensor, entries: slice) -> Tensor:
    """Batch entries of a tensor whose batch axis may have size 1 and then stays so."""
    return x if x.shape[0] == 1 else x[entries]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
