"""A report of everything a check found: as data, and for people: in the terminal, as plain text, as a page.

These three show the same sections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .oracle import Results
from .page import Section, page
from .questions import CLAIMED
from .verdict import (
    LONG_SEQUENCES,
    RAISED,
    VALUES,
    Failure,
    Observation,
    Verdict,
    dtype_name,
    given_fields,
)
from .yardstick import PASSES

if TYPE_CHECKING:
    from rich.console import Console

GOOD, BAD, OPEN = "✓", "✗", "·"
NAMED = 4
"""How many of the cases that fail of one cause are named."""


class Worst(NamedTuple):
    """Over many questions: the largest constant C of an output, and what the field's rule says of it.

    yardstick_failed: how often, of yardstick_asked, the error was more than 2 (out) or 3 times that of
    plain PyTorch.
    """

    constant: float
    allowed: float
    yardstick_failed: int = 0
    yardstick_asked: int = 0


@dataclass(frozen=True)
class Report:
    """Everything a check found. str() is readable; `to_dict` is for JSON.

    skipped: how many cases were not asked, by the claim that is missing.
    """

    target: str
    note: str
    environment: Mapping[str, str]
    level: str
    verdicts: Sequence[Verdict]
    observations: Sequence[Observation]
    skipped: Mapping[str, int]
    failures: Sequence[Failure]

    @property
    def ok(self) -> bool:
        """Whether every verdict is good, and nothing observed is other than claimed."""
        return all(v.ok for v in self.verdicts) and all(o.ok is not False for o in self.observations)

    def worst(self) -> dict[tuple[str, torch.dtype], Worst]:
        """By output and dtype, over the checks of values."""
        found: dict[tuple[str, torch.dtype], Worst] = {}
        for verdict in self.verdicts:
            for finding in verdict.findings if verdict.check in (VALUES, LONG_SEQUENCES) else ():
                key = finding.output, verdict.dtype
                before = found.get(key, Worst(0.0, finding.allowed))
                failed, asked = before[2:]
                ratio = verdict.yardstick.get(finding.output)
                if ratio is not None:
                    failed, asked = failed + (ratio > PASSES[finding.output]), asked + 1
                constant = max(finding.constant, before.constant)
                found[key] = Worst(constant, finding.allowed, failed, asked)
        return found

    def assert_ok(self) -> None:
        """Raise AssertionError, with the whole report, unless everything is right."""
        assert self.ok, f"\n{self}"

    def to_dict(self) -> dict[str, Any]:
        """Nothing but dicts, lists, strings and numbers; infinite or undefined numbers as strings."""
        return {
            "target": self.target,
            "note": self.note,
            "ok": self.ok,
            "level": self.level,
            "environment": dict(self.environment),
            "verdicts": [
                {
                    "check": v.check,
                    "case": v.case.name,
                    "dtype": dtype_name(v.dtype),
                    "ok": v.ok,
                    "detail": v.detail,
                    "constants": {f.output: _number(f.constant) for f in v.findings},
                    "allowed": {f.output: f.allowed for f in v.findings},
                    "ratio_to_plain_pytorch": {name: _number(x) for name, x in v.yardstick.items()},
                }
                for v in self.verdicts
            ],
            "observations": [o._asdict() for o in self.observations],
            "not_asked": dict(self.skipped),
            "failures": [
                {
                    "check": f.check,
                    "cause": f.cause,
                    "cases": list(f.names),
                    "smallest": {name: str(x) for name, x in given_fields(f.case).items()},
                    "dtype": dtype_name(f.dtype),
                    "detail": f.detail,
                    "code": f.code,
                }
                for f in self.failures
            ],
        }

    def __str__(self) -> str:
        return text(self)


def sections(report: Report) -> list[Section]:
    """What there is to say, in order; nothing in it that would be empty."""
    found = [_checks(report), _values(report), _meaning(report), _not_asked(report)]
    return [section for section in found if section.rows] + _failures(report)


def title(report: Report) -> str:
    good = sum(verdict.ok for verdict in report.verdicts)
    verdict = "right" if report.ok else "WRONG"
    other = sum(observation.ok is False for observation in report.observations)
    means = f"; it means {other} of {len(report.observations)} things otherwise than it claims" * bool(other)
    return f"{report.target}: {verdict}, {good} of {len(report.verdicts)} questions passed{means}"


def facts(report: Report) -> str:
    """Where the report comes from, in a line."""
    told = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    return f"{report.note + '; ' if report.note else ''}level {report.level}; {told}"


def html(report: Report) -> str:
    """One self-contained page."""
    return page(title(report), [Section("Where", facts(report)), *sections(report)])


def text(report: Report) -> str:
    """Plain text."""
    lines = [title(report), facts(report)]
    for section in sections(report):
        lines += ["", section.heading]
        if section.rows:
            lines += _aligned([section.columns, *section.rows])
        lines += [f"  {line}".rstrip() for line in section.text.splitlines()]
    return "\n".join(lines)


def show(report: Report, console: Console) -> None:
    """The same with colours and tables."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(title(report), style="bold green" if report.ok else "bold red"))
    console.print(Text(facts(report), style="dim"))
    for section in sections(report):
        console.print(Text(f"\n{section.heading}", style="bold"))
        if section.rows:
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
            for name in section.columns:
                table.add_column(name, overflow="fold")
            for row in section.rows:
                table.add_row(*(Text(str(cell), style=_style(str(cell))) for cell in row))
            console.print(table)
        if section.text:
            console.print(Text(section.text), soft_wrap=True)


def _checks(report: Report) -> Section:
    asked = Counter(verdict.check for verdict in report.verdicts)
    passed = Counter(verdict.check for verdict in report.verdicts if verdict.ok)
    rows = [
        (f"{GOOD if passed[name] == count else BAD} {name}", passed[name], count)
        for name, count in asked.items()
    ]
    return Section("Checks", "", ("check", "passed", "asked"), rows)


def _values(report: Report) -> Section:
    rows = []
    for (output, dtype), worst in sorted(report.worst().items(), key=lambda item: _order(*item[0])):
        mark = GOOD if worst.constant <= worst.allowed else BAD
        rule = f"{worst.yardstick_asked - worst.yardstick_failed} of {worst.yardstick_asked}"
        rows.append(
            (
                output,
                dtype_name(dtype),
                f"{mark} {_constant(worst.constant)}",
                f"{worst.allowed:.3g}",
                rule if worst.yardstick_asked else "not asked",
            )
        )
    columns = ("output", "dtype", "worst C", "allowed C", "within 2× rule (gradients 3×)")
    return Section("Worst errors: |x - x64| <= eta + C·u·cond(x)", "", columns, rows)


def _constant(x: float) -> str:
    """Errors of what must be exact need a C without bound."""
    return f"{x:.3g}" if x < 1e30 else "inf"


def _order(output: str, dtype: object) -> tuple[int, str]:
    return Results._fields.index(output), str(dtype)


def _meaning(report: Report) -> Section:
    rows = [
        (
            f"{GOOD if o.ok else BAD if o.ok is False else OPEN} {o.question}",
            o.found,
            "" if o.ok else o.promised or "nothing",
        )
        for o in report.observations
    ]
    return Section("What it means", "", ("question", "found", "promised, if it is another"), rows)


def _not_asked(report: Report) -> Section:
    rows = sorted(report.skipped.items(), key=lambda item: -item[1])
    return Section("Not asked", "", ("not claimed, or not possible here", "cases"), rows)


def _failures(report: Report) -> list[Section]:
    found = []
    # What gives wrong numbers in many cases first, what raises last: it may only be less than was claimed.
    for failure in sorted(report.failures, key=lambda x: (x.cause.startswith(RAISED), -len(x.names))):
        names = ", ".join(failure.names[:NAMED])
        more = len(failure.names) - NAMED
        where = f"Cases: {names}" + (f", and {more} more" if more > 0 else "") + "."
        if failure.check in CLAIMED:
            where += f" To leave this out, claim {CLAIMED[failure.check]}=false."
        code = "\n".join(f"    {line}" for line in failure.code.splitlines())
        words = f"{where}\n\n{dtype_name(failure.dtype)}, smallest case: {failure.detail}\n\n{code}"
        found.append(Section(f"{BAD} {failure.check}: {failure.cause}", words))
    return found


def _aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]


def _style(cell: str) -> str:
    return {GOOD: "green", BAD: "bold red"}.get(cell[:1], "")


def _number(x: float) -> float | str:
    return x if abs(x) < float("inf") else str(x)
