"""Mask objects: who sees whom, said once and short, and combined with & and |.

A call turns a mask into the cheapest thing that means the same: bounds that are arithmetic
(`AttentionSpec.left` and `right`), intervals of keys for each row (`Inputs.ranges`), or tiles
(`Inputs.tiles`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask_algebra import Atom, Dense, Mask, described
from .mask_compile import ranges_for, ranges_of, tiles_of
from .mask_intervals import Band, Call, Interval, Rows, band
from .spec import AttentionSpec, Inputs
from .validation import check_tensor

ALIGNMENTS = ("bottom-right", "top-left")


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Atom):
    """The query at position p sees keys up to p.

    align: "bottom-right", the last query stands at the last key, or "top-left", query 0 at key 0. A call has
    one alignment, which windows and ALiBi share: "top-left" sets it, and excludes `causal` and `window` of
    the call, which are bottom-right.
    """

    align: str = "bottom-right"

    def __post_init__(self) -> None:
        if self.align not in ALIGNMENTS:
            raise ValueError(f"align of Causal must be one of {ALIGNMENTS}, got {self.align!r}")

    def __repr__(self) -> str:
        return "Causal()" if self.align == ALIGNMENTS[0] else f"Causal(align={self.align!r})"

    def _alignment(self) -> str:
        return self.align

    def _band(self) -> Band:
        return Band(None, 0)

    def _intervals(self, rows: Rows) -> list[Interval]:
        return [band(None, 0, rows)]


@dataclass(frozen=True, eq=False)
class Window(Atom):
    """The query at position p sees keys p - left ... p + right, both ends included; None is unbounded."""

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name, side in (("left", self.left), ("right", self.right)):
            if side is not None:
                _check_int(f"{name} of Window", side)

    def _band(self) -> Band:
        return Band(self.left, self.right)

    def _intervals(self, rows: Rows) -> list[Interval]:
        return [band(self.left, self.right, rows)]


@dataclass(frozen=True, eq=False, repr=False)
class FirstKeys(Atom):
    """Every query sees the first n keys: `(Window(w, 0) | FirstKeys(4)) & Causal()` is what a streaming model
    has (Xiao et al. 2024, section 3.2)."""

    n: int

    def __post_init__(self) -> None:
        _check_int("n of FirstKeys", self.n)

    def __repr__(self) -> str:
        return f"FirstKeys({self.n})"

    def _intervals(self, rows: Rows) -> list[Interval]:
        return [Interval(None, rows.position.new_full((1, 1), min(self.n, 2**31 - 1)))]


@dataclass(frozen=True, eq=False, repr=False)
class PrefixLM(Atom):
    """Every query sees the keys below the prefix length of its batch entry; beyond them the mask is causal
    (Raffel et al. 2020, section 3.2.1).

    lengths: int32 or int64 (batch,) or (1,); packed, (sequences,). Out of range, they are clamped.
    """

    lengths: Tensor

    def __post_init__(self) -> None:
        _check_ints("PrefixLM lengths", self.lengths, "(batch,)", (1,))

    def __repr__(self) -> str:
        return f"PrefixLM({described(self.lengths)})"

    def _planes(self) -> tuple[int, int]:
        return self.lengths.shape[0], 1

    def _fits_atom(self, call: Call) -> None:
        if self.lengths.shape[0] not in (1, call.batch):
            axis, shape = "sequences" if call.packed else "batch", tuple(self.lengths.shape)
            raise ValueError(f"PrefixLM lengths must have shape ({axis},) = ({call.batch},), got {shape}")

    def _check_values(self, lengths: list[int]) -> None:
        for prefix, n_keys in zip(self.lengths.expand(len(lengths)).tolist(), lengths, strict=True):
            if not 0 <= prefix <= n_keys:
                raise ValueError(f"PrefixLM lengths must lie in [0, seqlen_k] = [0, {n_keys}], got {prefix}")

    def _intervals(self, rows: Rows) -> list[Interval]:
        lengths = rows.each(self.lengths.clamp(0, 2**31 - 1).int())
        return [Interval(None, torch.maximum(lengths, rows.position + 1))]


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Atom):
    """Queries see the keys of their own document: that of the key at the query's position.

    ids: int32 or int64 (seqlen_k,) or (batch, seqlen_k); packed, (sequences, longest sequence). Each run of
    equal ids is a document: an id that comes back is another one, which check=True refuses. A negative id is
    padding, which sees nothing and is seen by nobody; a query that stands at no key sees nothing. Behind the
    last key of a packed sequence ids may be anything.
    """

    ids: Tensor

    def __post_init__(self) -> None:
        _check_ints("Documents ids", self.ids, "(seqlen_k,) or (batch, seqlen_k)", (1, 2))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int) -> Documents:
        """Documents one behind the other: document i has the keys cu_seqlens[i] ... cu_seqlens[i + 1] - 1.

        cu_seqlens: int32 or int64 (documents + 1,). total: how many keys there are; those in no document are
        padding. An entry below the one before it is taken as equal to it, as `attention_varlen` does.
        """
        _check_ints("cu_seqlens of Documents", cu_seqlens, "(documents + 1,)", (1,))
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens of Documents must have shape (documents + 1,), got (0,)")
        cu_seqlens = cu_seqlens.cummax(0).values
        place = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        ids = torch.searchsorted(cu_seqlens.contiguous(), place, right=True, out_int32=True) - 1
        return cls(ids.masked_fill(ids >= cu_seqlens.shape[0] - 1, -1))

    def __repr__(self) -> str:
        return f"Documents({described(self.ids)})"

    def _planes(self) -> tuple[int, int]:
        return self._two_axes().shape[0], 1

    def _fits_atom(self, call: Call) -> None:
        shape = tuple(self.ids.shape)
        if call.packed:
            if self.ids.ndim != 2 or shape[0] != call.batch:
                raise ValueError(
                    "Documents ids of packed sequences must have shape (sequences, longest sequence) = "
                    f"({call.batch}, ...), got {shape}"
                )
        elif shape not in ((call.seqlen_k,), (1, call.seqlen_k), (call.batch, call.seqlen_k)):
            raise ValueError(
                f"Documents ids must have shape (seqlen_k,) or (batch, seqlen_k) = ({call.batch}, "
                f"{call.seqlen_k}), got {shape}"
            )

    def _check_values(self, lengths: list[int]) -> None:
        for entry, n_keys in zip(self._two_axes(), lengths):
            run = torch.unique_consecutive(entry[:n_keys])
            run = run[run >= 0]
            ids, times = run.unique(return_counts=True)
            back = ids[times > 1].tolist()
            if back:
                raise ValueError(
                    f"Documents ids must be constant in runs: id {back[0]} comes back after another one"
                )

    def _intervals(self, rows: Rows) -> list[Interval]:
        ids, p = F.pad(self._two_axes(), (0, 1), value=-1), rows.position  # past the last key is padding
        n = ids.shape[1]
        run = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).cumsum(1)
        start = torch.searchsorted(run, run, out_int32=True)
        stop = torch.searchsorted(run, run, right=True, out_int32=True)
        stop = torch.where(ids < 0, start, stop)
        at = p.clamp(0, n - 1)
        return [Interval(rows.look_up(start, at), torch.where(p >= 0, rows.look_up(stop, at), 0))]

    def _two_axes(self) -> Tensor:
        """[1 or batch, seqlen_k]"""
        return self.ids if self.ids.ndim == 2 else self.ids[None]


@dataclass(frozen=True, eq=False, repr=False)
class Predicate(Atom):
    """What `from_predicate` makes. sizes: the only (batch, heads_q, seqlen_q, seqlen_k) it is for, if there
    are such, the first two 1 where it is for any."""

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sizes: tuple[int, int, int, int] | None = None

    def __repr__(self) -> str:
        return f"from_predicate({getattr(self.fn, '__name__', repr(self.fn))})"

    def _planes(self) -> tuple[int, int]:
        return (1, 1) if self.sizes is None else self.sizes[:2]

    def _fits_atom(self, call: Call) -> None:
        if self.sizes is None:
            return
        if call.packed:
            call.check_holds_longest("what mask is for", self.sizes, broadcasts=False)
            return
        planes = all(a in (1, b) for a, b in zip(self._planes(), call.shape))
        if self.sizes[2:] != call.shape[2:] or not planes:
            raise ValueError(
                f"mask is for (batch, heads_q, seqlen_q, seqlen_k) = {self.sizes}, the call has {call.shape}"
            )

    def _shown(self, rows: Rows, cols: slice) -> Tensor:
        col = rows.columns(cols)
        b, h = rows.entry[:, 0], torch.arange(rows.heads, device=col.device)
        index = (b[:, None, None, None], h[:, None, None], rows.number[0].long()[:, None], col)
        shown = self.fn(*(x[(None,) * (4 - x.ndim)] for x in index))
        if not isinstance(shown, Tensor) or shown.dtype != torch.bool:
            found = shown.dtype if isinstance(shown, Tensor) else type(shown).__name__
            raise TypeError(f"the predicate of a mask must return a bool tensor, got {found}")
        shape = len(b), rows.heads, rows.number.shape[1], len(col)
        if shown.ndim > 4 or any(a not in (1, b) for a, b in zip(reversed(shown.shape), reversed(shape))):
            raise ValueError(
                "what the predicate of a mask returns must broadcast like its arguments to "
                f"{shape}, got {tuple(shown.shape)}"
            )
        return shown[(None,) * (4 - shown.ndim)]


def from_predicate(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mask:
    """fn(b, h, q, k) says whether the query in row q sees the key in column k, as flex_attention's mask_mod.

    Its arguments are int64 tensors of four axes that broadcast against each other: batch entries, query
    heads, query rows and key columns. It returns bool, and is asked block by block, never for all scores at
    once. What it says is kept while the mask object is used for calls of the same sizes: make a new one when
    what fn looks at has changed. torch.compile takes a mask that has been used once, in an eager call of the
    same sizes.

    Packed, b is the number of the sequence, q and k count from its start. Some sequences are asked at a time,
    as far as the longest of them reaches: past the end of another fn may say anything, as nobody sees that.
    """
    if not callable(fn):
        raise TypeError(f"fn of from_predicate must be callable, got {type(fn).__name__}")
    return Predicate(fn)


def compiled(
    mask: Mask, inputs: Inputs, spec: AttentionSpec, *, check: bool = False
) -> tuple[Inputs, AttentionSpec]:
    """What a call of inputs and spec becomes with the mask in it.

    Synchronises only for tiles, when they are made, or packed, when lengths are read, which is in every call;
    and with `check`, which looks at values on the device.

    Raises:
        ValueError, TypeError: the mask is not for this call; names what is wrong.
    """
    spec = _aligned(mask, spec)
    (batch, heads, seqlen_q, _), seqlen_k = inputs.q.shape, inputs.k.shape[2]
    packed = inputs.spans_q is not None
    if inputs.spans_q is not None:
        batch = inputs.spans_q.shape[0]
    shift = spec.shift(seqlen_q, seqlen_k)
    call = Call(batch, heads, seqlen_q, seqlen_k, shift, inputs.q.device, packed)
    mask._fits(call, _key_counts(inputs, batch) if check else None)
    within, own = Band(spec.left, spec.right), mask._band()
    if own is not None:
        both = within.intersected(own)
        return inputs, spec._replace(left=both.left, right=both.right)
    if 0 in call.shape:
        return inputs, spec
    padding = _as_it_is(mask)
    if padding is not None and not packed:
        return inputs._replace(mask=padding), spec
    if packed:
        found = ranges_for(mask, Rows.of(inputs, spec), within, seqlen_k, inputs.spans_q, inputs.spans_k)
    else:
        found = ranges_of(mask, call, within)
    if found is None and packed:
        call = call.of_longest(inputs, spec)
        mask._fits(call)
        if 0 in call.shape:
            return inputs, spec
    made = tiles_of(mask, call, within) if found is None else found
    return inputs._replace(**made._asdict()), spec._replace(left=None, right=None)


def _key_counts(inputs: Inputs, batch: int) -> list[int]:
    """Keys of each batch entry, or sequence, without key_lengths; synchronises for sequences."""
    if inputs.spans_k is None:
        return [inputs.k.shape[2]] * batch
    counts: list[int] = (inputs.spans_k[:, 1] - inputs.spans_k[:, 0]).tolist()
    return counts


def _aligned(mask: Mask, spec: AttentionSpec) -> AttentionSpec:
    """The call has one alignment: the mask's, if it has one."""
    alignment = mask._alignment()
    if alignment == "top-left" and not spec.top_left:
        if spec.left is not None or spec.right is not None:
            raise ValueError(
                'causal and window are aligned bottom-right, and mask has a Causal(align="top-left"): '
                "a call has one alignment; put Window and Causal into the mask"
            )
        return spec._replace(top_left=True)
    if alignment == "bottom-right" and spec.top_left:
        raise ValueError('mask must have Causal(align="top-left") in a call that is aligned top-left')
    return spec


def _as_it_is(mask: Mask) -> Tensor | None:
    """The tensor of a `Dense` that says the same to every row: element masks of that size cost nothing.

    Of any `Dense` while torch.compile traces: whether tiles are still those of the tensor is no question for
    a graph.
    """
    if not isinstance(mask, Dense):
        return None
    tensor = mask._four_axes()
    return tensor if tensor.shape[2] == 1 or torch.compiler.is_compiling() else None


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def _check_ints(name: str, x: object, shape: str, axes: tuple[int, ...]) -> None:
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64 {shape}, got {x.dtype} {tuple(x.shape)}")
    if x.ndim not in axes:
        raise ValueError(f"{name} must be int32 or int64 {shape}, got shape {tuple(x.shape)}")
