"""What a mask object becomes for a call: intervals or tiles, made when first needed, and kept on the mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import mask_tiles
from .mask_intervals import UNBOUNDED, Band, Call, Entries, Ranges, Rows, as_ranges, band, holds, intersected
from .visibility import rows_of_keys

if TYPE_CHECKING:
    from .mask_algebra import Mask

_T = TypeVar("_T")
_KEPT = 4
"""Kinds of calls that a mask remembers."""


def asked(
    mask: Mask, call: Call, within: Band = UNBOUNDED, sequences: list[int] | None = None
) -> mask_tiles.Shown:
    """Element masks of blocks of a dense call, or of some sequences of a packed one: what the mask and a band
    both show."""
    entries = Entries.of(call, sequences)

    def shown(rows: slice, cols: slice) -> Tensor:
        place = Rows.between(rows, entries, call.heads)
        shown, owned = mask._shown(place, cols), place.owns(cols)
        shown = shown[(None,) * (4 - shown.ndim)]
        if within != UNBOUNDED:
            shown = shown & holds([band(*within, place)], place.columns(cols))
        return shown if owned is None else shown & owned

    return shown


def ranges_of(mask: Mask, call: Call, within: Band) -> Ranges | None:
    """Intervals of what the mask and a band both show in a dense call, if that can be; kept like tiles."""

    def made() -> Ranges | None:
        return ranges_for(
            mask, Rows.between(slice(0, call.seqlen_q), Entries.of(call), call.heads), within, call.seqlen_k
        )

    return made() if _is_watched(call.device) else _kept(mask, "ranges", call, within, made)


def ranges_for(
    mask: Mask,
    rows: Rows,
    within: Band,
    seqlen_k: int,
    spans_q: Tensor | None = None,
    spans_k: Tensor | None = None,
) -> Ranges | None:
    """The same for any rows; spans: those of `Inputs`, of a packed call."""
    found = mask._intervals(rows)
    intervals = None if found is None else intersected(found, [band(*within, rows)])
    if intervals is None:
        return None
    ranges = as_ranges(intervals, rows)
    return Ranges(ranges, rows_of_keys(ranges, seqlen_k, spans_q, spans_k))


def tiles_of(mask: Mask, call: Call, within: Band = UNBOUNDED) -> mask_tiles.Tiles:
    """Tiles of what the mask and a band both show; kept until a tensor in it changes."""

    def made() -> mask_tiles.Tiles:
        if call.packed:
            of_some = functools.partial(asked, mask, call, within)
            return mask_tiles.of_sequences(of_some, [both[:2] for both in call.lengths], call.device)
        return mask_tiles.build(asked(mask, call, within), call.seqlen_q, call.seqlen_k, call.device)

    return _kept(mask, "tiles", call, within, made)


def _kept(mask: Mask, what: str, call: Call, within: Band, made: Callable[[], _T]) -> _T:
    """What is made for a call, or was made for one like it."""
    tensors = [x for atom in mask._atoms() for x in atom._tensors()]
    edits = None if any(x.is_inference() for x in tensors) else tuple(x._version for x in tensors)
    kept: dict[Any, tuple[_T]] = vars(mask).setdefault("_built", {})
    key = (what, call, within, edits)
    found = kept.get(key)
    if found is None:
        with torch.inference_mode(False):  # a later call may save them for its backward
            found = (made(),)
        if edits is not None and not _is_watched(call.device):
            while len(kept) >= _KEPT:
                kept.pop(next(iter(kept)), None)  # None: another thread was faster
            kept[key] = found
    return found[0]


def _is_watched(device: torch.device) -> bool:
    """Whether tensors made now are a tracer's or a transform's, or must be made anew at each replay."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )
