"""What is measured: shapes that models have, each with its source, and who sees whom in them.

A shape becomes a `Case` of the conformance kit, so what is timed is also what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..conformance.cases import Case, Extra

FULL, CAUSAL, WINDOW, DENSE, PADDING = MASKS = ("full", "causal", "window", "dense", "padding")
"""dense: a random boolean mask over rows and columns. padding: batch entries of different lengths."""


@dataclass(frozen=True)
class Shape:
    """Heads as a model has them, and sequences as long as it reads; batches that fill a GPU.

    tokens: of a batch on a GPU, hence its batch size. window: keys before a query, for the mask of that
    name. cpu: (batch, seqlen) on a CPU, where a whole batch would take minutes. masks: those it is
    measured with. decode: one query against seqlen keys, forward only.
    """

    name: str
    source: str
    heads_q: int
    heads_kv: int
    head_dim: int
    seqlen: int
    cpu: tuple[int, int]
    head_dim_v: int | None = None
    masks: tuple[str, ...] = (CAUSAL,)
    window: int = 255
    tokens: int = 16384
    decode: bool = False

    def case(self, mask: str, device: str, seqlen: int | None = None, batch: int | None = None) -> Case:
        """The case to build; device is a type ("cpu", "cuda"), seqlen and batch go before its own."""
        own_batch, own_seqlen = self.cpu if device == "cpu" else (0, self.seqlen)
        seqlen = seqlen or own_seqlen
        batch = batch or own_batch or max(1, self.tokens // seqlen)
        return Case(
            f"{self.name} {mask} {batch}x{seqlen}",
            batch,
            self.heads_q,
            self.heads_kv,
            1 if self.decode else seqlen,
            seqlen,
            self.head_dim,
            self.head_dim_v,
            causal=mask == CAUSAL,
            window=(self.window, 0) if mask == WINDOW else None,
            mask=Extra(axes="qk") if mask == DENSE else None,
            key_lengths=tuple(seqlen * share // 4 for share in (4, 2, 3, 1)) if mask == PADDING else None,
        )


def _llama(size: str, heads: int) -> Iterator[Shape]:
    source = "Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv 2407.21783, table 3"
    name = f"llama-3.1-{size}"
    yield Shape(name, source, heads, 8, 128, 8192, cpu=(1, 512), tokens=8192)
    yield Shape(
        f"{name}-decode", source, heads, 8, 128, 8192, cpu=(1, 4096), masks=(FULL,), tokens=2**18, decode=True
    )


def _sweep() -> Iterator[Shape]:
    """16k tokens, hidden size 2048; what matters most comes first, for when the time is short."""
    source = "Shah et al. 2024, FlashAttention-3, arXiv 2407.08608, section 4.1"
    for seqlen in (4096, 16384, 1024, 2048, 8192, 512):
        for head_dim in (128, 64, 256):
            heads = 2048 // head_dim
            yield Shape(
                f"fa3-hd{head_dim}-{seqlen}",
                source,
                heads,
                heads,
                head_dim,
                seqlen,
                cpu=(1, seqlen),
                masks=(FULL, CAUSAL),
            )


SWEEP = {shape.name: shape for shape in _sweep()}
SHAPES = {
    shape.name: shape
    for shape in (
        *_llama("8b", 32),
        *_llama("70b", 64),
        Shape(
            "gpt-oss",
            "OpenAI 2025, gpt-oss model card, arXiv 2508.10925, section 2: every other layer sees 128 keys",
            heads_q=64,
            heads_kv=8,
            head_dim=64,
            seqlen=4096,
            cpu=(1, 512),
            masks=(CAUSAL, WINDOW),
            window=127,
        ),
        Shape(
            "vit-l-16",
            "Dosovitskiy et al. 2021, arXiv 2010.11929, table 1: 14 x 14 patches and a class token",
            heads_q=16,
            heads_kv=16,
            head_dim=64,
            seqlen=197,
            cpu=(2, 197),
            masks=(FULL,),
            tokens=64 * 197,
        ),
        Shape(
            "bert-base",
            "Devlin et al. 2019, arXiv 1810.04805, section 3",
            heads_q=12,
            heads_kv=12,
            head_dim=64,
            seqlen=512,
            cpu=(2, 512),
            masks=(PADDING, DENSE),
        ),
        Shape(
            "deepseek-v3",
            "DeepSeek-AI 2024, arXiv 2412.19437, section 4.2: 128 channels and 64 with positions",
            heads_q=128,
            heads_kv=128,
            head_dim=192,
            head_dim_v=128,
            seqlen=4096,
            cpu=(1, 256),
            tokens=4096,
        ),
        Shape(
            "window-4k-of-16k",
            "Jiang et al. 2023, Mistral 7B, arXiv 2310.06825, table 1",
            heads_q=32,
            heads_kv=8,
            head_dim=128,
            seqlen=16384,
            cpu=(1, 512),
            masks=(WINDOW,),
            window=4095,
        ),
        *SWEEP.values(),
    )
}
DEFAULT = ("llama-3.1-8b", "llama-3.1-8b-decode", "gpt-oss", "vit-l-16", "bert-base", "deepseek-v3")
