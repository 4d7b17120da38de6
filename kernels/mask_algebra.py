"""The algebra of mask objects: what every mask can be asked, and what & and | make of the answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import mask_tiles
from .mask_compile import asked, tiles_of
from .mask_intervals import Band, Call, Interval, Rows, band, holds, intersected, united
from .validation import check_tensor

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


class Mask:
    """Who sees whom. `a & b`: what both show; `a | b`: what either shows; a bool tensor beside a mask becomes
    `Dense`.

    Cheap to make, in every step: what costs, tiles, is made when first used, and kept while the same object
    is used for calls of the same sizes, or packed, of the same lengths, unless it holds tensors made under
    torch.inference_mode, of which nobody counts the edits. Positions are those of the call: query i stands at
    i + (seqlen_k - seqlen_q), or at i where the mask has a `Causal(align="top-left")`.
    """

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: combine masks with & and |, not with `and` and `or`")

    def __and__(self, other: Mask | Tensor) -> Mask:
        return _joined(And, self, other)

    def __rand__(self, other: Tensor) -> Mask:
        return _joined(And, other, self)

    def __or__(self, other: Mask | Tensor) -> Mask:
        return _joined(Or, self, other)

    def __ror__(self, other: Tensor) -> Mask:
        return _joined(Or, other, self)

    def to(self, device: torch.device | str) -> Self:
        """The mask with its tensors there; what a predicate holds stays where it is."""
        raise NotImplementedError

    def to_dense(
        self,
        seqlen_q: int,
        seqlen_k: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Element by element: bool, four axes that broadcast to (batch, heads, seqlen_q, seqlen_k).

        batch, heads: by default as many as the mask's tensors have, or 1. device: theirs, or the CPU.

        Raises:
            ValueError: the mask is not for these sizes.
        """
        call = self._call(seqlen_q, seqlen_k, batch, heads, device)
        shown = asked(self, call)(slice(0, seqlen_q), slice(0, seqlen_k))
        return shown.expand(*shown.shape[:2], seqlen_q, seqlen_k).contiguous()

    def density(
        self,
        seqlen_q: int,
        seqlen_k: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> float:
        """The visible fraction of all scores; arguments as for `to_dense`. Synchronises."""
        call = self._call(seqlen_q, seqlen_k, batch, heads, device)
        shown = asked(self, call)
        if 0 in call.shape:
            return 0.0
        planes = shown(slice(0, 1), slice(0, 1)).shape[:2].numel()
        return mask_tiles.count(shown, seqlen_q, seqlen_k) / (planes * seqlen_q * seqlen_k)

    def plot(
        self,
        seqlen_q: int,
        seqlen_k: int,
        *,
        entry: int = 0,
        head: int = 0,
        batch: int | None = None,
        heads: int | None = None,
        ax: Any = None,
    ) -> Any:
        """Draw which tiles of scores are skipped, whole and partial, for one batch entry and head.

        batch, heads: of the call, by default as few as have that entry and head. ax: matplotlib's Axes to
        draw on; a new figure's if None. Returns it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; says how to get it.
            ValueError, IndexError: the mask is not for these sizes; an entry or head that is not there.
        """
        from .mask_plot import draw

        of_batch, of_heads = (max(n) for n in zip(*(atom._planes() for atom in self._atoms()), strict=True))
        batch = max(of_batch, entry + 1) if batch is None else batch
        heads = max(of_heads, head + 1) if heads is None else heads
        for name, index, size in (("entry", entry, batch), ("head", head, heads)):
            if not 0 <= index < size:
                raise IndexError(f"{name} must lie in [0, {size}), got {index}")
        call = self._call(seqlen_q, seqlen_k, batch, heads, None)
        tiles = tiles_of(self, call).tiles
        chosen = (min(i, n - 1) for i, n in zip((entry, head), tiles.shape))
        return draw(tiles[tuple(chosen)], seqlen_q, seqlen_k, repr(self), ax)

    @staticmethod
    def from_block_mask(block_mask: Any) -> Mask:
        """A `BlockMask` of torch.nn.attention.flex_attention: its mask_mod, and the blocks it lists."""
        from .mask_converters import from_block_mask

        return from_block_mask(block_mask)

    @staticmethod
    def from_flash_attention(
        *, causal: bool = False, window_size: tuple[int | None, int | None] = (-1, -1)
    ) -> Mask:
        """What flash_attn means by these arguments: -1 and None are unbounded, the last query sees the last
        key."""
        from .mask_converters import from_flash_attention

        return from_flash_attention(causal=causal, window_size=window_size)

    @staticmethod
    def from_transformers(attention_mask: Tensor | None) -> Mask | None:
        """A mask of Hugging Face transformers; None hides nothing and stays None.

        attention_mask: (batch, seqlen_k), 1 = a key to be seen; or four axes, bool (True = may attend) or
        float, 0 where visible and the dtype's lowest number or -inf where hidden.

        Raises:
            ValueError: another shape, or other values: all but bool masks are read, which synchronises.
        """
        from .mask_converters import from_transformers

        return from_transformers(attention_mask)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_built"}

    def _atoms(self) -> tuple[Atom, ...]:
        """What it is made of."""
        raise NotImplementedError

    def _band(self) -> Band | None:
        """The same by arithmetic, if that can be."""
        return None

    def _intervals(self, rows: Rows) -> list[Interval] | None:
        """Disjoint intervals of keys of each row, at most two, if that can be."""
        return None

    def _shown(self, rows: Rows, cols: slice) -> Tensor:
        """Element mask of a block: bool, broadcasts to (entries, heads, rows, cols)."""
        raise NotImplementedError

    def _fits(self, call: Call, lengths: list[int] | None = None) -> None:
        """Raise if the mask is not for such a call; with the number of keys of each batch entry, look at
        values too."""
        for atom in self._atoms():
            for x in atom._tensors():
                check_tensor(f"the tensor of {type(atom).__name__}", x, call.device)
            atom._fits_atom(call)
            if lengths is not None:
                atom._check_values(lengths)

    def _alignment(self) -> str | None:
        """Where its positions have to be counted from, if it says so: "bottom-right" or "top-left".

        Raises:
            ValueError: it says both.
        """
        return None

    def _call(
        self,
        seqlen_q: int,
        seqlen_k: int,
        batch: int | None,
        heads: int | None,
        device: torch.device | str | None,
    ) -> Call:
        """The call that the arguments of `to_dense` mean."""
        for name, size in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
            if size < 0:
                raise ValueError(f"{name} must be >= 0, got {size}")
        tensors = [x for atom in self._atoms() for x in atom._tensors()]
        planes = [atom._planes() for atom in self._atoms()]
        if device is None:
            device = tensors[0].device if tensors else "cpu"
        shift = 0 if self._alignment() == "top-left" else seqlen_k - seqlen_q
        call = Call(
            max(n for n, _ in planes) if batch is None else batch,
            max(n for _, n in planes) if heads is None else heads,
            seqlen_q,
            seqlen_k,
            shift,
            torch.device(device),
        )
        self._fits(call)
        return call


class Atom(Mask):
    """A mask that is not made of others: a frozen dataclass."""

    def to(self, device: torch.device | str) -> Self:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {name: x.to(device) for name, x in moved.items() if isinstance(x, Tensor)}
        return replace(self, **moved) if moved else self  # type: ignore[type-var]

    def _atoms(self) -> tuple[Atom, ...]:
        return (self,)

    def _tensors(self) -> list[Tensor]:
        given = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return [x for x in given if isinstance(x, Tensor)]

    def _planes(self) -> tuple[int, int]:
        """Batch entries and heads that it is for, 1 for any."""
        return 1, 1

    def _fits_atom(self, call: Call) -> None:
        """Raise if its sizes are not those of the call."""

    def _check_values(self, lengths: list[int]) -> None:
        """Raise if a tensor holds what it may not for entries of so many keys."""

    def _shown(self, rows: Rows, cols: slice) -> Tensor:
        intervals = self._intervals(rows)
        assert intervals is not None
        return holds(intervals, rows.columns(cols))


class Joined(Mask):
    """Several masks under one operator."""

    sign: str
    join_bands: Callable[[Band, Band], Band]
    join_elements: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, parts: tuple[Mask, ...]) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        shown = (f"({part!r})" if isinstance(part, Joined) else repr(part) for part in self.parts)
        return f" {self.sign} ".join(shown)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(tuple(part.to(device) for part in self.parts))

    def _atoms(self) -> tuple[Atom, ...]:
        return tuple(atom for part in self.parts for atom in part._atoms())

    def _alignment(self) -> str | None:
        found = {part._alignment() for part in self.parts} - {None}
        if len(found) > 1:
            raise ValueError("mask must have one alignment, got a Causal of each: bottom-right, top-left")
        return found.pop() if found else None

    def _band(self) -> Band | None:
        bands = _all_of([part._band() for part in self.parts])
        return None if bands is None else functools.reduce(self.join_bands, bands)

    def _shown(self, rows: Rows, cols: slice) -> Tensor:
        return functools.reduce(self.join_elements, (part._shown(rows, cols) for part in self.parts))


class And(Joined):
    """What all parts show."""

    sign = "&"
    join_bands = staticmethod(Band.intersected)
    join_elements = staticmethod(torch.logical_and)

    def _intervals(self, rows: Rows) -> list[Interval] | None:
        parts = _all_of([part._intervals(rows) for part in self.parts])
        if parts is None:
            return None
        found: list[Interval] | None = parts[0]
        for part in parts[1:]:
            found = None if found is None else intersected(found, part)
        return found


class Or(Joined):
    """What any part shows."""

    sign = "|"
    join_bands = staticmethod(Band.united)
    join_elements = staticmethod(torch.logical_or)

    def _intervals(self, rows: Rows) -> list[Interval] | None:
        bands = [x for x in [part._band() for part in self.parts] if x is not None]
        parts = _all_of([part._intervals(rows) for part in self.parts if part._band() is None])
        if parts is None:
            return None
        given = [interval for part in parts for interval in part]
        return united([*given, band(*functools.reduce(Band.united, bands), rows)] if bands else given)


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Atom):
    """A bool tensor, True = may attend; broadcasts, right-aligned, to (batch, heads, seqlen_q, seqlen_k)."""

    tensor: Tensor

    def __post_init__(self) -> None:
        check_tensor("the tensor of Dense", self.tensor)
        if self.tensor.dtype != torch.bool:
            raise TypeError(f"the tensor of Dense must be bool (True = may attend), got {self.tensor.dtype}")

    def __repr__(self) -> str:
        return f"Dense({described(self.tensor)})"

    def _planes(self) -> tuple[int, int]:
        return self._four_axes().shape[0], self._four_axes().shape[1]

    def _fits_atom(self, call: Call) -> None:
        shape = self.tensor.shape
        if call.packed:
            sizes = (1,) * (4 - len(shape)) + shape
            call.check_holds_longest("the tensor of Dense, each axis 1 or not,", sizes, broadcasts=True)
            return
        if len(shape) > 4 or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(call.shape))):
            raise ValueError(
                "the tensor of Dense must broadcast, right-aligned, to (batch, heads_q, seqlen_q, seqlen_k) "
                f"= {call.shape}, got shape {tuple(shape)}"
            )

    def _shown(self, rows: Rows, cols: slice) -> Tensor:
        return rows.block(self._four_axes(), cols)

    def _four_axes(self) -> Tensor:
        return self.tensor[(None,) * (4 - self.tensor.ndim)]


def _joined(kind: type[And] | type[Or], *operands: Mask | Tensor) -> Mask:
    """NotImplemented, and so a TypeError, for what is neither a mask nor a tensor."""
    if not all(isinstance(x, (Mask, Tensor)) for x in operands):
        return NotImplemented
    masks = [Dense(x) if isinstance(x, Tensor) else x for x in operands]
    return kind(tuple(part for x in masks for part in (x.parts if isinstance(x, kind) else (x,))))


def _all_of(found: list[_T | None]) -> list[_T] | None:
    given = [x for x in found if x is not None]
    return given if len(given) == len(found) else None


def described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
