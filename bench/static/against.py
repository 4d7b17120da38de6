"""The same figures from elsewhere: from an earlier run, or under another Triton."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...kernels.call_flags import Call
from . import document
from .report import Row


def check(path: Path) -> None:
    """ValueError unless it is a file, or a folder with a triton in it."""
    if not path.exists():
        raise ValueError(f"--against {path}: no such file or folder")
    if path.is_dir() and not (path / "triton" / "__init__.py").is_file():
        install = f"pip install --target {path} --no-deps triton==X"
        raise ValueError(f"--against {path} holds no triton: {install}")


def earlier(path: Path, call: Call) -> list[Row]:
    """The rows that an earlier run wrote; ValueError if they are of another call."""
    try:
        said, rows = document.read(path)
    except document.DocumentError as error:
        raise ValueError(f"--against {error}") from error
    if not said or not rows:
        raise ValueError(f"--against {path} is of no call: `undivided inspect --json` writes one that is")
    for name, now in asdict(call).items():
        if said.get(name) != (list(now) if isinstance(now, tuple) else now):
            raise ValueError(f"--against {path} is of another call: {name} was {said.get(name)}, not {now}")
    return rows


def under(folder: Path, asked: Mapping[str, Any], call: Call) -> list[Row]:
    """The rows of the same command in a process that finds the triton in that folder first.

    asked: what else the command was given, by the name of the flag.
    """
    print(f"again, under the triton in {folder}", file=sys.stderr)
    paths = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figures.json"
        done = subprocess.run(
            [sys.executable, "-m", "undivided", "inspect", *flags({**asked, **asdict(call), "json": file})],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
        if done.returncode not in (0, 1) or not file.is_file():
            raise ValueError(f"--against {folder}: the command failed under it, as said above")
        return earlier(file, call)


def flags(given: Mapping[str, Any]) -> list[str]:
    """A command line that says this; None and False are left out."""
    words: list[str] = []
    for name, value in given.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            several = value if isinstance(value, (list, tuple)) else [value]
            words += ["none" if x is None else str(x) for x in several]
    return words
