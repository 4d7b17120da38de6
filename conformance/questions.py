"""Which questions a target is asked: what to check, on which case, in which dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from . import safety
from .cases import CASES, OPTIONS, Case, Extra, Problem
from .combinations import combinations
from .oracle import ROUNDOFF
from .target import Target
from .verdict import LONG_SEQUENCES, VALUES

Level = Literal["quick", "full"]

LONG = (
    Case(
        "long queries", heads_q=1, heads_kv=1, seqlen_q=4096, seqlen_k=67, head_dim=64, distribution="uniform"
    ),
    Case("long keys", heads_q=1, heads_kv=1, seqlen_q=130, seqlen_k=4096, head_dim=64),
    Case("long", heads_q=1, heads_kv=1, seqlen_q=1500, seqlen_k=1500, head_dim=32),
    Case("long causal", heads_q=1, heads_kv=1, seqlen_q=1111, seqlen_k=1111, head_dim=32, causal=True),
)
"""Enough keys, and queries for gradients, for sums that are kept in 16 bits to leave the budget."""

HUGE = (Case("huge logits", scale=500.0), Case("huge equal logits", distribution="uniform", scale=1e4))

CANARIES = (
    Case("odd sizes", batch=2, seqlen_q=17, seqlen_k=33, head_dim=20),
    Case("square", head_dim=20),
    Case("grouped", heads_q=4, heads_kv=2, seqlen_q=17, seqlen_k=17),
    Case("causal", seqlen_q=19, seqlen_k=19, causal=True),
    Case("window", seqlen_q=35, seqlen_k=50, window=(3, 2)),
    Case("masked", seqlen_q=18, mask=Extra("random", "qk")),
    Case("biased", batch=2, seqlen_q=18, bias=Extra("random", "hk")),
    Case("lengths", batch=2, seqlen_q=5, key_lengths=(3, 31)),
)
"""Sizes that no tile divides, each kind of tensor that is read: what is asked of memory."""

HIDING = (
    Case("past the lengths", batch=2, heads_kv=1, key_lengths=(21, 4)),
    Case("an empty sequence", batch=2, seqlen_q=5, key_lengths=(0, 33)),
    Case("masked columns", mask=Extra("empty_columns", "k")),
    Case("masked columns, whole mask", mask=Extra("empty_columns", "qk")),
    Case("padding of one entry", batch=2, mask=Extra("padding_left", "bqk")),
    Case("before every window", seqlen_q=4, seqlen_k=40, window=(3, None)),
    Case("after every window", seqlen_q=4, seqlen_k=40, window=(None, 2), top_left=True),
    Case("after every query", seqlen_q=4, seqlen_k=40, causal=True, top_left=True),
)
"""Keys that no query of a batch entry sees, each way of hiding them."""

QUICK_COMBINATIONS = 12
"""How many of `combinations` the level quick asks: the first ones have more than half of all pairs."""

FAR = (Case("two heads, two rows", seqlen_q=2, seqlen_k=2),)


class Kind(NamedTuple):
    """A check and the cases it is put to, or how they follow from the target. claim: without which it is not
    asked at all.

    dtypes: of those a case is asked in, "all", one of them ("turns"), or the one that rounds most
    ("coarsest"); with the level full "turns" means all.
    """

    name: str
    run: Callable[[Target, Problem], safety.Outcome]
    cases: Sequence[Case] | Callable[[Target], Sequence[Case]]
    dtypes: Literal["all", "turns", "coarsest"] = "turns"
    claim: str | None = None
    full_only: bool = False


_SINGLES = tuple(case for case in CASES if case.name in OPTIONS)
_OTHERS = tuple(case for case in CASES if case not in _SINGLES)

_KINDS = (
    Kind(VALUES, safety.values, _SINGLES, "all"),
    Kind(VALUES, safety.values, (*_OTHERS, *HUGE)),
    Kind(VALUES, safety.values, lambda target: combinations(target)[:QUICK_COMBINATIONS]),
    Kind(VALUES, safety.values, combinations, full_only=True),
    Kind(LONG_SEQUENCES, safety.values, LONG, "coarsest"),
    Kind("nothing outside is read", safety.reads_nothing_outside, CANARIES),
    Kind("nothing outside is written", safety.writes_nothing_outside, CANARIES),
    Kind("every element is written", safety.writes_every_element, CANARIES),
    Kind("inputs stay as they are", safety.leaves_inputs_alone, CANARIES),
    Kind("the same bits again", safety.repeats, CANARIES, claim="deterministic"),
    Kind(
        "the same bits in any batch",
        safety.same_in_any_batch,
        tuple(replace(case, batch=3, batch_invariant=True) for case in CANARIES),
        claim="batch_invariant",
    ),
    Kind(
        "batch entries are independent",
        safety.keeps_entries_apart,
        tuple(replace(case, batch=2) for case in CANARIES),
    ),
    Kind("hidden keys reach nothing", safety.ignores_hidden_keys, HIDING, claim="nan_in_hidden_keys"),
    Kind("64-bit offsets", safety.reaches_far, FAR, "coarsest", "any_strides"),
    Kind("fake tensors agree with real ones", safety.fakes_faithfully, CANARIES, claim="compiles"),
    Kind("compiled agrees with eager", safety.compiles, CANARIES, "turns", "compiles", full_only=True),
)
CHECKS = {kind.name: kind.run for kind in _KINDS}
CLAIMED = {kind.name: kind.claim for kind in _KINDS if kind.claim}
"""The claim without which a check is not made."""


class Question(NamedTuple):
    """One check on one case."""

    check: str
    case: Case
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.check}, {self.case.name}, {self.dtype}".replace("torch.", "")


def questions(target: Target, level: Level, skipped: Counter[str]) -> Iterator[Question]:
    """What to ask; `skipped` counts the cases that are not asked, by the claim that is missing.

    quick: every case but most of the combinations of options, each in one dtype (they take turns), the single
    options in all dtypes; seconds on a CPU. full: everything in every dtype, and what is slow.
    """
    before: set[tuple[str, Case, torch.dtype]] = set()
    for kind in _KINDS:
        if kind.full_only and level == "quick":
            continue
        cases = kind.cases(target) if callable(kind.cases) else kind.cases
        if kind.claim is not None and not getattr(target.capabilities, kind.claim):
            skipped[kind.claim] += len(cases)
            continue
        for index, case in enumerate(map(target.fitted, cases)):
            dtypes = _askable(target, case, skipped)
            if dtypes and kind.dtypes == "coarsest":
                dtypes = [max(dtypes, key=lambda dtype: ROUNDOFF[dtype])]
            elif dtypes and kind.dtypes == "turns" and level == "quick":
                dtypes = [dtypes[index % len(dtypes)]]
            for dtype in dtypes:
                key = kind.name, replace(case, name=""), dtype
                if key not in before:  # of another name before it was fitted
                    before.add(key)
                    yield Question(kind.name, case, dtype)


def _askable(target: Target, case: Case, skipped: Counter[str]) -> list[torch.dtype]:
    """The dtypes in which a target claims to take a case."""
    refusals = {dtype: target.refusal(case, dtype) for dtype in target.capabilities.dtypes}
    dtypes = [dtype for dtype, refusal in refusals.items() if refusal is None]
    if not dtypes:
        skipped.update([next((reason for reason in refusals.values() if reason), "dtypes")])
    return dtypes
