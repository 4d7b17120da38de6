"""Compile the shipped kernels for GPUs that need not be there, and judge what came out.

Exit status 1 if a kernel misses a gate.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from ...kernels import evidence
from .gates import failures
from .report import Row, Variant
from .targets import TARGETS
from .variants import compile_variant, full, sample

COLUMNS = (
    *("architecture", "kernel", "variant", "regs", "spills (loops)", "shared KiB", "warps x stages"),
    *("CTAs/SM", "matrix", "slots", "exp2", "ffma", "gates"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, compile, print; 1 if a gate was missed."""
    parser = argparse.ArgumentParser(prog="python -m undivided.bench.static", description=__doc__)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sample", action="store_true", help="what a change is checked with (default)")
    amount.add_argument("--full", action="store_true", help="every shipped variant; half an hour")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="ARCH")
    parser.add_argument("--options", nargs="+", metavar="NAME", help="only these, 'plain' or 'mask' say")
    parser.add_argument("--head-dim", nargs="+", type=int, metavar="D", help="only these")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there")
    parser.add_argument("--record", action="store_true", help="note in evidence.json what compiled (--full)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels do not compile")
    if options.record and (not options.full or options.options or options.head_dim):
        parser.error("--record speaks of whole architectures: --full, without --options and --head-dim")

    cases = [
        (architecture, variant)
        for architecture, variant in (full() if options.full else sample())
        if architecture in options.arch
        and (options.options is None or variant.options in options.options)
        and (options.head_dim is None or variant.head_dim in options.head_dim)
    ]
    rows = compile_all(cases, options.jobs)
    misses = [list(failures(row)) for row in rows]
    show([(*_cells(row), "; ".join(missed) or "pass") for row, missed in zip(rows, misses)])
    missed_rows = sum(map(bool, misses))
    print(f"triton {triton.__version__}: {len(rows)} kernels, {missed_rows} miss a gate")
    if options.json:
        document = {
            "triton": triton.__version__,
            "kernels": [dataclasses.asdict(row) | {"missed": m} for row, m in zip(rows, misses)],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.record:
        record(rows)
    return 1 if missed_rows or not rows else 0


def compile_all(cases: Sequence[tuple[str, Variant]], jobs: int) -> list[Row]:
    """Compile every case, in as many processes as asked; says on stderr how far it is."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        pending = {pool.submit(compile_variant, *case): case for case in cases}
        for done, future in enumerate(concurrent.futures.as_completed(pending), 1):
            architecture, variant = pending[future]
            made = future.result()
            print(f"[{done}/{len(cases)}] {architecture} {variant}: {len(made)} kernels", file=sys.stderr)
            for row in made:
                for missed in failures(row):
                    print(f"    {row.kernel}: {missed}", file=sys.stderr)
    return [row for future in pending for row in future.result()]


def record(rows: Sequence[Row]) -> None:
    """Note the architectures of which every kernel compiled and fits."""
    architectures = {row.architecture for row in rows}
    failed = {row.architecture for row in rows if row.figures is None}
    source = "python -m undivided.bench.static --full"
    evidence.record(
        evidence.Evidence("triton", name, triton.__version__, "compiled", source)
        for name in architectures - failed
    )


def _cells(row: Row) -> tuple[str, ...]:
    figures = row.figures
    head = (row.architecture, row.kernel, str(row.variant))
    if figures is None:
        return (*head, *[""] * (len(COLUMNS) - len(head) - 1))
    loop = figures.main_loop
    return (
        *head,
        str(figures.registers),
        f"{figures.spills} ({figures.spills_in_loops})",
        f"{figures.shared / 1024:.0f}",
        f"{figures.num_warps} x {figures.num_stages}",
        str(figures.ctas_per_sm or ""),
        " ".join(figures.matrix),
        f"{loop.slots:.2f}" if loop and loop.slots else "",
        str(loop.exp2) if loop else "",
        str(loop.ffma) if loop else "",
    )


def show(lines: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join("\t".join(line) for line in (COLUMNS, *lines)))
        return
    table: Any = Table(*COLUMNS)
    for line in lines:
        table.add_row(*line, style=None if line[-1] == "pass" else "bold red")
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
