"""Sentences to embed: from a CSV or a text file, compressed or not, within bounds that are said aloud."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

MAX_BYTES = 64 * 2**20
MAX_CHARACTERS = 2000
SAMPLE_CHARACTERS = 2**16  # enough to see how a table is written
MAX_TOPICS = 20
FEWEST = 4
HEADER_NAMES = {"text", "sentence", "title", "description", "body", "content", "topic", "label", "class"}


class DemoError(Exception):
    """Something the user can put right: told in one line, exit status 2."""


@dataclass
class Sentences:
    """What was read.

    topics: one per text, empty strings where the file has none. notes: what was taken and what was left out.
    """

    source: str
    texts: list[str]
    topics: list[str]
    notes: list[str] = field(default_factory=list)


def read_sample(limit: int) -> Sentences:
    """The built-in sentences, topic by topic in turn, so that a small limit still has all topics."""
    data = resources.files(__package__).joinpath("sample.csv").read_bytes()
    read = _from_rows(list(csv.reader(io.StringIO(data.decode()))), "sample.csv", None)
    groups: dict[str, list[str]] = {}
    for topic, text in zip(read.topics, read.texts):
        groups.setdefault(topic, []).append(text)
    longest = max(len(texts) for texts in groups.values())
    mixed = [(topic, texts[i]) for i in range(longest) for topic, texts in groups.items() if i < len(texts)]
    topics, texts = (list(column) for column in zip(*mixed[:limit]))
    return Sentences("the built-in sample", texts, topics)


def read_sentences(path: Path, limit: int, column: str | None = None) -> Sentences:
    """The first `limit` different sentences of a file.

    Names with .csv or .tsv in them are read as tables: a column of few different values is the topic,
    the other columns that are not numbers form the text, or `column` does, a name or a number from 1.
    Any other file: a line is a sentence. gzip is recognised by content.

    Raises:
        DemoError: no such file, no text, nothing in it, no such column.
    """
    data, notes = _read_bytes(path)
    text = _decode(path, data)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if ".csv" in suffixes or ".tsv" in suffixes:
        delimiter = "\t" if ".tsv" in suffixes else _delimiter(text)
        read = _from_rows(_table(path, text, delimiter), path.name, column)
    elif column is not None:
        raise DemoError(f"{path.name} has no columns for --column: only .csv and .tsv files are tables")
    else:
        lines = text.splitlines()
        read = Sentences(path.name, lines, [""] * len(lines))
    read.notes += notes
    _tidy(read, limit)
    if not read.texts:
        raise DemoError(f"{path} is empty: it has no sentence")
    if len(read.texts) < FEWEST:
        raise DemoError(
            f"{path} has too few different sentences ({len(read.texts)}): comparing neighbours needs {FEWEST}"
        )
    return read


def _read_bytes(path: Path) -> tuple[bytes, list[str]]:
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with gzip.open(file) if compressed else file as stream:
                data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DemoError(f"no such file: {path}") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DemoError(f"{path} is a damaged gzip file: {error}") from None
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror or error}") from None
    if path.suffix.lower() == ".gz" and not compressed:
        raise DemoError(f"{path} is no gzip file, whatever its name says")
    if len(data) <= MAX_BYTES:
        return data, []
    end = data.rfind(b"\n", 0, MAX_BYTES)
    return data[: end if end >= 0 else MAX_BYTES], [
        f"read only the first {MAX_BYTES // 2**20} MiB of the file"
    ]


def _decode(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A cut in the middle of a character is ours, anything else is the file's.
        if len(data) < MAX_BYTES or error.start < len(data) - 3:
            raise DemoError(
                f"{path} is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}"
            ) from None
        text = data[: error.start].decode("utf-8-sig")
    if "\0" in text:
        raise DemoError(f"{path} is no text: it has a zero byte")
    if re.match(r'\s*[\[{]\s*["{]', text):
        raise DemoError(
            f"{path} is JSON; the demo reads .csv and .tsv tables, and text with a sentence a line"
        )
    return text


def _delimiter(text: str) -> str:
    """Whichever cuts most rows at the beginning into equally many cells, and not into one."""

    def regular_rows(delimiter: str) -> int:
        rows = csv.reader(io.StringIO(text[:SAMPLE_CHARACTERS], newline=""), delimiter=delimiter)
        return max(Counter(len(row) for row in rows if len(row) > 1).values(), default=0)

    return max(",;\t", key=regular_rows)


def _table(path: Path, text: str, delimiter: str) -> list[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return list(reader)
    except csv.Error as error:
        raise DemoError(
            f"{path} cannot be read as a table near line {reader.line_num} ({error}); "
            "a file whose name ends in .txt is read line by line"
        ) from None


def _from_rows(rows: list[list[str]], source: str, column: str | None) -> Sentences:
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    names = [f"column {i + 1}" for i in range(max(map(len, rows), default=0))]
    if rows and (column in rows[0] or any(cell.lower() in HEADER_NAMES for cell in rows[0])):
        header = rows.pop(0)
        names[: len(header)] = header
    if not rows:
        return Sentences(source, [], [])
    columns = [[row[i] if i < len(row) else "" for row in rows] for i in range(len(names))]
    chosen = None if column is None else _index(column, names, source)
    topic = next((i for i, cells in enumerate(columns) if i != chosen and _is_topic(cells)), None)
    if chosen is not None:
        spoken = [chosen]
    else:
        spoken = [i for i, cells in enumerate(columns) if i != topic and not all(map(_is_number, cells))]
    if not spoken:
        raise DemoError(f"{source} has no column of text; name one with --column, out of: {', '.join(names)}")
    note = "text: " + ", ".join(names[i] for i in spoken)
    if topic is not None:
        note += f"; topic: {names[topic]}"
    texts = [" ".join(filter(None, (columns[i][row] for i in spoken))) for row in range(len(rows))]
    return Sentences(source, texts, [""] * len(rows) if topic is None else columns[topic], [note])


def _index(column: str, names: list[str], source: str) -> int:
    if column in names:
        return names.index(column)
    if column.isdecimal() and 1 <= int(column) <= len(names):
        return int(column) - 1
    raise DemoError(f"{source} has no column {column!r}; it has: {', '.join(names)}")


def _is_topic(column: list[str]) -> bool:
    different = set(column)
    return 1 < len(different) <= min(MAX_TOPICS, len(column) // 4) and max(map(len, different)) <= 40


def _is_number(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return False
    return True


def _tidy(read: Sentences, limit: int) -> None:
    """One line per sentence, not too long, each once, `limit` of them."""
    kept: dict[str, str] = {}
    repeated = shortened = 0
    for topic, text in zip(read.topics, read.texts):
        text = " ".join(text[: 4 * MAX_CHARACTERS].split())
        if len(text) > MAX_CHARACTERS:
            text = text[:MAX_CHARACTERS]
            shortened += 1
        if text in kept:
            repeated += 1
        elif text:
            kept[text] = topic
        if len(kept) == limit:
            break
    if shortened:
        read.notes.append(f"cut {shortened} sentences to {MAX_CHARACTERS} characters")
    if repeated:
        read.notes.append(f"left out {repeated} repeated sentences")
    read.texts, read.topics = list(kept), list(kept.values())
