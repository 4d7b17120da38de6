"""The demo as a picture: the sentences on a map, how small the differences are, how fast it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from .result import Result
from .sentences import Sentences

STOCK, OURS, INK = "#a9b4c2", "#2a6f97", "#2b2d42"
EQUAL = 1e-9  # where differences of 0 stand on a logarithmic axis
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#76b7b2", "#9c755f", "#e15759")


def draw(path: Path, result: Result, sentences: Sentences, stock: Tensor, ours: Tensor) -> None:
    """Write the figure; stock, ours: (sentences, hidden_size) unit vectors."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(12.5, 6.2), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.75, 1))
    _map(figure.add_subplot(grid[:, 0]), sentences, stock, ours)
    _differences(figure.add_subplot(grid[0, 1]), result, stock, ours)
    _speeds(figure.add_subplot(grid[1, 1]), result)
    figure.suptitle(
        f"{result.model}, {result.sentences:,} sentences of {result.source}, {result.device}, {result.dtype}",
        color=INK,
        fontsize=12,
    )
    figure.savefig(path)


def _map(axes: Any, sentences: Sentences, stock: Tensor, ours: Tensor) -> None:
    """Both sets of embeddings in one plane, rings for stock and dots for ours."""
    plane = _plane(sentences.topics, stock)
    rings, dots = (stock @ plane).numpy(), (ours @ plane).numpy()
    topics = sorted(set(sentences.topics))
    size = 42 if len(stock) <= 500 else 14
    for i, topic in enumerate(topics):
        rows = [row for row, name in enumerate(sentences.topics) if name == topic]
        colour = COLOURS[i % len(COLOURS)]
        axes.scatter(*rings[rows].T, s=size, facecolors="none", edgecolors=colour, linewidths=0.9, alpha=0.8)
        axes.scatter(
            *dots[rows].T,
            s=size / 5,
            color=colour,
            linewidths=0,
            label=f"topic {topic}" if topic.isdecimal() else topic,
        )
    axes.set_title("every sentence twice: ring = stock attention, dot = undivided", fontsize=10, color=INK)
    if len(topics) > 1:
        axes.legend(loc="best", fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", markerscale=2)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(
        "plane of the topics' means" if len(topics) > 1 else "first two principal components", fontsize=8
    )
    _bare(axes)


def _plane(topics: list[str], embeddings: Tensor) -> Tensor:
    """(hidden_size, 2): where the topics' means, or without topics the sentences, differ most."""
    names = list(dict.fromkeys(topics))
    points = embeddings
    if len(names) > 2:
        rows = [[row for row, name in enumerate(topics) if name == wanted] for wanted in names]
        points = torch.stack([embeddings[group].mean(0) for group in rows])
    return torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh[:2].T


def _differences(axes: Any, result: Result, stock: Tensor, ours: Tensor) -> None:
    largest = (stock - ours).abs().amax(1).clamp(min=EQUAL).log10().numpy()
    low, high = math.log10(EQUAL), max(math.log10(result.difference_limit or EQUAL), largest.max())
    axes.hist(largest, bins=60, range=(low - 0.2, high), color=OURS)
    if result.difference_limit > 0:
        limit = math.log10(result.difference_limit)
        axes.axvline(limit, color=INK, linewidth=1.2, linestyle="--")
        axes.annotate(
            "allowed",
            (limit, 0.92),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK,
        )
    axes.set_xlim(low - 0.3, high + 0.3)
    axes.set_xticks([low, *range(math.ceil(low) + 1, math.floor(high) + 1)])
    axes.xaxis.set_major_formatter(lambda x, _: "0" if x <= low else f"$10^{{{x:g}}}$")
    axes.set_title("largest difference within an embedding, per sentence", fontsize=10, color=INK)
    axes.set_ylabel("sentences", fontsize=8)
    _bare(axes)


def _speeds(axes: Any, result: Result) -> None:
    names = (f"stock\n({result.stock})", f"undivided\n({result.implementation})")
    speeds = (result.stock_sentences_per_second, result.sentences_per_second)
    bars = axes.barh(names, speeds, color=(STOCK, OURS), height=0.45)
    axes.bar_label(bars, labels=[f"{speed:,.0f}" for speed in speeds], padding=4, fontsize=9, color=INK)
    axes.set_xlim(0, 1.15 * max(speeds))
    axes.invert_yaxis()
    low, high = result.speed_ratio_range
    title = f"sentences per second (ratio by batch: {low:.2f} to {high:.2f})"
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xticks([])
    _bare(axes)
    axes.spines["bottom"].set_visible(False)


def _bare(axes: Any) -> None:
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(STOCK)
