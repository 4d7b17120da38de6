"""README's table of CPU ratios, made of the committed file.

    python -m undivided.bench.readme

writes it between its marks in README.md, from bench/results/cpu/ratios.json; a test holds the two together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .environment import ROOT
from .results import Ratio, Results, read

RATIOS = Path("bench/results/cpu/ratios.json")
BEGIN, END = "<!-- ratios:begin -->", "<!-- ratios:end -->"
HEAD = "| case | ours | PyTorch | measured | required |\n|---|---|---|---|---|"


def ratios_markdown(results: Results, source: Path = RATIOS) -> str:
    """Where it was measured, and a row for each figure."""
    told = results.environment
    where = (
        f"{told['cpu']}, {told['threads']} threads, PyTorch {told['torch']}, {told['date']} "
        f"([`{source.as_posix()}`]({source.as_posix()})):"
    )
    return "\n".join([where, "", HEAD, *map(_row, results.ratios)])


def _row(ratio: Ratio) -> str:
    demand = ratio.demand if ratio.ok else f"{ratio.demand} **missed**"
    cells = ratio.name, _time(ratio.ours_ms), _time(ratio.theirs_ms), ratio.figure, demand
    return f"| {' | '.join(cells)} |"


def _time(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.1f} ms" if ms >= 1 else f"{ms * 1e3:.0f} µs"


def with_table(text: str, table: str) -> str:
    """A text with the table between its marks.

    Raises:
        ValueError: it lacks the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there is no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    """Rewrite README.md."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    readme = ROOT / "README.md"
    try:
        text = readme.read_text(encoding="utf-8")
        readme.write_text(with_table(text, ratios_markdown(read(ROOT / RATIOS))), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"{readme}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
