"""What to ask an attention function: named problems as plain data.

A case says shapes, options and kinds of numbers; `build` draws the tensors, the same ones on every
device. Tests, benchmarks and the check of other people's kernels read the same list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..kernels.biases import ALiBi, RelativeBias
from ..kernels.functional import prepare
from ..kernels.packed import one_by_one
from ..kernels.sequences import Sequences
from ..kernels.spec import DEFAULTS, STATISTICS, AttentionOptions, AttentionSpec, Inputs
from ..kernels.visibility import visible
from .distributions import draw
from .mask_objects import OBJECTS
from .patterns import BIASES, LAYOUTS, MASKS


@dataclass(frozen=True)
class Extra:
    """A mask or bias: what is in it, which axes of "bhqk" it has (the others are 1), its dtype.

    Leading axes that it lacks are left out of its shape altogether: "qk" is (seqlen_q, seqlen_k).
    dtype only for bias; None = q's.
    """

    pattern: str = "random"
    axes: str = "bhqk"
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Case:
    """One problem, without its numbers. key_lengths are repeated over the batch, negative ones count from
    seqlen_k; alibi: axes of slopes; mask_object: a name in `OBJECTS`, ANDed with mask. relative: buckets of
    a RelativeBias, and whether it is bidirectional. packed: (seqlen_q, seqlen_k) of sequences one behind the
    other; batch, seqlen_q and seqlen_k say nothing then."""

    name: str
    batch: int = 1
    heads_q: int = 2
    heads_kv: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 33
    head_dim: int = 16
    head_dim_v: int | None = None
    causal: bool = False
    top_left: bool = False
    window: tuple[int | None, int | None] | None = None
    key_lengths: tuple[int, ...] | None = None
    mask: Extra | None = None
    mask_object: str = ""
    bias: Extra | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: str = ""
    relative: tuple[int, bool] | None = None
    dropout_p: float = 0.0
    precise: bool = False
    batch_invariant: bool = False
    entropy: bool = False
    scale: float | None = None
    layout: str = "bhsd"
    distribution: str = "randn"
    packed: tuple[tuple[int, int], ...] | None = None

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(seqlen_q, seqlen_k) of each batch entry or sequence."""
        return ((self.seqlen_q, self.seqlen_k),) * self.batch if self.packed is None else self.packed

    def makes_sense_packed(self) -> bool:
        """Whether `attention_varlen` can be asked: it has one alignment."""
        return not self.top_left

    def build(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
        """Draw the numbers: on the CPU, then moved, so that every device answers the same question."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {"b": self.batch, "h": self.heads_q, "q": self.seqlen_q, "k": self.seqlen_k}
        batch, seqlen_q, seqlen_k, sequences = self.batch, self.seqlen_q, self.seqlen_k, None
        if self.packed is not None:
            max_q, max_k = (max(lengths) for lengths in zip(*self.packed))
            sizes |= {"b": len(self.packed), "q": max_q, "k": max_k}
            bounds = torch.tensor([(0, 0), *self.packed]).cumsum(0).to(device, torch.int32)
            sequences = Sequences(bounds[:, 0], bounds[:, 1], max_q, max_k)
            batch, (seqlen_q, seqlen_k) = 1, bounds[-1].tolist()
        head_dim_v = self.head_dim_v or self.head_dim
        shapes = (
            (batch, self.heads_q, seqlen_q, self.head_dim),
            (batch, self.heads_kv, seqlen_k, self.head_dim),
            (batch, self.heads_kv, seqlen_k, head_dim_v),
            (batch, self.heads_q, seqlen_q, head_dim_v),
        )
        operands = draw(self.distribution, shapes, generator)
        lay_out = LAYOUTS[self.layout]
        q, k, v, dout = (lay_out(x.to(device, dtype)) for x in operands)
        dlse = torch.randn(shapes[0][:3], generator=generator).mul(operands.dout.abs().mean() * 2)
        if dtype == torch.float64:
            dlse = dlse.double()

        options: AttentionOptions = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        options |= {"scale": self.scale, "dropout_p": self.dropout_p, "seed": 2**40 + seed}
        options |= {"precise": self.precise, "deterministic": "batch" if self.batch_invariant else None}
        if self.key_lengths is not None:
            given = itertools.cycle(self.key_lengths)
            lengths = [n if n >= 0 else seqlen + n for n, (_, seqlen) in zip(given, self.lengths)]
            options["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        elements: Tensor | None = None
        if self.mask is not None:
            mask = torch.rand(_shape(self.mask.axes, sizes), generator=generator) > 0.3
            options["mask"] = elements = _squeezed(MASKS[self.mask.pattern](mask)).to(device)
        if self.mask_object:
            shown = OBJECTS[self.mask_object](sizes, "top-left" if self.top_left else "bottom-right").to(
                device
            )
            options["mask"] = shown if elements is None else shown & elements
        if self.bias is not None:
            bias = torch.randn(_shape(self.bias.axes, sizes), generator=generator)
            bias = BIASES[self.bias.pattern](bias, generator)
            options["bias"] = _squeezed(bias).to(device, self.bias.dtype or dtype)
        if self.sinks:
            sinks = torch.randn(self.heads_q, generator=generator)
            options["sinks"] = sinks.to(device, dtype)
        if self.alibi:
            slopes = torch.rand(_shape(self.alibi, sizes)[:2], generator=generator)
            alibi = ALiBi(slopes[0 if self.alibi == "h" else slice(None)].to(device, dtype))
            dense = options.get("bias")
            options["bias"] = (dense, alibi) if isinstance(dense, Tensor) else alibi
        if self.relative is not None:
            n_buckets, bidirectional = self.relative
            table = torch.randn(n_buckets, self.heads_q, generator=generator).to(device, dtype)
            relative = RelativeBias(table, bidirectional, max_distance=n_buckets + 3)
            others = options.get("bias")
            others = others if isinstance(others, tuple) else () if others is None else (others,)
            options["bias"] = (*others, relative) if others else relative
        dentropy = torch.zeros_like(dlse)
        if self.entropy:
            dentropy = torch.randn(dlse.shape, generator=generator, dtype=dlse.dtype)
            dout, dlse = torch.zeros_like(dout), torch.zeros_like(dlse)
        dlse, dentropy = dlse.to(device), dentropy.to(device)
        return Problem(q, k, v, options, dout, dlse, dentropy, self.top_left, sequences)


class Problem(NamedTuple):
    """A case with its numbers: the tensors and options of one call, and the gradients that come back.

    All have four axes, packed too: then the first has size 1, and `packed` is how a call wants them. want:
    statistics that somebody will look at.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: AttentionOptions
    dout: Tensor
    dlse: Tensor
    dentropy: Tensor
    top_left: bool = False
    sequences: Sequences | None = None
    want: tuple[str, ...] = STATISTICS

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (total, heads, head_dim)."""
        q, k, v = (x[0].transpose(0, 1) for x in self[:3])
        return q, k, v

    def prepared(self, want: Collection[str] = ("lse",)) -> tuple[Inputs, AttentionSpec]:
        """The same as implementations see it."""
        if self.sequences is not None:
            return prepare(*self.packed(), self.options, sequences=self.sequences, want=want)
        return prepare(self.q, self.k, self.v, self.options, top_left=self.top_left, want=want)

    def given_options(self) -> AttentionOptions:
        """The options that differ from their defaults; a seed only where there is dropout."""
        return cast(
            AttentionOptions,
            {
                name: x
                for name, x in self.options.items()
                if x is not DEFAULTS[name]  # type: ignore[literal-required]
                and not (name == "seed" and not self.options.get("dropout_p"))
                and not (name == "dropout_p" and x == 0.0)
            },
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with change(x) for each of its tensors x."""
        options = {name: _changed(x, change) for name, x in self.options.items()}
        q, k, v, dout, dlse, dentropy = map(change, (*self[:3], self.dout, self.dlse, self.dentropy))
        sequences = None if self.sequences is None else Sequences(*_changed(tuple(self.sequences), change))
        return Problem(
            q, k, v, cast(AttentionOptions, options), dout, dlse, dentropy, self.top_left, sequences,
            self.want,
        )  # fmt: skip

    def of_entries(self, entries: list[int]) -> Problem:
        """The problem of some batch entries, in that order."""
        batch = self.q.shape[0]

        def chosen(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(chosen, x))
            if isinstance(x, ALiBi):
                return ALiBi(x.slopes[entries]) if x.slopes.ndim == 2 and len(x.slopes) == batch else x
            return x[entries] if isinstance(x, Tensor) and x.ndim == 4 and x.shape[0] == batch else x

        options = {name: chosen(x) for name, x in self.options.items()}
        lengths = self.options.get("key_lengths")
        if lengths is not None:
            options["key_lengths"] = lengths[entries]
        q, k, v, dout, dlse, dentropy = (x[entries] for x in (*self[:3], self.dout, self.dlse, self.dentropy))
        return Problem(q, k, v, cast(AttentionOptions, options), dout, dlse, dentropy, self.top_left)

    def has_empty_rows(self) -> bool:
        """Whether some query sees no key, or only scores of -inf."""
        inputs, spec = self.prepared()
        if inputs.spans_q is not None:
            return any(_has_empty_rows(*dense[1:]) for dense in one_by_one(inputs, spec))
        return _has_empty_rows(inputs, spec)


def _has_empty_rows(inputs: Inputs, spec: AttentionSpec) -> bool:
    batch, heads, seqlen_q, _ = inputs.q.shape
    ok = torch.ones(batch, heads, seqlen_q, inputs.k.shape[2], dtype=torch.bool, device=inputs.q.device)
    shown = visible(inputs, spec)
    if shown is not None:
        ok = ok & shown
    if inputs.bias is not None:
        ok = ok & (inputs.bias > -torch.inf)
    return not bool(ok.any(-1).all())


def _changed(option: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(option, Tensor):
        return change(option)
    if isinstance(option, ALiBi):
        return ALiBi(change(option.slopes))
    if isinstance(option, RelativeBias):
        return replace(option, table=change(option.table))
    return tuple(_changed(x, change) for x in option) if isinstance(option, tuple) else option


def _shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(size if axis in axes else 1 for axis, size in sizes.items())


def _squeezed(x: Tensor) -> Tensor:
    """Without its leading axes of size 1."""
    while x.ndim > 0 and x.shape[0] == 1:
        x = x[0]
    return x


OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {"batch": 2},
    "causal": {"causal": True},
    "window": {"window": (5, 1)},
    "key_lengths": {"key_lengths": (21, 0, 40), "batch": 3},
    "mask": {"mask": Extra("empty_rows")},
    "documents": {"mask_object": "documents", "batch": 2},
    "predicate": {"mask_object": "predicate"},
    "bias": {"bias": Extra(axes="hqk")},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi": "h"},
    "relative": {"relative": (8, True)},
    "dropout": {"dropout_p": 0.3},
    "entropy": {"entropy": True},
    "precise": {"precise": True, "distribution": "mean_v"},
    "scale": {"scale": -0.4},
    "gqa": {"heads_q": 4},
    "rectangular": {"seqlen_k": 50},
    "packed": {"packed": ((5, 33), (0, 9), (33, 20), (7, 0), (1, 40), (17, 17), (17, 17))},
}


def _options() -> list[Case]:
    """Every option alone. (Together: `combinations`.)"""
    return [Case(name, **fields) for name, fields in OPTIONS.items()]


def _shapes() -> list[Case]:
    lengths = [(1, 1), (1, 7), (7, 1), (2, 2), (16, 17), (17, 16), (33, 65), (65, 33), (113, 203), (203, 113)]
    sizes = [Case(f"{m}x{n}", seqlen_q=m, seqlen_k=n) for m, n in lengths]
    causal = [replace(case, name=f"causal {case.name}", causal=True) for case in sizes]
    top_left = [replace(case, name=f"top-left {case.name}", top_left=True) for case in causal]
    dims = [(d, d) for d in (1, 3, 17, 40, 64, 80, 128, 256)] + [(192, 128), (64, 32), (32, 64)]
    heads = [Case(f"head_dim {d}x{e}", head_dim=d, head_dim_v=e) for d, e in dims]
    groups = [(2, 1), (6, 3), (6, 2), (8, 1), (7, 1), (5, 1)]
    gqa = [Case(f"heads {m}x{n}", seqlen_q=17, heads_q=m, heads_kv=n) for m, n in groups]
    gqa += [replace(case, name=f"causal {case.name}", causal=True) for case in gqa]
    nothing = [Case("no batch", batch=0), Case("no queries", seqlen_q=0), Case("no keys", seqlen_k=0)]
    return sizes + causal + top_left + heads + gqa + nothing


def _visibility() -> list[Case]:
    windows = [(0, 0), (3, None), (None, 2), (5, 1), (0, None), (None, 0), (100, 100)]
    window = [Case(f"window {w}", window=w, seqlen_k=40) for w in windows]
    window += [Case(f"causal window {w}", window=w, causal=True, seqlen_q=40) for w in windows[1:4]]
    window += [replace(c, name=f"top-left {c.name}", top_left=True) for c in window[3:4] + window[-1:]]
    lengths = [(0,), (1, 33), (16, 17), (33, 34), (0, 5)]
    length = [Case(f"key_lengths {n}", key_lengths=n, batch=len(n)) for n in lengths]
    length += [replace(case, name=f"causal {case.name}", causal=True, seqlen_q=40) for case in length[1:]]
    axes = ["bhqk", "hqk", "qk", "k", "bk", "bqk", "bhk", "q", "bh", "h", ""]
    mask = [Case(f"mask {a or 'scalar'}", batch=1 + ("b" in a), mask=Extra("random", a)) for a in axes]
    padding = [("padding_right", "bk"), ("padding_left", "bk"), ("padding_left", "bhqk")]
    empty = [("empty_rows", "q"), ("empty_columns", "k"), ("empty_columns", "bqk")]
    empty += [("first_entry_empty", "b"), ("nothing", "qk")]
    patterns = [Case(f"mask {p} {a}", batch=2, mask=Extra(p, a)) for p, a in padding + empty]
    mask += patterns + [replace(case, name=f"causal {case.name}", causal=True) for case in patterns[:4]]
    objects = [Case(f"object {x}", mask_object=x, batch=2, seqlen_q=29, seqlen_k=40) for x in OBJECTS]
    objects += [
        replace(c, name=f"window {c.name}", window=(9, 2), key_lengths=(31, 40)) for c in objects[3::3]
    ]
    objects += [replace(c, name=f"top-left {c.name}", top_left=True, batch=1) for c in objects[4:6]]
    return window + length + mask + objects


def _numbers() -> list[Case]:
    axes = ["bhqk", "hqk", "qk", "k", "bk", "bqk", "bhk", "bhq", "h", ""]
    bias = [Case(f"bias {a or 'scalar'}", batch=1 + ("b" in a), bias=Extra("random", a)) for a in axes]
    bias += [Case(f"bias {p}", bias=Extra(p, "hqk", torch.float32)) for p in BIASES if p != "random"]
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    bias += [Case(f"bias {d}".replace("torch.", ""), bias=Extra("random", "bqk", d)) for d in dtypes]
    bias += [Case("bias causal hidden", bias=Extra("hidden", "hqk", torch.float32), causal=True)]
    scales = [0.0, -1.0, 1e-8, 8.0]
    options = [Case(f"scale {x:g}", scale=x) for x in scales]
    options += [Case(f"softcap {x:g}", softcap=x, scale=1.0) for x in (0.5, 30.0)]
    options += [Case(f"dropout {p:g}", dropout_p=p) for p in (0.1, 1.0)]
    options += [Case("alibi of each batch entry", alibi="bh", batch=2, seqlen_q=17, seqlen_k=29)]
    options += [Case("relative, one side", relative=(6, False), seqlen_q=29, seqlen_k=37, batch=2)]
    options += [Case("top-left relative", relative=(12, True), top_left=True, seqlen_q=17, seqlen_k=29)]
    options += [Case("top-left alibi", alibi="h", top_left=True, seqlen_q=17, seqlen_k=29)]
    options += [Case("sinks, rows without keys", sinks=True, seqlen_q=50, seqlen_k=20, causal=True, batch=2)]
    kinds = ["uniform", "peaky", "tiny", "mean_v", "ones_v", "low_rank", "outlier_channel"]
    numbers = [Case(f"{kind} numbers", distribution=kind, head_dim=64, seqlen_k=65) for kind in kinds]
    numbers += [replace(case, name=f"precise {case.name}", precise=True) for case in numbers]
    layouts = [Case(f"layout {x}", layout=x, batch=2, heads_q=4, seqlen_q=17) for x in LAYOUTS if x != "bhsd"]
    layouts += [Case(f"causal layout {x}", layout=x, causal=True) for x in ("bshd", "expanded_heads")]
    return bias + options + numbers + layouts


def _packed() -> list[Case]:
    """Packed sequences: lengths that no tile divides, none at either end and in the middle."""
    lengths = {
        "alone": ((33, 33),),
        "alike": ((17, 17),) * 3,
        "square": ((0, 0), (33, 33), (1, 1), (0, 0), (0, 0), (17, 17), (17, 17), (0, 0)),
    }
    cases = [Case(f"packed {name}", packed=x) for name, x in lengths.items()]
    cases += [replace(case, name=f"causal {case.name}", causal=True) for case in cases]
    ragged, square = OPTIONS["packed"]["packed"], lengths["square"]
    cases += [
        Case(f"packed object {x}", packed=ragged, mask_object=x) for x in ("prefix", "streaming", "predicate")
    ]
    cases += [Case("packed layout bshd", packed=ragged, layout="bshd")]
    cases += [Case("packed gqa+window+bias", packed=ragged, heads_q=4, window=(9, 0), bias=Extra(axes="bhk"))]
    cases += [Case("packed mask of each sequence", packed=ragged, mask=Extra("padding_left", "bk"))]
    cases += [Case("packed bias of each sequence", packed=square, bias=Extra("random", "bhqk"))]
    cases += [Case("packed alibi of each sequence", packed=square, alibi="bh", causal=True)]
    return cases


CASES: tuple[Case, ...] = (*_options(), *_shapes(), *_visibility(), *_numbers(), *_packed())
