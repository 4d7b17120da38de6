"""What torch.compile should know of functions it cannot look into."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_when_traced(call: _F) -> _F:
    """Let torch.compile call the function while tracing and keep its answer as a constant.

    `torch.compiler.assume_constant_result` sets this attribute too, but imports the whole compiler,
    which takes seconds.
    """
    vars(call)["_dynamo_marked_constant"] = True
    return call


def each_once(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Views in place of tensors that occur before: torch.compile gives no Function the same tensor twice."""
    given: list[Tensor | None] = []
    for x in tensors:
        given.append(x.view_as(x) if x is not None and any(x is y for y in given) else x)
    return given
