"""The operators and their autograd: every way PyTorch has of calling, transforming or tracing a function."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from undivided import ALiBi, RelativeBias, attention
from undivided.kernels import functional, ops
from undivided.kernels.spec import N_GRADIENTS

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
"""All of opcheck but test_autograd_registration: autograd lives around the operators, not in them."""


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Two query heads per key head, more keys than queries, another head_dim for v."""
    return leaf(2, 4, 5, 8), leaf(2, 2, 7, 8), leaf(2, 2, 7, 6)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True, window=(2, None))


def gradients(call: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(*tensors).sin().sum(), tensors)


@pytest.mark.parametrize(("impl", "layout"), [("fallback", "BHSD"), ("fallback", "BSHD"), ("triton", "BSHD")])
def test_opcheck(impl: str, layout: str, device: torch.device) -> None:
    """Fakes that lie about shapes or strides, mutated inputs, results that alias inputs (hazard L8, C1)."""
    sizes = ((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 8))
    q, k, v = (torch.randn(size, device=device) for size in sizes)
    if layout == "BSHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    options = {"causal": True, "dropout_p": 0.3, "seed": 5, "sinks": torch.randn(4, device=device)}
    options["bias"] = torch.randn(4, 1, 7, device=device), ALiBi(torch.rand(4, device=device))
    inputs, spec = functional.prepare(q, k, v, options)
    for asked in (spec, spec._replace(want_max=True)):
        torch.library.opcheck(ops._forward_op, (*inputs, *asked, impl), test_utils=CHECKS)
    out, lse, _ = ops._forward_op(*inputs, *spec, impl)
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, *inputs, *spec, impl)
    for needs in ([True] * N_GRADIENTS, [i == 1 for i in range(N_GRADIENTS)]):
        torch.library.opcheck(ops._backward_op, (*backward, needs), test_utils=CHECKS)


@pytest.mark.parametrize("impl", ["fallback", "triton"])
def test_lse_may_come_back_with_other_strides(impl: str, device: torch.device) -> None:
    """Whoever saves it between forward and backward may lay it out anew; a kernel reads it by row number."""
    q, k = torch.randn(2, 4, 5, 16, device=device), torch.randn(2, 2, 7, 16, device=device)
    inputs, spec = functional.prepare(q, k, k, {})
    out, lse, _ = ops._forward_op(*inputs, *spec, impl)
    strided = lse.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    dout, needs = torch.randn_like(out), [i < 3 for i in range(N_GRADIENTS)]
    expected = ops._backward_op(dout, lse, out, lse, *inputs, *spec, impl, needs)
    for ours, theirs in zip(
        ops._backward_op(dout, strided, out, strided, *inputs, *spec, impl, needs), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph_and_equal(qkv: tuple[Tensor, ...], dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(windowed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(compiled(*qkv), windowed(*qkv))
    for ours, eager in zip(gradients(compiled, *qkv), gradients(windowed, *qkv), strict=True):
        assert torch.equal(ours, eager)


INDUCTOR = """
import torch
from undivided import ALiBi, RelativeBias, attention, scaled_dot_product_attention

def call(q, k, v, bias):
    stats = attention(q, k, v, causal=True, window=(2, None), bias=bias, softcap=5.0, want=("lse",))
    facade = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return facade.sin().sum() + (stats.out * stats.lse[..., None]).sum()

shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (4, 1, 7)
tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
compiled = torch.compile(call, fullgraph=True)
for ours, eager in zip(*(torch.autograd.grad(f(*tensors), tensors) for f in (compiled, call))):
    torch.testing.assert_close(ours, eager)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles what it writes for a CPU by g++")
def test_compile_with_the_default_backend(tmp_path: Path) -> None:
    """Inductor parses schemas anew: two arguments of one name were accepted everywhere but there.

    In a process of its own, without caches: a graph compiled yesterday proves nothing.
    """
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_compile_with_options_and_sdpa_facade() -> None:
    """Validation, dropout's seed and statistics must trace too."""
    torch._dynamo.reset()
    q = torch.randn(2, 4, 6, 8)
    lengths = torch.tensor([3, 6])

    def call(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stats = attention(
            q, q, q, key_lengths=lengths, mask=torch.ones(6, 6).tril().bool(), softcap=5.0, want=("lse",)
        )
        return stats.out, stats.lse, functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(q), call(q), strict=True):
        assert torch.equal(ours, eager)
    dropped = torch.compile(lambda q: attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(dropped(q), dropped(q)), "a seed that was drawn at compile time"


def test_compile_with_a_scale_that_varies() -> None:
    """A dynamic float is no float to math.isfinite: several layers with a scale each broke the graph.

    (hazard L9)
    """
    torch._dynamo.reset()
    q = torch.randn(2, 4, 6, 8)

    def call(q: Tensor, scale: float, softcap: float) -> Tensor:
        return attention(q, q, q, scale=scale, softcap=softcap)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(q, scale, 9 * scale), call(q, scale, 9 * scale))


def test_compile_does_not_recompile_per_length() -> None:
    """A graph for each length (hazard C2)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(windowed, fullgraph=True, backend=counter, dynamic=True)
    frames = set()
    for n in (20, 21, 25, 32, 49):  # sizes that are equal by chance would be compiled as one
        compiled(torch.randn(2, 4, n, 8), torch.randn(2, 2, n + 50, 8), torch.randn(2, 2, n + 50, 6))
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_export_keeps_one_operator(qkv: tuple[Tensor, ...]) -> None:
    """An operator that export takes apart (hazard C5)."""

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return windowed(q, k, v)

    tensors = tuple(x.detach() for x in qkv)
    program = torch.export.export(Model(), tensors)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.undivided.forward.default) == 1
    assert torch.equal(program.module()(*tensors), windowed(*tensors))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_replays_dropout(use_reentrant: bool) -> None:
    """A seed drawn anew in the recomputation gives gradients of another mask (hazard A8, R9)."""
    q = leaf(1, 2, 9, 8)

    def call(q: Tensor) -> Tensor:
        return attention(q, q, q, dropout_p=0.4)

    torch.manual_seed(3)
    (plain,) = torch.autograd.grad(call(q).sin().sum(), q)
    torch.manual_seed(3)
    checkpoint(call, q, use_reentrant=use_reentrant).sin().sum().backward()
    assert torch.equal(q.grad, plain)


def test_inference_mode(qkv: tuple[Tensor, ...]) -> None:
    expected = windowed(*qkv)
    with torch.inference_mode():
        assert torch.equal(windowed(*qkv), expected)


def test_func_grad(qkv: tuple[Tensor, ...]) -> None:
    """torch.func.grad returned an error with register_autograd."""
    ours = torch.func.grad(lambda *x: windowed(*x).sin().sum(), argnums=(0, 1, 2))(*qkv)
    for a, b in zip(ours, gradients(windowed, *qkv), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, 2), (None, 0, None)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    """Examples folded into the batch in another order (hazard A10)."""
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    tensors = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        full = list(shape) if dim is None else [*shape[:dim], 3, *shape[dim:]]
        tensors.append(torch.randn(full, dtype=torch.float64))

    def example(i: int) -> list[Tensor]:
        return [x if d is None else x.select(d, i) for x, d in zip(tensors, in_dims, strict=True)]

    expected = torch.stack([windowed(*example(i)) for i in range(3)])
    torch.testing.assert_close(torch.vmap(windowed, in_dims)(*tensors), expected)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return windowed(q, k, v).sin().sum()

    per_example = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims)(*tensors)
    for i in range(3):
        expected_grads = torch.func.grad(loss, argnums=(0, 1, 2))(*example(i))
        for ours, theirs in zip(per_example, expected_grads, strict=True):
            torch.testing.assert_close(ours[i], theirs)


@pytest.mark.parametrize("impl", ["fallback", "triton"])
@pytest.mark.parametrize("mask_shape", [(1, 1, 5, 7), (2, 1, 1, 7), (1, 4, 5, 7)])
@pytest.mark.parametrize("mapped", [False, True])
def test_vmap_with_a_mask(impl: str, mask_shape: tuple[int, ...], mapped: bool, device: torch.device) -> None:
    """A mask for the whole batch, folded like a tensor with a batch of its own, is read past its end."""
    q, k = torch.randn(3, 2, 4, 5, 16, device=device), torch.randn(2, 2, 7, 16, device=device)
    mask = torch.rand(3, *mask_shape, device=device) > 0.3
    lengths = torch.tensor([7, 4], device=device)

    def call(q: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, k, mask=mask, key_lengths=lengths, impl=impl)

    ours = torch.vmap(call, (0, 0 if mapped else None))(q, mask if mapped else mask[0])
    theirs = torch.stack([call(q[i], mask[i if mapped else 0]) for i in range(3)])
    torch.testing.assert_close(ours, theirs)


def test_vmap_with_bias_and_dropout_equals_a_loop() -> None:
    """Folding examples into the batch would sum a bias gradient over them and change dropout's bits."""
    q, bias = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 4, 1, 5)

    def loss(q: Tensor, bias: Tensor) -> Tensor:
        return attention(q, q, q, bias=bias, dropout_p=0.3, seed=3).sin().sum()

    grad = torch.func.grad(loss, argnums=(0, 1))
    for ours, theirs in zip(
        torch.vmap(grad)(q, bias), zip(*(grad(*x) for x in zip(q, bias)), strict=True), strict=True
    ):
        torch.testing.assert_close(ours, torch.stack(theirs))


class TestNeverSilentZeros:
    """What fused attention cannot differentiate it refuses; the reference can."""

    def test_jvp_of_jvp(self, qkv: tuple[Tensor, ...]) -> None:
        """Zeros as a tangent of a tangent (hazard A10)."""
        q, k, v = (x.detach() for x in qkv)

        def moved(q: Tensor) -> Tensor:
            return torch.func.jvp(lambda q: windowed(q, k, v), (q,), (q,))[1]

        with pytest.raises(NotImplementedError, match="forward mode of forward mode"):
            torch.func.jvp(moved, (q,), (q,))

    def test_third_derivative(self, qkv: tuple[Tensor, ...]) -> None:
        """dout needs no gradient here, q does (hazard A3)."""
        q = qkv[0]
        (dq,) = torch.autograd.grad(windowed(*qkv).sum(), q, create_graph=True)
        (ddq,) = torch.autograd.grad(dq.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="third derivative"):
            torch.autograd.grad(ddq.square().sum() + q.sum(), q)

    def test_func_third_derivative(self, qkv: tuple[Tensor, ...]) -> None:
        q, k, v = (x.detach() for x in qkv)
        call: Callable[[Tensor], Tensor] = lambda q: windowed(q, k, v).sin().sum()  # noqa: E731
        for _ in range(2):
            call = functools.partial(lambda of, q: torch.func.grad(of)(q).sin().sum(), call)
        with pytest.raises(NotImplementedError, match="third derivative"):
            torch.func.grad(call)(q)

    def test_third_derivative_in_forward_mode(self, qkv: tuple[Tensor, ...]) -> None:
        q, k, v = (x.detach() for x in qkv)
        first = torch.func.grad(lambda q: windowed(q, k, v).sin().sum())
        second = torch.func.grad(lambda q: first(q).sin().sum())
        with pytest.raises(NotImplementedError, match="third derivative"):
            torch.func.jvp(second, (q,), (q,))

    def test_reference_does_all_of_it(self, qkv: tuple[Tensor, ...]) -> None:
        def call(*x: Tensor) -> Tensor:
            return attention(*x, causal=True, impl="reference")

        assert torch.autograd.gradgradcheck(call, qkv)
        _, tangent = torch.func.jvp(call, qkv, qkv)
        assert tangent.abs().sum() > 0


@pytest.mark.parametrize("needs", itertools.product((False, True), repeat=N_GRADIENTS))
def test_every_subset_of_gradients(needs: tuple[bool, ...]) -> None:
    """A gradient that only comes along with another, or comes unasked (hazard A1, A5)."""
    tensors = [
        torch.randn(*s) for s in ((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), (5, 5), (2,), (2,), (4, 2))
    ]
    leaves = [x.clone().requires_grad_(n) for x, n in zip(tensors, needs, strict=True)]
    q, k, v, bias, sinks, slopes, table = leaves
    out = attention(q, k, v, bias=(bias, ALiBi(slopes), RelativeBias(table)), sinks=sinks)
    assert out.requires_grad == any(needs)
    if not any(needs):
        return
    out.sin().sum().backward()
    full = [x.clone().requires_grad_() for x in tensors]
    attention(
        *full[:3], bias=(full[3], ALiBi(full[5]), RelativeBias(full[6])), sinks=full[4]
    ).sin().sum().backward()
    for x, y, n in zip(leaves, full, needs, strict=True):
        assert (x.grad is None) == (not n)
        if n:
            torch.testing.assert_close(x.grad, y.grad)


def test_lse_alone_has_gradients_and_v_gets_zero(qkv: tuple[Tensor, ...]) -> None:
    """lse treated as a constant, or dout read although nobody used out."""
    lse = attention(*qkv, causal=True, want=("lse",)).lse
    dq, dk, dv = torch.autograd.grad(lse.sin().sum(), qkv)
    expected = attention(*qkv, causal=True, want=("lse",), impl="reference").lse
    for ours, theirs in zip((dq, dk), torch.autograd.grad(expected.sin().sum(), qkv[:2]), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.count_nonzero(dv) == 0


def test_saved_tensors_notice_in_place_edits() -> None:
    """Gradients of what q was changed into (hazard A9)."""
    q = leaf(1, 2, 5, 8)
    x = q * 1
    out = attention(x, x, x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("impl", ["sdpa", "fallback", "triton"])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_results_are_edited_in_place_like_those_of_sdpa(
    impl: str, layout: str, heads_kv: int, device: torch.device
) -> None:
    """A result that autograd takes for a view made without gradients, or by a Function, refuses edits."""

    def call(q: Tensor, k: Tensor) -> Tensor:
        if impl == "sdpa":
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        return attention(q, k, k, impl=impl)

    sizes = ((2, 4, 5, 16), (2, heads_kv, 7, 16))
    where = device if impl == "triton" else "cpu"  # on a GPU PyTorch may take a way that saves no result
    q, k = (torch.randn(b, s, h, d, device=where).transpose(1, 2) for b, h, s, d in sizes)
    if layout == "BHSD":
        q, k = q.contiguous(), k.contiguous()
    plain = call(q, k)
    weight = torch.full((), 2.0, requires_grad=True, device=where)
    with torch.no_grad():
        out = call(q, k)
    assert torch.equal(out.mul_(weight), 2 * plain)
    with torch.inference_mode():
        assert torch.equal(call(q, k).mul_(2), 2 * plain)
    out = call(q.requires_grad_(), k)
    assert torch.equal(out.mul_(weight), 2 * plain)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class HeardError(Exception):
    """Raised by the first operator that a `Listening` tensor meets."""


class Listening(Tensor):
    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise HeardError(str(function))


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


class TestWhoeverListensHearsTheOperator:
    """Eager calls go straight to the operator's body; each listener must switch that off."""

    q = torch.randn(1, 2, 5, 8)
    operator = "undivided.forward.default"

    @pytest.mark.parametrize("mode", [DispatchLog, FunctionLog])
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_modes(self, mode: type[DispatchLog] | type[FunctionLog], requires_grad: bool) -> None:
        q = self.q.clone().requires_grad_(requires_grad)
        with mode() as log:
            attention(q, q, q)
        assert self.operator in log.calls

    @pytest.mark.parametrize("argument", ["q", "k", "v", "bias", "mask", "key_lengths", "seed"])
    def test_tensor_subclasses(self, argument: str) -> None:
        options = {
            "mask": torch.ones(5, 5).bool(),
            "bias": torch.zeros(5, 5),
            "key_lengths": torch.tensor([3]),
            "dropout_p": 0.5,
        }
        inputs, spec = functional.prepare(self.q, self.q, self.q, options)
        inputs = inputs._replace(**{argument: getattr(inputs, argument).as_subclass(Listening)})
        with pytest.raises(HeardError, match=self.operator):
            ops.attention(inputs, spec, "fallback")

    def test_profiler(self) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            attention(self.q, self.q, self.q)
        assert "undivided::forward" in {event.key for event in profile.key_averages()}

    @pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
    def test_make_fx(self, tracing_mode: str) -> None:
        graph = make_fx(lambda q: attention(q, q, q, causal=True), tracing_mode=tracing_mode)(self.q).graph
        assert self.operator in {str(node.target) for node in graph.nodes}

    def test_fake_tensors(self) -> None:
        """Inside their mode and after it: the body would read memory that is not there."""
        with FakeTensorMode() as mode:
            q = mode.from_tensor(self.q)
            assert attention(q, q, q).shape == q.shape
        assert type(attention(q, q, q)) is type(q)


def test_flop_counter_counts_visible_scores_only() -> None:
    q = leaf(1, 2, 64, 16)
    with FlopCounterMode(display=False) as counter:
        attention(q, q, q).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 64 * 64 * 16 * (2 + 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(q, q, q, causal=True)
    assert counter.get_total_flops() == 2 * 2 * (64 * 65 // 2) * 16 * 2


def test_the_first_call_of_a_process_is_counted(tmp_path: Path) -> None:
    """A counter copies the formulas it knows when it is made: that may be before the first call."""
    code = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from undivided import attention
q = torch.randn(1, 2, 64, 16)
with FlopCounterMode(display=False) as counter:
    torch.func.grad(lambda q: attention(q, q, q).sum())(q)
print(counter.get_total_flops())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(2 * 2 * 64 * 64 * 16 * (2 + 5)), done.stderr


def test_autocast_casts_q_k_v_but_not_bias() -> None:
    """Operands of mixed dtypes, or a bias that loses digits (hazard A7)."""
    q, bias = leaf(1, 2, 6, 8, dtype=torch.float32), leaf(6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, q.bfloat16(), q, bias=bias)
        plain = attention(q.double(), q.double(), q.double())
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert q.grad.dtype == torch.float32
    assert bias.grad.dtype == torch.float32
    assert plain.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = attention(q, q, q, impl="reference")
    narrow = q.bfloat16()
    assert torch.equal(wide, attention(narrow, narrow, narrow, impl="reference")), (
        "products ran under autocast"
    )


def test_meta_tensors_get_shapes() -> None:
    q = torch.empty(2, 4, 5, 8, device="meta")
    stats = attention(q, q, q[..., :6], want=("lse",))
    assert stats.out.shape == (2, 4, 5, 6)
    assert stats.lse.shape == (2, 4, 5)
