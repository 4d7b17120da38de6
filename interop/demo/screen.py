"""What the demo says in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .models import Encoder
from .result import Hit, Result, Search
from .sentences import Sentences


class Screen:
    """Prints to the terminal, or plain text where there is none."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def working(self, what: str) -> contextlib.AbstractContextManager[object]:
        return self.console.status(f"{what} ...")

    def start(self, encoder: Encoder, sentences: Sentences, device: torch.device, dtype: str) -> None:
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        else:
            threads = torch.get_num_threads()
            where = f"{device}, {threads} thread{'s' * (threads > 1)}"
        self.console.print()
        facts = (
            ("model", f"[bold]{escape(encoder.name)}[/] ({encoder.description})"),
            ("data", f"[bold]{len(sentences.texts):,}[/] sentences from {escape(sentences.source)}"),
            ("machine", f"{where}, {dtype}"),
        )
        for name, fact in facts:
            self.console.print(f"  [dim]{name:<10}[/]{fact}")
        for note in sentences.notes:
            self.console.print(f"  [dim]{'':<10}{escape(note)}[/]")
        self.console.print()

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[], None]]:
        """Yields a function to call after each step."""
        columns = (
            TextColumn("  embedding with both"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda: bar.advance(task)

    def finish(self, result: Result, sentences: Sentences) -> None:
        self._costs(result)
        self._verdicts(result)
        for found in result.searches:
            self._search(found, sentences)
        self.console.print()
        if result.passed:
            verdict = "[bold green]same[/]: the model does not notice whose attention it runs on"
        elif result.calls == 0:
            verdict = "[bold red]not compared[/]: this model never called our attention"
        else:
            verdict = "[bold red]different[/]: beyond what rounding explains"
        self.console.print(f"  {verdict}\n")

    def wrote(self, path: Path) -> None:
        self.console.print(f"  [dim]wrote[/] {escape(str(path))}")

    def _costs(self, result: Result) -> None:
        speeds = result.stock_sentences_per_second, result.sentences_per_second
        peaks = result.stock_peak_bytes, result.peak_bytes
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 2), show_edge=False)
        for name, style in (("", ""), ("stock", ""), ("undivided", "bold"), ("", "dim")):
            table.add_column(name, justify="left" if not name else "right", style=style, no_wrap=True)
        table.add_row("attention", result.stock, result.implementation)
        low, high = result.speed_ratio_range
        ratio = f"{speeds[1] / speeds[0]:.2f} × ({low:.2f} to {high:.2f})"
        table.add_row("sentences per second", *(f"{speed:,.1f}" for speed in speeds), ratio)
        table.add_row("peak memory", *map(_size, peaks))
        self.console.print(table)
        memory = "GPU memory" if result.device.startswith("cuda") else "the process's resident memory"
        passes = "one pass" if result.passes == 1 else f"median of {result.passes} passes"
        self.console.print(f"  [dim]speed: {passes}, the two taking turns on each batch, after a warm-up;[/]")
        self.console.print("  [dim]in brackets the ratio's range over single batches[/]")
        self.console.print(f"  [dim]memory: growth of {memory} in the longest batch[/]")
        self.console.print(f"  [dim]evidence for {result.implementation} here: {escape(result.evidence)}[/]")

    def _verdicts(self, result: Result) -> None:
        neighbours = result.neighbours
        close = f", {neighbours.tied} tied within rounding" if neighbours.tied else ""
        bitwise = result.largest_difference == 0
        allowed = "equal bit for bit" if bitwise else f"allowed {result.difference_limit:.0e}"
        lines = (
            (
                result.calls > 0,
                "calls of our attention",
                f"{result.calls:,}",
                f"{result.layers} layers × {result.calls // result.layers:,} batches, warm-up included",
            ),
            (
                result.largest_difference <= result.difference_limit,
                "largest difference",
                f"{result.largest_difference:.1e}",
                allowed,
            ),
            (
                neighbours.disagree == 0,
                "same nearest neighbour",
                f"{neighbours.agree:,}",
                f"of {result.sentences:,} sentences{close}",
            ),
        )
        self.console.print()
        for good, name, figure, remark in lines:
            mark = "[green]✓[/]" if good else "[red]✗[/]"
            self.console.print(f"  {mark} {name:<24}[bold]{figure:>8}[/]   [dim]{remark}[/]")
        if bitwise and result.implementation == "fallback" and result.stock == "sdpa":
            self.console.print(
                "    [dim]On a CPU both end in PyTorch's own operator for a plain call like this one;\n"
                "    --stock eager compares with the formula written out.[/]"
            )

    def _search(self, found: Search, sentences: Sentences) -> None:
        width = max(20, self.console.width - 24)
        self.console.print()
        self.console.print(Text.assemble("  ", (f"“{_short(found.query, width)}”", "bold cyan")))
        self.console.print("  [dim]stock   ours[/]")
        for stock, ours in zip(found.stock, found.ours):
            for hit in (ours,) if stock.index == ours.index else (stock, ours):
                self.console.print(self._hit(hit, sentences, width))

    def _hit(self, hit: Hit, sentences: Sentences, width: int) -> Text:
        topic = sentences.topics[hit.index]
        line = Text(f"  {hit.stock:.3f}  {hit.ours:.3f}  ")
        line.append(_short(sentences.texts[hit.index], width - len(topic) - 2))
        line.append(f"  {topic}", style="dim")
        return line


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _size(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:,.1f} MiB"
