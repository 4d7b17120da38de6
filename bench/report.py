"""A run as people read it: tables on a terminal, one HTML page that needs no network."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from ..conformance.page import Section, page
from .peers import OURS
from .plots import Picture, pictures
from .results import Change, Peak, Ratio, Record, Results

HOW = (
    "A cell: milliseconds · FLOP/s · share of a roof. "
    "Peers run in turns in one process; shown is the median, and in the JSON the 20th and 80th percentile. "
    "FLOP/s count the scores that are visible (2 products forward, 5 backward); % is of the matrix product "
    "or the copy that this machine was measured to do, whichever is nearer. What is outside the error budget "
    "of the conformance kit gets no time; ≈ marks peers that are outside it and inside the field's rule."
)

HOST = (
    " Times are the GPU's own; a single call takes the host's as well, until its launches are queued: host "
    "µs, here where they are more than the GPU's."
)


def how(results: Results) -> str:
    """How to read the main table."""
    return HOW + (HOST if _has_host(results.records) else "")


def _has_host(records: Iterable[Record]) -> bool:
    return any(record.host_us is not None for record in records)


def table(results: Results) -> Table:
    """A line per case, dtype and direction; a column per implementation that was timed or wrong."""
    columns, rows = grid(results)
    made = Table(caption=how(results))
    for column in columns:
        made.add_column(column, justify="left" if column in HEAD else "right")
    for row in rows:
        made.add_row(*row)
    return made


HEAD = ("case", "dtype", "direction")
AGAINST = "against the fastest other"


def grid(results: Results) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the main table."""
    shown = [record for record in results.records if record.status != "n/a"]
    names = list(dict.fromkeys(record.implementation for record in shown))
    names.sort(key=lambda name: not name.startswith(OURS))
    lines: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in results.records:
        lines.setdefault(record.key[:3], {})[record.implementation] = record
    rows = [
        [*key, *(_cell(found[name]) if name in found else "" for name in names)]
        for key, found in lines.items()
    ]
    return [*HEAD, *names, *([AGAINST] if names else [])], [
        [*row, _fastest(lines[tuple(row[:3])].values())] if names else row for row in rows
    ]


def _cell(record: Record) -> str:
    if record.status != "timed":
        return "✗ wrong" if record.status == "wrong" else "n/a"
    share = max(record.of_matmul or 0.0, record.of_copy or 0.0)
    mark = " ≈" if record.reason else ""
    speed = f"{record.tflops:.3g}T" if (record.tflops or 0.0) >= 1 else f"{(record.tflops or 0.0) * 1e3:.3g}G"
    host = record.host_us if (record.host_us or 0.0) * 1e-3 > (record.median_ms or 0.0) else None
    waits = "" if host is None else f" · host {host:.0f} µs"
    return f"{record.median_ms:.3g} · {speed} · {share:.0%}{waits}{mark}"


def against_fastest(records: Iterable[Record]) -> float | None:
    """How many times as fast ours is as the fastest of the others."""
    times = {r.implementation: r.median_ms for r in records if r.status == "timed"}
    others = [ms for name, ms in times.items() if ms is not None and not name.startswith(OURS)]
    mine = times.get(OURS)
    return min(others) / mine if mine and others else None


def _fastest(records: Iterable[Record]) -> str:
    ratio = against_fastest(records)
    return "" if ratio is None else f"{ratio:.2f}x"


def absences(results: Results) -> list[str]:
    """Who was not measured, or is wrong, and why; each reason once."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for record in results.records:
        if record.status != "timed" or record.reason:
            cases = reasons.setdefault((record.implementation, record.status, record.reason), [])
            cases.append(f"{record.case} {record.dtype}")
    total = len({(record.case, record.dtype) for record in results.records})
    lines = []
    for (name, status, reason), cases in reasons.items():
        distinct = list(dict.fromkeys(cases))
        where = "everywhere" if len(distinct) == total else ", ".join(distinct[:3])
        where += f" and {len(distinct) - 3} more" if 3 < len(distinct) < total else ""
        lines.append(f"{name}: {'≈' if status == 'timed' else status} {where}: {reason}")
    return lines


def busy(results: Results) -> list[str]:
    """A warning where others were at work on the machine when it was measured."""
    load, threads = (results.environment.get(name) for name in ("load", "threads"))
    if load is None or threads is None or load <= 0.5 * threads:
        return []
    return [f"The machine was busy when this began, its load {load:g}: trust ratios more than times."]


def ratio_table(ratios: Sequence[Ratio]) -> Table:
    """Ours against PyTorch's on a CPU."""
    made = Table(title="undivided.attention against F.scaled_dot_product_attention")
    for column in RATIO_COLUMNS:
        made.add_column(column, justify="left" if column == "case" else "right")
    for row in _ratio_rows(ratios):
        colour = {"✓": "green", "✗": "red"}.get(row[-1][:1], "")
        made.add_row(*row[:-1], f"[{colour}]{row[-1]}[/]" if colour else "")
    return made


RATIO_COLUMNS = ("case", "ours ms", "PyTorch ms", "measured", "required", "")


def _ratio_rows(ratios: Sequence[Ratio]) -> list[list[str]]:
    return [
        [
            r.name,
            *("" if x is None else f"{x:.3f}" for x in (r.ours_ms, r.theirs_ms)),
            r.figure,
            r.demand,
            "" if r.required is None else "✓ kept" if r.ok else "✗ missed",
        ]
        for r in ratios
    ]


PEAK_COLUMNS = ("seqlen", "implementation", "peak MiB")


def peak_table(peaks: Sequence[Peak]) -> Table:
    """Memory over sequence length."""
    made = Table(*PEAK_COLUMNS, title=f"peak memory, forward + backward, {peaks[0].case if peaks else ''}")
    for row in _peak_rows(peaks):
        made.add_row(*row)
    return made


def _peak_rows(peaks: Sequence[Peak]) -> list[list[str]]:
    return [
        [
            str(p.seqlen),
            p.implementation,
            f"n/a: {p.reason}" if p.peak_bytes is None else f"{p.peak_bytes / 2**20:.1f}",
        ]
        for p in peaks
    ]


DETAIL_COLUMNS = (
    *("case", "dtype", "direction", "implementation", "turns", "p20 ms", "median ms", "p80 ms", "GB/s"),
    *("% of matmul", "% of copy", "peak MiB", "note"),
)
HOST_COLUMN = "host µs"


def _details(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Everything that was timed, with what the main table has no room for; host time and clocks where they
    are known."""
    on_gpu = _has_host(records)
    columns = [*DETAIL_COLUMNS[:8], *[HOST_COLUMN] * on_gpu, *DETAIL_COLUMNS[8:]]
    return columns, [
        [
            *r.key,
            *("" if x is None else f"{x:.4g}" for x in (r.turns, r.p20_ms, r.median_ms, r.p80_ms)),
            *["" if r.host_us is None else f"{r.host_us:.4g}"] * on_gpu,
            "" if r.gbs is None else f"{r.gbs:.4g}",
            *("" if x is None else f"{x:.0%}" for x in (r.of_matmul, r.of_copy)),
            "" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.1f}",
            "; ".join(filter(None, (r.note, r.clocks))),
        ]
        for r in records
        if r.status == "timed"
    ]


CHANGE_COLUMNS = ("case", "dtype", "direction", "implementation", "before ms", "now ms", "now / before", "")


def change_rows(changes: Sequence[Change]) -> list[list[str]]:
    """Of a comparison with another run."""
    return [
        [
            *change.key,
            f"{change.before_ms:.4g}",
            f"{change.now_ms:.4g}",
            f"{change.ratio:.3f}",
            "✗ regression" if change.is_regression else "",
        ]
        for change in changes
    ]


def change_table(changes: Sequence[Change]) -> Table:
    """The same on a terminal."""
    made = Table(*CHANGE_COLUMNS, title="against the other run, slowest change first")
    for row, change in zip(change_rows(changes), changes, strict=True):
        made.add_row(*row, style="bold red" if change.is_regression else None)
    return made


def html(results: Results, changes: Sequence[Change] = (), remarks: Sequence[str] = ()) -> str:
    """The whole run as one page: what came out, then what it rests on."""
    columns, rows = grid(results)
    images = pictures(results)
    environment = [[name, str(value)] for name, value in results.environment.items()]
    peaks = f"Forward + backward, {results.peaks[0].case}." if results.peaks else ""
    sections = [
        _section("In short", text="\n\n".join([where(results), *summary(results), *busy(results)])),
        _section("Against another run", CHANGE_COLUMNS, change_rows(changes), "\n\n".join(remarks)),
        _section("Speed", columns, rows, how(results) if rows else "", _named(images, "speed")),
        _section("CPU ratios", RATIO_COLUMNS, _ratio_rows(results.ratios), images=_named(images, "ratios")),
        _section("Memory", PEAK_COLUMNS, _peak_rows(results.peaks), peaks, _named(images, "memory")),
        _section("Host time", ("call", "us"), list(results.host_us.items())),
        _section("Not measured, or with a remark", ("what",), [[line] for line in absences(results)]),
        _section("Sources of the shapes", ("case", "source"), list(results.sources.items())),
        _section("Roofs", ("what", "measured"), _roof_rows(results.roofs)),
        _section("Surroundings", ("what", "is"), environment),
        _section("Every time", *_details(results.records)),
    ]
    return page("undivided bench", [section for section in sections if section.rows or section.text])


def where(results: Results) -> str:
    """The machine in a line."""
    told = results.environment.get
    machine = told("cpu", "") if told("gpu", "none") == "none" else told("gpu")
    threads = f"{told('threads')} threads, " if machine == told("cpu", "") and told("threads") else ""
    return f"{machine}, {threads}PyTorch {told('torch')}, {told('date', 'no date')}."


def summary(results: Results) -> list[str]:
    """Ours against the fastest other by direction; what was required and missed."""
    by_direction: dict[str, list[float]] = {}
    lines: dict[tuple[str, ...], list[Record]] = {}
    for record in results.records:
        lines.setdefault(record.key[:3], []).append(record)
    for key, records in lines.items():
        if (ratio := against_fastest(records)) is not None:
            by_direction.setdefault(key[2], []).append(ratio)
    said = [
        f"{direction}: against the fastest other {statistics.median(ratios):.2f}× in the median of "
        f"{len(ratios)} cases, {min(ratios):.2f}× to {max(ratios):.2f}×."
        for direction, ratios in by_direction.items()
    ]
    missed = [ratio.name for ratio in results.ratios if not ratio.ok]
    if results.ratios:
        asked = sum(ratio.required is not None for ratio in results.ratios)
        said.append(f"CPU ratios: {asked - len(missed)} of {asked} required figures kept.")
    return said


def _section(
    heading: str,
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[Any]] = (),
    text: str = "",
    images: Sequence[bytes] = (),
) -> Section:
    return Section(heading, text, columns, rows, images)


def _named(images: Sequence[Picture], name: str) -> list[bytes]:
    return [image for title, image in images if title.startswith(name)]


def _roof_rows(roofs: dict[str, float]) -> list[list[str]]:
    return [[name, f"{value:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}"] for name, value in roofs.items()]
