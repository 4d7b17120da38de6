"""`undivided bench` from top to bottom: what is asked, measure it, show it, compare it, write it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..conformance.adapters import resolve
from ..conformance.cases import Case
from ..conformance.guard import RAISABLE, told
from . import memory, peers, report, results, roofs, shapes
from .environment import environment
from .launch_cost import host_us
from .measure import Effort, Roofs, measure
from .plots import pictures
from .results import Change, Record, Results, ResultsError
from .tune import FLOPS_PER_CLOCK, HEAD_DIMS, KERNELS, tune

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}
HERE = "here"
EXTRAS = ("ratios", "memory", "host")
QUICK, THOROUGH = Effort(turns=7, budget_s=0.8), Effort(turns=30, budget_s=20.0)
RATIO_BUDGET_S = 1.5


class Point(NamedTuple):
    """What a line of the table is about, in all its directions."""

    shape: shapes.Shape
    case: Case
    dtype: torch.dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.description = (
        "Time attention on shapes that models have, ours and whatever else is importable, in turns in one "
        "process; first check every result against the float64 oracle. Without options: a selection, and "
        "on a CPU also its ratios to PyTorch's, in about three minutes on two cores. Exit status: 0, 1 if a "
        "result of ours is wrong or missing or --compare finds that it got slower, 2 for wrong input."
    )
    asked = parser.add_argument_group("what")
    asked.add_argument("--shape", nargs="+", metavar="NAME", help="see --list; 'all' for every one")
    asked.add_argument("--mask", nargs="+", choices=shapes.MASKS, help="instead of the shape's own")
    asked.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="(CPU: float32; GPU: bfloat16)")
    asked.add_argument("--direction", nargs="+", choices=roofs.DIRECTIONS, help="(forward backward)")
    asked.add_argument("--seqlen", nargs="+", type=_positive, metavar="N", help="instead of the shape's own")
    asked.add_argument("--batch", type=_positive, metavar="N", help="instead of the shape's own")
    asked.add_argument("--peers", nargs="+", metavar="NAME", help="see --list; or module:target, executed")
    asked.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    asked.add_argument("--thorough", action="store_true", help="more turns, for figures to keep")
    asked.add_argument(
        "--extras",
        nargs="*",
        choices=EXTRAS,
        help="CPU ratios, memory curve, host time of a call (default: all, unless --shape chooses)",
    )
    asked.add_argument("--peak-memory", action="store_true", help="of each case too; a process for each")
    asked.add_argument("--list", action="store_true", help="name shapes and peers, and end")
    asked.add_argument(
        "--tune",
        nargs="?",
        const=HERE,
        choices=[HERE, *FLOPS_PER_CLOCK],
        help="instead, search tiles for a kind of GPU, or for the one that is here",
    )
    asked.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="to tune (all)")
    asked.add_argument("--head-dim", nargs="+", type=_positive, default=HEAD_DIMS, help="to tune (64 128)")
    shown = parser.add_argument_group("what becomes of it")
    shown.add_argument("--output", type=Path, default=Path("undivided-bench"), metavar="FOLDER")
    shown.add_argument("--load", type=Path, metavar="JSON", help="measure nothing, show these results")
    shown.add_argument("--compare", type=Path, metavar="JSON", help="say what got slower since these")
    shown.add_argument("--lines", action="store_true", help="JSON records as they come, nothing else")


def main(options: argparse.Namespace) -> int:
    """Run the command; the exit status says what came of it."""
    is_screen = sys.stdout.isatty() and not options.lines
    console = Console(stderr=options.lines, width=None if is_screen else 180)
    if options.list:
        _list(console)
        return 0
    try:
        if options.tune:
            return _tune(options, console)
        return _bench(options, console)
    except (ResultsError, InputError) as error:
        print(f"undivided bench: {error}", file=sys.stderr)
        return 2


def _tune(options: argparse.Namespace, console: Console) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET=1 is set: interpreted kernels do not compile")
    kind = options.tune
    if kind == HERE:
        kind = environment()["architecture"]
        if kind not in FLOPS_PER_CLOCK:
            raise InputError(f"--tune must name one of {', '.join(FLOPS_PER_CLOCK)}: {kind} is here")
    for candidate in tune(kind, options.kernel, options.head_dim, console):
        if options.lines:
            print(json.dumps(asdict(candidate)), flush=True)
    return 0


class InputError(ValueError):
    """Something that was asked for and is not there."""


def _bench(options: argparse.Namespace, console: Console) -> int:
    earlier = results.read(options.compare) if options.compare else None
    if options.load:
        found = results.read(options.load)
    else:
        device = _device(options.device)
        found = _measured(options, points(options, device), device, console)
    changes = results.compare(earlier, found) if earlier else []
    remarks = _remarks(earlier, found) if earlier else []
    if not options.lines:
        _show(console, found, changes, remarks)
        _write(options.output, found, changes, remarks, console)
    failed = [r for r in found.records if r.implementation == peers.OURS and r.status != "timed"]
    lost = results.lost(earlier, found) if earlier else []
    return 1 if failed or lost or any(x.is_regression and x.key[3] == peers.OURS for x in changes) else 0


def points(options: argparse.Namespace, device: torch.device) -> list[Point]:
    """Shapes times masks, lengths and dtypes."""
    names = options.shape or list(shapes.DEFAULT)
    if names == ["all"]:
        names = list(shapes.SHAPES)
    for name in names:
        if name not in shapes.SHAPES:
            raise InputError(f"--shape must be of {', '.join(shapes.SHAPES)} or all, got {name!r}")
    for name in options.peers or ():
        if name in peers.NAMES:
            continue
        if ":" not in name:
            raise InputError(f"--peers must be of {', '.join(peers.NAMES)} or module:target, got {name!r}")
        _load(name, device)
    dtypes = options.dtype or (["float32"] if device.type == "cpu" else ["bfloat16"])
    return [
        Point(shape, shape.case(mask, device.type, seqlen, options.batch), DTYPES[dtype])
        for shape in map(shapes.SHAPES.__getitem__, names)
        for mask in options.mask or shape.masks
        for seqlen in options.seqlen or [None]
        for dtype in dtypes
    ]


def _load(name: str, device: torch.device) -> None:
    """Complain now of a peer that cannot be loaded, not in every line of the table."""
    sys.path.insert(0, "")  # as `python -m` does: a module beside the reader is found
    try:
        resolve(name, device)
    except RAISABLE as error:  # importing somebody else's module
        raise InputError(f"--peers: cannot load {name}: {told(error)}") from None


def _measured(
    options: argparse.Namespace, asked: Sequence[Point], device: torch.device, console: Console
) -> Results:
    """Everything asked for; records are printed as lines as they come, if so wanted."""
    torch.manual_seed(0)
    extras = (EXTRAS if options.shape is None else ()) if options.extras is None else options.extras
    if device.type != "cpu":
        extras = [name for name in extras if name != "ratios"]
    found = Results(environment(), sources={point.case.name: point.shape.source for point in asked})
    steps = 2 + len(asked) + len(extras)
    with _progress(console, steps, silent=options.lines) as advance:
        advance("roofs: copy")
        found.roofs["copy"] = roofs.copy_roof(device)
        for dtype in dict.fromkeys(point.dtype for point in asked):
            name = str(dtype).removeprefix("torch.")
            advance(f"roofs: {name} product", 0)
            found.roofs[name] = roofs.matmul_roof(dtype, device)
        records: list[Record] = []
        for point in asked:
            advance(f"{point.case.name}, {point.dtype}".replace("torch.", ""))
            for record in _records(options, point, device, found.roofs):
                if options.lines:
                    print(json.dumps(results.as_dict(record)), flush=True)
                records.append(record)
        found = replace(found, records=tuple(records))
        if "ratios" in extras:
            from .cpu_ratios import measure_all

            advance("CPU ratios")
            ratios = []
            for name, run in measure_all(RATIO_BUDGET_S):
                advance(f"CPU ratios: {name}", 0)
                ratios.append(run())
            found = replace(found, ratios=tuple(ratios))
        if "memory" in extras:
            advance("memory, 1k to 32k")
            found = replace(found, peaks=tuple(memory.curve()))
        if "host" in extras:
            advance("host time of a call")
            found = replace(found, host_us=host_us())
    return found


def _records(
    options: argparse.Namespace, point: Point, device: torch.device, found: dict[str, float]
) -> Iterator[Record]:
    directions = options.direction or [roofs.FORWARD, roofs.BACKWARD]
    if point.shape.decode:
        directions = [roofs.FORWARD]
    rivals = {name: peers.find(name) for name in options.peers or peers.DEFAULT}
    dtype = str(point.dtype).removeprefix("torch.")
    peaks: dict[str, int | None] = {}
    for record in measure(
        point.case,
        point.dtype,
        directions,
        rivals,
        device,
        Roofs(found[dtype], found["copy"]),
        THOROUGH if options.thorough else QUICK,
    ):
        if options.peak_memory and device.type == "cpu" and record.status == "timed":
            name = record.implementation
            if name not in peaks:
                peaks[name] = memory.peak(point.case, point.dtype, name).peak_bytes
            record = replace(record, peak_bytes=peaks[name])
        yield record


def _show(console: Console, found: Results, changes: Sequence[Change], remarks: Sequence[str]) -> None:
    if found.records:
        console.print(report.table(found))
    for line in report.absences(found) + report.busy(found):
        console.print(line, style="dim", markup=False, highlight=False)
    if found.ratios:
        console.print(report.ratio_table(found.ratios))
    if found.peaks:
        console.print(report.peak_table(found.peaks))
    for name, us in found.host_us.items():
        console.print(f"host time, {name}: {us:g} us", highlight=False)
    for remark in remarks:
        console.print(remark, style="yellow", markup=False)
    if changes:
        console.print(report.change_table(changes))


def _write(
    folder: Path, found: Results, changes: Sequence[Change], remarks: Sequence[str], console: Console
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results.write(found, folder / "results.json")
        (folder / "report.html").write_text(report.html(found, changes, remarks), encoding="utf-8")
        for name, image in pictures(found):
            (folder / f"{name}.png").write_bytes(image)
    except OSError as error:
        raise InputError(f"--output cannot be written: {error}") from None
    console.print(f"wrote {folder / 'results.json'}, {folder / 'report.html'} and pictures", style="dim")


def _remarks(earlier: Results, found: Results) -> list[str]:
    remarks = [f"other surroundings: {line}" for line in results.differences(earlier, found)]
    return remarks + [
        f"timed then, {record.status} now: {', '.join(record.key)}: {record.reason}"
        for record in results.lost(earlier, found)
    ]


def _list(console: Console) -> None:
    for shape in shapes.SHAPES.values():
        console.print(f"{shape.name:24} {', '.join(shape.masks):14} {shape.source}", highlight=False)
    console.print(f"peers: {', '.join(peers.NAMES)}", highlight=False)


@contextmanager
def _progress(console: Console, steps: int, silent: bool) -> Iterator[Any]:
    """A bar, and a function that names the step that begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=silent or not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=steps)

        def advance(description: str, by: int = 1) -> None:
            bar.update(task, description=description, advance=by)
            if not (silent or console.is_terminal):  # where a bar would be shown once, at its end
                console.print(f"{description} …", style="dim", markup=False, highlight=False)

        yield advance


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} does not work here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and synchronisation are those of the current one
    return device


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
