"""Options in combination: what can be asked for at once, and cases in which every pair of it occurs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .cases import Case, Extra
from .covering import Level, Row, covering, pairs
from .mask_objects import OBJECTS
from .target import Capabilities, Target

FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "visibility": {
        "every key": {},
        "causal": {"causal": True},
        "top-left causal": {"causal": True, "top_left": True},
        "window": {"window": (5, 1)},
        "causal window": {"window": (9, None), "causal": True},
        "top-left window": {"window": (7, 2), "top_left": True},
    },
    "mask": {
        "no mask": {},
        "mask": {"mask": Extra()},
        "mask of rows": {"mask": Extra("empty_rows", "qk")},
        "mask of columns": {"mask": Extra("empty_columns", "hk")},
        "left padding": {"mask": Extra("padding_left", "bk")},
        "mask of entries": {"mask": Extra("first_entry_empty", "bk")},
        **{f"{name} object": {"mask_object": name} for name in OBJECTS if name not in ("causal", "window")},
        "masked documents": {"mask": Extra(), "mask_object": "documents"},
    },
    "key_lengths": {
        "all keys": {},
        "lengths": {"key_lengths": (-1, -2)},
        "an empty sequence": {"key_lengths": (0, -1, -3)},
    },
    "bias": {
        "no bias": {},
        "bias": {"bias": Extra()},
        "bias of heads": {"bias": Extra("hidden", "hqk")},
        "bias of keys": {"bias": Extra("random", "bk")},
        "bias in float32": {"bias": Extra("hidden_rows", "qk", torch.float32)},
    },
    "alibi": {"no alibi": {}, "alibi": {"alibi": "h"}, "alibi of entries": {"alibi": "bh"}},
    "relative": {
        "no relative": {},
        "relative": {"relative": (8, True)},
        "one-sided relative": {"relative": (6, False)},
    },
    "softcap": {"no softcap": {}, "softcap": {"softcap": 1.5}, "wide softcap": {"softcap": 30.0}},
    "sinks": {"no sinks": {}, "sinks": {"sinks": True}},
    "dropout": {"no dropout": {}, "dropout": {"dropout_p": 0.3}},
    "scale": {"default scale": {}, "negative scale": {"scale": -0.4}, "scale 0": {"scale": 0.0}},
    "heads": {"2 heads": {}, "gqa": {"heads_q": 6}, "mqa": {"heads_q": 3, "heads_kv": 1}},
    "seqlens": {
        "square": {},
        "wide": {"seqlen_q": 17, "seqlen_k": 50},
        "tall": {"seqlen_q": 50, "seqlen_k": 17},
        "tiny": {"seqlen_q": 9, "seqlen_k": 13},
        "tiles": {"seqlen_q": 70, "seqlen_k": 139},
        "one query": {"seqlen_q": 1, "seqlen_k": 37},
        "packed": {"packed": ((5, 33), (0, 9), (33, 20), (7, 0), (17, 17), (17, 17))},
    },
    "head_dims": {
        "head_dim 16": {},
        "head_dim 40": {"head_dim": 40},
        "head_dim 64x32": {"head_dim": 64, "head_dim_v": 32},
    },
    "batch": {"batch 1": {}, "batch 2": {"batch": 2}, "batch 3": {"batch": 3}},
    "layout": {
        "bhsd": {},
        **{
            name: {"layout": name}
            for name in ("bshd", "sliced", "last_stride_2", "head_dim_outermost", "expanded_heads")
        },
    },
    "precise": {"rounded delta": {}, "precise": {"precise": True}},
    "batch_invariant": {"any bits": {}, "batch invariant": {"batch_invariant": True}},
    "gradients": {"of out and lse": {}, "of entropy": {"entropy": True}},
    "numbers": {
        "randn": {},
        "outliers": {"distribution": "outlier_channel"},
        "mean_v": {"distribution": "mean_v"},
    },
}
"""By factor and level, fields of a `Case`. The first level of each has none, and stands beside everything."""

CLASHES = {
    frozenset({("visibility", "top-left causal"), ("seqlens", "one query")}),
    frozenset({("visibility", "top-left window"), ("seqlens", "one query")}),
    frozenset({("visibility", "top-left causal"), ("mask", "left padding")}),
    frozenset({("visibility", "top-left window"), ("mask", "left padding")}),
    frozenset({("visibility", "top-left causal"), ("seqlens", "packed")}),
    frozenset({("visibility", "top-left window"), ("seqlens", "packed")}),
    frozenset({("mask", "mask of entries"), ("batch", "batch 1")}),
    frozenset({("key_lengths", "an empty sequence"), ("batch", "batch 1")}),
}
"""What leaves nothing to see, and would hide whatever else stands there; what no call can say."""


def combinations(target: Target) -> tuple[Case, ...]:
    """Cases in which every two levels that a target claims to take together do stand together.

    Each is named by its levels. The first ones have most of the pairs.
    """
    return _combinations(target.capabilities)


def count_pairs(target: Target) -> int:
    """How many pairs of levels its combinations have."""
    asked = Askable(target.capabilities)
    return len(pairs(asked.factors, asked.together))


@functools.cache
def _combinations(claims: Capabilities) -> tuple[Case, ...]:
    asked = Askable(claims)
    return tuple(asked.case(row) for row in covering(asked.factors, asked.together))


class Askable:
    """The levels out of `FACTORS` that claims allow, fitted to their sizes."""

    def __init__(self, claims: Capabilities) -> None:
        self._target = Target("", lambda problem: (problem.q, None), claims)
        self.factors: dict[str, list[str]] = {}
        for factor, levels in FACTORS.items():
            cases = {self.case({factor: level}, ""): level for level in reversed(levels)}
            found = [level for case, level in cases.items() if self._takes(case)][::-1]
            if len(found) > 1:
                self.factors[factor] = found

    def case(self, row: Row, name: str | None = None) -> Case:
        """A row's case; by default it is named by the levels that are not the first of their factor."""
        changes = {key: x for factor, level in row.items() for key, x in FACTORS[factor][level].items()}
        told = [level for factor, level in row.items() if FACTORS[factor][level]]
        return self._target.fitted(Case(" + ".join(told) or "plain" if name is None else name, **changes))

    def together(self, a: Level, b: Level) -> bool:
        """Whether two levels make sense together, and are claimed to work."""
        return frozenset((a, b)) not in CLASHES and self._takes(self.case(dict((a, b)), ""))

    def _takes(self, case: Case) -> bool:
        return any(self._target.refusal(case, dtype) is None for dtype in self._target.capabilities.dtypes)
