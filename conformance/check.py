"""Is this attention function right? Puts every question to it and reports what came of them."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from .guard import RAISABLE, WrongAnswerError, first_line, guarded, told
from .probes import probe
from .questions import CHECKS, Level, Question, questions
from .report import Report
from .safety import NotAskedError
from .shrink import failures
from .target import Target, target
from .verdict import HANGS, RAISED, Observation, Verdict

PATIENCE = 2
"""After so many questions without an answer in time nothing more is asked."""

Progress = Callable[[int, int, str], None]
"""Called before each step with how many are done, of how many, and what comes."""


def check(
    attention: Target | Callable[..., Any],
    *,
    device: str | torch.device | None = None,
    level: Level = "quick",
    progress: Progress | None = None,
    only: str = "",
    **capabilities: Any,
) -> Report:
    """Compare an attention function with what it claims to compute.

    attention: `fn(q, k, v, **options) -> out or (out, lse)`, see `target`, with its capabilities, fields of
    `Capabilities`; or a `Target`, which has its own. It is called with options it claims to take only.
    device: a GPU if there is one. level: "quick" asks in seconds what shows most bugs, "full" everything.
    only: ask only what has this in its name; then nothing is probed.

    Whatever the function does, also raise, is reported. Only what Python cannot survive ends the check.
    """
    if level not in ("quick", "full"):
        raise ValueError(f"level must be 'quick' or 'full', got {level!r}")
    if isinstance(attention, Target):
        if capabilities:
            raise TypeError(f"a Target brings its capabilities, got {', '.join(capabilities)} as well")
        asked = attention
    else:
        asked = target(attention, **capabilities)
    device = default_device(device)
    skipped: Counter[str] = Counter()
    asking = [q for q in questions(asked, level, skipped) if only.lower() in str(q).lower()]
    steps = len(asking) + 2
    tell = progress or (lambda done, total, what: None)
    verdicts = []
    patience = PATIENCE
    for done, question in enumerate(asking):
        tell(done, steps, str(question))
        verdict = ask(asked, question, device) if patience else f"given up: it hung {PATIENCE} times"
        if isinstance(verdict, Verdict):
            verdicts.append(verdict)
            patience -= verdict.detail.startswith(HANGS)
        else:
            skipped[verdict] += 1
    observations: list[Observation] = []
    if not only and patience:
        tell(steps - 2, steps, "what it means")
        observations = probe(asked, device)
    tell(steps - 1, steps, "smallest failures")
    return Report(
        target=asked.name,
        note=asked.note,
        environment=environment(device),
        level=level,
        verdicts=verdicts,
        observations=observations,
        skipped=dict(skipped),
        failures=failures(asked, verdicts, lambda again: ask(asked, again, device), device),
    )


def ask(target: Target, question: Question, device: torch.device) -> Verdict | str:
    """Put one question. A string says why this machine cannot ask it."""
    check, case, dtype = question
    try:
        with guarded():
            findings, yardstick = CHECKS[check](target, case.build(dtype, device))
    except NotAskedError as reason:
        return str(reason)
    except WrongAnswerError as error:
        return Verdict(check, case, dtype, first_line(error))
    except RAISABLE as error:
        return Verdict(check, case, dtype, f"{RAISED}{told(error)}")
    broken = "; ".join(str(finding) for finding in findings if not finding.ok)
    return Verdict(check, case, dtype, broken, findings, yardstick)


def default_device(device: str | torch.device | None = None) -> torch.device:
    """The GPU if there is one and no other is asked for."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def environment(device: torch.device) -> dict[str, str]:
    """What a report must say about where it comes from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": f"{device}" + f" ({name})" * bool(name),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
