"""Are two sets of embeddings of the same sentences the same, and would a search notice?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_A_TIME = 1024


@dataclass
class Neighbours:
    """For how many sentences both sets name the same nearest other sentence.

    tied: they name different ones whose similarities are closer than the embeddings' difference
    explains. disagree: any other.
    """

    agree: int
    tied: int
    disagree: int


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of any entry; infinite if one is NaN."""
    difference = (a - b).abs().max().item()
    return float("inf") if difference != difference else difference


def nearest_other(embeddings: Tensor) -> Tensor:
    """(sentences,): index of the most similar other one, by the inner product in float64."""
    wide = embeddings.double()
    found = []
    for start in range(0, len(wide), ROWS_AT_A_TIME):
        similarity = wide[start : start + ROWS_AT_A_TIME] @ wide.T
        rows = torch.arange(len(similarity))
        similarity[rows, rows + start] = -torch.inf
        found.append(similarity.argmax(dim=1))
    return torch.cat(found)


def compare_neighbours(stock: Tensor, ours: Tensor) -> Neighbours:
    """Compare the nearest neighbours of two sets of unit vectors.

    With d_i the length of the difference of sentence i's embeddings, a similarity of i and j moves by at
    most d_i + d_j. So two candidates j and j' may change places where stock separates them by no more
    than 2 d_i + d_j + d_j'; a change beyond that is a disagreement.
    """
    a, b = nearest_other(stock), nearest_other(ours)
    wide = stock.double()
    moved = (wide - ours.double()).norm(dim=1)
    margin = (wide * (wide[a] - wide[b])).sum(dim=1)
    differ = a != b
    explained = margin <= 2 * moved + moved[a] + moved[b]
    tied = int((differ & explained).sum())
    total = int(differ.sum())
    return Neighbours(agree=len(a) - total, tied=tied, disagree=total - tied)


def search(query: Tensor, embeddings: Tensor, count: int, without: int | None = None) -> list[int]:
    """Indices of the `count` most similar sentences, best first; `without` leaves one out."""
    similarity = embeddings.double() @ query.double()
    if without is not None:
        similarity[without] = -torch.inf
    return similarity.topk(min(count, len(embeddings))).indices.tolist()
