"""`undivided check`: an attention function named on the command line, checked and reported."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from ..kernels import evidence
from ..kernels.spec import DTYPES
from .adapters import ADAPTERS, ARITHMETIC, UnknownTargetError, resolve
from .check import Progress, check, default_device
from .guard import RAISABLE, told
from .questions import Level
from .report import Report, html, show, text
from .target import Capabilities, ClaimError, Target
from .verdict import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = {dtype_name(dtype): dtype for dtype in DTYPES}


class CheckError(Exception):
    """The command cannot be followed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the check."""
    parser.description = (
        "Is an attention function right? Its values and gradients are compared with float64 under an error "
        "budget, its reads and writes watched, its conventions probed; what fails is shrunk, with code that "
        "shows it. Exit status: 0 right, 1 wrong, 2 could not check."
    )
    parser.add_argument(
        "target",
        nargs="?",
        help="an adapter (see --list), or module:function: the module is imported, that is, executed. "
        "fn(q, k, v, **options) -> out or (out, lse); q, k, v: (batch, heads, seqlen, head_dim)",
    )
    parser.add_argument("--list", action="store_true", help="name the adapters and say which work here")
    parser.add_argument("--impl", choices=list(ARITHMETIC), help="check ours: short for undivided-IMPL")
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        type=_claim,
        metavar="NAME[=VALUE]",
        help="what the function takes, may be repeated: --claim causal --claim gqa --claim backward=false "
        f"--claim head_dims=64,128. Claimed unless it is made false: {_claims(True)}. To be claimed: "
        f"{_claims(False)}. Further: {_claims(None)}",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", action="append", choices=list(NAMES), help="only this one of those claimed; repeatable"
    )
    parser.add_argument(
        "--level", choices=get_args(Level), default="quick", help="quick: each case once; full: everything"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only questions with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs no network")


def main(options: argparse.Namespace) -> int:
    """Run the check; the exit status is 0 if the target is right, 1 if not, 2 if it could not be checked."""
    try:
        if options.list:
            print(_listed(_device(options.device)))
            return 0
        target, device = _target(options)
        for file in (options.json, options.html):
            _require_writable(file)
        with _progress() as progress:
            report = check(target, device=device, level=options.level, progress=progress, only=options.only)
        if not report.verdicts:
            raise CheckError(f"nothing to ask: {_why_nothing(options, report)}")
        _print(report)
        if options.json is not None:
            _write(options.json, json.dumps(report.to_dict(), indent=1) + "\n")
        if options.html is not None:
            _write(options.html, html(report))
        if _is_evidence(options, report, device):
            _record(device, str(options.json or "undivided check --impl triton --level full"))
    except CheckError as error:
        print(f"undivided check: {error}", file=sys.stderr)
        return 2
    return 0 if report.ok else 1


def _require_writable(file: Path | None) -> None:
    """What can be said before minutes of work."""
    if file is None:
        return
    folder = file.absolute().parent
    if not folder.is_dir():
        raise CheckError(f"cannot write {file}: there is no folder {folder}")
    if file.is_dir():
        raise CheckError(f"cannot write {file}: it is a folder")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise CheckError(f"cannot write {file}: permission denied")


def _write(file: Path, content: str) -> None:
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise CheckError(f"cannot write {file}: {error.strerror}") from error


def _target(options: argparse.Namespace) -> tuple[Target, torch.device]:
    if (options.target is None) == (options.impl is None):
        raise CheckError("name one target, or one of ours with --impl; --list shows the adapters")
    device = _device(options.device)
    name = options.target or f"undivided-{options.impl}"
    sys.path.insert(0, "")  # as `python -m` does: a module beside the reader is found
    try:
        target = resolve(name, device, **dict(options.claim))
    except (UnknownTargetError, ClaimError) as error:
        raise CheckError(str(error)) from None
    except RAISABLE as error:  # importing somebody else's module
        raise CheckError(f"cannot load {name}: {told(error)}") from error
    if options.dtype:
        claimed = target.capabilities.dtypes
        dtypes = tuple(dtype for dtype in claimed if dtype_name(dtype) in options.dtype)
        if not dtypes:
            names = ", ".join(map(dtype_name, claimed))
            raise CheckError(f"{target.name} claims {names}, not {', '.join(options.dtype)}")
        target = replace(target, capabilities=replace(target.capabilities, dtypes=dtypes))
    return target, device


def _claims(default: bool | None) -> str:
    """The capabilities that are True or False by default, or something else."""
    found = (
        f for f in fields(Capabilities) if (f.default if isinstance(f.default, bool) else None) is default
    )
    return ", ".join(field.name for field in found)


def _device(name: str | None) -> torch.device:
    try:
        device = default_device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CheckError(f"--device {name} does not work here: {str(error).splitlines()[0]}") from None
    return device


def _claim(word: str) -> tuple[str, Any]:
    """NAME, which is NAME=true, or NAME=VALUE; a tuple's values are parted by commas."""
    name, equals, value = word.partition("=")
    types = {field.name: str(field.type) for field in fields(Capabilities)}
    if name not in types:
        raise argparse.ArgumentTypeError(f"unknown capability {name!r}; there are {', '.join(types)}")
    try:
        return name, _VALUES[types[name].removesuffix(" | None")](value if equals else "true")
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{name} is of type {types[name]}, got {value!r}") from None


_VALUES: dict[str, Callable[[str], Any]] = {
    "bool": lambda value: {"true": True, "false": False}[value.lower()],
    "int": int,
    "Arithmetic": lambda value: {"kernel": "kernel", "wide": "wide"}[value],
    "tuple[int, ...]": lambda value: tuple(map(int, value.split(","))),
    "tuple[torch.dtype, ...]": lambda value: tuple(NAMES[name] for name in value.split(",")),
    "tuple[Alignment, ...]": lambda value: tuple(
        {"bottom-right": "bottom-right", "top-left": "top-left"}[name] for name in value.split(",")
    ),
}
"""How a claim of each type is written on the command line."""


def _listed(device: torch.device) -> str:
    lines = [f"adapters, on {device}:"]
    for name, make in ADAPTERS.items():
        try:
            says = make(device).note
        except (ImportError, ValueError) as error:
            says = f"not here: {error}"
        lines.append(f"  {name:<22}{says}".rstrip())
    return "\n".join([*lines, "or module:function, a function of yours"])


def _why_nothing(options: argparse.Namespace, report: Report) -> str:
    if options.only:
        return f"no question has {options.only!r} in its name"
    return f"nothing that is claimed can be asked ({', '.join(report.skipped)})"


def _progress() -> AbstractContextManager[Progress | None]:
    """A bar in a terminal, if rich is there."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return nullcontext()
    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
    )

    @contextmanager
    def bar() -> Iterator[Progress]:
        with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("")
            yield lambda done, total, what: shown.update(task, completed=done, total=total, description=what)

    return bar()


def _print(report: Report) -> None:
    try:
        from rich.console import Console
    except ImportError:
        print(text(report))
    else:
        show(report, Console(highlight=False))


def _is_evidence(options: argparse.Namespace, report: Report, device: torch.device) -> bool:
    """Whether everything there is to ask of our kernels was asked of a GPU, and passed."""
    whole = options.level == "full" and not (options.only or options.dtype or options.claim)
    return options.impl == "triton" and device.type == "cuda" and whole and report.ok


def _record(device: torch.device, source: str) -> None:
    """What `explain` shows from now on."""
    where = evidence.architecture(device)
    found = evidence.Evidence("triton", where, version("triton"), "run natively", source)
    try:
        file = evidence.record([found])
    except OSError as error:  # installed where the reader may not write
        raise CheckError(f"passed, but the evidence cannot be kept: {error}") from error
    print(f"native evidence for triton on {where}: {file}")
