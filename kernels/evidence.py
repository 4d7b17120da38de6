"""What is known of each implementation on each architecture: compiled, interpreted, or run natively.

The records lie in evidence.json. `python -m undivided.bench.static --full --record` writes those that
say "compiled", `bash bench/gpu.sh` those that say "run natively", with the file of its results.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

NO_EVIDENCE = "no evidence"
STATES = (NO_EVIDENCE, "compiled", "interpreted", "run natively")
"""From least to most: the interpreter executes the kernels, with numpy for the GPU."""

_FILE = Path(__file__).with_name("evidence.json")


class Evidence(NamedTuple):
    """One record: where and with what an implementation was tried, how far, and what shows it."""

    implementation: str  # "triton", "gluon", "fallback", "reference"
    architecture: str  # "sm_90", "gfx942", "cpu"
    triton: str | None  # version; None where Triton plays no part
    state: str
    source: str  # command or file


@functools.cache
def records() -> tuple[Evidence, ...]:
    """Everything that was recorded."""
    return tuple(Evidence(**record) for record in json.loads(_FILE.read_text()))


def record(new: Iterable[Evidence]) -> Path:
    """Write records, each in place of an earlier one that says the same; the file they are in."""
    by_key = {entry[:4]: entry for entry in (*records(), *new)}
    ordered = sorted(by_key.values(), key=lambda entry: tuple(map(str, entry)))
    _FILE.write_text(json.dumps([entry._asdict() for entry in ordered], indent=1) + "\n")
    records.cache_clear()
    return _FILE


def state_of(implementation: str, architecture: str, triton_version: str | None = None) -> str:
    """The furthest state recorded for that triple; the installed Triton if no version is given."""
    if implementation in ("triton", "gluon") and triton_version is None:
        try:
            triton_version = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            return NO_EVIDENCE
    states = [
        entry.state
        for entry in records()
        if (entry.implementation, entry.architecture) == (implementation, architecture)
        and entry.triton in (None, triton_version)
    ]
    return max(states, key=STATES.index, default=NO_EVIDENCE)


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Name of a kind of device: "cpu", "sm_90", "gfx942", ..."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def markdown() -> str:
    """The table of the README."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for entry in records():
        key = (entry.implementation, entry.architecture, entry.state, entry.source)
        groups.setdefault(key, []).append(entry.triton or "")
    lines = ["| implementation | architecture | Triton | state | shown by |", "|---|---|---|---|---|"]
    lines += [
        f"| {implementation} | {architecture} | {', '.join(filter(None, versions))} | {state} | `{source}` |"
        for (implementation, architecture, state, source), versions in groups.items()
    ]
    return "\n".join(lines)
