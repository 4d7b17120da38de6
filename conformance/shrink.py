"""From many failures to few: what fails of one cause is shown once, as small as it gets, with code."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from .cases import Case, Extra
from .questions import Question
from .target import Target
from .verdict import HANGS, RAISED, Failure, Verdict, given_fields

SHRUNK = 12
"""How many failures are shrunk; further ones are shown by the first case that failed."""

SECONDS = 300
"""How long failures are shrunk, all together; a slow target's are shown as they are after that."""

TRIES = 100
"""How many smaller cases are asked for one cause. A step that halves all sizes needs a few dozen."""

PLAIN = Case("smallest")
SIZES = ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv", "head_dim", "head_dim_v")

Ask = Callable[[Question], "Verdict | str"]


def failures(target: Target, verdicts: Sequence[Verdict], ask: Ask, device: torch.device) -> list[Failure]:
    """The verdicts that failed, by cause, each with its smallest case and the code that shows it."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        if not verdict.ok:
            raised = verdict.cause.startswith(RAISED)  # whatever was asked
            groups.setdefault(("" if raised else verdict.check, verdict.cause), []).append(verdict)
    found: list[Failure] = []
    end = time.monotonic() + SECONDS
    for (_, cause), group in groups.items():
        while group:
            worth = len(found) < SHRUNK and time.monotonic() < end and not cause.startswith(HANGS)
            verdict = smallest(target, group[0], ask, end) if worth else group[0]
            needed = _ingredients(verdict.case)
            alike = [v for v in group if v is group[0] or needed <= _ingredients(v.case)]
            group = [v for v in group if v not in alike]  # they fail without it, so of something else
            names = list(dict.fromkeys(v.case.name for v in alike))
            code = reproduction(target.origin, verdict, device)
            found.append(
                Failure(verdict.check, cause, names, verdict.case, verdict.dtype, verdict.detail, code)
            )
    return found


def _ingredients(case: Case) -> set[str]:
    """What makes a case other than the plain one, but for its sizes."""
    grouped = {"gqa"} if case.heads_q != case.heads_kv else set()
    return grouped | given_fields(case).keys() - SIZES


def smallest(target: Target, verdict: Verdict, ask: Ask, end: float = math.inf) -> Verdict:
    """The verdict of the smallest case found, until some time, that still fails of the same cause."""
    current = verdict._replace(case=replace(verdict.case, name=PLAIN.name))
    tried: set[Case] = set()
    while True:
        for case in _smaller(current.case):
            if case in tried or target.refusal(case, current.dtype) is not None:
                continue
            if len(tried) == TRIES or time.monotonic() > end:
                return current
            tried.add(case)
            answer = ask(Question(current.check, case, current.dtype))
            if isinstance(answer, Verdict) and answer.cause == current.cause:
                current = answer
                break
        else:
            return current


def _smaller(case: Case) -> Iterator[Case]:
    """Every case that is one step smaller: an option less, a simpler one, a smaller size."""
    change: dict[str, Any]
    for field in fields(Case):
        if field.name not in (*SIZES, "name") and getattr(case, field.name) != getattr(PLAIN, field.name):
            change = {field.name: getattr(PLAIN, field.name)}
            yield replace(case, **change)
    if case.packed is not None:
        for i in range(len(case.packed)):
            yield replace(case, packed=case.packed[:i] + case.packed[i + 1 :])
    for name in ("mask", "bias"):
        extra = getattr(case, name)
        if extra is not None and extra.dtype is None and extra != Extra():
            change = {name: Extra()}
            yield replace(case, **change)
    if case.head_dim_v is not None:
        yield replace(case, head_dim_v=None)
    if case.heads_q != case.heads_kv:
        yield replace(case, heads_q=case.heads_kv)
    alone = [name for name in SIZES if "heads" not in name or case.heads_q != case.heads_kv]
    for names in (("seqlen_q", "seqlen_k"), ("heads_q", "heads_kv"), *((name,) for name in alone)):
        sizes = {name: getattr(case, name) for name in names}
        if None in sizes.values():
            continue
        for step in (lambda n: 1, lambda n: n // 2, lambda n: n - 1):
            change = {name: step(size) for name, size in sizes.items()}
            fits = change.get("heads_q", case.heads_q) % max(change.get("heads_kv", case.heads_kv), 1) == 0
            if change != sizes and min(change.values()) > 0 and fits:
                yield replace(case, **change)


def reproduction(origin: str, verdict: Verdict, device: torch.device) -> str:
    """Code that shows a failure and runs as it stands, if origin is an expression for `resolve`."""
    made = f"resolve({origin})" if origin else "...  # the target that was checked"
    given = ", ".join(["'smallest'", *(f"{k}={_code(x)}" for k, x in given_fields(verdict.case).items())])
    return (
        "import torch\n"
        "from undivided.conformance.adapters import resolve\n"
        "from undivided.conformance.cases import Case, Extra\n"
        "from undivided.conformance.check import Question, ask\n\n"
        f"target = {made}\n"
        f"case = Case({given})\n"
        f'print(ask(target, Question("{verdict.check}", case, {verdict.dtype}), torch.device("{device}")))\n'
    )


def _code(x: object) -> str:
    """An expression that gives x again."""
    if isinstance(x, Extra):
        return f"Extra({x.pattern!r}, {x.axes!r}" + (f", {x.dtype}" if x.dtype else "") + ")"
    return repr(x)
