"""What came of one question: a verdict, and what fails of one cause; what a probe observed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import torch

from .budget import Finding
from .cases import Case

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


class Observation(NamedTuple):
    """What was found. promised: what the target's claims promise; ok: whether they are the same words.

    Both are None where nothing was promised.
    """

    question: str
    found: str
    promised: str | None = None
    ok: bool | None = None


class Failure(NamedTuple):
    """Verdicts that failed of one cause. case: the smallest found that still fails so; code shows it."""

    check: str
    cause: str
    names: Sequence[str]
    case: Case
    dtype: torch.dtype
    detail: str
    code: str


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
