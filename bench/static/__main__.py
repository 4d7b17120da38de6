"""Compile the shipped kernels for GPUs that need not be there, and judge what came out.

Exit status 1 if a kernel misses a gate, or a plain or causal one differs from what is recorded of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import triton
from triton import knobs

from ...kernels import evidence
from . import document, record
from .gates import failures
from .processes import in_processes
from .report import Row, Variant
from .tables import described, show
from .targets import TARGETS
from .variants import compile_variant, full, sample

FIGURES = (
    *(
        "registers",
        "spills (in loops)",
        "shared KiB",
        "warps x stages",
        "CTAs/SM",
        "matrix",
        "slots per score",
    ),
    *("loop: exp2", "loop: ffma", "exp2 under wgmma", "bytes spilled"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, compile, print; 1 if a gate was missed."""
    parser = argparse.ArgumentParser(prog="python -m undivided.bench.static", description=__doc__)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sample", action="store_true", help="what a change is checked with (default)")
    amount.add_argument("--full", action="store_true", help="every shipped variant; half an hour")
    amount.add_argument(
        "--record-slots", action="store_true", help="write record.json anew; a minute, pinned triton"
    )
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="ARCH")
    parser.add_argument("--options", nargs="+", metavar="NAME", help="only these, 'plain' or 'mask' say")
    parser.add_argument("--head-dim", nargs="+", type=int, metavar="D", help="only these")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there")
    parser.add_argument("--record", action="store_true", help="note in evidence.json what compiled (--full)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels do not compile")
    if options.record and (not options.full or options.options or options.head_dim):
        parser.error("--record speaks of whole architectures: --full, without --options and --head-dim")
    if options.record_slots and (options.arch != [*TARGETS] or options.options or options.head_dim):
        parser.error("--record-slots is of everything in record.json: without --arch, --options, --head-dim")

    cases = [
        (architecture, variant)
        for architecture, variant in (
            full() if options.full else record.cases() if options.record_slots else sample()
        )
        if architecture in options.arch
        and (options.options is None or variant.options in options.options)
        and (options.head_dim is None or variant.head_dim in options.head_dim)
    ]
    rows = compile_all(cases, options.jobs)
    if options.record_slots:
        record.write(rows)
    misses = [[*failures(row), *record.differences(row)] for row in rows]
    lines = []
    for row, missed in zip(rows, misses):
        known = described(row)
        cells = [known[name] for name in FIGURES]
        lines.append([row.architecture, row.kernel, str(row.variant), *cells, "; ".join(missed) or "pass"])
    show(
        ("architecture", "kernel", "variant", *FIGURES, "gates"),
        lines,
        style=lambda line: None if line[-1] == "pass" else "bold red",
    )
    missed_rows = sum(map(bool, misses))
    print(f"triton {triton.__version__}: {len(rows)} kernels, {missed_rows} miss a gate")
    listened = [row.figures.assembly for row in rows if row.figures and row.figures.assembly]
    for assembler in sorted({assembly.assembler for assembly in listened}):
        print(f"gluon kernels: assembled by {assembler}")
    print(record.said(rows))
    if options.json:
        options.json.write_text(document.written(rows, missed=misses))
    if options.record:
        note_evidence(rows)
    return 1 if missed_rows or not rows else 0


def compile_all(cases: Sequence[tuple[str, Variant]], jobs: int) -> list[Row]:
    """Compile every case, in as many processes as asked; says on stderr how far it is."""

    def remarks(row: Row) -> list[str]:
        return [f"{row.kernel}: {missed}" for missed in (*failures(row), *record.differences(row))]

    return in_processes(compile_variant, cases, jobs, remarks)


def note_evidence(rows: Sequence[Row]) -> None:
    """Note the implementations and architectures of which every kernel compiled."""
    tried = {(row.variant.implementation, row.architecture) for row in rows}
    failed = {(row.variant.implementation, row.architecture) for row in rows if row.figures is None}
    source = "python -m undivided.bench.static --full"
    evidence.record(
        evidence.Evidence(*what, triton.__version__, "compiled", source) for what in tried - failed
    )


if __name__ == "__main__":
    raise SystemExit(main())
