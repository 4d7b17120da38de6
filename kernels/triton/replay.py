"""Calls that were made before, made again: what follows from their shapes alone is not worked out anew.

Triton binds and specialises every argument at every launch, which takes longer than a short kernel runs.
What comes of it, and of filling in the arguments, is the same for calls that agree in their options, and
whose tensors agree in shape, strides, dtype and whether the address is a multiple of 16 bytes. Such a call
needs addresses, and Triton's launcher. Whoever listens to launches, and what this Triton does otherwise than
those that were looked at, gets the ordinary launch.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .launch import scratch

MOST_REMEMBERED = 512
_known: dict[Hashable, _Call | None] = {}
"""By all that decides what is launched, but for the device: `_Call` says that. No tensor is kept.
None: met once, and what is never met again is not worth more."""

EXPECTED = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,",
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())",
)
"""How `JITFunction.run` ends in Triton 3.6 to 3.9: what `_Start.again` does."""


class Described(Protocol):
    """A launch: `launch.Launch`, or one of `gluon`. A parameter that is made from a tensor has it as
    `tensor`; its `remake()` gives what makes the like from another tensor."""

    @property
    def kernel(self) -> JITFunction[Any]: ...
    @property
    def programs(self) -> int: ...
    @property
    def needs_scratch(self) -> bool: ...
    def recall(self, device: torch.device) -> None: ...
    def run(self, device: torch.device) -> Any: ...
    def parameters(self) -> list[Any]: ...


class _Start(NamedTuple):
    """A launch without its tensors: which of them are whose pointers, and what is made from which."""

    kernel: JITFunction[Any]
    compiled: Any  # as long as it lives, what it loaded stays
    launcher: Callable[..., None]
    fixed: tuple[Any, ...]  # what the launcher is told before the arguments, but for the stream
    parameters: list[Any]
    pointers: list[tuple[int, int]]
    made: list[tuple[int, int, Callable[[Tensor], Any]]]
    needs_scratch: bool

    def again(self, stream: int, tensors: Sequence[Tensor | None], addresses: Sequence[int]) -> None:
        """Launch it with these tensors."""
        parameters = self.parameters.copy()
        for place, number in self.pointers:
            parameters[place] = addresses[number]
        for place, number, make in self.made:
            parameters[place] = make(tensors[number])  # type: ignore[arg-type]
        if self.needs_scratch:
            triton.set_allocator(scratch)
        programs, function, metadata = self.fixed
        self.launcher(programs, 1, 1, stream, function, metadata, None, None, None, *parameters)


class _Call(NamedTuple):
    """All launches of a call, on a device as Triton names it."""

    device: Any
    starts: list[_Start]

    def may_be_repeated(self) -> bool:
        """Whether it would be launched on the same device, and nobody wants to see how."""
        return (
            bool(self.starts)
            and nobody_listens()
            and self.device == driver.active.get_current_device()
            and not any(start.kernel.pre_run_hooks for start in self.starts)
        )


def run(
    facts: Hashable,
    tensors: Sequence[Tensor | None],
    device: torch.device,
    describe: Callable[[], Sequence[Described]],
) -> None:
    """Start the launches that `describe` returns, one after the other, on the device of the tensors.

    facts and tensors are all that they depend on: tensors in shape, strides, dtype and alignment, and by
    identity where they are a parameter.

    Raises:
        BuildError: one of them could not be built.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(facts, tensors, device, describe)
    key: list[Any] = [facts, device]
    addresses = []
    for x in tensors:
        address = 0
        if x is None:
            key.append(None)
        else:
            address = x.data_ptr()
            key += x.shape, x.stride(), x.dtype, address % 16
        addresses.append(address)
    variant = tuple(key)
    call = _known.get(variant)
    if call is not None and call.may_be_repeated():
        stream = driver.active.get_current_stream(call.device)
        for start in call.starts:
            start.again(stream, tensors, addresses)
        return None
    launches = describe()
    for launch in launches:
        launch.recall(device)
    compiled = [launch.run(device) for launch in launches]
    if variant not in _known:
        _keep(variant, None)
    elif call is None or call.starts:
        _remember(variant, launches, compiled, tensors)
    return None


def forget() -> None:
    """Let every call be its first."""
    _known.clear()


_switches = operator.attrgetter("launch_enter_hook.calls", "launch_exit_hook.calls", "debug")


def nobody_listens() -> bool:
    """Whether no hook wants to see launches, and no switch changes what is compiled."""
    try:
        return not any(_switches(knobs.runtime)) and not (
            knobs.compilation.instrumentation_mode
            or getattr(knobs.runtime, "add_stages_inspection_hook", None)
        )
    except AttributeError:  # a hook of another kind
        return False


@functools.cache
def _as_expected() -> bool:
    """Whether this Triton launches as `_Start.again` does."""
    try:
        source = inspect.getsource(JITFunction.run)
    except (OSError, TypeError):
        return False
    return all(line in source for line in EXPECTED)


def _remember(
    variant: Hashable,
    launches: Sequence[Described],
    compiled: Sequence[Any],
    tensors: Sequence[Tensor | None],
) -> None:
    """Keep what `_Start.again` needs; no starts if what is launched depends on more than the variant."""
    numbers = {id(x): number for number, x in enumerate(tensors) if x is not None}
    # With one tensor in two places, nobody can tell which of them a parameter is.
    if len(numbers) + sum(x is None for x in tensors) < len(tensors) or not nobody_listens():
        return
    starts = []
    for launch, kernel in zip(launches, compiled, strict=True):
        start = _start(launch, kernel, numbers)
        if start is None:
            _keep(variant, _Call(None, []))
            return
        starts.append(start)
    _keep(variant, _Call(driver.active.get_current_device(), starts))


def _keep(variant: Hashable, call: _Call | None) -> None:
    if len(_known) >= MOST_REMEMBERED and variant not in _known:
        _known.clear()
    _known[variant] = call


def _start(launch: Described, compiled: Any, numbers: dict[int, int]) -> _Start | None:
    """The launch without its tensors, or None: it was Triton's interpreter that ran, or a copy that was made
    on the way is among the parameters."""
    if getattr(compiled, "packed_metadata", None) is None or not _as_expected():
        return None
    parameters = launch.parameters()
    pointers, made = [], []
    for place, x in enumerate(parameters):
        number = numbers.get(id(getattr(x, "tensor", x)))
        if number is not None:
            if isinstance(x, Tensor):
                pointers.append((place, number))
            else:
                made.append((place, number, x.remake()))
            parameters[place] = None
        elif _has_tensor(x):
            return None
    fixed = launch.programs, compiled.function, compiled.packed_metadata
    return _Start(
        launch.kernel, compiled, compiled.run, fixed, parameters, pointers, made, launch.needs_scratch
    )


def _has_tensor(x: Any) -> bool:
    """Whether a parameter is a tensor, or is made of or from one."""
    if isinstance(x, tuple):
        return any(map(_has_tensor, x))
    return isinstance(x, Tensor) or hasattr(x, "tensor")
