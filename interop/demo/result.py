"""What the demo found out."""

from __future__ import annotations

from dataclasses import dataclass

from .comparison import Neighbours


@dataclass
class Hit:
    """One search result: the sentence's index, and its similarity to the query by either attention."""

    index: int
    stock: float
    ours: float


@dataclass
class Search:
    """A query and its nearest sentences, best first, by either attention."""

    query: str
    stock: list[Hit]
    ours: list[Hit]


@dataclass
class Result:
    """Everything the demo found out; `--json` writes it.

    calls: of our attention, untimed batches included. speed_ratio_range: how many times as fast ours is,
    the least and the most over timed batches.
    """

    model: str
    description: str
    source: str
    device: str
    dtype: str
    threads: int
    sentences: int
    tokens: int
    batches: int
    layers: int
    passes: int
    stock: str
    implementation: str
    evidence: str
    calls: int
    stock_sentences_per_second: float
    sentences_per_second: float
    speed_ratio_range: tuple[float, float]
    stock_peak_bytes: int | None
    peak_bytes: int | None
    largest_difference: float
    difference_limit: float
    neighbours: Neighbours
    searches: list[Search]

    @property
    def passed(self) -> bool:
        """Ours ran, its embeddings are the stock ones up to rounding, and no neighbour changed."""
        same = self.largest_difference <= self.difference_limit and self.neighbours.disagree == 0
        return same and self.calls > 0
