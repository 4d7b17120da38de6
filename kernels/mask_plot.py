"""A picture of a mask: which tiles are skipped, whole or partial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..extras import missing
from .spec import TILE, WHOLE

KINDS = ("skipped", "whole", "partial")
COLOURS = ("#e9edf1", "#2a6f97", "#f28e2b")


def draw(tiles: Tensor, seqlen_q: int, seqlen_k: int, title: str, ax: Any = None) -> Any:
    """Draw one plane of `Inputs.tiles`, [tiles of rows, tiles of keys], on matplotlib's Axes; returns them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    absent = missing("plot", "matplotlib")
    if absent is not None:
        raise ModuleNotFoundError(absent)
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kind = torch.where(tiles == WHOLE, 1, torch.where(tiles >= 0, 2, 0))
    if ax is None:
        ax = Figure(figsize=(5, 5), layout="constrained").add_subplot()
    extent = (0, tiles.shape[1] * TILE, tiles.shape[0] * TILE, 0)
    ax.imshow(
        kind.cpu().numpy(), cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=2.5, extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    ax.set_xlim(0, seqlen_k)
    ax.set_ylim(seqlen_q, 0)
    ax.set(xlabel="key", ylabel="query", title=title)
    counts = [int((kind == i).sum()) for i in range(3)]
    patches = [
        Patch(color=colour, label=f"{name}: {count}") for colour, name, count in zip(COLOURS, KINDS, counts)
    ]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False,
              title=f"tiles of {TILE} x {TILE}")  # fmt: skip
    return ax
