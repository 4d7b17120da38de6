"""Embedding sentences with one attention and with the other, and what that costs.

An embedding is what sentence-transformers makes of this model: the mean of the last hidden states over
the tokens that are no padding, scaled to length 1 (Reimers and Gurevych 2019, section 3).
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.explain import explain
from .models import Encoder

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Batch(NamedTuple):
    """rows: positions of the sentences in the list they came from; ids, mask: (len(rows), seqlen)."""

    rows: list[int]
    ids: Tensor
    mask: Tensor


@dataclass
class Run:
    """What one attention implementation did.

    speeds: sentences per second, one per pass over the data. seconds: one per timed batch.
    """

    name: str
    embeddings: Tensor
    speeds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


class Recorder:
    """Our attention function, counting its calls and noting which implementation the first one ran on."""

    def __init__(self) -> None:
        self.calls = 0
        self.implementation = "none"
        self.evidence = "none"

    def __call__(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        from .. import transformers

        if self.calls == 0:
            q, k, v, ours = transformers.translate(*args, **options)
            explanation = explain(q, k, v, **ours)
            self.implementation, self.evidence = explanation.chosen or "none", explanation.evidence
        self.calls += 1
        return transformers.attention_function(*args, **options)


def make_batches(encoder: Encoder, texts: list[str], size: int, device: torch.device) -> list[Batch]:
    """Batches of sentences of similar length: sorted, so that little is spent on padding."""
    tokens = encoder.tokenize(texts)
    order = sorted(range(len(texts)), key=lambda row: len(tokens[row]), reverse=True)
    batches = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = len(tokens[rows[0]])
        ids = torch.full((len(rows), longest), encoder.pad_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(tokens[row])] = torch.tensor(tokens[row])
            mask[i, : len(tokens[row])] = 1
        batches.append(Batch(rows, ids.to(device), mask.to(device)))
    return batches


@torch.inference_mode()
def embed(encoder: Encoder, batch: Batch) -> Tensor:
    """(sentences, hidden_size) float32, of length 1."""
    hidden = encoder.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state.float()
    weights = batch.mask[..., None].float()
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def compare_runs(
    encoder: Encoder,
    batches: list[Batch],
    names: tuple[str, str],
    passes: int,
    advance: Callable[[], None],
) -> tuple[Run, Run]:
    """Embed every batch `passes` times with both implementations, in alternating order, after a warm-up.

    The embeddings of the last pass are kept. advance: called after each timed batch.
    """
    count = sum(len(batch.rows) for batch in batches)
    width = encoder.model.config.hidden_size
    stock, ours = (Run(name, torch.empty(count, width)) for name in names)
    runs = (stock, ours)
    for batch in (batches[0], batches[-1]):
        for run in runs:
            encoder.model.set_attn_implementation(run.name)
            embed(encoder, batch)
    first = 0
    for _ in range(passes):
        for batch in batches:
            for run in (runs[first], runs[1 - first]):
                encoder.model.set_attn_implementation(run.name)
                synchronize(batch.ids.device)
                start = time.perf_counter()
                out = embed(encoder, batch)
                synchronize(batch.ids.device)
                run.seconds.append(time.perf_counter() - start)
                run.embeddings[batch.rows] = out.cpu()
                advance()
            first = 1 - first
        for run in runs:
            run.speeds.append(count / sum(run.seconds[-len(batches) :]))
    for run in runs:
        encoder.model.set_attn_implementation(run.name)
        run.peak_bytes = peak_memory(lambda: embed(encoder, batches[0]), batches[0].ids.device)
    return runs


def embed_all(encoder: Encoder, batches: list[Batch], name: str) -> Tensor:
    """Embeddings of all sentences, in their own order, untimed."""
    encoder.model.set_attn_implementation(name)
    count = sum(len(batch.rows) for batch in batches)
    out = torch.empty(count, encoder.model.config.hidden_size)
    for batch in batches:
        out[batch.rows] = embed(encoder, batch).cpu()
    return out


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes a call needs at its peak beyond what was there before; None where that cannot be measured.

    On a GPU what PyTorch allocated there; on Linux the growth of the process's resident memory, after
    free memory went back to the system and the kernel's high-water mark was set back.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
        before = _resident("VmRSS")
        call()
        return _resident("VmHWM") - before
    except (OSError, AttributeError, StopIteration):
        return None


def _resident(field_name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name))
