"""What the kernels without options look like: an option that somebody does not ask for costs nothing.

The record lies in record.json, `python -m undivided.bench.static --record-slots` writes it anew. Its figures
repeat exactly under the Triton it was recorded with, and mean nothing under another.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from .report import Row, Variant

TOLERANCE = 0.01
_FILE = Path(__file__).with_name("record.json")


class Entry(NamedTuple):
    """One kernel. slots: of the main loop, per score and thread; registers: shown, not compared."""

    architecture: str
    kernel: str
    head_dim: int
    dtype: str
    options: str
    slots: float
    registers: int
    spills_in_loops: int


def cases() -> list[tuple[str, Variant]]:
    """What is recorded."""
    kinds = itertools.product(("sm_80", "sm_90"), (64, 128), ("plain", "causal"))
    return [(name, Variant(head_dim, "bfloat16", options)) for name, head_dim, options in kinds]


@functools.cache
def recorded() -> tuple[str, dict[tuple[str, str, Variant], Entry]]:
    """The Triton it was recorded with, and its entries by architecture, kernel and variant."""
    content = json.loads(_FILE.read_text())
    entries = [Entry(**entry) for entry in content["kernels"]]
    return content["triton"], {
        (x.architecture, x.kernel, Variant(x.head_dim, x.dtype, x.options)): x for x in entries
    }


def write(rows: Sequence[Row]) -> None:
    """Take the place of the record; kernels without a loop over scores have no entry."""
    entries = []
    for row in rows:
        figures, loop, of = row.figures, row.main_loop, row.variant
        if figures is None or loop is None or loop.slots is None or figures.spills_in_loops is None:
            continue
        seen = round(loop.slots, 4), figures.registers, figures.spills_in_loops
        entries.append(Entry(row.architecture, row.kernel, of.head_dim, of.dtype, of.options, *seen))
    lines = ",\n".join(f"  {json.dumps(entry._asdict())}" for entry in sorted(entries))
    _FILE.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": [\n{lines}\n ]\n}}\n')
    recorded.cache_clear()


def differences(row: Row) -> Iterator[str]:
    """How a row differs from what was recorded of it under the same Triton, in sentences."""
    version, entries = recorded()
    entry = entries.get((row.architecture, row.kernel, row.variant))
    if entry is None or row.figures is None or row.triton != version:
        return
    slots = None if row.main_loop is None else row.main_loop.slots
    if slots is None or abs(slots - entry.slots) > TOLERANCE * entry.slots:
        found = "no" if slots is None else f"{slots:.2f}"
        yield f"{found} slots per score, {entry.slots:.2f} are recorded ({entry.registers} registers)"
    if row.figures.spills_in_loops != entry.spills_in_loops:
        yield f"{row.figures.spills_in_loops} spills inside loops, {entry.spills_in_loops} are recorded"


def said(rows: Sequence[Row]) -> str:
    """How many of the rows were compared, and with what; or that none could be."""
    version, entries = recorded()
    known = [row for row in rows if (row.architecture, row.kernel, row.variant) in entries]
    if any(row.triton != version for row in known):
        return f"not compared with the record, which is of triton {version}"
    return f"{len(known)} kernels compared with the record of triton {version}"
