"""How far from the oracle a correct implementation may land, and the one helper that says so.

The promise is per element: |x - x64| <= eta + C·u·cond(x), with cond from `oracle`, u the unit
roundoff of the dtype, eta for underflow only. C is what the arithmetic of a fused kernel costs,
measured over the distributions of this room; there is no other tolerance and no argument for one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .oracle import ACCUMULATION_ROUNDOFF, ROUNDOFF, Oracle, Results

Arithmetic = Literal["kernel", "wide"]
"""kernel: 16-bit operands, P and dS rounded once, delta from the rounded out, results rounded once.
wide: everything in float32 (or float64), results rounded once. The same for float32 and float64."""

_WIDE = {"out": 4.0, "dq": 2.0, "dk": 5.0, "dv": 16.0, "dbias": 5.0}
CONSTANTS: dict[tuple[Arithmetic, torch.dtype], dict[str, float]] = {
    ("kernel", torch.float16): {"out": 2.0, "dq": 1.0, "dk": 1.0, "dv": 2.5, "dbias": 1.0},
    ("kernel", torch.bfloat16): {"out": 2.0, "dq": 1.0, "dk": 1.0, "dv": 2.5, "dbias": 1.0},
    ("kernel", torch.float32): _WIDE,
    ("kernel", torch.float64): _WIDE,
    ("wide", torch.float16): {"out": 1.0, "dq": 0.5, "dk": 1.0, "dv": 2.0, "dbias": 1.0},
    ("wide", torch.bfloat16): {"out": 1.0, "dq": 0.5, "dk": 1.0, "dv": 2.0, "dbias": 1.0},
    ("wide", torch.float32): _WIDE,
    ("wide", torch.float64): _WIDE,
}
LSE_CONSTANT = 4e-7 * 2**24
"""In units of the accumulation's roundoff, for every dtype: lse is never rounded to 16 bits."""

SCORE_ERRORS = {torch.float16: 8.0, torch.bfloat16: 8.0, torch.float32: 1.0, torch.float64: 1.0}
"""Errors of a score in units of the accumulation's roundoff times its sum of absolute values. In
16 bits C counts roundings of P, so the few that a long dot product makes are counted here."""


class Finding(NamedTuple):
    """The element of one output that lies furthest outside, or least inside, its budget."""

    output: str
    constant: float
    allowed: float
    index: tuple[int, ...]
    actual: float
    expected: float

    @property
    def ok(self) -> bool:
        return self.constant <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.output}[{', '.join(map(str, self.index))}] = {self.actual!r}, oracle {self.expected!r}: "
            f"C = {self.constant:.3g}, allowed {self.allowed:.3g}"
        )


def assert_within_budget(actual: Results, oracle: Oracle, arithmetic: Arithmetic) -> dict[str, float]:
    """Raise AssertionError unless every element of every output given is within its budget.

    Returns the worst constant C by output: scale-free, so it can be published and compared.
    """
    findings = measure(actual, oracle, arithmetic)
    broken = [str(finding) for finding in findings if not finding.ok]
    assert not broken, "outside the error budget:\n  " + "\n  ".join(broken)
    return {finding.output: finding.constant for finding in findings}


def measure(actual: Results, oracle: Oracle, arithmetic: Arithmetic) -> list[Finding]:
    """The worst element of each output that was given. A shape that differs is an AssertionError."""
    findings = []
    for name, x in actual._asdict().items():
        expected = getattr(oracle.value, name)
        if x is None or x.numel() == 0:
            continue
        assert expected is not None, f"the oracle has no {name}: it was solved without dout or bias"
        assert x.shape == expected.shape, f"{name} has shape {tuple(x.shape)}, not {tuple(expected.shape)}"
        allowed = LSE_CONSTANT if name == "lse" else CONSTANTS[arithmetic, oracle.dtype][name]
        findings.append(_worst(name, x.detach(), expected, oracle, allowed))
    return findings


def _worst(name: str, x: Tensor, expected: Tensor, oracle: Oracle, allowed: float) -> Finding:
    error = (x.double() - expected).abs() - _underflow(name, x.dtype, expected, oracle)
    # the smallest normal number keeps 0/0 out: an exact zero with nothing to round has C = 0
    unit = _unit(name, oracle).clamp_min(torch.finfo(torch.float64).tiny)
    constant = (error / unit).clamp_min(0.0)
    same = (x.double() == expected) | (x.isnan() & expected.isnan())
    constant = torch.where(same, 0.0, constant.nan_to_num(nan=torch.inf))
    index = torch.unravel_index(constant.argmax(), constant.shape)
    coordinate = tuple(int(i) for i in index)
    return Finding(
        name,
        float(constant[coordinate]),
        allowed,
        coordinate,
        float(x[coordinate]),
        float(expected[coordinate]),
    )


def _unit(name: str, oracle: Oracle) -> Tensor:
    """What C multiplies: roundings of the operands, and errors of the scores."""
    cond, score_cond = getattr(oracle.cond, name), getattr(oracle.score_cond, name)
    accumulation = ACCUMULATION_ROUNDOFF[oracle.dtype]
    if name == "lse":
        return accumulation * (cond + score_cond)
    return ROUNDOFF[oracle.dtype] * cond + SCORE_ERRORS[oracle.dtype] * accumulation * score_cond


def _underflow(name: str, dtype: torch.dtype, expected: Tensor, oracle: Oracle) -> Tensor:
    """eta: what numbers below the normal range cost, and the rounding of a result kept more coarsely.

    Only dbias can be that: it has the dtype of bias, whatever q has.
    """
    eta = torch.zeros_like(expected)
    if oracle.dtype == torch.float16 and name != "lse":
        eta = eta + 2.0**-25 * getattr(oracle.underflow, name)
    if name == "dbias" and ROUNDOFF[dtype] > ROUNDOFF[oracle.dtype]:
        eta = eta + ROUNDOFF[dtype] * expected.abs()
    smallest = {torch.float16: 2.0**-24, torch.float64: 1e-300}
    return eta + smallest.get(dtype, 1e-33)
