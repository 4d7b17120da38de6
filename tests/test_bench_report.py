"""What people read of the benchmark: figures of README come from a file, the page leaves nothing out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from undivided.bench import plots, readme, report
from undivided.bench.results import Ratio, Record, Results, ResultsError, read

ROOT = Path(__file__).parent.parent
RATIOS = (
    Ratio("kept", 1.234, "times as fast", 0.95, 12.345, 15.2),
    Ratio("missed", 2.0, "times as fast", 2.5, 0.5, 1.0),
    Ratio("small", 61.4, "us more", 60.0, 0.08, 0.02),
    Ratio("memory", 508.2, "MiB", 2048.0),
    Ratio("free", 0.5, "times as fast", None, 1.0, 0.5),
)
WHERE = {"threads": 2, "cpu": "Processor", "torch": "2.13.0", "date": "2026-01-02"}


def record(implementation: str = "undivided", **fields: Any) -> Record:
    given = {"status": "timed", "p20_ms": 0.9, "median_ms": 1.0, "p80_ms": 1.1, "tflops": 1.0, **fields}
    return Record("c", "float32", "forward", implementation, **given)


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
    slow = record("torch-flash", median_ms=2.0)
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
