"""Which keys does a query see? Alignment, ends of windows, masks, lengths, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cases import Problem
from .subject import Probe, Subject, recognised

IGNORED = "ignored: every query sees every key"
EVERY_KEY = "every key, all alike, with weights that sum to 1"
ALIGNED = {
    "bottom-right": "bottom-right: the last query stands at the last key",
    "top-left": "top-left: query 0 stands at key 0",
}
ENDS = {0: "", 1: "one key too many on the {}", -1: "one key too few on the {}"}


def probes(subject: Subject) -> Iterator[Probe]:
    claims, tensor = subject.claims, subject.tensor
    yield Probe("without options a query sees", EVERY_KEY, partial(_unmasked, subject))
    if claims.causal:
        yield from _bands(subject, "causal", None, 0, causal=True)
    if claims.window:
        yield from _bands(subject, "window=(3, 2)", 3, 2, window=(3, 2))

    i, j = torch.arange(10)[:, None], torch.arange(10)
    mask = (i == j) | ((i * 3 + j * 5) % 7 < 3)
    if claims.mask:
        words = {"True means may attend": mask, "True means hidden": ~mask}
        yield _seen(subject, "a boolean mask", subject.problem(10, 10, mask=tensor(mask)), words)
    if claims.mask and claims.causal:
        words = {
            "both hold": mask & (j <= i),
            "the mask is ignored": (j <= i).expand(10, 10),
            "causal is ignored": mask,
            "one of them is enough": mask | (j <= i),
        }
        problem = subject.problem(10, 10, mask=tensor(mask), causal=True)
        yield _seen(subject, "a mask and causal", problem, words, promise=claims.mask_and_causal)
    if claims.key_lengths:
        yield from _lengths(subject)


def _bands(subject: Subject, name: str, left: int | None, right: int, **options: Any) -> Iterator[Probe]:
    """A causal call or a window: where it stands and where it ends."""
    rows, cols = subject.rows(6, 10), 10
    for alignment in subject.claims.alignments if rows != cols else subject.claims.alignments[:1]:
        problem = subject.problem(rows, cols, top_left=alignment == "top-left", **options)
        words = _band_words(rows, cols, left, right)
        preferred = {text: seen for text, seen in words.items() if rows == cols or text.startswith(alignment)}
        question = name if len(subject.claims.alignments) == 1 else f"{name}, asked for {alignment}"
        yield _seen(subject, f"{question}, {rows} queries and {cols} keys", problem, preferred | words)


def _band_words(rows: int, cols: int, left: int | None, right: int) -> dict[str, Tensor]:
    """What a band of keys around each query's position may look like, the exact one first."""
    offset = torch.arange(cols) - torch.arange(rows)[:, None]
    shifts = {ALIGNED["bottom-right"]: cols - rows, ALIGNED["top-left"]: 0}
    words = {}
    for more_left, more_right in sorted(
        itertools.product(ENDS, repeat=2), key=lambda n: n[0] ** 2 + n[1] ** 2
    ):
        if left is None and more_left:
            continue
        ends = [ENDS[more_left].format("left"), ENDS[more_right].format("right")]
        exact = "its own key included" if left is None else "both ends included"
        for aligned, shift in shifts.items():
            seen = offset - shift <= right + more_right
            if left is not None:
                seen = seen & (offset - shift >= -left - more_left)
            parts = [aligned] * (rows != cols) + ([end for end in ends if end] or [exact])
            words["; ".join(parts)] = seen
    return words


def _lengths(subject: Subject) -> Iterator[Probe]:
    rows, cols = subject.rows(4, 10), 10
    lengths = torch.tensor([6, 8][: subject.batch])
    key, at = torch.arange(cols), lengths[:, None, None, None]
    shape = (subject.batch, 1, rows, cols)
    words = {
        "keys at and past the length are hidden": key < at,
        "one key too many is seen": key <= at,
        "one key too few is seen": key < at - 1,
        "the first length is used for all": key < at[:1],
    }
    words = {text: seen.expand(shape) for text, seen in words.items()}
    given = subject.tensor(lengths.int())
    yield _seen(subject, "key_lengths", subject.problem(rows, cols, key_lengths=given), words)
    if subject.claims.causal and rows != cols and "bottom-right" in subject.claims.alignments:
        query = torch.arange(rows)[:, None]
        words = {
            "the lengths move no alignment": (key < at) & (key - query <= cols - rows),
            "the last query stands at the last key within the length": (key < at)
            & (key - query <= at - rows),
        }
        problem = subject.problem(rows, cols, top_left=False, key_lengths=given, causal=True)
        yield _seen(subject, "key_lengths and causal", problem, words)


def _seen(
    subject: Subject, question: str, problem: Problem, words: Mapping[str, Tensor], promise: bool = True
) -> Probe:
    """A probe whose first words are what is promised."""
    every = {**words, IGNORED: torch.ones(problem.q.shape[2], problem.k.shape[2])}

    def look() -> str:
        weights = subject.weights(problem)
        read = [_named(w, every) for w in weights if w is not None]
        return read[0] if read[0] == read[-1] else f"{read[0]}; in backward {read[-1]}"

    return Probe(question, next(iter(words)) if promise else None, look)


def _named(weights: Tensor, words: Mapping[str, Tensor]) -> str:
    if weights.isnan().any():
        return "NaN"
    seen = weights > 0
    first, last = (_numbers(row) for row in seen[0, 0, [0, -1]])
    return recognised(seen.cpu(), words, f"something else: query 0 sees {first}, the last query {last}")


def _numbers(row: Tensor) -> str:
    return "keys " + (", ".join(str(int(i)) for i in row.nonzero()) or "none")


def _unmasked(subject: Subject) -> str:
    """A number of keys that no tile divides."""
    cols = 67
    for weights in subject.weights(subject.problem(subject.rows(5, cols), cols)):
        if weights is None:
            continue
        if weights.isnan().any():
            return "NaN"
        unseen = (weights == 0).flatten(0, 2).any(0)
        if unseen.any():
            return f"all but {_numbers(unseen)} of {cols}"
        total = weights.sum(-1)
        if (total - 1).abs().max() > 0.01:
            return f"weights that sum to {total.min():.3g}: more is counted than the {cols} keys"
        if (weights * cols - 1).abs().max() > 0.02:
            return "every key, but not all alike"
    return EVERY_KEY
