"""What is particular to the forward kernel: tiles, edges, addresses, bits, and what gets compiled.

The meaning of attention is tested for all implementations at once elsewhere.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in it")

import triton
import triton.language as tl

from undivided.conformance.budget import assert_within_budget
from undivided.conformance.oracle import Results, solve
from undivided.kernels import philox
from undivided.kernels.spec import AttentionSpec, Inputs
from undivided.kernels.triton import softmax, visibility
from undivided.kernels.triton.config import TABLE, TABLES_FOR, TileConfig, tile_config
from undivided.kernels.triton.forward import attention_forward
from undivided.kernels.triton.launch import dropped_bits
from undivided.kernels.visibility import visible

SMALL = TileConfig(16, 32, num_warps=4, num_stages=1)
WIDE = TileConfig(32, 16, num_warps=4, num_stages=1)


def draw(device: torch.device, dtype: torch.dtype, seqlen_q: int = 37, seqlen_k: int = 53) -> Inputs:
    """Two query heads share a key head; head_dim 24 is no power of two and differs from v's."""
    shapes = ((2, 2, seqlen_q, 24), (2, 1, seqlen_k, 24), (2, 1, seqlen_k, 40))
    return Inputs(*(torch.randn(shape, device=device).to(dtype) for shape in shapes))


def assert_right(inputs: Inputs, spec: AttentionSpec, config: TileConfig | None) -> None:
    out, lse, _ = attention_forward(inputs, spec, config)
    assert_within_budget(Results(out, lse), solve(inputs, spec, None, None), "kernel")


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["16x32", "32x16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (2, 0), (20, 3), (9, None)])
def test_any_tile_size_is_right(
    config: TileConfig, dtype: torch.dtype, left: int | None, right: int | None, device: torch.device
) -> None:
    """An edge tile visited twice or not at all; a row whose first tile is empty (hazard S12)."""
    assert_right(draw(device, dtype), AttentionSpec(0.3, left, right), config)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["16x32", "32x16"])
def test_everything_at_once_crosses_tiles(config: TileConfig, device: torch.device) -> None:
    """An option that reads rows, columns or heads of the wrong tile."""
    inputs = draw(device, torch.float32)._replace(
        bias=torch.randn(1, 2, 37, 53, device=device),
        mask=torch.rand(2, 1, 37, 53, device=device) > 0.3,
        key_lengths=torch.tensor([41, 0], dtype=torch.int32, device=device),
        seed=torch.tensor(2**40 + 1, device=device),
    )
    assert_right(inputs, AttentionSpec(-0.3, 25, 1, softcap=2.0, dropout_p=0.2), config)


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0)])
def test_descriptors_change_nothing(left: int | None, right: int | None, device: torch.device) -> None:
    """A descriptor with the wrong head, shape or zero fill."""
    inputs = Inputs(*(torch.randn(2, 2, n, 32, device=device).half() for n in (37, 53, 53)))
    spec = AttentionSpec(0.3, left, right)
    with_pointers = attention_forward(inputs, spec, TileConfig(32, 32, 4, 1))
    with_descriptors = attention_forward(inputs, spec, TileConfig(32, 32, 4, 1, tma=True))
    for a, b in zip(with_pointers[:2], with_descriptors[:2]):
        assert torch.equal(a, b)


def test_values_hidden_from_everybody_stay_out(device: torch.device) -> None:
    """0 times NaN: by a mask's column, by a top-left causal mask, by a window (in the padding rows too)."""
    inputs = draw(device, torch.float16, seqlen_q=5, seqlen_k=40)
    for spec, hidden in (
        (AttentionSpec(0.3, right=0, top_left=True), slice(5, None)),
        (AttentionSpec(0.3, left=2), slice(0, 33)),
    ):
        clean = attention_forward(inputs, spec)
        k, v = inputs.k.clone(), inputs.v.clone()
        k[:, :, hidden], v[:, :, hidden] = math.nan, math.inf
        for a, b in zip(clean[:2], attention_forward(inputs._replace(k=k, v=v), spec)[:2]):
            assert torch.equal(a, b)


def test_scores_beyond_the_precision_of_the_exponent(device: torch.device) -> None:
    """exp2(fma(s, c, -round(max c))) is not 1 at the maximum: overflow at |max c| > 2^27 (hazard N5)."""
    x = torch.full((1, 1, 40, 64), 133120.0, device=device)
    out, lse, _ = attention_forward(Inputs(x, x, x), AttentionSpec(0.125))
    assert torch.equal(out, x)
    assert torch.isfinite(lse).all()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the interpreter fuses no multiplication with an addition"
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lse_of_long_rows(head_dim: int, device: torch.device) -> None:
    """Sums scaled by 2^(a rounding error) for each tile, though the maximum stays: lse drifts away."""
    inputs = Inputs(*(torch.randn(1, 2, 8192, head_dim, device=device).half() for _ in range(3)))
    assert_right(inputs, AttentionSpec(head_dim**-0.5), None)


def test_rows_of_the_lowest_float_are_uniform(device: torch.device) -> None:
    """A bias of finfo.min overflows to -inf when it is multiplied by log2 e: the row would look empty."""
    inputs = draw(device, torch.float32)
    bias = torch.full((1, 1, 1, 53), torch.finfo(torch.float32).min, device=device)
    out, _, _ = attention_forward(inputs._replace(bias=bias), AttentionSpec(0.3))
    torch.testing.assert_close(out, inputs.v.mean(2, keepdim=True).expand_as(out))


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """rows * stride computed in int32 wraps around to poison before the tensor.

    The buffer is larger than what is touched: its pages stay uncommitted.

    (hazard S10)
    """
    stride, rows = 2**26, 40
    buffer = torch.empty(2**31 + rows * stride, dtype=torch.float16, device=device)
    k = buffer[2**31 :].as_strided((1, 1, rows, 16), (rows * stride, rows * stride, stride, 1))
    buffer.as_strided((rows, 16), (stride, 1)).fill_(math.nan)
    k.copy_(torch.randn(k.shape))
    q = torch.randn(1, 1, 3, 16, device=device).half()
    out, lse, _ = attention_forward(Inputs(q, k, k), AttentionSpec(0.3))
    near, near_lse, _ = attention_forward(Inputs(q, k.contiguous(), k.contiguous()), AttentionSpec(0.3))
    assert torch.equal(out, near)
    assert torch.equal(lse, near_lse)


@triton.jit
def _keep_kernel(keep_ptr, seed_ptr, last_dropped, plane, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = row + tl.arange(0, ROWS)[:, None]
    keep = softmax.keep_mask(tl.load(seed_ptr), last_dropped, plane, rows, col, COLS)
    index = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(keep_ptr + index, keep.to(tl.int8))


@pytest.mark.parametrize("seed", [0, 2**40 + 5, -7])
@pytest.mark.parametrize("dropout_p", [0.002, 0.5, 0.9, 1.0])
def test_dropout_keeps_the_same_elements_as_philox(seed: int, dropout_p: float, device: torch.device) -> None:
    """A signed comparison, a lost half of the seed, lanes in another order."""
    keep = torch.empty(16, 32, dtype=torch.int8, device=device)
    seed_tensor = torch.tensor(seed, device=device)
    _keep_kernel[(1,)](keep, seed_tensor, dropped_bits(dropout_p), 5, 7, 64, 16, 32)
    expected = philox.keep_mask(seed_tensor, dropout_p, 1, 1, range(7, 23), range(64, 96), first_plane=5)
    assert torch.equal(keep.bool(), expected[0, 0])


@triton.jit
def _tanh_kernel(x_ptr, tanh_ptr, slope_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tanh, slope = softmax.tanh_and_slope(tl.load(x_ptr + index))
    tl.store(tanh_ptr + index, tanh)
    tl.store(slope_ptr + index, slope)


def test_tanh_is_precise_everywhere(device: torch.device) -> None:
    """Cancellation near 0 and, in the slope, where tanh saturates; overflow far out."""
    magnitude = torch.logspace(-6, 1.6, 512)
    x = torch.cat([magnitude, -magnitude]).to(device)
    tanh, slope = torch.empty_like(x), torch.empty_like(x)
    _tanh_kernel[(1,)](x, tanh, slope, 1024)
    wide = x.double()
    torch.testing.assert_close(tanh.double(), wide.tanh(), rtol=5e-7, atol=0.0)
    torch.testing.assert_close(slope.double(), wide.cosh() ** -2, rtol=5e-6, atol=0.0)


@triton.jit
def _ranges_kernel(
    ranges_ptr, sizes_ptr, left, right, KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    program = tl.program_id(0)
    first = tl.load(sizes_ptr + program * 4)
    seqlen_q = tl.load(sizes_ptr + program * 4 + 1)
    n_keys = tl.load(sizes_ptr + program * 4 + 2)
    shift = tl.load(sizes_ptr + program * 4 + 3)
    if KEYS:
        lo, full_lo, full_hi, hi = visibility.visible_keys(
            first, seqlen_q, n_keys, shift, left, right, BLOCK_Q, BLOCK_K
        )
    else:
        lo, full_lo, full_hi, hi = visibility.visible_queries(
            first, seqlen_q, n_keys, shift, left, right, BLOCK_Q, BLOCK_K
        )
    tl.store(ranges_ptr + program * 4, lo)
    tl.store(ranges_ptr + program * 4 + 1, full_lo)
    tl.store(ranges_ptr + program * 4 + 2, full_hi)
    tl.store(ranges_ptr + program * 4 + 3, hi)


@pytest.mark.parametrize("keys", [True, False], ids=["visible_keys", "visible_queries"])
@pytest.mark.parametrize(
    ("left", "right"), [(None, None), (None, 0), (None, 5), (0, 0), (3, 0), (9, 2), (4, None)]
)
def test_ranges_are_what_the_mask_says(
    keys: bool, left: int | None, right: int | None, device: torch.device
) -> None:
    """A range one tile short or long, tiles called whole that are not, a negative bound."""
    block_q, block_k = 4, 8
    sizes, blocks = [], []
    for seqlen_q, seqlen_k, top_left in itertools.product((1, 4, 17), (1, 8, 25), (False, True)):
        for n_keys in {seqlen_k, seqlen_k // 2, 0}:
            spec = AttentionSpec(1.0, left, right, top_left)
            ok = allowed(seqlen_q, seqlen_k, n_keys, spec)
            for first in range(0, seqlen_q if keys else seqlen_k, block_q if keys else block_k):
                sizes.append((first, seqlen_q, n_keys, spec.shift(seqlen_q, seqlen_k)))
                blocks.append(ok[first : first + block_q] if keys else ok[:, first : first + block_k].T)
    ranges = torch.empty(len(sizes), 4, dtype=torch.int32, device=device)
    sizes_tensor = torch.tensor(sizes, dtype=torch.int32, device=device)
    _ranges_kernel[(len(sizes),)](ranges, sizes_tensor, left, right, keys, block_q, block_k)
    step, height = (block_k, block_q) if keys else (block_q, block_k)
    for bounds, block, size in zip(ranges.tolist(), blocks, sizes):
        check_ranges(bounds, block, step, whole_height=keys or len(block) == height, size=size)


def allowed(seqlen_q: int, seqlen_k: int, n_keys: int, spec: AttentionSpec) -> Tensor:
    """[seqlen_q, seqlen_k], from the definition."""
    q, k = torch.empty(1, 1, seqlen_q, 1), torch.empty(1, 1, seqlen_k, 1)
    lengths = torch.tensor([n_keys], dtype=torch.int32)
    ok = visible(Inputs(q, k, k, key_lengths=lengths), spec)
    assert ok is not None
    return ok.expand(1, 1, seqlen_q, seqlen_k)[0, 0]


def check_ranges(bounds: list[int], block: Tensor, step: int, whole_height: bool, size: object) -> None:
    """block: the tile's rows of the mask, or its columns transposed; bounds run along its last axis."""
    lo, full_lo, full_hi, hi = bounds
    seen = block.any(0).nonzero().flatten().tolist()
    assert not seen or (lo, hi) == (seen[0], seen[-1] + 1), size
    assert 0 <= full_lo <= full_hi, size
    assert full_lo % step == full_hi % step == 0, size
    assert block[:, full_lo:full_hi].all(), size
    assert full_lo == full_hi or full_hi <= hi, size
    for start in range(0, block.shape[1] - step + 1, step):
        if whole_height and block[:, start : start + step].all():
            assert full_lo <= start, size
            assert start + step <= full_hi, size


def test_one_binary_serves_every_length_window_and_batch() -> None:
    """Triton compiles anew for a run-time 1 or multiple of 16 unless it is told not to: seconds at a call.

    (hazard T4)
    """
    script = """
import itertools
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from undivided.kernels.spec import AttentionSpec, Inputs, like
from undivided.kernels.triton.config import TileConfig
from undivided.kernels.triton.forward import forward_launch

def key(batch, heads, seqlen_q, seqlen_k, left, right):
    q, k, v = (torch.empty(batch, heads, n, 64, device="meta") for n in (seqlen_q, seqlen_k, seqlen_k))
    spec = AttentionSpec(0.125, left, right)
    launch = forward_launch(Inputs(q, k, v), spec, like(q, 64), torch.empty(q.shape[:3], device="meta"),
                            TileConfig(64, 64, 4, 2))
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*launch.arguments, **launch.constants, **launch.options())
    return str(specialization), str(options)

keys = {key(1, 1, n, n, 1, 0) for n in range(1, 65)}
for batch, heads, window in itertools.product((1, 2, 16), (1, 3, 16), ((0, 1), (0, 16), (16, 1))):
    keys.add(key(batch, heads, 7, 16, *window))
print(len(keys))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("arch", [*TABLE, "interpreter", "sm_75"])
def test_every_head_dim_up_to_512_has_tiles(arch: str) -> None:
    """A hole in the table, or a tile tl.dot cannot multiply (hazard S4)."""
    for kernel, head_dim, dtype, load in itertools.product(
        ("forward", "dkdv", "dq", "dbias"), (1, 64, 65, 512), (torch.float16, torch.float32), TABLES_FOR
    ):
        config = tile_config(kernel, arch, head_dim, 8, dtype, load)
        assert config is not None
        assert min(config.block_q, config.block_k) >= 16
