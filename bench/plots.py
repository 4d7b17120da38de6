"""A run as pictures (PNG): how near the roofs, speed over sequence length, ratios on a CPU, memory."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .results import Peak, Ratio, Record, Results

Picture = tuple[str, bytes]
"""Name, which is also a file's, and PNG."""

INK, QUIET = "#2b2d42", "#a9b4c2"
COLOURS = ("#2a6f97", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948")
SWEPT = re.compile(r"^(.+)-(\d+) (\w+) \d+x\d+$")
"""A case of a sweep: family, sequence length, mask."""


def pictures(results: Results) -> list[Picture]:
    """Every picture that the results have figures for; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    found = [*_speeds(results.records), *_sweeps(results.records)]
    if results.ratios:
        found.append(("ratios", _ratios(results.ratios)))
    if any(peak.peak_bytes for peak in results.peaks):
        found.append(("memory", _memory(results.peaks)))
    return found


def _speeds(records: Sequence[Record]) -> Iterator[Picture]:
    """Per dtype and direction: bars of the share of the nearer roof, grouped by case."""
    timed = [record for record in records if record.status == "timed"]
    names = list(dict.fromkeys(record.implementation for record in timed))
    for kind in dict.fromkeys((record.dtype, record.direction) for record in timed):
        group = [record for record in timed if (record.dtype, record.direction) == kind]
        cases = list(dict.fromkeys(record.case for record in group))
        figure, axes = _figure(8.5, 1.2 + 0.17 * len(cases) * (len(names) + 1.5))
        height = 0.85 / max(1, len(names))
        for i, name in enumerate(names):
            mine = [record for record in group if record.implementation == name]
            places = [cases.index(record.case) + i * height for record in mine]
            shares = [100 * max(record.of_matmul or 0.0, record.of_copy or 0.0) for record in mine]
            axes.barh(places, shares, height * 0.92, color=COLOURS[i % len(COLOURS)], label=name)
        axes.set_yticks([j + 0.425 - height / 2 for j in range(len(cases))], cases)
        axes.invert_yaxis()
        axes.set_xlabel("% of this machine's measured matmul or copy, the nearer one")
        axes.legend(fontsize=8, frameon=False, loc="best")
        axes.set_title(" ".join(kind), fontsize=10, color=INK, loc="left")
        yield f"speed-{'-'.join(kind)}", _png(figure)


def _sweeps(records: Sequence[Record]) -> Iterator[Picture]:
    """Per family, mask, dtype and direction with three lengths or more: TFLOP/s over sequence length."""
    families: dict[tuple[str, ...], dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        swept = SWEPT.match(record.case)
        if swept and record.tflops is not None:
            key: tuple[str, ...] = (swept[1], swept[3], record.dtype, record.direction)
            line = families.setdefault(key, {}).setdefault(record.implementation, [])
            line.append((int(swept[2]), record.tflops))
    for key, lines in families.items():
        if max(map(len, lines.values())) < 3:
            continue
        figure, axes = _figure(7, 4)
        for i, (name, points) in enumerate(lines.items()):
            axes.plot(*zip(*sorted(points)), marker="o", color=COLOURS[i % len(COLOURS)], label=name)
        _lengths(axes, sorted({length for points in lines.values() for length, _ in points}))
        axes.set(xlabel="sequence length", ylabel="TFLOP/s")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)
        axes.set_title(" ".join(key), fontsize=10, color=INK, loc="left")
        yield f"speed-{'-'.join(key)}", _png(figure)


def _ratios(ratios: Sequence[Ratio]) -> bytes:
    """Times as fast as PyTorch's, with what is required."""
    shown = [ratio for ratio in ratios if ratio.unit == "times as fast"]
    figure, axes = _figure(8.5, 0.8 + 0.27 * len(shown))
    for i, ratio in enumerate(shown):
        axes.plot([1, ratio.measured], [i, i], color=QUIET, linewidth=2, zorder=1)
        axes.scatter(ratio.measured, i, color=COLOURS[0] if ratio.ok else COLOURS[4], zorder=3)
        if ratio.required is not None:
            axes.scatter(ratio.required, i, marker="|", s=120, color=INK, zorder=2)
    axes.axvline(1, color=QUIET, linewidth=1)
    axes.set_yticks(range(len(shown)), [ratio.name for ratio in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "25" else "")
    axes.set_xlabel("times as fast as PyTorch's; | what is required")
    return _png(figure)


def _memory(peaks: Sequence[Peak]) -> bytes:
    """Peak memory over sequence length."""
    figure, axes = _figure(7, 4)
    for i, name in enumerate(dict.fromkeys(peak.implementation for peak in peaks)):
        points = [
            (peak.seqlen, peak.peak_bytes / 2**20)
            for peak in peaks
            if peak.implementation == name and peak.peak_bytes
        ]
        if points:
            axes.plot(*zip(*points), marker="o", color=COLOURS[i % len(COLOURS)], label=name)
    _lengths(axes, sorted({peak.seqlen for peak in peaks}))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set(xlabel="sequence length", ylabel="MiB, forward + backward")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(peaks[0].case, fontsize=10, color=INK, loc="left")
    return _png(figure)


def _lengths(axes: Any, seqlens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(seqlens, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in seqlens])


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(which="both", labelsize=8, colors=INK, length=0)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
