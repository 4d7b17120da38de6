"""How far from the oracle a correct implementation may land, and the one helper that says so.

The promise is per element: |x - x64| <= eta + C·u·cond(x), with cond from `oracle`, u the unit
roundoff of the dtype and eta for underflow only. There is no other tolerance, and no argument for one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .oracle import ACCUMULATION_ROUNDOFF, ROUNDOFF, Oracle, Results

Arithmetic = Literal["kernel", "wide"]
"""kernel: products of 16-bit operands, for which P and dS are rounded once, delta from the rounded out.
wide: everything in float32, delta at most from the rounded out. Both round results once."""

ROUNDINGS: dict[Arithmetic, float] = {"kernel": 2.0, "wide": 1.0}
"""C in 16 bits, an a-priori bound to first order (Higham 2002, section 3.1): the number of roundings to
16 bits between the inputs and any result. In a kernel those are of P, then out; of P, then dv; of dS,
then dq or dk; and delta inherits the two of out, weighted by A. It does not rely on errors that cancel
over many channels: with one value channel, or one that outweighs the others, nothing cancels.
`precise` changes no C, only what it multiplies: delta inherits nothing, so A leaves cond (`oracle.solve`)."""

FULL_PRECISION = {
    "out": 4.0,
    "dq": 3.0,
    "dk": 5.0,
    "dv": 16.0,
    "dbias": 5.0,
    "dsinks": 5.0,
    "dslopes": 5.0,
    "dtable": 5.0,
}
"""C where nothing is narrower than the accumulation (float32, float64). Sums of n terms have no useful
a-priori bound, so these are measured ones over the distributions of this room, rounded up."""

STATISTICS = {"lse": 4e-7 * 2**24, "max_logit": 16.0, "entropy": 4.0, "key_mass": 4.0}
"""C of what is never rounded to 16 bits, in units of the accumulation's roundoff; measured, rounded up."""

SCORE_ERRORS = 8.0
"""What a score and a sum in float32 may be wrong by, in roundoffs, where C counts 16-bit roundings."""


class Finding(NamedTuple):
    """The worst element of one output: the constant C that it would have needed, and the one it may."""

    output: str
    constant: float
    allowed: float
    element: tuple[int, ...]
    actual: float
    expected: float

    @property
    def ok(self) -> bool:
        return self.constant <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.output}{list(self.element)} = {self.actual!r}, oracle {self.expected!r}: "
            f"C = {self.constant if self.constant < 1e30 else float('inf'):.4g}, allowed {self.allowed:.3g}"
        )


def assert_within_budget(actual: Results, oracle: Oracle, arithmetic: Arithmetic) -> dict[str, float]:
    """Raise AssertionError unless every element of every output given is within its budget.

    A NaN is outside unless the oracle has one there too; infinities must be equal. Returns the worst
    constant C by output: scale-free, so it can be published and compared.
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
        if x is None:
            continue
        assert expected is not None, f"the problem has no {name}"
        assert x.shape == expected.shape, f"{name} has shape {tuple(x.shape)}, not {tuple(expected.shape)}"
        if x.numel():
            findings.append(_worst(name, x.detach(), expected, oracle, arithmetic))
    return findings


def _worst(name: str, x: Tensor, expected: Tensor, oracle: Oracle, arithmetic: Arithmetic) -> Finding:
    allowed, unit = _budget(name, oracle, arithmetic)
    error = (x.double() - expected).abs() - _underflow(name, x.dtype, expected, oracle)
    # the smallest normal number keeps 0/0 out: an exact zero with nothing to round has C = 0
    constant = (error / unit.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0.0)
    same = (x.double() == expected) | (x.isnan() & expected.isnan())
    constant = torch.where(same, 0.0, constant.nan_to_num(nan=torch.inf))
    index = tuple(int(i) for i in torch.unravel_index(constant.argmax(), constant.shape))
    return Finding(name, float(constant[index]), allowed, index, float(x[index]), float(expected[index]))


def _budget(name: str, oracle: Oracle, arithmetic: Arithmetic) -> tuple[float, Tensor]:
    """C, and for each element what it multiplies."""
    accumulation = ACCUMULATION_ROUNDOFF[oracle.dtype]
    cond, score_cond = getattr(oracle.cond, name), getattr(oracle.score_cond, name)
    errors = accumulation * (cond + score_cond)
    if name in STATISTICS:
        return STATISTICS[name], errors
    if ROUNDOFF[oracle.dtype] == accumulation:
        return FULL_PRECISION[name], errors
    return ROUNDINGS[arithmetic], ROUNDOFF[oracle.dtype] * cond + SCORE_ERRORS * errors


def _underflow(name: str, dtype: torch.dtype, expected: Tensor, oracle: Oracle) -> Tensor:
    """eta: what numbers below the normal range cost, and the rounding of a result kept more coarsely.

    dbias, dsinks, dslopes and dtable can be that: they have the dtype of their inputs, whatever q has.
    """
    smallest = {torch.float16: 2.0**-24, torch.float64: 1e-300}
    eta = torch.full_like(expected, smallest.get(dtype, 1e-33))
    if oracle.dtype == torch.float16:
        eta = eta + 2.0**-25 * getattr(oracle.underflow, name)
    if name in ("dbias", "dsinks", "dslopes", "dtable") and ROUNDOFF[dtype] > ROUNDOFF[oracle.dtype]:
        eta = eta + ROUNDOFF[dtype] * expected.abs()
    return eta
