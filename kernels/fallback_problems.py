"""What the fallback computes: batch entries that share a plan, and the blocks of scores to visit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .fallback_band import Band
from .fallback_blocks import FlashEngine, MatmulEngine
from .fallback_mask_plan import plan_of_ranges, plan_of_tiles
from .fallback_plan import Limits, Run, Strip, plan, runs
from .spec import AttentionSpec, Inputs, of_entries, wide_dtype
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
    for entries, own, stop in alike(inputs, spec):
        limits, masked, by_object = engine.limits(own, spec), _masked(own), _by_object(own)
        strips = blocks_to_visit(own, spec, stop, limits)
        repeated = () if by_object else runs(spec, seqlen_q, seqlen_k, stop, masked, limits)
        hides = masked or by_object
        seen = _seen(own, spec, strips) if hides and not _harmless([x[entries] for x in poison]) else None
        nothing_added = all(x is None for x in (own.bias, own.slopes, own.table))
        is_band = engine is FlashEngine and not hides and nothing_added
        yield Problem(
            entries, own, spec, strips, repeated, seen, Band(own, spec, strips) if is_band else None
        )


def blocks_to_visit(inputs: Inputs, spec: AttentionSpec, stop: int, limits: Limits) -> tuple[Strip, ...]:
    """The plan of entries that are `alike`, whoever hides blocks; stop: keys from here on are hidden."""
    seqlen_q, seqlen_k, masked = inputs.q.shape[2], inputs.k.shape[2], _masked(inputs)
    if inputs.ranges is not None:
        return plan_of_ranges(inputs.ranges[0], stop, masked, limits)
    if inputs.tiles is not None:
        return plan_of_tiles(inputs.tiles, seqlen_q, stop, masked, limits)
    return plan(spec, seqlen_q, seqlen_k, stop, masked, limits)


def _masked(inputs: Inputs) -> bool:
    """Whether every block needs an element mask."""
    return inputs.mask is not None or inputs.key_lengths is not None


def _by_object(inputs: Inputs) -> bool:
    return inputs.ranges is not None or inputs.tiles is not None


def _harmless(tensors: list[Tensor]) -> bool:
    """Whether all are finite, as far as that can be known without synchronising."""
    return tensors[0].device.type == "cpu" and all(
        bool(x.sum(dtype=wide_dtype(x)).isfinite()) for x in tensors
    )


def alike(inputs: Inputs, spec: AttentionSpec) -> Iterator[tuple[slice, Inputs, int]]:
    """Runs of batch entries with equal key_lengths, without them, that length, and blocks in the same places.

    Keys past the length are then never touched. Elsewhere than on a CPU reading lengths would
    synchronise: they stay a mask. With `batch_invariant` each entry is alone: sizes of blocks, and how
    PyTorch's operators share work among threads, depend on how many entries there are.
    """
    (batch, _, seqlen_k, _), lengths = inputs.k.shape, inputs.key_lengths
    given = (lengths, inputs.ranges, inputs.tiles)
    if not spec.batch_invariant and all(x is None for x in given):
        yield slice(None), inputs, seqlen_k
        return
    readable = lengths is not None and lengths.device.type == "cpu"
    stops = [seqlen_k] * batch
    if lengths is not None and readable:
        stops = lengths.clamp(0, seqlen_k).tolist()
    alone = range(batch) if spec.batch_invariant else [0] * batch
    kinds = [*zip(stops, _places(inputs.ranges, batch), _places(inputs.tiles, batch), alone)]
    if not readable and not spec.batch_invariant and kinds[0] == kinds[-1]:
        yield slice(None), inputs, seqlen_k
        return
    for (stop, *_), run in itertools.groupby(range(batch), kinds.__getitem__):
        numbers = [*run]
        entries = slice(numbers[0], numbers[-1] + 1)
        own = of_entries(inputs, entries)
        yield entries, own._replace(key_lengths=None) if readable else own, stop


def _places(x: Tensor | None, batch: int) -> list[int]:
    """Ascending numbers, equal where neighbouring entries of ranges or tiles visit the same blocks."""
    if x is None or x.shape[0] == 1:
        return [0] * batch
    where = x.clamp_max(0) if x.ndim == 4 else x  # beside HIDDEN and WHOLE, tiles are numbers of bits
    differs = (where[1:] != where[:-1]).flatten(1).any(1)
    return [0, *differs.cumsum(0).tolist()]


def _seen(inputs: Inputs, spec: AttentionSpec, strips: tuple[Strip, ...]) -> Tensor:
    """Which keys some row of the batch entry sees, [batch, 1, seqlen_k, 1]: the others may hold NaN."""
    k = inputs.k
    seen = torch.zeros(k.shape[0], 1, k.shape[2], 1, dtype=torch.bool, device=k.device)
    for strip in strips:
        for part in strip.parts:
            if part.visible != "some":  # the last row sees all of it
                seen[:, :, part.cols] = True
                continue
            ok = visible(inputs, spec, strip.rows, part.cols)
            assert ok is not None
            ok = ok[(None,) * (4 - ok.ndim)]
            seen[:, 0, part.cols, 0] |= ok.flatten(1, 2).any(1)
    return seen
