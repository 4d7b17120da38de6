"""Covering arrays: few rows in which every pair of levels of different factors stands together.

Most bugs of combinations need two options, and all pairs of dozens of levels fit into hardly more rows than
the two largest factors have pairs. Rows are made greedily, as by AETG (Cohen et al. 1997, section 3).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Level = tuple[str, str]
"""A factor and one of its levels, by name."""
Row = dict[str, str]
"""A level of each factor."""
Factors = Mapping[str, Sequence[str]]
Pair = frozenset[Level]
Allowed = Callable[[Level, Level], bool]

CANDIDATES = 8
"""How many rows are made for each that is kept."""


def pairs(factors: Factors, allowed: Allowed) -> set[Pair]:
    """Every two levels of different factors that may stand together."""
    levels = [[(factor, level) for level in levels] for factor, levels in factors.items()]
    return {
        frozenset((a, b))
        for some, others in itertools.combinations(levels, 2)
        for a, b in itertools.product(some, others)
        if allowed(a, b)
    }


def pairs_of(row: Row) -> set[Pair]:
    """The pairs that a row covers."""
    return set(map(frozenset, itertools.combinations(row.items(), 2)))


def covering(factors: Factors, allowed: Allowed, seed: int = 0) -> list[Row]:
    """Rows with every pair that is allowed and no other; those that cover most of what is missing come first.

    The first level of a factor must be allowed beside every level of the others: it is for rows in which
    nothing else fits. The same arguments give the same rows.
    """
    good = pairs(factors, allowed)
    missing, rows = set(good), list[Row]()
    draw = random.Random(seed).random  # the one method whose numbers Python promises to keep
    while missing:
        begun = sorted(map(sorted, missing))
        candidates = [
            _completed(dict(begun[int(draw() * len(begun))]), factors, good, missing, draw)
            for _ in range(CANDIDATES)
        ]
        rows.append(max(candidates, key=lambda row: len(missing & pairs_of(row))))
        missing -= pairs_of(rows[-1])
    return rows


def _completed(
    row: Row, factors: Factors, good: set[Pair], missing: set[Pair], draw: Callable[[], float]
) -> Row:
    """One factor after the other, in any order, gets the level that covers most."""
    for factor in sorted((f for f in factors if f not in row), key=lambda _: draw()):
        met = {level: {frozenset(((factor, level), x)) for x in row.items()} for level in factors[factor]}
        gains = {level: len(new & missing) + draw() for level, new in met.items() if new <= good}
        row[factor] = max(gains, key=gains.__getitem__)
    return {factor: row[factor] for factor in factors}
