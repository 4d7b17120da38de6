"""The demo from top to bottom: read, load, embed twice, compare, show, judge."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...extras import missing
from . import models
from .comparison import compare_neighbours, largest_difference, search
from .result import Hit, Result, Search
from .sentences import FEWEST, DemoError, Sentences, read_sample, read_sentences

if TYPE_CHECKING:
    from .embedding import Run

LIMIT_FLOAT32 = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLE_QUERIES = (
    "insects that are useful to gardeners",
    "pain in the joints",
    "protecting data against hackers",
)
HITS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the demo."""
    parser.description = (
        "Embed real sentences with a trained model, once with the attention it came with and once with ours; "
        "compare results, speed and memory. Exit status: 0 same, 1 different, 2 could not run."
    )
    parser.add_argument(
        "--model",
        default="all-MiniLM-L6-v2",
        help="all-MiniLM-L6-v2 (default, weights from a package), random, a folder, or a name on the hub",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="CSV or text, .gz too (default: a sample)")
    parser.add_argument(
        "--column", metavar="NAME", help="the table's column to embed, by name or number (default: all text)"
    )
    parser.add_argument("--limit", type=_positive, default=1000, metavar="N", help="sentences at most (1000)")
    parser.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="sentences a batch (32)"
    )
    parser.add_argument(
        "--passes", type=_positive, metavar="N", help="passes to time (3 for the sample, else 1)"
    )
    parser.add_argument(
        "--query", action="append", type=_text, metavar="TEXT", help="search for this; may be repeated"
    )
    parser.add_argument(
        "--stock", choices=["sdpa", "eager"], help="what to compare with (default: what transformers chooses)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a figure (.png, .svg or .pdf)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")


def main(options: argparse.Namespace) -> int:
    """Run the demo; the exit status is 0 if both attentions agree, 1 if not, 2 if it could not run."""
    try:
        if options.limit < FEWEST:
            raise DemoError(f"--limit must be at least {FEWEST}, to compare neighbours; got {options.limit}")
        _check_installed(options)
        _check_outputs(options)
        device = _device(options.device)
        if options.data is not None:
            sentences = read_sentences(options.data, options.limit, options.column)
        elif options.column is not None:
            raise DemoError("--column needs --data")
        else:
            sentences = read_sample(options.limit)
        return 0 if _run(options, sentences, device).passed else 1
    except DemoError as error:
        print(f"undivided demo: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, sentences: Sentences, device: torch.device) -> Result:
    if options.model in ("all-MiniLM-L6-v2", "random") or Path(options.model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    from .. import transformers
    from . import embedding, screen

    console = screen.Screen()
    dtype = DTYPES[options.dtype]
    with console.working("loading the model"):
        encoder = models.load(options.model, device, dtype)
        recorder = embedding.Recorder()
        transformers.register("undivided", recorder)
        stock_name = options.stock or encoder.model.config._attn_implementation
        queries, own = _queries(options.query, sentences, is_sample=options.data is None)
        count = len(sentences.texts)
        batches = embedding.make_batches(encoder, sentences.texts + queries, options.batch_size, device)
    passes = options.passes or (3 if options.data is None else 1)
    console.start(encoder, sentences, device, options.dtype)
    with console.progress(len(batches) * passes * 2) as advance:
        stock, ours = embedding.compare_runs(encoder, batches, (stock_name, "undivided"), passes, advance)

    layers, calls = encoder.model.config.num_hidden_layers, recorder.calls
    limit = LIMIT_FLOAT32
    if dtype != torch.float32:
        with console.working("the same in float32, to judge the rounding"):
            exact_encoder = models.load(options.model, device, torch.float32)
            exact = embedding.embed_all(exact_encoder, batches, stock_name)
        limit = 2 * largest_difference(stock.embeddings, exact)
    ratios = [theirs / own for theirs, own in zip(stock.seconds, ours.seconds)]
    result = Result(
        model=encoder.name,
        description=encoder.description,
        source=sentences.source,
        device=str(device),
        dtype=options.dtype,
        threads=torch.get_num_threads(),
        sentences=count,
        tokens=sum(int(batch.mask.sum()) for batch in batches),
        batches=len(batches),
        layers=layers,
        passes=passes,
        stock=stock_name,
        implementation=recorder.implementation,
        evidence=recorder.evidence,
        calls=calls,
        stock_sentences_per_second=stock.speed,
        sentences_per_second=ours.speed,
        speed_ratio_range=(min(ratios), max(ratios)),
        stock_peak_bytes=stock.peak_bytes,
        peak_bytes=ours.peak_bytes,
        largest_difference=largest_difference(stock.embeddings, ours.embeddings),
        difference_limit=limit,
        neighbours=compare_neighbours(stock.embeddings[:count], ours.embeddings[:count]),
        searches=_searches(queries, own, stock, ours, count),
    )
    console.finish(result, sentences)
    if options.json:
        report = {**asdict(result), "passed": result.passed}
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        console.wrote(options.json)
    if options.plot:
        from .plot import draw

        draw(options.plot, result, sentences, stock.embeddings[:count], ours.embeddings[:count])
        console.wrote(options.plot)
    return result


def _queries(
    asked: list[str] | None, sentences: Sentences, is_sample: bool
) -> tuple[list[str], list[int | None]]:
    """What to search for, and, where that is a sentence of the data, its index."""
    if asked or is_sample:
        queries = asked or list(SAMPLE_QUERIES)
        return queries, [None] * len(queries)
    own = [len(sentences.texts) * i // 4 for i in (1, 2, 3)]
    return [sentences.texts[i] for i in own], list(own)


def _searches(queries: list[str], own: list[int | None], stock: Run, ours: Run, count: int) -> list[Search]:
    a, b = stock.embeddings, ours.embeddings
    found = []
    for row, (query, without) in enumerate(zip(queries, own), start=count):
        similar = (a[:count] @ a[row], b[:count] @ b[row])
        hits = (
            [
                Hit(i, similar[0][i].item(), similar[1][i].item())
                for i in search(x[row], x[:count], HITS, without)
            ]
            for x in (a, b)
        )
        found.append(Search(query, *hits))
    return found


def _check_installed(options: argparse.Namespace) -> None:
    modules = ["transformers", "safetensors", "rich"]
    if options.model == "all-MiniLM-L6-v2":
        modules.append(models.PACKAGE)
    if options.plot:
        modules.append("matplotlib")
    if message := missing("demo", *modules):
        raise DemoError(message)


def _check_outputs(options: argparse.Namespace) -> None:
    for file in (options.plot, options.json):
        if file is not None and not file.absolute().parent.is_dir():
            raise DemoError(f"cannot write {file}: there is no folder {file.absolute().parent}")
    if options.plot and options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise DemoError(f"--plot must name a .png, .svg or .pdf file, got {options.plot}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DemoError(f"--device {name} does not work here: {str(error).splitlines()[0]}") from None
    return device


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text
