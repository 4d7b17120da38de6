"""A run as a file: what was measured and where, checked when read; and what got slower since another."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

SCHEMA = "undivided bench 1"
SAME_MACHINE = ("cpu", "threads", "gpu", "torch", "triton")
"""What two files must agree on for their times to be compared."""

Status = Literal["timed", "wrong", "n/a"]
Unit = Literal["times as fast", "us more", "MiB", "ms"]


class ResultsError(ValueError):
    """A file that is not what this version writes; the message says where."""


@dataclass(frozen=True)
class Record:
    """One implementation on one case in one direction.

    status: "timed", "wrong" (outside the error budget, so not timed) or "n/a"; reason says why. Times in
    milliseconds; tflops from the scores that are visible; gbs from every tensor read or written once;
    of_matmul, of_copy: share of the machine's measured roofs. host_us: on a GPU, whose own time the others
    are: microseconds until the call returns. constants: of the error budget, by output. peak_bytes: above
    what was there before the call.
    """

    case: str
    dtype: str
    direction: str
    implementation: str
    status: Status
    reason: str = ""
    note: str = ""
    turns: int | None = None
    p20_ms: float | None = None
    median_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    of_matmul: float | None = None
    of_copy: float | None = None
    host_us: float | None = None
    constants: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    clocks: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes it comparable with a record of another run."""
        return self.case, self.dtype, self.direction, self.implementation


@dataclass(frozen=True)
class Ratio:
    """Ours against PyTorch's on the same case; required: None where nothing is demanded."""

    name: str
    measured: float
    unit: Unit
    required: float | None = None
    ours_ms: float | None = None
    theirs_ms: float | None = None

    @property
    def ok(self) -> bool:
        if self.required is None:
            return True
        return self.measured >= self.required if self._more_is_better else self.measured <= self.required

    @property
    def figure(self) -> str:
        """What was measured, with its unit."""
        if self._more_is_better:
            return f"{self.measured:.2f} ×"
        return f"{self.measured:.0f} {'µs more' if self.unit == 'us more' else self.unit}"

    @property
    def demand(self) -> str:
        """What is required; nothing where nothing is."""
        return "" if self.required is None else f"{'≥' if self._more_is_better else '≤'} {self.required:g}"

    @property
    def _more_is_better(self) -> bool:
        return self.unit == "times as fast"


@dataclass(frozen=True)
class Peak:
    """Peak memory of a forward and backward pass in a process of its own, above a short one's."""

    case: str
    seqlen: int
    implementation: str
    peak_bytes: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Results:
    """Everything one run found. sources: of the shapes, by case; roofs: TFLOP/s by dtype, copy in GB/s;
    host_us: microseconds a call keeps the host busy."""

    environment: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)
    roofs: dict[str, float] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    peaks: tuple[Peak, ...] = ()
    host_us: dict[str, float] = field(default_factory=dict)


class Change(NamedTuple):
    """One figure in two runs. ratio: time over time, above 1 is slower now."""

    key: tuple[str, str, str, str]
    before_ms: float
    now_ms: float
    ratio: float
    is_regression: bool


def write(results: Results, path: Path) -> None:
    """As JSON, without what is None or empty."""
    path.write_text(json.dumps(as_dict(results), indent=1) + "\n", encoding="utf-8")


def as_dict(x: Any) -> dict[str, Any]:
    """A dataclass of this room as what JSON can hold; fields at their defaults are left out."""
    document: dict[str, Any] = {"schema": SCHEMA} if isinstance(x, Results) else {}
    for entry in dataclasses.fields(x):
        value = getattr(x, entry.name)
        if isinstance(value, tuple):
            value = [as_dict(item) for item in value]
        elif isinstance(value, dict):
            value = dict(value)
        if value not in (None, "", {}, []):
            document[entry.name] = value
    return document


def read(path: Path) -> Results:
    """A file that `write` wrote.

    Raises:
        ResultsError: it cannot be read, or something in it is missing, unknown or of another type.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: {error}") from None
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
        raise ResultsError(f"{path}: its schema must be {SCHEMA!r}")
    try:
        return _parse(Results, document, "")
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None


def record_of(line: dict[str, Any]) -> Record:
    """A record as `undivided bench --lines` prints it; raises as `read` does."""
    return _parse(Record, line, "")


def _parse(kind: Any, document: Any, where: str) -> Any:
    """A dataclass from JSON, each field checked against its annotation."""
    if not isinstance(document, dict):
        raise ResultsError(f"{where} must be an object, got {document!r}")
    hints = get_type_hints(kind)
    unknown = document.keys() - hints.keys()
    if unknown:
        raise ResultsError(f"{where} has an unknown field {min(unknown)!r}".lstrip())
    values = {}
    for entry in dataclasses.fields(kind):
        name = f"{where}.{entry.name}".lstrip(".")
        if entry.name in document:
            values[entry.name] = _checked(hints[entry.name], document[entry.name], name)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ResultsError(f"{name} is missing")
    return kind(**values)


def _checked(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = getattr(hint, "__origin__", None), get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ResultsError(f"{where} must be a list, got {value!r}")
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ResultsError(f"{where} must be an object, got {value!r}")
        return {key: _checked(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        ok = value in arguments
    else:
        ok = hint is Any or (isinstance(value, _classes(hint)) and not isinstance(value, bool))
    if not ok:
        wanted = " or ".join(map(repr, arguments)) if origin is Literal else str(hint)
        raise ResultsError(f"{where} must be {wanted}, got {value!r}")
    return value


def _classes(hint: Any) -> tuple[type, ...]:
    """What isinstance takes; JSON writes a float without a fraction as an integer."""
    found = tuple(get_args(hint) or (hint,))
    return (*found, int) if float in found else found


def compare(old: Results, new: Results, tolerance: float = 0.05) -> list[Change]:
    """Every figure that both have, slowest change first.

    A regression is more than `tolerance` slower, and by more than the two runs themselves vary: the
    new 20th percentile lies above the old 80th.
    """
    before = {record.key: record for record in old.records if record.status == "timed"}
    changes = []
    for record in new.records:
        earlier = before.get(record.key)
        if earlier is None or earlier.median_ms is None or record.median_ms is None:
            continue
        ratio = record.median_ms / earlier.median_ms
        apart = (record.p20_ms or record.median_ms) > (earlier.p80_ms or earlier.median_ms)
        changes.append(
            Change(record.key, earlier.median_ms, record.median_ms, ratio, apart and ratio > 1 + tolerance)
        )
    return sorted(changes, key=lambda change: -change.ratio)


def lost(old: Results, new: Results) -> list[Record]:
    """What the old run timed and the new one found wrong or not available."""
    timed = {record.key for record in old.records if record.status == "timed"}
    return [record for record in new.records if record.key in timed and record.status != "timed"]


def differences(old: Results, new: Results) -> list[str]:
    """Sentences on what makes the times of two runs hard to compare."""
    return [
        f"{name}: {old.environment.get(name)} then, {new.environment.get(name)} now"
        for name in SAME_MACHINE
        if old.environment.get(name) != new.environment.get(name)
    ]
