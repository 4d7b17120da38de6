"""`undivided demo`: what it reads, what it refuses and why, and that it compares what it says it compares."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the optional dependencies undivided[demo] are not installed")
pytest.importorskip("rich", reason="the optional dependencies undivided[demo] are not installed")
pytest.importorskip("matplotlib", reason="the optional dependencies undivided[demo] are not installed")

from undivided.interop.demo import add_arguments, comparison, embedding, main, models, sentences

ROOT = Path(__file__).parents[1]
HAS_WEIGHTS = models.packaged_folder() is not None
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason=f"{models.REQUIREMENT} is not installed")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo may set HF_HUB_OFFLINE for its own process; that must not leak into other tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "1"))


def demo(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(["--device", "cpu", *map(str, arguments)]))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line an impossible call prints; checks status 2 and that it is one line."""
    assert demo(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("undivided demo: ")
    assert captured.err.count("\n") == 1
    return captured.err


def read(path: Path, limit: int = 100, column: str | None = None) -> sentences.Sentences:
    return sentences.read_sentences(path, limit, column)


LINES = ["The first line.", "Another one, with a comma.", "Größe und Café.", 'She said "no".', "The last."]


def test_random_model_on_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: the report, the figure, the screen and the exit status."""
    report, figure = tmp_path / "report.json", tmp_path / "figure.png"
    assert demo("--model", "random", "--limit", "60", "--json", report, "--plot", figure) == 0
    found = json.loads(report.read_text())
    assert found["passed"] is True
    assert found["sentences"] == 60
    assert found["neighbours"] == {"agree": 60, "tied": 0, "disagree": 0}
    assert found["largest_difference"] < 1e-5
    # Two batches warm up, three passes of all batches are timed, one batch is measured for memory.
    assert found["calls"] == found["layers"] * (2 + 3 * found["batches"] + 1)
    low, high = found["speed_ratio_range"]
    assert 0 < low <= high
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    screen = capsys.readouterr().out
    for text in ("60 sentences", "nearest neighbour", found["implementation"], "stock", "same:"):
        assert text in screen
    assert f"({low:.2f} to {high:.2f})" in screen, "a ratio without its spread says too much"
    assert "warm-up included" in screen, "the calls are more than layers x batches x passes"


@needs_weights
def test_trained_model_agrees_with_the_formula(tmp_path: Path) -> None:
    """The published weights, compared with attention written out (eager)."""
    report = tmp_path / "report.json"
    options = ("--limit", "24", "--passes", "1", "--stock", "eager", "--json", report)
    assert demo(*options, "--query", "travelling to other planets") == 0
    found = json.loads(report.read_text())
    assert found["neighbours"]["agree"] == 24
    assert 0 < found["largest_difference"] < 1e-5, "0 would mean that the same code ran twice"
    best = found["searches"][0]["ours"][0]["index"]
    assert sentences.read_sample(24).topics[best] == "space"


def test_it_fails_if_our_attention_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo that passes whatever attention does shows nothing."""
    from undivided.interop import transformers

    true_translate = transformers.translate

    def wrong_scale(*args: Any, **options: Any) -> Any:
        q, k, v, ours = true_translate(*args, **options)
        return q, k, v, {**ours, "scale": 1.01 * ours["scale"]}

    monkeypatch.setattr(transformers, "translate", wrong_scale)
    assert demo("--model", "random", "--limit", "20", "--passes", "1") == 1


def test_it_fails_if_our_attention_never_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of the stock attention agree perfectly."""
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda self, name: None)
    assert demo("--model", "random", "--limit", "20", "--passes", "1") == 1


def test_bfloat16_is_judged_by_its_own_rounding(tmp_path: Path) -> None:
    """1e-5 would be absurd there: the bound is twice the distance of the stock result from float32."""
    report = tmp_path / "report.json"
    options = ("--model", "random", "--limit", "20", "--passes", "1", "--dtype", "bfloat16", "--json", report)
    assert demo(*options) == 0
    assert 1e-5 < json.loads(report.read_text())["difference_limit"] < 0.1


def test_runs_as_a_module_from_the_root() -> None:
    """In the root a folder named `kernels` is in the way of transformers."""
    script = [
        "-m",
        "undivided",
        "demo",
        "--model",
        "random",
        "--limit",
        "8",
        "--passes",
        "1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, *script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "same:" in done.stdout


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz", "gzip-without-the-name.txt"])
def test_text_is_read_line_by_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = "\ufeff{}\r\n\n  \n{}\n".format(LINES[0], "\n".join(LINES[1:])).encode()
    path.write_bytes(gzip.compress(data) if "gz" in name else data)
    assert read(path).texts == LINES


@pytest.mark.parametrize("header", [[], ["class,title,text"]])
def test_table_with_topics(tmp_path: Path, header: list[str]) -> None:
    """Quotes, commas, line breaks in cells, empty rows and short rows; the numbers are topics."""
    rows = [f'"{1 + i % 2}","Title {i}","He said ""yes"",\nand left {i}."' for i in range(12)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join([*header, *rows[:6], "", ",,", *rows[6:], "1,Short row"]))
    found = read(path)
    assert found.texts[0] == 'Title 0 He said "yes", and left 0.'
    assert found.texts[-1] == "Short row"
    assert len(found.texts) == 13
    assert set(found.topics) == {"1", "2"}


def test_table_without_topics_and_with_numbers(tmp_path: Path) -> None:
    """An id column is no text; a column of different sentences is no topic."""
    path = tmp_path / "table.tsv"
    path.write_text("".join(f"{i}\tSentence number {i}.\n" for i in range(8)))
    found = read(path)
    assert found.texts == [f"Sentence number {i}." for i in range(8)]
    assert set(found.topics) == {""}


COLUMNS = "id{0}title{0}rating\n" + "".join(f"{i}{{0}}Well, number {i}{{0}}{i % 5}\n" for i in range(20))


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters(delimiter: str, tmp_path: Path) -> None:
    """Spreadsheets in much of Europe write semicolons, because there a comma is the decimal point."""
    path = tmp_path / "table.csv"
    path.write_text(COLUMNS.format(delimiter))
    found = read(path)
    assert found.texts[3] == "Well, number 3"
    assert found.topics[3] == "3"


def test_it_says_which_columns_it_took(tmp_path: Path) -> None:
    """Guessed in silence, an author's name becomes part of every sentence and nobody sees it."""
    path = tmp_path / "table.csv"
    rows = "".join(f"{i % 2},Title {i},Author {i}\n" for i in range(12))
    path.write_text("kind,title,author\n" + rows)
    assert read(path).notes == ["text: title, author; topic: kind"]
    path.write_text("kind,title\n" + rows)
    assert read(path).notes == ["text: title, column 3; topic: kind"]
    path.write_text(rows)
    assert read(path).notes == ["text: column 2, column 3; topic: column 1"]


@pytest.mark.parametrize("column", ["2", "who"])
def test_a_chosen_column_is_the_text(column: str, tmp_path: Path) -> None:
    """By its name, also where no other name in the row is known to be one, or by its number."""
    path = tmp_path / "table.csv"
    path.write_text("what,who\n" + "".join(f"Words {i},Author {i}\n" for i in range(8)))
    found = read(path, column=column)
    assert found.texts[-8:] == [f"Author {i}" for i in range(8)]
    assert len(found.texts) == (8 if column == "who" else 9), "a number does not say that there are names"


def test_a_column_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, lines = tmp_path / "table.csv", tmp_path / "lines.txt"
    table.write_text("title,author\n" + "".join(f"Words {i},Author {i}\n" for i in range(8)))
    lines.write_text("\n".join(LINES))
    for column in ("name", "3", "0"):
        said = complaint(capsys, "--model", "random", "--data", table, "--column", column)
        assert f"has no column {column!r}; it has: title, author" in said
    assert "no columns" in complaint(capsys, "--model", "random", "--data", lines, "--column", "1")
    assert "--column needs --data" in complaint(capsys, "--model", "random", "--column", "1")


def test_limit_repetitions_and_long_lines(tmp_path: Path) -> None:
    """Repeated sentences would be each other's neighbours; a long one would fill the memory."""
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([LINES[0], LINES[0], "word " * 100_000, *LINES[1:]]))
    found = read(path, limit=4)
    assert len(found.texts) == 4
    assert max(map(len, found.texts)) <= sentences.MAX_CHARACTERS
    assert found.notes == ["cut 1 sentences to 2000 characters", "left out 1 repeated sentences"]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_huge_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool) -> None:
    """The bound counts what comes out of gzip, and a cut through a character is no error of the file."""
    monkeypatch.setattr(sentences, "MAX_BYTES", 1001)
    path = tmp_path / "lines.txt"
    data = ("\n".join(LINES) + "\n" + "ä" * 5000).encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    found = read(path)
    assert found.texts == LINES
    assert "read only the first" in found.notes[0]
    path.write_bytes("ä".encode() * 5000)
    with pytest.raises(sentences.DemoError, match=r"too few different sentences \(1\)"):
        read(path)


BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank lines": (b"\n  \n\t\n", "is empty"),
    "a single sentence": (b"Only this.\n", "too few different sentences (1)"),
    "binary": (b"PK\x03\x04\x00\x00 text", "zero byte"),
    "other encoding": ("Größe\nCafé\n".encode("latin-1"), "no UTF-8 text: byte 2 is 0xf6"),
    "damaged gzip": (gzip.compress(b"text " * 1000)[:40], "damaged gzip"),
    "gzip only by its first bytes": (b"\x1f\x8bnot gzip", "damaged gzip"),
    "JSON lines": (b'{"text": "One."}\n' * 8, "is JSON"),
    "JSON": (b'[\n  {"text": "One."},\n  {"text": "Two."}\n]\n', "is JSON"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_unusable_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, reason = BAD_FILES[kind]
    path = tmp_path / "data.txt"
    path.write_bytes(data)
    assert reason in complaint(capsys, "--model", "random", "--data", path)


def test_a_table_of_nothing_but_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "names.csv"
    path.write_text("title,text\n")
    assert "is empty" in complaint(capsys, "--model", "random", "--data", path)


def test_a_table_of_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numbers.csv"
    path.write_text("".join(f"{i},{i / 7},\n" for i in range(20)))
    assert "no column of text" in complaint(capsys, "--model", "random", "--data", path)


def test_gzip_only_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.txt.gz"
    path.write_text("\n".join(LINES))
    assert "is no gzip file" in complaint(capsys, "--model", "random", "--data", path)


def test_an_unclosed_quote_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.csv"
    path.write_text('1,"never closed\n' + "line after line\n" * 20_000)
    assert "near line" in complaint(capsys, "--model", "random", "--data", path)


def test_missing_file_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in complaint(capsys, "--model", "random", "--data", tmp_path / "none.txt")
    assert "cannot read" in complaint(capsys, "--model", "random", "--data", tmp_path)


@pytest.mark.parametrize("device", ["quantum", "cuda:99"])
def test_unknown_device(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--device {device}" in complaint(capsys, "--model", "random", "--device", device)


def test_unwritable_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before two minutes of work, not after."""
    assert "no folder" in complaint(capsys, "--model", "random", "--json", tmp_path / "none" / "x.json")
    assert ".png" in complaint(capsys, "--model", "random", "--plot", tmp_path / "x.jpeg2")


@pytest.mark.parametrize("package", ["rich", "safetensors", "transformers", "matplotlib", models.PACKAGE])
def test_missing_package_names_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else true_find(name, *rest)
    )
    said = complaint(capsys, "--plot", "figure.png")
    assert "pip install" in said
    assert package.replace("_", "-") in said


def test_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot load the model" in complaint(capsys, "--model", tmp_path)


@needs_weights
def test_other_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One flipped bit in a copy of the published file."""
    folder = models.packaged_folder()
    assert folder is not None
    data = bytearray((folder / "model.safetensors").read_bytes())
    models.check_digest(folder / "model.safetensors")
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(models, "packaged_folder", lambda: tmp_path)
    assert "is not the published model" in complaint(capsys)


@pytest.mark.parametrize("query", ["", "  "])
def test_an_empty_query_is_refused(query: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be embedded, and find something."""
    with pytest.raises(SystemExit):
        demo("--query", query)
    assert "must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
def test_counts_must_be_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo("--limit", value)
    assert stop.value.code == 2
    assert "whole number" in capsys.readouterr().err


def test_a_changed_neighbour_counts_unless_rounding_explains_it() -> None:
    """Three points: the nearest of the first changes with a nudge that is as small as its lead."""
    angles = torch.tensor([0.0, 0.5, -0.5 - 1e-6, 3.0], dtype=torch.float64)
    stock = torch.stack([angles.cos(), angles.sin()], dim=1)
    nudged = angles + torch.tensor([-1e-6, 0.0, 0.0, 0.0], dtype=torch.float64)
    ours = torch.stack([nudged.cos(), nudged.sin()], dim=1)
    assert comparison.compare_neighbours(stock, ours) == comparison.Neighbours(agree=3, tied=1, disagree=0)


def test_a_wrong_neighbour_is_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal embeddings explain no change at all."""
    stock = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    answers = iter([torch.tensor([1, 0, 0, 0, 0]), torch.tensor([2, 0, 0, 0, 0])])
    monkeypatch.setattr(comparison, "nearest_other", lambda embeddings: next(answers))
    stock[1] = stock[0]
    assert comparison.compare_neighbours(stock, stock) == comparison.Neighbours(4, 0, 1)


def test_nan_is_a_difference() -> None:
    """NaN compares false with everything, a limit included."""
    a = torch.zeros(2, 2)
    assert comparison.largest_difference(a, a.clone().fill_(float("nan"))) == float("inf")


def test_batches_hold_every_sentence_once_and_mark_padding() -> None:
    encoder = models.load("random", torch.device("cpu"), torch.float32)
    texts = ["one", "one two three", "one two", "", "a b c d e f g"]
    batches = embedding.make_batches(encoder, texts, 2, torch.device("cpu"))
    assert sorted(row for batch in batches for row in batch.rows) == [0, 1, 2, 3, 4]
    assert [batch.mask.sum(1).tolist() for batch in batches] == [[7, 3], [2, 1], [1]]


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    """Mean pooling over padding, or attention to it, would show here."""
    encoder = models.load("random", torch.device("cpu"), torch.float32)
    (alone,) = embedding.make_batches(encoder, ["one two"], 4, torch.device("cpu"))
    (mixed,) = embedding.make_batches(
        encoder, ["one two", "a much longer sentence of words"], 4, torch.device("cpu")
    )
    expected = embedding.embed(encoder, alone)[0]
    torch.testing.assert_close(embedding.embed(encoder, mixed)[mixed.rows.index(0)], expected)
    torch.testing.assert_close(expected.norm(), torch.tensor(1.0))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux only")
def test_peak_memory_sees_what_is_freed_again() -> None:
    peak = embedding.peak_memory(lambda: torch.ones(8, 2**20).sum(), torch.device("cpu"))
    assert peak is not None
    assert 30 * 2**20 < peak < 60 * 2**20


def test_sample_is_balanced_and_has_no_repetitions() -> None:
    sample = sentences.read_sample(1000)
    assert len(set(sample.texts)) == len(sample.texts) == 200
    assert {sample.topics.count(topic) for topic in sample.topics} == {25}
    assert len(set(sentences.read_sample(8).topics)) == 8
