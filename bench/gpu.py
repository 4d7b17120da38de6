"""What to do when a GPU is at hand: tests and conformance natively, the sweep, launch modes, tiles; one file.

Once every test has passed, or every question of conformance, kernels/evidence.json says so.
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
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..conformance.adapters import ours
from ..kernels import evidence, hopper
from ..kernels.spec import IMPLEMENTATIONS
from . import gpu_tests, lane, results, shapes
from .environment import ROOT, environment
from .results import Results, record_of

RESULTS = ROOT / "bench" / "results"
WORK = ROOT / "build" / "gpu"
CHECK_SECONDS, CASE_SECONDS, TUNE_SECONDS = 400.0, 150.0, 400.0
CALL_AGAIN = os.EX_TEMPFAIL
# Where a call is short, how it is launched decides.
MODES = (
    *("--shape", "llama-3.1-8b", "llama-3.1-8b-decode", "vit-l-16"),
    *("--direction", "forward", "backward", "both"),
    *("--peers", "undivided", "undivided-compiled", "undivided-graph"),
)
TASKS = ("check", "sweep", "tune")
PARTS = ("tests", *TASKS)


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
    kind = f"{where['architecture']}-triton-{where['triton']}.jsonl"
    journal, suite = options.work / f"journal-{kind}", gpu_tests.Journal(options.work / f"tests-{kind}")
    if options.fresh:
        journal.unlink(missing_ok=True)
        suite.path.unlink(missing_ok=True)
    begin, seconds = time.monotonic(), options.minutes * 60
    asked = list(tasks(options.only, options.work))
    try:
        lane.require(asked, seconds)
    except ValueError as error:
        parser.error(f"--minutes {options.minutes:g} is too short: {error}")
    complete = True
    if options.only in (None, "tests"):
        # Of what else is asked, at least one shape should fit.
        reserve = min(CASE_SECONDS, seconds / 2) if asked else 0.0
        complete = gpu_tests.proceed(suite, seconds - reserve).complete
    complete = lane.run(asked, journal, seconds - (time.monotonic() - begin)) and complete

    outcomes, standing = lane.journal_of(journal), suite.standing()
    path = write(outcomes, standing, complete, where, RESULTS)
    known = evidence.record(findings(outcomes, standing, where, f"bench/results/{path.name}"))
    if os.environ.get("OUT"):
        for file in (path, sweep_beside(path), journal, suite.path, known, *options.work.glob("check-*")):
            if file.exists():
                shutil.copy(file, os.environ["OUT"])
    is_right = say(outcomes, standing)
    print(f"{path}: {'complete' if complete else 'call again'}")
    return CALL_AGAIN if not complete else 0 if is_right else 1


def tasks(only: str | None = None, work: Path = WORK) -> Iterator[lane.Task]:
    """Questions of conformance, shapes, launch modes, tiles: each in a process of its own, one at a time."""
    bench = [sys.executable, "-m", "undivided", "bench", "--lines"]
    if only in (None, "check"):
        for implementation in IMPLEMENTATIONS:
            yield from checks(implementation, work)
    if only in (None, "sweep"):
        for name in shapes.SHAPES:
            yield lane.Task(f"sweep/{name}", [*bench, "--shape", name], CASE_SECONDS)
        yield lane.Task("sweep/modes", [*bench, *MODES], CASE_SECONDS)
    if only in (None, "tune"):
        yield lane.Task("tune/tiles", [*bench, "--tune"], TUNE_SECONDS)


def checks(implementation: str, work: Path = WORK) -> Iterator[lane.Task]:
    """Of kernels that this machine runs, one for each dtype: together they would take too long for one."""
    if implementation not in gpu_tests.KERNELS:
        return
    if implementation == "gluon" and hopper.machine_reasons(torch.device("cuda")):
        return
    for dtype in ours(implementation, native=True).capabilities.dtypes:
        name = str(dtype).removeprefix("torch.")
        report = work / f"check-{implementation}-{name}"
        command = [sys.executable, "-m", "undivided", "check", "--impl", implementation, "--level", "full"]
        command += ["--device", "cuda", "--dtype", name]
        command += ["--json", f"{report}.json", "--html", f"{report}.html"]
        yield lane.Task(f"check/{implementation}/{name}", command, CHECK_SECONDS)


def write(
    outcomes: Sequence[lane.Outcome],
    standing: gpu_tests.Standing,
    complete: bool,
    where: Mapping[str, Any],
    folder: Path,
) -> Path:
    """One file: where it ran, what passed, every figure; and the sweep alone, as the command has it."""
    entries = [outcome._asdict() for outcome in outcomes]
    for entry in entries:
        if entry["status"] == "passed":
            del entry["tail"]
    document: dict[str, Any] = {
        "environment": where,
        "complete": complete,
        "tests": {
            "passed": len(standing.passed),
            "skipped": len(standing.skipped),
            "failed": [
                {"test": verdict.test, "seconds": verdict.seconds, "tail": verdict.tail}
                for verdict in standing.failed
            ],
            "left": None if standing.left is None else len(standing.left),
            "unsteady": standing.unsteady,
        },
        **{part: [entry for entry in entries if entry["name"].startswith(f"{part}/")] for part in TASKS},
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
    outcomes: Sequence[lane.Outcome], standing: gpu_tests.Standing, where: Mapping[str, Any], source: str
) -> list[evidence.Evidence]:
    """Which implementations ran natively on this kind of GPU.

    Those that were tested, once every test that concerns them has passed; kernels, too, once every question
    of conformance has. A failure in either leaves them without.
    """
    status_of = {outcome.name: outcome.status for outcome in outcomes}
    found = []
    for implementation in IMPLEMENTATIONS:
        checked = [status_of.get(task.name) for task in checks(implementation)]
        is_tested = standing.left is not None and not any(
            gpu_tests.concerns(test, implementation) for test in standing.left
        )
        ran = is_tested and any(gpu_tests.speaks_of(test, implementation) for test in standing.passed)
        answered = bool(checked) and all(status == "passed" for status in checked)
        wrong = "failed" in checked or any(
            gpu_tests.concerns(verdict.test, implementation) for verdict in standing.failed
        )
        if (ran or answered) and not wrong:
            triton = where["triton"] if implementation in gpu_tests.KERNELS else None
            architecture = where["architecture"]
            found.append(evidence.Evidence(implementation, architecture, triton, "run natively", source))
    return found


def say(outcomes: Sequence[lane.Outcome], standing: gpu_tests.Standing) -> bool:
    """Print figures, then what failed, and how many of everything; whether nothing failed."""
    print(table(outcomes), "", table(outcomes, "host_us", "host µs"), sep="\n")
    failed = [outcome for outcome in outcomes if outcome.status != "passed"]
    for outcome in failed:
        print(f"\n{outcome.name} {outcome.status}:\n{outcome.tail[-1500:]}")
    for verdict in standing.failed:
        print(f"\n{verdict.test} failed:\n{verdict.tail[-500:]}")
    print(f"\ntests: {standing}; {len(outcomes)} other tasks done, {len(failed)} failed")
    return not failed and not standing.failed


def table(outcomes: Sequence[lane.Outcome], field: str = "tflops", head: str = "TFLOP/s") -> str:
    """A figure of records by case and direction, one column per implementation."""
    figures: dict[tuple[str, str], dict[str, float]] = {}
    for record in (record for outcome in outcomes for record in outcome.records):
        if field in record:
            row = figures.setdefault((record["case"], record["direction"]), {})
            row[record["implementation"]] = record[field]
    names = sorted({name for row in figures.values() for name in row})
    lines = [f"{head:34}" + "".join(f"{name[-14:]:>16}" for name in names)]
    for (case, direction), row in figures.items():
        cells = "".join(f"{row[name]:16.1f}" if name in row else f"{'':16}" for name in names)
        lines.append(f"{case + ' ' + direction:34}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
