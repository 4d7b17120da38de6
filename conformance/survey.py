"""Our implementations asked all combinations of options, and what came of it in a few numbers.

    python -m undivided.conformance.survey --json FILE

Each case is asked in one dtype, they take turns; values and every gradient, under the error budget. Exit
status 1 if one fails. Without a GPU the kernels run in Triton's interpreter: minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..kernels.spec import IMPLEMENTATIONS
from .adapters import ADAPTERS, ours
from .check import ask, default_device, environment
from .combinations import combinations, count_pairs
from .questions import Question
from .verdict import VALUES, Verdict


def survey(impls: Sequence[str], device: torch.device, most: int | None = None) -> dict[str, Any]:
    """Nothing but dicts, lists, strings and numbers. most: of the cases of each."""
    told = environment(device)
    with contextlib.suppress(PackageNotFoundError):
        told["triton"] = version("triton")
    told["date"] = datetime.now(timezone.utc).date().isoformat()
    return {"environment": told, "implementations": {impl: _asked(impl, device, most) for impl in impls}}


def _asked(impl: str, device: torch.device, most: int | None) -> dict[str, Any]:
    target = ours(impl)
    cases = combinations(target)[:most]
    start = time.monotonic()
    answers = []
    for index, case in enumerate(cases):
        dtypes = [x for x in target.capabilities.dtypes if target.refusal(case, x) is None]
        answers.append(ask(target, Question(VALUES, case, dtypes[index % len(dtypes)]), device))
    failed = [str(answer) for answer in answers if not (isinstance(answer, Verdict) and answer.ok)]
    return {
        "pairs_of_options": count_pairs(target) if most is None else None,
        "cases": len(cases),
        "passed": len(cases) - len(failed),
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
    }


def _that_run_on(device: torch.device) -> list[str]:
    """The implementations that are asked where nobody names one; says why others are not."""
    found = []
    for impl in IMPLEMENTATIONS:
        try:
            ADAPTERS[f"undivided-{impl}"](device)
        except ValueError as error:
            print(error)
        else:
            found.append(impl)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, print a line for each implementation, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--impl", action="append", choices=IMPLEMENTATIONS, help="only this one; repeatable")
    parser.add_argument("--most", type=int, metavar="N", help="only the first N cases of each")
    given = parser.parse_args(arguments)
    device = default_device()
    found = survey(given.impl or _that_run_on(device), device, given.most)
    for impl, of in found["implementations"].items():
        passed = f"{of['passed']} of {of['cases']} cases passed in {of['seconds']} s"
        pairs = f", with {of['pairs_of_options']} pairs of options" if given.most is None else ""
        print(f"{impl}: {passed}{pairs}", *of["failed"], sep="\n  ")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any(of["failed"] for of in found["implementations"].values()) else 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(main())
