"""Runs the source of Gluon kernels for Hopper on a CPU, under orders of events that a GPU may never show.

    simulate(launch, seed=3)
    simulate(launch, seed=3, edits=[Edit("hopper_forward", "if right", "if wrong")])

The modules in the kernel's folder are executed once more with `gluon_modules` in Triton's place; those that
are really imported do not notice. `gluon_hardware` says what is modelled and what is not. One program of the
grid runs after the other, in an order drawn from the seed.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gluon_arithmetic import Float, Scalar, Wide, simulated_range
from gluon_hardware import Block
from gluon_language import enter
from gluon_memory import Descriptor, Pointer
from gluon_modules import FakeModule, fake_modules


class Launch(Protocol):
    """What is simulated: `undivided.kernels.gluon.launch.HopperLaunch`.

    Of its arguments, what has a tensor and a box becomes a descriptor, a tensor a pointer. Of its options,
    num_warps counts.
    """

    @property
    def kernel(self) -> Any: ...
    @property
    def programs(self) -> int: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...
    @property
    def constants(self) -> Mapping[str, Any]: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


class Edit(NamedTuple):
    """A bug to plant: in a module of the kernel's folder, old becomes new, wherever it occurs."""

    module: str
    old: str
    new: str


def simulate(launch: Launch, seed: object = 0, edits: Sequence[Edit] = ()) -> None:
    """Run a launch on the CPU tensors in its arguments.

    Raises:
        SimulationError: the kernel breaks a rule of the machine. DeadlockError, one of them: nobody can move.
        ValueError: an edit's old text does not occur.
    """
    function = getattr(launch.kernel, "fn", launch.kernel)
    kernel = _program(function.__module__, tuple(edits)).kernel(function.__name__)
    programs = list(range(launch.programs))
    random.Random(str(seed)).shuffle(programs)
    with _one_thread():
        for program in programs:
            block = Block(program, launch.programs, (seed, program))
            arguments = {name: _argument(x) for name, x in launch.arguments.items()}
            enter(block)
            try:
                body = functools.partial(kernel, **arguments, **launch.constants)
                block.scheduler.run("the first partition", body, launch.options["num_warps"])
            finally:
                enter(None)


def _argument(x: Any) -> Any:
    """As a kernel is given it."""
    if hasattr(x, "box"):
        return Descriptor(x.tensor.detach(), x.box)
    if isinstance(x, Tensor):
        return Pointer(x.detach())
    if isinstance(x, tuple):
        return tuple(map(_argument, x))
    if isinstance(x, float):
        return Float(x)
    if isinstance(x, int) and not isinstance(x, bool):
        return Scalar(x) if -(2**31) <= x < 2**31 else Wide(x)
    return x


@contextmanager
def _one_thread() -> Iterator[None]:
    """Each partition has a thread of its own: none of them should start more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Program:
    """The modules of a folder, executed with the fakes, and with bugs planted in them."""

    def __init__(self, name: str, edits: Sequence[Edit]) -> None:
        package, _, own = name.rpartition(".")
        source = sys.modules[name].__file__
        assert source is not None
        self._package, self._folder, self._own = package, Path(source).parent, own
        self._edits = edits
        self._modules: dict[str, types.ModuleType] = {}
        self._fakes = fake_modules()
        for edit in edits:
            self._source(edit.module)  # says so if there is no such text

    def kernel(self, name: str) -> Callable[..., Any]:
        kernel: Callable[..., Any] = getattr(self._load(self._own), name)
        return kernel

    def _source(self, module: str) -> str:
        text = (self._folder / f"{module}.py").read_text(encoding="utf-8")
        for edit in self._edits:
            if edit.module == module:
                if edit.old not in text:
                    raise ValueError(f"{module} has no {edit.old!r}")
                text = text.replace(edit.old, edit.new)
        return text

    def _load(self, name: str) -> types.ModuleType:
        if name not in self._modules:
            module = types.ModuleType(f"{self._package}.{name}".lstrip("."))
            changed = {**vars(builtins), "__import__": self._import, "range": simulated_range}
            module.__dict__.update(
                __builtins__=changed, __package__=self._package, __file__=str(self._folder / f"{name}.py")
            )
            self._modules[name] = module
            code = compile(self._source(name), str(module.__file__), "exec", dont_inherit=True)
            exec(code, module.__dict__)
        return self._modules[name]

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        """`__import__` of the modules that are simulated."""
        wanted = importlib.util.resolve_name("." * level + name, self._package) if level else name
        if wanted.split(".")[0] == "triton":
            known = self._fakes.setdefault(wanted, FakeModule(wanted, {}))
            return known if fromlist else self._fakes["triton"]
        if level and wanted == self._package:
            found = types.SimpleNamespace()
            for child in fromlist or ():
                setattr(found, child, self._load(child))
            return found
        folder, _, child = wanted.rpartition(".")
        if level and folder == self._package:
            return self._load(child)
        return builtins.__import__(name, globals, locals, fromlist or (), level)


@functools.lru_cache(maxsize=64)
def _program(name: str, edits: tuple[Edit, ...]) -> _Program:
    return _Program(name, edits)
