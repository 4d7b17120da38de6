"""Packed sequences: what the suite's cases cannot see, because the reference cuts them as the oracle does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from undivided import ALiBi, RelativeBias, attention, attention_varlen, explain
from undivided.conformance.memory import Watch, fenced, poisoned_allocations
from undivided.kernels import fallback_blocks, functional, ops
from undivided.kernels.sequences import Sequences
from undivided.kernels.spec import N_GRADIENTS

LENGTHS = ((0, 0), (3, 3), (17, 17), (17, 17), (0, 4), (5, 0), (1, 40), (9, 20), (20, 9), (0, 0))
"""(rows, keys): none at both ends and in the middle, equal neighbours, more rows than keys and fewer."""
N, MAX_Q, MAX_K = len(LENGTHS), max(m for m, _ in LENGTHS), max(n for _, n in LENGTHS)
HEADS_Q, HEADS_KV, HEAD_DIM, HEAD_DIM_V = 4, 2, 8, 6
IMPLEMENTATIONS = ["reference", "fallback"]

Call = tuple[Tensor, ...]
"""out and statistics, (total, heads_q, ...)"""
WANT = ("lse", "max_logit", "entropy", "key_mass")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cu_seqlens(lengths: Any) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


LENS_Q, LENS_K = ([*lengths] for lengths in zip(*LENGTHS))
CU_Q, CU_K = cu_seqlens(LENS_Q), cu_seqlens(LENS_K)
TOTAL_Q, TOTAL_K = sum(LENS_Q), sum(LENS_K)
DOUT, DLSE = randn(TOTAL_Q, HEADS_Q, HEAD_DIM_V, seed=8), randn(TOTAL_Q, HEADS_Q, seed=9)


def qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (TOTAL_Q, HEADS_Q, HEAD_DIM), (TOTAL_K, HEADS_KV, HEAD_DIM), (TOTAL_K, HEADS_KV, HEAD_DIM_V)
    return [randn(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def together(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Call:
    limits = {"max_seqlen_q": MAX_Q, "max_seqlen_k": MAX_K}
    return attention_varlen(q, k, v, CU_Q, CU_K, want=WANT, **limits, **options)


def alone(q: Tensor, k: Tensor, v: Tensor, options_of: Callable[[int], dict[str, Any]]) -> Call:
    """Every sequence by `attention`."""
    found = []
    for i, sequence in enumerate(zip(q.split(LENS_Q), k.split(LENS_K), v.split(LENS_K), strict=True)):
        dense = (x.transpose(0, 1)[None] for x in sequence)
        found.append([x[0].transpose(0, 1) for x in attention(*dense, want=WANT, **options_of(i))])
    return tuple(map(torch.cat, zip(*found, strict=True)))


def cut(x: Tensor, i: int) -> Tensor:
    """What sequence i has of a mask or bias."""
    rows, cols = LENGTHS[i]
    x = x[i : i + 1] if x.shape[0] > 1 else x
    return x[:, :, : rows if x.shape[2] > 1 else 1, : cols if x.shape[3] > 1 else 1]


SINKS, SLOPES, SLOPES_OF_EACH, TABLE = (
    randn(HEADS_Q),
    randn(HEADS_Q).abs(),
    randn(N, HEADS_Q),
    randn(8, HEADS_Q),
)
BIAS, BIAS_OF_ROWS, BIAS_OF_KEYS = (
    randn(N, HEADS_Q, MAX_Q, MAX_K),
    randn(1, HEADS_Q, MAX_Q, 1),
    randn(N, 1, 1, MAX_K),
)
LEAVES = {
    "sinks": SINKS,
    "slopes": SLOPES,
    "slopes of each": SLOPES_OF_EACH,
    "table": TABLE,
    "bias": BIAS,
    "bias of rows": BIAS_OF_ROWS,
    "bias of keys": BIAS_OF_KEYS,
}
for _leaf in LEAVES.values():
    _leaf.requires_grad_()
MASK = BIAS.detach() > -0.5
KEY_LENGTHS = torch.tensor([0, 2, 30, 5, 1, 0, 7, 0, 9, 3], dtype=torch.int32).minimum(torch.tensor(LENS_K))

OPTIONS: dict[str, Callable[[int | None], dict[str, Any]]] = {
    "plain": lambda i: {},
    "causal": lambda i: {"causal": True},
    "window": lambda i: {"window": (4, 1)},
    "softcap": lambda i: {"softcap": 1.5, "scale": -0.7},
    "key_lengths": lambda i: {"key_lengths": KEY_LENGTHS if i is None else KEY_LENGTHS[i : i + 1]},
    "causal key_lengths": lambda i: OPTIONS["key_lengths"](i) | {"causal": True},
    "mask": lambda i: {"mask": MASK if i is None else cut(MASK, i)},
    "mask of keys": lambda i: {"mask": MASK[:, :1, :1] if i is None else cut(MASK[:, :1, :1], i)},
    "sinks": lambda i: {"sinks": SINKS, "causal": True},
    "bias": lambda i: {"bias": BIAS if i is None else cut(BIAS, i)},
    "bias of rows": lambda i: {"bias": BIAS_OF_ROWS if i is None else cut(BIAS_OF_ROWS, i)},
    "bias of keys": lambda i: {"bias": BIAS_OF_KEYS if i is None else cut(BIAS_OF_KEYS, i), "causal": True},
    "slopes": lambda i: {"bias": ALiBi(SLOPES)},
    "slopes of each": lambda i: {
        "bias": ALiBi(SLOPES_OF_EACH[slice(None) if i is None else i]),
        "causal": True,
    },
    "table": lambda i: {"bias": RelativeBias(TABLE)},
}
"""Options of the packed call, and of sequence i."""


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bit_for_bit_as_each_sequence_alone(impl: str, option: str) -> None:
    """A sequence that sees its neighbour, stands in its place or has its mask; an empty one (hazard S3)."""
    fixed = {"impl": impl, "deterministic": "batch"}
    leaves, shared = qkv(), [LEAVES[option]] if option in LEAVES else []
    found = together(*leaves, **OPTIONS[option](None), **fixed)
    expected = alone(*leaves, lambda i: OPTIONS[option](i) | fixed)
    assert found[0].shape == (TOTAL_Q, HEADS_Q, HEAD_DIM_V)
    assert found[1].shape == (TOTAL_Q, HEADS_Q)
    assert found[4].shape == (TOTAL_K, HEADS_Q)
    mine, theirs = (
        torch.autograd.grad((out, lse, entropy), [*leaves, *shared], (DOUT, DLSE, DLSE.cos()))
        for out, lse, _, entropy, _ in (found, expected)
    )
    for x, y in zip((*found, *mine[:3]), (*expected, *theirs[:3]), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(mine[3:], theirs[3:], strict=True):  # sums over sequences, in another order
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_drops_what_it_drops_padded(impl: str, causal: bool) -> None:
    """Dropout's bits counted from the first token of all, or by the number within a batch of neighbours."""
    lengths = [0, 5, 5, 0, 5, 12, 3, 3, 3, 0]  # equal ones on both sides of an empty one
    cu = cu_seqlens(lengths)
    q, k, v = (randn(sum(lengths), heads, 8, seed=heads) for heads in (4, 2, 2))
    padded = torch.zeros(3, len(lengths), max(lengths), 4, 8, dtype=torch.float64)
    for i, n in enumerate(lengths):
        for x, y in zip((q, k, v), padded, strict=True):
            y[i, :n, : x.shape[1]] = x[cu[i] : cu[i + 1]]
    options = {"dropout_p": 0.4, "seed": 7, "causal": causal, "impl": impl, "softcap": 9.0}
    dense = (x[:, :, :n].transpose(1, 2) for x, n in zip(padded, (4, 2, 2), strict=True))
    expected = attention(*dense, key_lengths=torch.tensor(lengths), **options).transpose(1, 2)
    found = attention_varlen(q, k, v, cu, **options)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(found[cu[i] : cu[i + 1]], expected[i, :n])


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "triton"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"sinks": SINKS.detach().float()}], ids=str)
def test_tokens_of_no_sequence_give_and_take_nothing(
    impl: str, options: dict[str, Any], device: torch.device
) -> None:
    """Rows before the first sequence, past the last or past a limit: NaN in them, or a sink in their lse."""
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    options |= {"impl": impl, "want": ("lse",)}
    owned = torch.zeros(20, dtype=torch.bool)
    owned[4:8] = True
    sizes = ((20, 4, 16), (20, 2, 16), (20, 2, 16))
    clean = [randn(*size, seed=i).float() for i, size in enumerate(sizes)]
    clean, dirty = (
        [x.to(device).requires_grad_() for x in tensors]
        for tensors in (clean, [torch.where(owned[:, None, None], x, torch.nan) for x in clean])
    )
    cu = torch.tensor([4, 15], device=device)
    out, lse = attention_varlen(*dirty, cu, max_seqlen_q=4, **options)[:2]
    assert (out[8:] == 0.0).all()
    assert (out[:4] == 0.0).all()
    assert (lse[8:] == -torch.inf).all()
    assert (lse[:4] == -torch.inf).all()
    spoiled = torch.full_like(out, torch.nan)
    spoiled[4:8] = 1.0
    found = torch.autograd.grad((out, lse), dirty, (spoiled, spoiled[..., 0]))
    own = [x[4:8].detach().requires_grad_() for x in clean]
    results = attention_varlen(*own, torch.tensor([0, 4], device=device), **options)[:2]
    expected = torch.autograd.grad(results, own, tuple(map(torch.ones_like, results)))
    assert torch.equal(out[4:8], results[0])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x[4:8], y)
        assert (x[:4] == 0.0).all()
        assert (x[8:] == 0.0).all()


WRONG = {
    "decreasing": [0, 9, 4, 20],
    "negative": [-5, 3, -2, 20],
    "past the end": [0, 8, 21, 2**31 - 1],
    "huge": [2**40, -(2**40), 7, 2**62],
    "not from 0": [3, 9, 12, 20],
    "not to the end": [0, 9, 12, 19],
}


INTERPRETED = [("triton", "decreasing"), ("triton", "huge")]  # takes seconds each


@pytest.mark.parametrize(("impl", "wrong"), [*itertools.product(IMPLEMENTATIONS, WRONG), *INTERPRETED])
def test_wrong_cu_seqlens_reach_nothing_outside(impl: str, wrong: str, device: torch.device) -> None:
    """Rows before the tensors or after them, and rows that are left as they were allocated (hazard P3)."""
    cu = torch.tensor(WRONG[wrong], device=device)
    tensors = [randn(20, heads, 16, seed=heads).to(device, torch.float32) for heads in (4, 2, 2)]
    given = Watch()
    leaves = [given.over(fenced(x)).requires_grad_() for x in tensors]
    with poisoned_allocations() as allocated:
        out = attention_varlen(*leaves, cu, causal=True, impl=impl)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
    assert not given.written_outside()
    assert not allocated.written_outside()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (WRONG["decreasing"], "cu_seqlens_q must not decrease, got 9 and then 4 at 2"),
        (WRONG["not from 0"], "cu_seqlens_q must start with 0, got 3"),
        (WRONG["not to the end"], "cu_seqlens_q must end with q's total 20, got 19"),
        ([0, 13, 20], "max_seqlen_q must not be below any length, got 12, and sequence 0 of length 13"),
    ],
)
def test_check_names_what_is_wrong(values: list[int], message: str) -> None:
    """A batch that was packed wrongly and trains on nothing."""
    q = randn(20, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention_varlen(q, q, q, torch.tensor(values), max_seqlen_q=12, check=True)
    right = torch.tensor([0, 12, 20])
    with pytest.raises(ValueError, match="cu_seqlens_k must end with k's total 21"):
        attention_varlen(q, randn(21, 2, 8), randn(21, 2, 8), right, right, check=True)
    with pytest.raises(ValueError, match=r"key_lengths must lie in .*number of keys"):
        attention_varlen(q, q, q, right, key_lengths=torch.tensor([12, 9]), check=True)
    attention_varlen(q, q, q, right, key_lengths=torch.tensor([12, 8]), max_seqlen_q=12, check=True)


def _wrong(**changes: Any) -> dict[str, Any]:
    q = randn(20, 4, 8)
    return {"q": q, "k": q[:, :2], "v": q[:, :2], "cu_seqlens_q": torch.tensor([0, 12, 20]), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": randn(1, 4, 20, 8)}, ValueError, "q must have 3 axes .total, heads, head_dim.*1, 4, 20, 8"),
        ({"v": randn(19, 2, 8)}, ValueError, "v must have k's seqlen 20, got 19"),
        ({"k": randn(20, 3, 8), "v": randn(20, 3, 8)}, ValueError, "multiple of heads of k"),
        ({"cu_seqlens_q": [0, 20]}, TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
        ({"cu_seqlens_q": torch.tensor([0.0, 20.0])}, TypeError, "cu_seqlens_q must be int32 or int64"),
        ({"cu_seqlens_q": torch.zeros(2, 2).int()}, ValueError, "cu_seqlens_q must have shape .sequences"),
        ({"cu_seqlens_q": torch.zeros(0).int()}, ValueError, "cu_seqlens_q must have shape .sequences"),
        ({"cu_seqlens_q": torch.zeros(2).int().to("meta")}, ValueError, "cu_seqlens_q must be on cpu"),
        ({"cu_seqlens_k": torch.tensor([0, 20])}, ValueError, "cu_seqlens_k must have as many .* 3, got 2"),
        ({"k": randn(9, 2, 8), "v": randn(9, 2, 8)}, ValueError, "k must have q's total 20 where"),
        ({"max_seqlen_q": 1.5}, TypeError, "max_seqlen_q must be an int or None, got float"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be >= 0"),
        ({"mask": torch.ones(12, 12).bool()}, ValueError, "mask must broadcast.*1 without max_seqlen_q"),
        ({"bias": randn(3, 1, 1, 1)}, ValueError, "bias must broadcast.* = .2, 4, 1, 1., got shape .3"),
        ({"key_lengths": torch.ones(3).int()}, ValueError, r"key_lengths must have shape .* = \(2,\), got"),
        ({"nothing": 1}, TypeError, "unknown option 'nothing'"),
        ({"want": ("lss",)}, ValueError, "want must be"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """A message that speaks of what the caller did not write."""
    with pytest.raises(error, match=message):
        attention_varlen(**_wrong(**changes))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("total", [0, 5])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_do(impl: str, total: int, lengths: list[int]) -> None:
    """No tokens, no sequences, or tokens that no sequence has."""
    leaves = [randn(total, heads, 8).requires_grad_() for heads in (4, 2, 2)]
    options = {"sinks": SINKS.detach(), "bias": ALiBi(SLOPES.detach()), "causal": True, "impl": impl}
    out, lse = attention_varlen(*leaves, cu_seqlens(lengths), want=("lse",), **options)[:2]
    assert out.shape == (total, 4, 8)
    assert not out.any()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert not any(bool(x.any()) for x in grads)


def test_without_limits_and_in_64_bits() -> None:
    """A limit that is needed where no mask has its axis; cu_seqlens_k that is not taken from cu_seqlens_q."""
    q, k, v = qkv()
    expected = together(q, k, v, causal=True)[0]
    assert torch.equal(attention_varlen(q, k, v, CU_Q.long(), CU_K.long(), causal=True), expected)
    huge = {"max_seqlen_q": 2**31 - 1, "max_seqlen_k": 2**40}  # a start and this exceed int32
    assert torch.equal(attention_varlen(q, k, v, CU_Q, CU_K, causal=True, **huge), expected)
    cu = cu_seqlens([20, 30])
    x = randn(50, 2, 8)
    assert torch.equal(attention_varlen(x, x, x, cu), attention_varlen(x, x, x, cu, cu))


@pytest.mark.parametrize(
    "needed", [x for n in range(4) for x in itertools.combinations(range(4), n)], ids=str
)
def test_gradients_that_nobody_asks_for_are_none(needed: tuple[int, ...]) -> None:
    """Work for nobody, or a gradient handed to its neighbour."""
    tensors = [*(x.detach() for x in qkv()), SINKS.detach().clone()]
    every = [x.clone().requires_grad_() for x in tensors]
    some = [x.clone().requires_grad_(i in needed) for i, x in enumerate(tensors)]
    for *leaves, sinks in (every, some):
        out = together(*leaves, sinks=sinks, dropout_p=0.1, seed=3)[0]
        if out.requires_grad:
            (out * DOUT).sum().backward()
    for i, (x, y) in enumerate(zip(some, every, strict=True)):
        assert (x.grad is None) if i not in needed else torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2, "seed": 1}], ids=["flash", "matmul"])
def test_computes_no_scores_between_sequences(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks over all tokens with a mask: 64 documents would cost 64 times as much, and memory as well."""
    scores = []

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(block: fallback_blocks.Block, *rest: Any) -> Any:
            scores.append(block.q.shape[:3].numel() * block.k.shape[2])
            return run(block, *rest)

        return call

    for engine in (fallback_blocks.FlashEngine, fallback_blocks.MatmulEngine):
        for name in ("forward", "backward"):
            monkeypatch.setattr(engine, name, staticmethod(counted(getattr(engine, name))))
    lengths = [16] * 40 + [7, 30, 1] * 10
    q = randn(sum(lengths), 2, 8).requires_grad_()
    attention_varlen(q, q, q, cu_seqlens(lengths), **options).sum().backward()
    assert sum(scores) == 2 * 2 * sum(n * n for n in lengths)


def test_what_sequences_share_is_rounded_once() -> None:
    """Shares in 16 bits: alike, so that their roundings add up."""
    q = randn(3, 4, 8, dtype=torch.float32).repeat(200, 1, 1)
    narrow = SLOPES.detach().bfloat16(), randn(4, 3, 3).bfloat16()

    def gradients(slopes: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        leaves = slopes.requires_grad_(), bias.requires_grad_()
        options = {"bias": (bias, ALiBi(slopes)), "deterministic": "batch"}
        out = attention_varlen(q, q, q, cu_seqlens([3] * 200), max_seqlen_q=3, **options)
        return torch.autograd.grad(out.square().sum() + out[:, :, 0].sum(), leaves)

    wide = gradients(*(x.float() for x in narrow))
    for x, y in zip(gradients(*narrow), wide, strict=True):
        assert torch.equal(x, y.bfloat16())


def test_neighbours_of_equal_lengths_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for each of 16 documents; "batch" must not join them, since sums may depend on the company."""
    calls = []
    flash = fallback_blocks._flash
    monkeypatch.setattr(fallback_blocks, "_flash", lambda *args, **kw: calls.append(1) or flash(*args, **kw))
    q = randn(16 * 32, 2, 8)
    cu = cu_seqlens([32] * 16)
    attention_varlen(q, q, q, cu)
    assert len(calls) == 1
    attention_varlen(q, q, q, cu, deterministic="batch")
    assert len(calls) == 1 + 16


def test_opcheck() -> None:
    """Fakes that lie about shapes or strides, mutated inputs, results that alias inputs."""
    q, k, v = (x.detach().float() for x in qkv())
    options = {"causal": True, "dropout_p": 0.3, "seed": 5, "sinks": SINKS.detach().float()}
    options["bias"] = BIAS.detach().float(), ALiBi(SLOPES_OF_EACH.detach().float())
    sequences = Sequences(CU_Q, CU_K, MAX_Q, MAX_K)
    inputs, spec = functional.prepare(q, k, v, options, sequences=sequences)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops._forward_op, (*inputs, *spec, "fallback"), test_utils=checks)
    out, lse, _ = ops._forward_op(*inputs, *spec, "fallback")
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, *inputs, *spec, "fallback")
    for needs in ([True] * N_GRADIENTS, [i == 1 for i in range(N_GRADIENTS)]):
        torch.library.opcheck(ops._backward_op, (*backward, needs), test_utils=checks)


def windowed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    return attention_varlen(q, k, v, cu, window=(5, 0), softcap=3.0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph_and_equal(dynamic: bool) -> None:
    """Spans that are read while tracing."""
    torch._dynamo.reset()
    compiled = torch.compile(windowed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = [randn(30, heads, 8, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    for lengths in ([10, 20], [3, 27]):  # the same graph
        cu = cu_seqlens(lengths)
        found, expected = compiled(*leaves, cu), windowed(*leaves, cu)
        assert torch.equal(found, expected)
        grads = (torch.autograd.grad(x.sin().sum(), leaves) for x in (found, expected))
        assert all(itertools.starmap(torch.equal, zip(*grads, strict=True)))


def test_compile_does_not_recompile_per_length() -> None:
    """Totals and numbers of sequences change with every step of training."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(windowed, fullgraph=True, backend=counter, dynamic=True)
    frames = set()
    for lengths in ([10, 20], [3, 27, 9], [40, 2, 7, 8, 9]):
        q, k = (randn(sum(lengths), heads, 8) for heads in (4, 2))
        compiled(q, k, k, cu_seqlens(lengths))
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.parametrize("kind", ["int", "int64 of numpy"])
def test_compile_does_not_recompile_per_max_seqlen(kind: str) -> None:
    """The longest of a step's sequences, taken for a constant: a graph for each step (hazard C4).

    Two graphs at most: PyTorch takes a number for a constant until it sees another. fullgraph is for ints:
    what Dynamo makes of numpy's numbers, it leaves to Python.
    """
    number: Any = int if kind == "int" else pytest.importorskip("numpy", reason="numpy is optional").int64

    def call(q: Tensor, cu: Tensor, longest: int) -> Tensor:
        return attention_varlen(q, q, q, cu, max_seqlen_q=longest, causal=True).sin()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, q, frames = torch.compile(call, fullgraph=kind == "int", backend=counter), randn(30, 2, 8), []
    for longest in (20, 25, 22, 27, 30):
        cu = cu_seqlens([longest, 30 - longest])
        assert torch.equal(compiled(q, cu, number(longest)), call(q, cu, longest))
        frames.append(counter.frame_count)
    assert len({*frames[1:]}) == 1, frames


def test_vmap() -> None:
    """Examples that share cu_seqlens, folded into a batch axis that packed tensors do not have."""
    q, k, v = (torch.stack([x.detach(), x.detach().flip(0)]) for x in qkv())
    found = torch.func.vmap(lambda q, k, v: together(q, k, v, causal=True))(q, k, v)
    for i in range(2):
        for x, y in zip(found, together(q[i], k[i], v[i], causal=True), strict=True):
            assert torch.equal(x[i], y)


def test_fake_tensors() -> None:
    """Values of cu_seqlens that somebody wants to know where there are none."""
    real = [*(x.detach() for x in qkv()), CU_Q, CU_K]
    expected = attention_varlen(*real, causal=True)
    with FakeTensorMode() as mode:
        fake = attention_varlen(*map(mode.from_tensor, real), causal=True)
    assert (fake.shape, fake.dtype, fake.stride()) == (expected.shape, expected.dtype, expected.stride())


def nested(lengths: list[int], heads: int, seed: int) -> Tensor:
    """(batch, heads, ragged, 8), a leaf's transposed view."""
    rows = [randn(n, heads, 8, seed=seed + n) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True).transpose(1, 2)


def test_nested_tensors() -> None:
    """Offsets of the wrong tensor, a result that cannot be added to what it came from."""
    lengths_q, lengths_k = [3, 1, 7], [5, 2, 7]
    q, k, v = nested(lengths_q, 4, 0), nested(lengths_k, 2, 10), nested(lengths_k, 2, 20)
    out, lse = attention(q, k, v, causal=True, want=("lse",))[:2]
    assert out.is_nested
    (out + q).sin().values().sum().backward()
    for i, (x, y, z) in enumerate(zip(q.unbind(), k.unbind(), v.unbind(), strict=True)):
        expected = attention(x[None], y[None], z[None], causal=True, want=("lse",))
        torch.testing.assert_close(out.unbind()[i], expected.out[0])
        torch.testing.assert_close(lse.unbind()[i], expected.lse[0])
    plain, packed = (
        attention(q, k, v).values(),
        attention(q, k, v, sinks=torch.full((4,), -torch.inf)).values(),
    )
    assert torch.equal(plain, packed)


def test_nested_gradients() -> None:
    """Gradients are those of the values, packed."""
    x = torch.nested.nested_tensor([randn(n, 2, 8, seed=n) for n in (3, 6)], layout=torch.jagged)
    leaf, flat = x.requires_grad_(), x.values().detach().requires_grad_()
    y = leaf.transpose(1, 2)
    attention(y, y, y, causal=True).values().sin().sum().backward()
    attention_varlen(flat, flat, flat, cu_seqlens([3, 6]), causal=True).sin().sum().backward()
    assert torch.equal(leaf.grad.values(), flat.grad)
    pytorch = F.scaled_dot_product_attention(y, y, y)
    torch.testing.assert_close(attention(y, y, y).unbind()[1], pytorch.unbind()[1])


def test_nested_tensors_that_cannot_be_taken() -> None:
    """An error from the depth of PyTorch, or the values of another axis."""
    q, dense = nested([3, 5], 2, 0), randn(2, 2, 5, 8)
    with pytest.raises(TypeError, match="all be dense or all jagged nested tensors, got a dense k"):
        attention(q, dense, dense)
    strided = torch.nested.nested_tensor([dense[0], dense[1]])
    with pytest.raises(TypeError, match="got a nested, strided q"):
        attention(strided, strided, strided)
    flat = q.transpose(1, 2)
    with pytest.raises(ValueError, match=r"q must be .batch, heads, ragged"):
        attention(flat, flat, flat)
    with pytest.raises(ValueError, match="one batch size, got 2, 3, 3"):
        attention(q, nested([3, 5, 1], 2, 0), nested([3, 5, 1], 2, 0))
    with pytest.raises(ValueError, match="v must have k's lengths"):
        attention(q, q, nested([5, 3], 2, 0), check=True)
    holes = torch.nested.nested_tensor_from_jagged(
        randn(9, 2, 8), torch.tensor([0, 4, 9]), torch.tensor([3, 5])
    ).transpose(1, 2)
    with pytest.raises(ValueError, match="q must have no holes"):
        attention(holes, holes, holes)
    with pytest.raises(ValueError, match="1 without max_seqlen_q"):
        attention(q, q, q, mask=torch.ones(5, 5).bool())


def test_flops_and_explain() -> None:
    """Work counted for one long sequence, or for another batch."""
    q, k, v = (x.detach() for x in qkv())
    explained = explain(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_k=MAX_K)
    expected = 2 * HEADS_Q * (HEAD_DIM + HEAD_DIM_V) * sum(m * n for m, n in LENGTHS)
    assert explained.flops_forward == expected
    assert explained.chosen == "fallback"
    assert "sequences" in str(explained)
    with FlopCounterMode(display=False) as counter:
        attention_varlen(q, k, v, CU_Q, CU_K)
    assert counter.get_total_flops() == expected
    causal = explain(q, q, q, cu_seqlens_q=CU_Q, causal=True)
    assert causal.flops_forward == 2 * HEADS_Q * 2 * HEAD_DIM * sum(m * (m + 1) // 2 for m in LENS_Q)
    jagged = nested([3, 5], 2, 0)
    assert explain(jagged, jagged, jagged).flops_forward == 2 * 2 * 2 * HEAD_DIM * (3 * 3 + 5 * 5)
    on_a_gpu = explain(*(x.to("meta") for x in (q, q, q)), cu_seqlens_q=CU_Q.to("meta"))
    assert on_a_gpu.flops_forward > 0
