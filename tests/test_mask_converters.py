"""Masks of other libraries become mask objects that show the same; pictures of masks."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from undivided import Causal, Documents, Mask, Window, attention, from_predicate
from undivided.kernels import fallback
from undivided.kernels.mask_plot import KINDS
from undivided.kernels.spec import AttentionSpec, Inputs

IDS = torch.stack([torch.arange(300) // 70, torch.arange(300) // 128])


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (IDS[b, q] == IDS[b, k]) & (q >= k)


@pytest.mark.parametrize(("batch", "heads"), [(2, 3), (2, None), (None, None)])
@pytest.mark.parametrize("block", [128, 64])
def test_block_masks(batch: int | None, heads: int | None, block: int) -> None:
    """Full blocks forgotten, blocks of another size, batch entries that a mask_mod tells apart."""
    block_mask = create_block_mask(documents, batch, heads, 300, 300, device="cpu", BLOCK_SIZE=block)
    want = create_mask(documents, batch, heads, 300, 300, device="cpu")
    mask = Mask.from_block_mask(block_mask)
    assert repr(mask) == "from_predicate(documents)"
    assert torch.equal(mask.to_dense(300, 300, batch=batch or 1, heads=heads or 1).expand_as(want), want)
    q = torch.randn(2, 3, 300, 8)
    if batch is not None:
        dense = create_mask(documents, 2, 3, 300, 300, device="cpu")
        torch.testing.assert_close(attention(q, q, q, mask=mask), attention(q, q, q, mask=dense))
    with pytest.raises(ValueError, match=r"mask is for .*300, 300.*the call has .*299"):
        attention(q[:, :, :299], q, q, mask=mask)
    with pytest.raises(TypeError, match="block_mask must be a BlockMask, got Tensor"):
        Mask.from_block_mask(q)


def test_block_masks_without_a_function() -> None:
    """A block mask made of lists of blocks has a mask_mod that shows everything, and padded lists."""
    counts = torch.tensor([[[1, 2, 0]]], dtype=torch.int32)
    columns = torch.tensor([[[[1, 0], [2, 0], [0, 0]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=16, seq_lengths=(48, 48))
    want = torch.zeros(3, 3, dtype=torch.bool)
    want[0, 1] = want[1, 2] = want[1, 0] = True
    dense = Mask.from_block_mask(block_mask).to_dense(48, 48)[0, 0]
    assert torch.equal(dense, want.repeat_interleave(16, 0).repeat_interleave(16, 1))


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        ({"causal": True}, Causal()),
        ({"window_size": (5, 2)}, Window(5, 2)),
        ({"window_size": (5, -1)}, Window(5, None)),
        ({"window_size": (None, 3)}, Window(None, 3)),
        ({"causal": True, "window_size": (5, -1)}, Window(5, 0)),
        ({"causal": True, "window_size": (5, 7)}, Window(5, 0)),
        ({}, Window(None, None)),
    ],
    ids=str,
)
def test_flash_attention(arguments: dict[str, Any], same: Mask) -> None:
    """-1 taken as a distance; a causal window that sees to its right, where flash_attn's does not."""
    mask = Mask.from_flash_attention(**arguments)
    assert torch.equal(mask.to_dense(7, 11), same.to_dense(7, 11))


def test_transformers() -> None:
    """The lowest number of a dtype taken for a bias, or a bias for a mask."""
    keep = torch.rand(2, 1, 9, 9) > 0.4
    assert Mask.from_transformers(None) is None
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for lowest in (torch.finfo(dtype).min, -torch.inf):
            added = torch.zeros(2, 1, 9, 9, dtype=dtype).masked_fill(~keep, lowest)
            mask = Mask.from_transformers(added)
            assert mask is not None
            assert torch.equal(mask.to_dense(9, 9), keep)
    mask = Mask.from_transformers(keep)
    assert mask is not None
    assert torch.equal(mask.to_dense(9, 9), keep)
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = Mask.from_transformers(padding)
    assert mask is not None
    assert mask.to_dense(3, 5)[:, 0].tolist() == padding.bool()[:, None].expand(-1, 3, -1).tolist()
    with pytest.raises(ValueError, match="bias="):
        Mask.from_transformers(torch.randn(1, 1, 9, 9))
    with pytest.raises(ValueError, match="four axes"):
        Mask.from_transformers(torch.ones(9))
    with pytest.raises(TypeError, match="bool or float"):
        Mask.from_transformers(torch.ones(1, 1, 9, 9).int())


def test_a_picture_counts_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of another head, or kinds swapped; what is said without matplotlib."""
    pytest.importorskip("matplotlib")
    mask = from_predicate(lambda b, h, q, k: (q >= k) & (h == 1))
    ax = mask.plot(300, 300, heads=2, head=1)
    image = ax.get_images()[0].get_array()
    kinds = [[KINDS[int(x)] for x in line] for line in image]
    assert kinds == [
        ["partial", "skipped", "skipped"],
        ["whole", "partial", "skipped"],
        ["partial", "partial", "partial"],
    ]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["skipped: 3", "whole: 1", "partial: 5"]
    again = (Documents(torch.zeros(300).int()) & Causal()).plot(300, 300, ax=ax)
    assert again is ax
    assert ax.get_title() == "Documents(int32 (300,)) & Causal()"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"undivided\[plot\]"):
        mask.plot(300, 300)


def test_compiled_calls_take_masks() -> None:
    """Python that torch.compile cannot follow on the way from a mask to intervals; tiles that are there."""
    q, k, v = (torch.randn(2, 2, 40, 8, requires_grad=True) for _ in range(3))
    shown = from_predicate(lambda b, h, q, k: q >= k)

    ids = torch.arange(40) // 9
    want = attention(q, k, v, mask=Documents(ids) & Window(9, 0)) + attention(q, k, v, mask=shown)
    torch.compiler.reset()

    def both(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return attention(q, k, v, mask=Documents(ids) & Window(9, 0)) + attention(q, k, v, mask=shown)

    out = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v, ids)
    torch.testing.assert_close(out, want)
    out.sum().backward()


_PEAK = """
import re, torch
from undivided import *
from undivided.kernels.functional import prepare
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
def call(seqlen):
    q = torch.empty(1, 1, seqlen, 8)
    return prepare(q, q, q, {"mask": MASK})
call(2048)
before = peak()
call(32768)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("mask", "limit"),
    [
        ("(Window(99, 0) | FirstKeys(4)) & Documents(torch.arange(seqlen) // 999)", 32),
        ("from_predicate(lambda b, h, q, k: (q >= k) & (k > 9))", 256),
    ],
)
def test_no_dense_mask(mask: str, limit: int) -> None:
    """A mask of all scores on the way: 32768² bools are 1024 MiB, indices of a block of rows are not."""
    command = [sys.executable, "-c", _PEAK.replace("MASK", mask)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(re.findall(r"\d+", done.stdout)[-1]) < limit * 1024


def test_ranges_of_vmap_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expanded tensor where implementations count on addresses: one mask under a mapped q of batch 1."""
    seen = []
    forward = fallback.attention_forward

    def looked_at(inputs: Inputs, spec: AttentionSpec) -> Any:
        assert inputs.ranges is not None
        seen.append((inputs.ranges.shape, inputs.ranges.is_contiguous()))
        return forward(inputs, spec)

    monkeypatch.setattr(fallback, "attention_forward", looked_at)
    q = torch.randn(3, 1, 2, 30, 8)
    mask = Documents(torch.arange(30) // 7)
    mapped = torch.func.vmap(lambda q: attention(q, q, q, mask=mask, impl="fallback"))(q)
    assert seen == [((3, 2, 30), True)]
    torch.testing.assert_close(mapped, torch.stack([attention(x, x, x, mask=mask) for x in q]))


def test_two_axes_of_transformers_are_kept_or_not() -> None:
    """An additive mask read upside down; ids of packed sequences read as all visible."""
    hidden = torch.zeros(2, 8)
    hidden[:, :3] = -torch.inf
    for wrong in (hidden, torch.tensor([[1, 1, 2, 2]])):
        with pytest.raises(ValueError, match="attention_mask of two axes must be bool, or hold 1"):
            Mask.from_transformers(wrong)


def test_a_window_of_flash_attention_is_a_pair() -> None:
    with pytest.raises(TypeError, match="window_size must be a pair"):
        Mask.from_flash_attention(window_size=3)  # type: ignore[arg-type]
