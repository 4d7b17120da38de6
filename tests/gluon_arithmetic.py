"""Arithmetic of simulated kernels: scalars as in C, blocks as torch tensors, maxima that pass over NaN."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gluon_hardware import require
from gluon_memory import Product

Value = Any
"""A block tensor, or a scalar."""


class Scalar(int):
    """An int32 of a kernel. Division truncates, and nothing may overflow."""

    def __new__(cls, value: int) -> Scalar:
        require(-(2**31) <= value < 2**31, f"{int(value)} overflows int32")
        return super().__new__(cls, value)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        if bitcast:
            return Float(torch.tensor(int(self), dtype=torch.int32).view(dtype).item())
        if dtype.is_floating_point:
            return Float(self)
        return Wide(self) if dtype == torch.int64 else Scalar(self)

    def __neg__(self) -> Scalar:
        return type(self)(-int(self))


class Wide(Scalar):
    """An int64 of a kernel."""

    def __new__(cls, value: int) -> Wide:
        return int.__new__(cls, value)


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int:
    return a - b * _truncated(a, b)


def _operation(compute: Callable[[int, int], int], reflected: bool) -> Callable[[Scalar, object], Any]:
    def method(self: Scalar, other: object) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        wide = isinstance(self, Wide) or isinstance(other, Wide)
        a, b = (int(other), int(self)) if reflected else (int(self), int(other))
        return (Wide if wide else Scalar)(compute(a, b))

    return method


INTEGER = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": _truncated,
    "mod": _remainder,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
for _name, _compute in INTEGER.items():
    setattr(Scalar, f"__{_name}__", _operation(_compute, reflected=False))
    setattr(Scalar, f"__r{_name}__", _operation(_compute, reflected=True))


class Float(float):
    """A float32 of a kernel: every result is rounded to it."""

    def __new__(cls, value: float) -> Float:
        return super().__new__(cls, torch.tensor(float(value), dtype=torch.float32).item())

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        if bitcast:
            return Scalar(int(torch.tensor(float(self), dtype=torch.float32).view(dtype).item()))
        return Float(self) if dtype.is_floating_point else Scalar(int(self))

    def __neg__(self) -> Float:
        return Float(-float(self))


def _rounded(compute: Callable[[float, float], float], reflected: bool) -> Callable[[Float, object], Any]:
    def method(self: Float, other: object) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        a, b = (float(other), float(self)) if reflected else (float(self), float(other))
        return Float(compute(a, b))

    return method


for _name in ("add", "sub", "mul", "truediv"):
    setattr(Float, f"__{_name}__", _rounded(getattr(operator, _name), reflected=False))
    setattr(Float, f"__r{_name}__", _rounded(getattr(operator, _name), reflected=True))


def simulated_range(*bounds: int) -> Iterator[Scalar]:
    """`range` in a kernel: its counter is computed there."""
    return map(Scalar, range(*bounds))


def scalar(x: Value) -> Value:
    return {int: Scalar, float: Float}.get(type(x), lambda it: it)(x)


def tensors(*values: Value) -> Iterator[Tensor]:
    """Numbers as tensors of the dtype that they have beside the others."""
    kind = next((x.dtype for x in values if isinstance(x, Tensor) and x.dtype != torch.bool), None)
    for x in values:
        require(not isinstance(x, Product), "an accumulator in flight is used")
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, float) and (kind is None or not kind.is_floating_point):
            yield torch.tensor(x, dtype=torch.float32)
        else:
            yield torch.tensor(x, dtype=kind or torch.int32)


def where(condition: Value, a: Value, b: Value) -> Value:
    if not any(isinstance(x, Tensor) for x in (condition, a, b)):
        return scalar(a if condition else b)
    a, b = tensors(a, b)
    return torch.where(torch.as_tensor(condition), a, b)


def maximum(a: Value, b: Value) -> Value:
    """Of a number and NaN, the number."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return scalar(max(a, b))
    return torch.fmax(*tensors(a, b))


def minimum(a: Value, b: Value) -> Value:
    """Of a number and NaN, the number."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return scalar(min(a, b))
    return torch.fmin(*tensors(a, b))


def reduce_max(x: Tensor, axis: int | None = None, keep_dims: bool = False) -> Tensor:
    """Of numbers and NaN, the numbers'."""
    axes = list(range(x.ndim)) if axis is None else [axis]
    if not x.is_floating_point():
        return x.amax(axes, keep_dims)
    nothing = x.isnan()
    top = x.masked_fill(nothing, -torch.inf).amax(axes, keep_dims)
    return top.masked_fill(nothing.all(axes[0], keep_dims), torch.nan) if axis is not None else top


def reduce_min(x: Tensor, axis: int | None = None, keep_dims: bool = False) -> Tensor:
    return -reduce_max(-x, axis, keep_dims)


def reduce_sum(x: Tensor, axis: int | None = None, keep_dims: bool = False) -> Tensor:
    return x.sum(list(range(x.ndim)) if axis is None else axis, keep_dims, dtype=x.dtype)


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def fma(a: Value, b: Value, c: Value) -> Value:
    """Rounded once, but for what float64 itself rounds."""
    if not isinstance(a, Tensor):
        return a * b + c
    return (a.double() * b + c).to(a.dtype)


def elementwise(
    of_tensors: Callable[[Tensor], Tensor], of_numbers: Callable[[float], float]
) -> Callable[..., Value]:
    def compute(x: Value) -> Value:
        return of_tensors(x) if isinstance(x, Tensor) else of_numbers(x)

    return compute


def cast(x: Value, dtype: torch.dtype) -> Value:
    return x.to(dtype) if hasattr(x, "to") else scalar(x)
