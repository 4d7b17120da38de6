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
TINY: dict[str, Any] = {"fontsize": 6, "color": "#5c636b", "va": "center"}
RAISED: dict[str, Any] = {**TINY, "va": "bottom"}
MARKERS = "os^Dv<>P"
COLOURS = (
    "#2a6f97",
    "#f28e2b",
    "#59a14f",
    "#b07aa1",
    "#e15759",
    "#76b7b2",
    "#9c755f",
    "#edc948",
    "#2b2d42",
    "#ff9da7",
    "#8cd17d",
)
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
    swept = {record.case for lines in _families(records).values() for record in _flat(lines)}
    timed = [record for record in records if record.status == "timed" and record.case not in swept]
    names = list(dict.fromkeys(record.implementation for record in timed))
    for kind in dict.fromkeys((record.dtype, record.direction) for record in timed):
        group = {
            (r.case, r.implementation): 100 * max(r.of_matmul or 0.0, r.of_copy or 0.0)
            for r in timed
            if (r.dtype, r.direction) == kind
        }
        cases = list(dict.fromkeys(case for case, _ in group))
        figure, axes = _figure(8.5, 1.1 + 0.13 * len(cases) * (len(names) + 1.5))
        height = 0.85 / max(1, len(names))
        for i, name in enumerate(names):
            places = [j + i * height for j in range(len(cases))]
            shares = [group.get((case, name)) for case in cases]
            axes.barh(places, [x or 0 for x in shares], height * 0.92, color=_colour(i), label=name)
            for place, share in zip(places, shares):
                said = "n/a" if share is None else f"{share:.0f}"
                axes.annotate(said, (share or 0, place), (3, 0), textcoords="offset points", **TINY)
        axes.set_yticks([j + 0.425 - height / 2 for j in range(len(cases))], cases)
        axes.set_ylim(len(cases) - 0.15, -height)
        axes.axvline(100, color=QUIET, linewidth=1, linestyle=":")
        axes.set_xlim(0, max(105.0, 1.06 * max(group.values())))
        axes.set_xlabel("% of this machine's measured matmul or copy, the nearer one")
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        axes.set_title(" ".join(kind), fontsize=10, color=INK, loc="left")
        yield f"speed-{'-'.join(kind)}", _png(figure)


Family = dict[str, list[tuple[int, Record]]]
"""What each implementation did at each sequence length."""


def _families(records: Sequence[Record]) -> dict[tuple[str, ...], Family]:
    """By family, mask, dtype and direction: those with three lengths or more."""
    families: dict[tuple[str, ...], Family] = {}
    for record in records:
        swept = SWEPT.match(record.case)
        if swept and record.tflops is not None:
            key = (swept[1], swept[3], record.dtype, record.direction)
            line = families.setdefault(key, {}).setdefault(record.implementation, [])
            line.append((int(swept[2]), record))
    return {key: lines for key, lines in families.items() if max(map(len, lines.values())) >= 3}


def _flat(lines: Family) -> list[Record]:
    return [record for line in lines.values() for _, record in line]


def _sweeps(records: Sequence[Record]) -> Iterator[Picture]:
    """TFLOP/s over sequence length."""
    for key, lines in _families(records).items():
        figure, axes = _figure(7, 4)
        for i, (name, line) in enumerate(lines.items()):
            points = sorted((length, record.tflops) for length, record in line)
            axes.plot(*zip(*points), marker=MARKERS[i % len(MARKERS)], color=_colour(i), label=name)
        _lengths(axes, sorted({length for line in lines.values() for length, _ in line}))
        axes.set(xlabel="sequence length", ylabel="TFLOP/s")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        axes.set_title(" ".join(key), fontsize=10, color=INK, loc="left")
        yield f"speed-{'-'.join(key)}", _png(figure)


def _ratios(ratios: Sequence[Ratio]) -> bytes:
    """Times as fast as PyTorch's, with what is required."""
    shown = [ratio for ratio in ratios if ratio.unit == "times as fast"]
    figure, axes = _figure(8.5, 0.8 + 0.27 * len(shown))
    for i, ratio in enumerate(shown):
        axes.plot([1, ratio.measured], [i, i], color=QUIET, linewidth=2, zorder=1)
        colour, marker = (_colour(0), "o") if ratio.ok else (COLOURS[4], "X")
        axes.scatter(ratio.measured, i, color=colour, marker=marker, zorder=3)
        place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{ratio.measured:.2f}", (ratio.measured, i), **place, **RAISED)
        if ratio.required is not None:
            axes.scatter(ratio.required, i, marker="|", s=120, color=INK, zorder=2)
    axes.axvline(1, color=QUIET, linewidth=1)
    axes.set_yticks(range(len(shown)), [ratio.name for ratio in shown])
    axes.set_ylim(len(shown) - 0.4, -0.8)
    axes.set_xscale("log")
    ends = [x for ratio in shown for x in (ratio.measured, ratio.required or 1.0)]
    axes.set_xlim(min([0.8, *ends]) / 1.15, max([2.0, *ends]) * 1.15)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.set_xlabel("times as fast as PyTorch's   (|: required   ✕: missed)")
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
            axes.plot(*zip(*points), marker="o", color=_colour(i), label=name)
    _lengths(axes, sorted({peak.seqlen for peak in peaks}))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set(xlabel="sequence length", ylabel="MiB, forward + backward")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(peaks[0].case, fontsize=10, color=INK, loc="left")
    return _png(figure)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


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
