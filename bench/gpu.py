"""What to do when a GPU is at hand: tests and conformance natively, the sweep, launch modes, tiles; one file.

Once every file of tests has passed, or every question of conformance, kernels/evidence.json says so.
`bench/gpu.sh` calls this. Exit status 0: all done, all passed; 1: all done, something failed; 75: not
everything fitted into the time, call again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..kernels import evidence
from ..kernels.spec import IMPLEMENTATIONS
from . import lane, results, shapes
from .environment import ROOT, environment
from .results import Results, record_of

RESULTS = ROOT / "bench" / "results"
WORK = ROOT / "build" / "gpu"
TEST_SECONDS, CHECK_SECONDS, CASE_SECONDS, TUNE_SECONDS = 240.0, 400.0, 150.0, 400.0
CHECKED = ("float16", "bfloat16", "float32")  # a task for each: together they would take too long for one
NO_TESTS_LEFT = 5  # pytest's exit status when every test of a file was deselected
CALL_AGAIN = os.EX_TEMPFAIL
# Where a call is short, how it is launched decides.
MODES = (
    *("--shape", "llama-3.1-8b", "llama-3.1-8b-decode", "vit-l-16"),
    *("--direction", "forward", "backward", "both"),
    *("--peers", "undivided", "undivided-compiled", "undivided-graph"),
)
CORRECTNESS = ("tests/", "check/")
PARTS = ("tests", "check", "sweep", "tune")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as much as fits into the minutes given; what an earlier call did is not done again."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop before (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="where the journal lies")
    parser.add_argument("--only", choices=PARTS, help="leave out the others")
    parser.add_argument("--fresh", action="store_true", help="forget what was done")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels show nothing about the GPU")

    where = environment()
    # What one GPU or Triton passed says nothing of another.
    journal = options.work / f"journal-{where['architecture']}-triton-{where['triton']}.jsonl"
    if options.fresh:
        journal.unlink(missing_ok=True)
    try:
        complete = lane.run(tasks(options.only, options.work), journal, options.minutes * 60)
    except ValueError as error:
        parser.error(f"--minutes {options.minutes:g} is too short: {error}")
    outcomes = lane.journal_of(journal)
    path = write(outcomes, complete, where, RESULTS)
    known = evidence.record(findings(outcomes, where, f"bench/results/{path.name}"))
    if os.environ.get("OUT"):
        for file in (path, sweep_beside(path), journal, known, *options.work.glob("check-*")):
            shutil.copy(file, os.environ["OUT"])
    print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.status != "passed"]
    for outcome in failed:
        print(f"\n{outcome.name} {outcome.status}:\n{outcome.tail[-1500:]}")
    print(f"\n{path}: {len(outcomes)} done, {len(failed)} failed, {'complete' if complete else 'call again'}")
    return CALL_AGAIN if not complete else 1 if failed else 0


def tasks(only: str | None = None, work: Path = WORK) -> Iterator[lane.Task]:
    """Files of tests, questions of conformance, shapes, launch modes, tiles, each in a process of its own."""
    bench = [sys.executable, "-m", "undivided", "bench", "--lines"]
    if only in (None, "tests"):
        for file in sorted(ROOT.glob("tests/test_*.py")):
            command = [sys.executable, "-m", "pytest", "-q", "-m", "not full and not compile", str(file)]
            yield lane.Task(f"tests/{file.name}", command, TEST_SECONDS, (0, NO_TESTS_LEFT))
    if only in (None, "check"):
        check = [sys.executable, "-m", "undivided", "check", "--impl", "triton", "--level", "full"]
        for dtype in CHECKED:
            report = (
                "--json",
                str(work / f"check-{dtype}.json"),
                "--html",
                str(work / f"check-{dtype}.html"),
            )
            command = [*check, "--device", "cuda", "--dtype", dtype, *report]
            yield lane.Task(f"check/{dtype}", command, CHECK_SECONDS)
    if only in (None, "sweep"):
        for name in shapes.SHAPES:
            yield lane.Task(f"sweep/{name}", [*bench, "--shape", name], CASE_SECONDS)
        yield lane.Task("sweep/modes", [*bench, *MODES], CASE_SECONDS)
    if only in (None, "tune"):
        yield lane.Task("tune/tiles", [*bench, "--tune"], TUNE_SECONDS)


def write(outcomes: Sequence[lane.Outcome], complete: bool, where: Mapping[str, Any], folder: Path) -> Path:
    """One file: where it ran, what passed, every figure; and the sweep alone, as the command has it."""
    entries = [outcome._asdict() for outcome in outcomes]
    for entry in entries:
        if entry["status"] == "passed":
            del entry["tail"]
    document: dict[str, Any] = {
        "environment": where,
        "complete": complete,
        **{part: [entry for entry in entries if entry["name"].startswith(f"{part}/")] for part in PARTS},
    }
    gpu = re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{gpu}-{where['date']}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    lines = [line for entry in document["sweep"] for line in entry["records"]]
    results.write(Results(dict(where), records=tuple(map(record_of, lines))), sweep_beside(path))
    return path


def sweep_beside(path: Path) -> Path:
    """The file for `undivided bench --load` and `--compare`, next to the one with everything."""
    return path.with_name(f"{path.stem}-sweep.json")


def findings(
    outcomes: Sequence[lane.Outcome], where: Mapping[str, Any], source: str
) -> list[evidence.Evidence]:
    """Which implementations ran natively on this kind of GPU.

    All, once every file of tests has passed; the kernels, too, once every question of conformance has. A
    failure in either leaves them without.
    """
    passed = {outcome.name for outcome in outcomes if outcome.status == "passed"}
    is_checked, is_tested = (
        passed.issuperset(task.name for task in tasks(part)) for part in ("check", "tests")
    )
    wrong = any(outcome.status == "failed" and outcome.name.startswith(CORRECTNESS) for outcome in outcomes)
    shown = [*(IMPLEMENTATIONS if is_tested else ()), *(("triton",) if is_checked else ())]
    return [
        evidence.Evidence(
            implementation,
            where["architecture"],
            where["triton"] if implementation == "triton" else None,
            "run natively",
            source,
        )
        for implementation in dict.fromkeys(shown)
        if not (implementation == "triton" and wrong)
    ]


def table(outcomes: Sequence[lane.Outcome]) -> str:
    """TFLOP/s by case and direction, one column per implementation."""
    figures: dict[tuple[str, str], dict[str, float]] = {}
    for record in (record for outcome in outcomes for record in outcome.records):
        if "tflops" in record:
            row = figures.setdefault((record["case"], record["direction"]), {})
            row[record["implementation"]] = record["tflops"]
    names = sorted({name for row in figures.values() for name in row})
    lines = [f"{'TFLOP/s':34}" + "".join(f"{name[-14:]:>16}" for name in names)]
    for (case, direction), row in figures.items():
        cells = "".join(f"{row[name]:16.1f}" if name in row else f"{'':16}" for name in names)
        lines.append(f"{case + ' ' + direction:34}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
