"""Figures as JSON: what the compile lane and `undivided inspect` write, and a later run compares with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from .assembly import Assembly
from .model import Work
from .report import Figures, Loop, Row, Variant

NOTE = "Compiler output and a model of it: nothing was run, and no figure here is a speed."


class DocumentError(ValueError):
    """A file is not what `written` writes."""


def written(rows: Sequence[Row], call: object = None, missed: Sequence[Sequence[str]] = ()) -> str:
    """The text of a document. call: what was asked for; missed: the gates that each row misses."""
    kernels = []
    for k, row in enumerate(rows):
        bound = row.bound and {"by": row.bound.by, "clocks": row.bound.clocks, "parts": row.bound.parts}
        gates = {"missed": list(missed[k])} if missed else {}
        kernels.append(dataclasses.asdict(row) | {"bound": bound} | gates)
    head = {"note": NOTE, "triton": triton.__version__} | ({} if call is None else {"call": call})
    return json.dumps(head | {"kernels": kernels}, indent=1) + "\n"


def read(path: Path) -> tuple[Any, list[Row]]:
    """(call, rows) of a document.

    Raises:
        DocumentError: it is none, or an older program's.
    """
    try:
        content = json.loads(path.read_text())
        return content.get("call"), [_row(kernel) for kernel in content["kernels"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DocumentError(f"{path} is no JSON of `undivided inspect` ({reason})") from error


def _row(kernel: dict[str, Any]) -> Row:
    figures = kernel["figures"]
    return Row(
        kernel["architecture"],
        kernel["kernel"],
        Variant(**kernel["variant"]),
        figures and figures_of(figures),
        kernel["error"],
        kernel["triton"],
    )


def figures_of(given: dict[str, Any]) -> Figures:
    """What dataclasses.asdict made of them, back from JSON, which knows no tuples."""
    tile, work, assembly = given["tile"], given["work"], given["assembly"]
    restored = {
        "tile": tile and tuple(tile),
        "matrix": tuple(given["matrix"]),
        "loops": tuple(Loop(**loop) for loop in given["loops"]),
        "work": work and Work(*work),
        "assembly": assembly and Assembly(assembly[0], assembly[1], tuple(assembly[2])),
    }
    return Figures(**given | restored)
