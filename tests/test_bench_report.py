"""What people read of the benchmark: figures of README come from a file, the page leaves nothing out."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from undivided.bench import plots, readme, report, results, shapes
from undivided.bench.results import Peak, Ratio, Record, Results, ResultsError, read

ROOT = Path(__file__).parent.parent
RATIOS = (
    Ratio("kept", 1.234, "times as fast", 0.95, 12.345, 15.2),
    Ratio("missed", 2.0, "times as fast", 2.5, 0.5, 1.0),
    Ratio("small", 61.4, "us more", 60.0, 0.08, 0.02),
    Ratio("memory", 508.2, "MiB", 2048.0),
    Ratio("free", 0.5, "times as fast", None, 1.0, 0.5),
)
WHERE = {"threads": 2, "cpu": "Processor", "torch": "2.13.0", "date": "2026-01-02"}


def record(**fields: Any) -> Record:
    given: dict[str, Any] = {
        "case": "c",
        "dtype": "float32",
        "direction": "forward",
        "implementation": "undivided",
    }
    if fields.get("status", "timed") == "timed":
        given |= {"p20_ms": 0.9, "median_ms": 1.0, "p80_ms": 1.1, "tflops": 1e-3, "of_matmul": 0.5}
    return Record(**{"status": "timed", **given, **fields})


FOUND = Results(
    {"cpu": "a processor", "torch": "2.13.0", "threads": 2},
    sources={"c": "Somebody 2020, https://example.org/paper <b>"},
    roofs={"copy": 10.0, "float32": 0.1},
    records=(
        record(host_us=12.5),
        record(implementation="torch-flash", median_ms=2.0, reason="out[0] = 1", constants={"out": 2.5}),
        record(implementation="torch-math", status="wrong", reason="out[3] = nan"),
        record(implementation="xformers", status="n/a", reason="no module named xformers"),
    ),
    ratios=(Ratio("forward", 1.1, "times as fast", 0.95, 1.0, 1.1), Ratio("memory", 9.0, "MiB", 2.0)),
    peaks=(Peak("w", 1024, "undivided", 2**20), Peak("w", 1024, "torch-flash", None, "no room")),
    host_us={"forward": 41.5},
)


def test_readme_shows_the_committed_ratios() -> None:
    """A figure without its file is a figure that nobody can check."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.ratios_markdown(read(ROOT / readme.RATIOS))
    assert readme.with_table(text, table) == text, "python -m undivided.bench.readme puts it there"


def test_the_table_of_readme() -> None:
    """Units, directions and misses, from a file whose figures are known."""
    where, _, _, _, *rows = readme.ratios_markdown(Results(WHERE, ratios=RATIOS)).splitlines()
    assert where.startswith("Processor, 2 threads, PyTorch 2.13.0, 2026-01-02")
    assert rows == [
        "| kept | 12.3 ms | 15.2 ms | 1.23 × | ≥ 0.95 |",
        "| missed | 500 µs | 1.0 ms | 2.00 × | ≥ 2.5 **missed** |",
        "| small | 80 µs | 20 µs | 61 µs more | ≤ 60 **missed** |",
        "| memory |  |  | 508 MiB | ≤ 2048 |",
        "| free | 1.0 ms | 500 µs | 0.50 × |  |",
    ]


def test_the_command_rewrites_what_is_between_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["readme"])
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    file = tmp_path / "README.md"
    file.write_text("no marks")
    assert readme.main() == 1
    assert "ratios.json" in capsys.readouterr().err
    (tmp_path / readme.RATIOS).parent.mkdir(parents=True)
    (tmp_path / readme.RATIOS).write_text((ROOT / readme.RATIOS).read_text())
    assert readme.main() == 1
    assert f"there is no {readme.BEGIN}" in capsys.readouterr().err
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.main() == 0
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| case | ours |" in text


def test_committed_files_of_results_can_be_read() -> None:
    """--load and --compare are for them."""
    for file in (ROOT / "bench" / "results").glob("**/*.json"):
        try:
            found = read(file)
        except ResultsError:
            assert file.with_name(f"{file.stem}-sweep.json").exists(), f"{file} is no file of the GPU lane's"
        else:
            assert {"date", "torch", "cpu"} <= found.environment.keys()


def test_the_page_says_in_short_what_came_out() -> None:
    slow = record(implementation="torch-flash", median_ms=2.0)
    found = Results(WHERE | {"gpu": "none"}, records=(record(), slow), ratios=RATIOS)
    assert report.summary(found) == [
        "forward: against the fastest other 2.00× in the median of 1 cases, 2.00× to 2.00×.",
        "CPU ratios: 2 of 4 required figures kept.",
    ]
    assert report.where(found) == "Processor, 2 threads, PyTorch 2.13.0, 2026-01-02."


def test_the_page_has_spread_peak_and_clocks() -> None:
    """The main table has no room for them, and a file is not read by people."""
    shown = report.html(Results(WHERE, records=(record(peak_bytes=3 * 2**20, clocks="1980 MHz, 690 W"),)))
    for cell in (">0.9<", ">1.1<", ">3.0<", "1980 MHz, 690 W"):
        assert cell in shown


def test_host_time_is_shown_where_there_is_a_gpu() -> None:
    """A short call waits for the host, and its kernel's time alone would promise what nobody gets."""
    found = record(host_us=61.5), record(case="short", host_us=1500.0)
    _, (long, short) = report.grid(Results(WHERE, records=found))
    assert "host" not in long[3]
    assert short[3] == "1 · 1G · 50% · host 1500 µs"
    shown = report.html(Results(WHERE, records=(record(host_us=61.5), record(case="short"))))
    for words in ("host µs</th>", ">61.5<", "the host's as well"):
        assert words in html.unescape(shown)
    assert "host µs" not in report.html(Results(WHERE, records=(record(),)))


def test_what_was_lost_is_on_the_page_when_nothing_else_changed() -> None:
    """A comparison in which everything broke has no changes to show, and everything to say."""
    broken = Results(WHERE, records=(Record("c", "float32", "forward", "undivided", "wrong", "out[0]"),))
    assert "timed then, wrong now" in report.html(broken, [], ["timed then, wrong now: c"])


def test_cases_of_a_sweep_are_drawn_once() -> None:
    """As a line over lengths, not among the bars as well."""
    pytest.importorskip("matplotlib", reason="pictures are drawn with it")
    swept = [Record(f"fa3-hd64-{n} causal 1x{n}", *record().key[1:], "timed", tflops=1.0) for n in (1, 2, 4)]
    assert list(dict(plots.pictures(Results({}, records=tuple(swept))))) == [
        "speed-fa3-hd64-causal-float32-forward"
    ]
    assert list(dict(plots.pictures(Results({}, records=(record(), *swept))))) == [
        "speed-float32-forward",
        "speed-fa3-hd64-causal-float32-forward",
    ]


def test_results_survive_a_file(tmp_path: Path) -> None:
    """A field that is written and not read, or the other way round."""
    results.write(FOUND, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json") == FOUND
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == results.SCHEMA


def _broken(change: Callable[[Any], Any]) -> Any:
    document = results.as_dict(FOUND)
    change(document)
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "schema"),
        (_broken(lambda d: d.update(schema="undivided bench 0")), "schema"),
        (_broken(lambda d: d.update(extra=1)), "unknown field 'extra'"),
        (_broken(lambda d: d.pop("environment")), "environment is missing"),
        (_broken(lambda d: d.update(records={})), "records must be a list"),
        (_broken(lambda d: d["records"][1].update(status="fast")), r"records\[1\].status must be 'timed' or"),
        (_broken(lambda d: d["records"][0].update(median_ms="1")), r"records\[0\].median_ms must be"),
        (_broken(lambda d: d["records"][0].update(median_ms=True)), r"records\[0\].median_ms must be"),
        (_broken(lambda d: d["records"][0].pop("case")), r"records\[0\].case is missing"),
        (_broken(lambda d: d["records"].append(3)), r"records\[4\] must be an object"),
        (_broken(lambda d: d["roofs"].update(copy=None)), r"roofs.copy must be"),
    ],
)
def test_a_file_that_is_not_one_is_refused(tmp_path: Path, document: Any, message: str) -> None:
    """A comparison with a misread file would report what nobody measured."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document))
    with pytest.raises(results.ResultsError, match=message):
        results.read(path)


def test_a_planted_regression_is_found() -> None:
    """And noise is not: within the tolerance, or inside what the runs themselves vary."""

    def run(**by_direction: tuple[float, float, float]) -> Results:
        names = ("p20_ms", "median_ms", "p80_ms")
        records = [record(direction=d, **dict(zip(names, ms))) for d, ms in by_direction.items()]
        return Results({"cpu": "x"}, records=tuple(records))

    old = run(a=(0.9, 1.0, 1.1), b=(0.99, 1.0, 1.01), c=(0.9, 1.0, 1.1), d=(0.5, 1.0, 3.0), gone=(1, 1, 1))
    new = run(a=(1.3, 1.4, 1.5), b=(1.02, 1.03, 1.04), c=(0.4, 0.5, 0.6), d=(1.1, 2.0, 3.5), fresh=(1, 1, 1))
    changes = {change.key[2]: change for change in results.compare(old, new)}
    assert {name: change.is_regression for name, change in changes.items()} == {
        "a": True,
        "b": False,
        "c": False,
        "d": False,
    }
    assert changes["a"].ratio == pytest.approx(1.4)
    assert next(iter(changes)) == "d", "slowest change first"


def test_what_was_timed_and_is_wrong_now_is_lost() -> None:
    """The fastest way to a better figure must not be to break the kernel."""
    new = Results({"cpu": "y"}, records=(record(status="wrong", reason="out[0]"),))
    assert results.lost(FOUND, new) == [*new.records]
    assert results.compare(FOUND, new) == []
    assert "cpu: a processor then, y now" in results.differences(FOUND, new)


class Outside(html.parser.HTMLParser):
    """Collects whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(tag)
        for name, value in attrs:
            fetches = name in ("src", "href", "srcset", "data", "action", "style")
            if fetches and value and not value.startswith("data:image/png;base64,"):
                self.found.append(f"{name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_fetches_nothing() -> None:
    """Readable without a network, whatever addresses the sources of shapes name."""
    pytest.importorskip("matplotlib", reason="pictures are drawn with it")
    made = report.html(FOUND, results.compare(FOUND, FOUND), ["other surroundings: cpu"])
    parser = Outside()
    parser.feed(made)
    assert parser.found == []
    assert "url(" not in made
    assert "@import" not in made
    assert parser.images == 3, "speed, ratios, memory"
    words = "https://example.org/paper <b>", "✗ wrong", "xformers: n/a everywhere", "✗ missed", "no room"
    for word in words:
        assert word in parser.text


def test_the_table_shows_ratios_and_reasons() -> None:
    """Ours against the fastest other that is right: a wrong one must not count as the fastest."""
    columns, rows = report.grid(FOUND)
    assert columns == ["case", "dtype", "direction", "undivided", "torch-flash", "torch-math", report.AGAINST]
    assert rows[0][-1] == "2.00x"
    assert rows[0][4].endswith("≈")
    assert rows[0][5] == "✗ wrong"
    assert any(line.startswith("torch-math: wrong") for line in report.absences(FOUND))


def test_a_busy_machine_is_said() -> None:
    """Times of a run beside a compilation look like times."""
    assert report.busy(FOUND) == []
    crowded = dataclasses.replace(FOUND, environment={"load": 9.0, "threads": 2})
    assert "load 9:" in report.busy(crowded)[0]
    assert "load 9:" in report.html(crowded)


def test_a_sweep_is_drawn_over_lengths() -> None:
    """The names of the paper's sweep must be those that the picture looks for."""
    pytest.importorskip("matplotlib", reason="pictures are drawn with it")
    cases = [shapes.SHAPES[f"fa3-hd64-{n}"].case("causal", "cuda") for n in (512, 1024, 2048)]
    found = Results({}, records=tuple(record(case=case.name) for case in cases))
    assert "speed-fa3-hd64-causal-float32-forward" in dict(plots.pictures(found))


def test_the_page_is_in_the_encoding_that_it_names(tmp_path: Path) -> None:
    """Where the machine's own is another, a ≥ would be two wrong letters, or an error after minutes."""
    code = (
        "import argparse, pathlib, sys\n"
        "from undivided.bench import command\n"
        "parser = argparse.ArgumentParser()\n"
        "command.add_arguments(parser)\n"
        "sys.exit(command.main(parser.parse_args(sys.argv[1:])))\n"
    )
    results.write(FOUND, tmp_path / "r.json")
    arguments = ["--load", str(tmp_path / "r.json"), "--output", str(tmp_path)]
    plain = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    plain["PYTHONIOENCODING"] = "utf-8"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "≥ 0.95" in (tmp_path / "report.html").read_text(encoding="utf-8")
