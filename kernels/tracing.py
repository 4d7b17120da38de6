"""What torch.compile should know of functions it cannot look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_when_traced(call: _F) -> _F:
    """Let torch.compile call the function while tracing and keep its answer as a constant.

    `torch.compiler.assume_constant_result` sets this attribute too, but imports the whole compiler,
    which takes seconds.
    """
    vars(call)["_dynamo_marked_constant"] = True
    return call
