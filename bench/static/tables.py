"""Figures in words: the one list that every table takes its lines from, with rich where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from .instructions import CLASSES
from .model import Rates
from .report import Row

UNKNOWN = "n/a"
ALWAYS = (
    *("registers", "spills (in loops)", "shared KiB", "CTAs/SM", "matrix", "loop: instructions"),
    *("slots per score", "exp2 under wgmma", "clocks: model", "bound by"),
)
"""Shown even if nothing is known of them: the reader should see that."""


def described(row: Row) -> dict[str, str]:
    """Every figure of a kernel by its name, always all of them and in one order; UNKNOWN where it is not."""
    figures, loop, bound = row.figures, row.main_loop, row.bound
    said: dict[str, object] = {"does not compile": row.error}
    said["tile"] = figures and figures.tile and " x ".join(map(str, figures.tile))
    said["warps x stages"] = figures and f"{figures.num_warps} x {figures.num_stages}"
    said["registers"] = figures and figures.registers
    said["spills (in loops)"] = figures and f"{figures.spills} ({_or_unknown(figures.spills_in_loops)})"
    assembly = figures and figures.assembly
    said["bytes spilled"] = assembly and assembly.spilled
    said["serialised"] = assembly and " ".join(assembly.serialised)
    said["assembler"] = assembly and assembly.assembler
    said["shared KiB"] = figures and f"{figures.shared / 1024:.0f}"
    said["CTAs/SM"] = figures and figures.ctas_per_sm
    said["matrix"] = figures and " ".join(figures.matrix)
    said["loop: instructions"] = loop and loop.instructions
    said |= {f"loop: {name}": loop and loop.count(name) for name in CLASSES}
    said["slots per score"] = loop and loop.slots and f"{loop.slots:.2f}"
    said["exp2 under wgmma"] = (
        f"{loop.exp2_under_product} of {loop.count('exp2')}"
        if loop and loop.exp2_under_product is not None
        else None
    )
    said |= {f"clocks: {name}": bound and f"{bound.parts[name]:.3f}" for name in Rates._fields}
    said["clocks: model"] = bound and f"{bound.clocks:.3f}"
    said["bound by"] = bound and bound.by
    return {name: _or_unknown(value) for name, value in said.items()}


def _or_unknown(value: object) -> str:
    return UNKNOWN if value is None or value == "" else str(value)


def show(
    columns: Sequence[str],
    lines: Sequence[Sequence[str]],
    style: Callable[[Sequence[str]], str | None] = lambda line: None,
    title: str | None = None,
) -> None:
    """Print a table; without rich, its cells between tabs."""
    if title:
        print(title)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join("\t".join(line) for line in (columns, *lines)))
        return
    table: Any = Table(*columns)
    for line in lines:
        table.add_row(*line, style=style(line))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def side_by_side(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table with a kernel to a column; figures that none has are left out."""
    figures = [described(row) for row in rows]
    lines = [[name, *(known[name] for known in figures)] for name in figures[0]]
    return ["figure", *(row.kernel for row in rows)], [
        line for line in lines if line[0] in ALWAYS or not set(line[1:]) <= {UNKNOWN, "0"}
    ]


def differences(versions: Sequence[Sequence[Row]]) -> list[list[str]]:
    """(architecture, kernel, figure, what each version says of it), where they do not all say the same.

    Of the kernels of the first version; one line for a kernel that another lacks.
    """
    known = [{(row.architecture, row.kernel): described(row) for row in rows} for rows in versions]
    lines = []
    for key, figures in known[0].items():
        if all(key in version for version in known):
            said = {name: [version[key][name] for version in known] for name in figures}
        else:
            said = {"kernel": ["there" if key in version else "not there" for version in known]}
        lines += [[*key, name, *cells] for name, cells in said.items() if len(set(cells)) > 1]
    return lines
