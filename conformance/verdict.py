"""What came of a check, as data: a verdict for every question asked, a report of all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .budget import Finding
from .cases import Case
from .yardstick import PASSES

if TYPE_CHECKING:
    from .probes import Observation

RAISED = "raises "
HANGS = f"{RAISED}TimeoutError"

VALUES, LONG_SEQUENCES = "values", "long sequences"
"""The checks whose errors can be published: the others set traps."""


class Verdict(NamedTuple):
    """The answer to one question. detail: what is wrong, empty if nothing is.

    findings: the worst element of each output. yardstick: by output, the error over that of plain PyTorch
    in the same dtype, for readers used to the field's rule; it decides nothing.
    """

    check: str
    case: Case
    dtype: torch.dtype
    detail: str = ""
    findings: Sequence[Finding] = ()
    yardstick: Mapping[str, float] = {}

    @property
    def ok(self) -> bool:
        return not self.detail

    @property
    def constants(self) -> dict[str, float]:
        """The worst constant C of each output."""
        return {finding.output: finding.constant for finding in self.findings}

    @property
    def cause(self) -> str:
        """The detail without numbers and shapes: failures that share one are shown together."""
        broken = [finding for finding in self.findings if not finding.ok]
        if not broken:
            return re.sub(r"[\[(][\d, ]+[\])]", "(…)", self.detail)
        spoilt = [f.output for f in broken if f.actual != f.actual]
        wrong = [f.output for f in broken if f.actual == f.actual]
        parts = [f"NaN in {', '.join(spoilt)}"] * bool(spoilt)
        return "; ".join(parts + [f"{', '.join(wrong)} outside the error budget"] * bool(wrong))

    def __str__(self) -> str:
        return f"{self.check}, {self.case.name}, {dtype_name(self.dtype)}: {self.detail or 'passed'}"


class Failure(NamedTuple):
    """Verdicts that failed of one cause. case: the smallest found that still fails so; code shows it."""

    check: str
    cause: str
    names: Sequence[str]
    case: Case
    dtype: torch.dtype
    detail: str
    code: str


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
    """Everything a check found. str() is readable; `to_dict` is for JSON; see `report` for more.

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
        from .report import text

        return text(self)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def given_fields(case: Case) -> dict[str, Any]:
    """What of a case differs from its defaults, but for the name."""
    plain = asdict(Case(case.name))
    return {
        field.name: getattr(case, field.name)
        for field in fields(case)
        if getattr(case, field.name) != plain[field.name]
    }


def _number(x: float) -> float | str:
    return x if abs(x) < float("inf") else str(x)
