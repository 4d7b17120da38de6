"""Derivatives of derivatives: forward mode, double backward, their compositions, and what they cost."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from undivided import ALiBi, Documents, Mask, PrefixLM, RelativeBias, attention
from undivided.conformance.cases import Case, Extra
from undivided.conformance.oracle import ROUNDOFF
from undivided.kernels import fallback_blocks, functional, second_order

Call = Callable[..., tuple[Tensor, Tensor]]
MASK = torch.tensor([[True, False, True], [False, False, False], [True, True, False], [True, True, True]])
"""A row that sees nothing."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},  # four queries, three keys: the first sees nothing
    "window": {"window": (1, 0)},
    "mask": {"mask": MASK},
    "key_lengths": {"key_lengths": torch.tensor([2])},
    "bias": {"bias": True},
    "ALiBi": {"alibi": True},
    "relative": {"table": True},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.4, "seed": 3},
    "scale": {"scale": -0.7},
}
PAIRS = [*itertools.combinations([x for x in OPTIONS if x not in ("plain", "window", "scale")], 2)]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """gradcheck makes thousands of calls too small for two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def question(options: dict[str, Any]) -> tuple[Call, list[Tensor]]:
    """(out, lse) as a function of all that can have gradients, two query heads per key head, and these."""
    options = dict(options)
    leaves = [leaf(1, 2, 4, 2), leaf(1, 1, 3, 2), leaf(1, 1, 3, 3)]
    makers: list[Callable[[Tensor], Any]] = []
    for name, shape, maker in (
        ("bias", (2, 4, 1), lambda x: x),
        ("alibi", (2,), ALiBi),
        ("table", (4, 2), lambda x: RelativeBias(x, max_distance=5)),
    ):
        if options.pop(name, False):
            leaves.append(leaf(*shape))
            makers.append(maker)
    with_sinks = options.pop("sinks", False)
    if with_sinks:
        leaves.append(leaf(2))

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(options)
        if makers:
            given["bias"] = tuple(maker(x) for maker, x in zip(makers, rest, strict=False))
        if with_sinks:
            given["sinks"] = rest[-1]
        out, lse, *_ = attention(q, k, v, want=("lse",), **given)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    return call, leaves


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_mode(name: str) -> None:
    """A tangent left out, or one that reaches a row without keys; vmapped too."""
    call, leaves = question(OPTIONS[name])
    assert torch.autograd.gradcheck(
        call, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivatives(name: str) -> None:
    """A term of the Hessian left out, in reverse mode of reverse mode or in forward mode of it."""
    call, leaves = question(OPTIONS[name])
    assert torch.autograd.gradgradcheck(call, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_second_derivatives_of_two_options(names: tuple[str, str]) -> None:
    """Two options, each right alone, whose product is missing."""
    call, leaves = question(OPTIONS[names[0]] | OPTIONS[names[1]])
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        call, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )


CASES = [
    Case("plain", heads_q=4, seqlen_q=40, seqlen_k=50, head_dim_v=24),
    Case("causal", batch=2, seqlen_q=40, seqlen_k=70, causal=True),
    Case("nothing seen first", seqlen_q=50, seqlen_k=20, causal=True, sinks=True),
    Case("keys nobody sees", seqlen_q=20, seqlen_k=50, causal=True, top_left=True),
    Case("window", seqlen_q=70, seqlen_k=70, window=(9, 3), softcap=1.5),
    Case("mask", batch=2, heads_q=4, mask=Extra("empty_rows", "bqk")),
    Case("lengths", batch=4, key_lengths=(33, 7, 7, 0), causal=True),
    Case("hidden by bias", heads_q=4, bias=Extra("hidden_rows", "hqk"), causal=True),
    Case("biases", batch=2, bias=Extra("random", "bk"), alibi="bh", relative=(12, False), dropout_p=0.2),
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that meet their keys in several blocks, and several strips of rows."""
    monkeypatch.setattr(fallback_blocks, "_BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(fallback_blocks, "_COLS", 16)


def of_case(case: Case, impl: str, dtype: torch.dtype = torch.float64) -> tuple[Call, list[Tensor]]:
    """(out, lse) as a function of all that can have gradients."""
    inputs, spec = case.build(dtype)._replace(top_left=case.top_left).prepared()
    there = [i for i, x in enumerate(inputs[:7]) if x is not None]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = inputs._replace(**{inputs._fields[i]: x for i, x in zip(there, tensors, strict=True)})
        out, lse, *_ = functional.dispatch.run(given, spec, impl)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    return call, [inputs[i].detach() for i in there]  # type: ignore[union-attr]


class Directions(NamedTuple):
    """Tangents of what a call takes, and cotangents of what it returns."""

    tangents: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]

    @classmethod
    def of(cls, call: Call, leaves: list[Tensor]) -> Directions:
        tangents = tuple(torch.randn_like(x).masked_fill(x == -torch.inf, 0.0) for x in leaves)
        return cls(tangents, tuple(map(torch.randn_like, call(*leaves))))

    def double(self) -> Directions:
        return Directions(*(tuple(x.double() for x in side) for side in self))


def second_derivatives(
    call: Call, leaves: list[Tensor], directions: Directions
) -> dict[str, tuple[Tensor, ...]]:
    """Forward mode, and each composition of two modes that there is."""
    tangents, cotangents = directions

    def gradients(*x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(call, *x)[1](cotangents)

    def moved(*x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(call, x, tangents)[1]

    x = tuple(leaves)
    again = [x.clone().requires_grad_() for x in (*leaves, *cotangents)]
    first = torch.autograd.grad(call(*again[: len(x)]), again[: len(x)], again[len(x) :], create_graph=True)
    return {
        "forward": moved(*x),
        "forward of reverse": torch.func.jvp(gradients, x, tangents)[1],
        "reverse of reverse": torch.func.vjp(gradients, *x)[1](tangents),
        "reverse of forward": torch.func.vjp(moved, *x)[1](cotangents),
        "double backward": torch.autograd.grad(first, again, tangents),
    }


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_compositions_equal_the_reference(case: Case) -> None:
    """Blocks summed wrongly; a Hessian that is not symmetric; gradients of out and lse counted twice."""
    call, leaves = of_case(case, "fallback")
    directions = Directions.of(call, leaves)
    ours = second_derivatives(call, leaves, directions)
    theirs = second_derivatives(*of_case(case, "reference"), directions)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")
    hessian = ours["forward of reverse"]
    for name in ("reverse of reverse", "reverse of forward"):
        torch.testing.assert_close(ours[name], hessian)
    torch.testing.assert_close(ours["double backward"], (*hessian, *ours["forward"]))


def hardness(case: Case, leaves: list[Tensor], directions: Directions) -> dict[str, tuple[Tensor, ...]]:
    """For each result of "forward" and "double backward": the sums that make it, on absolute values.

    Each term is a product of up to three probabilities, whose exponents are wrong by a roundoff for each unit
    of the row's scores and lse: hence the weight. Plain, masked and grouped attention only.
    """
    inputs, spec = case.build(leaves[0].dtype).prepared()
    inputs = inputs._replace(q=leaves[0].double(), k=leaves[1].double(), v=leaves[2].double())
    eye = torch.eye(inputs.k.shape[2], dtype=torch.float64).expand(*inputs.k.shape[:2], -1, -1)
    p, lse, *_ = functional.dispatch.run(inputs._replace(v=eye), spec, "reference")
    assert lse is not None
    (tq, tk, tv), (dout, dlse) = ([x.double().abs() for x in side] for side in directions)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    q, dlse = inputs.q.abs(), dlse[..., None]
    k, v, tk, tv = (y.abs().repeat_interleave(group, 1) for y in (*inputs[1:3], tk, tv))
    level = abs(spec.scale) * (q @ k.mT)
    weight = 3 * (1 + lse.abs()[..., None] + torch.where(p > 0, level, 0.0).amax(-1, keepdim=True))
    weight = torch.where(lse[..., None] == -torch.inf, 0.0, weight)
    ts = abs(spec.scale) * (tq @ k.mT + q @ tk.mT)
    tlse = (p * ts).sum(-1, keepdim=True)
    tout = (p * (ts + tlse)) @ v + p @ tv
    dp = dout @ v.mT + (dout * (p @ v)).sum(-1, keepdim=True) + dlse
    w = p * ((ts + tlse) * dp + dout @ tv.mT + (dout * tout).sum(-1, keepdim=True))
    w, ds, u = (weight * y for y in (w, p * dp, p * (ts + tlse)))

    def over_group(y: Tensor) -> Tensor:
        return y.unflatten(1, (-1, group)).sum(2)

    dq = abs(spec.scale) * (w @ k + ds @ tk)
    dk = abs(spec.scale) * over_group(w.mT @ q + ds.mT @ tq)
    rows = (weight * tout, (weight * tlse)[..., 0])
    return {"forward": rows, "double backward": (dq, dk, over_group(u.mT @ dout), *rows)}


NARROW = [
    Case("plain", heads_q=4, seqlen_q=40, seqlen_k=50),
    Case("causal", batch=2, seqlen_q=70, seqlen_k=50, causal=True),
    Case("peaky", distribution="peaky", seqlen_k=65),
    Case("values with a mean", distribution="mean_v", window=(9, 3)),
    Case("mask", batch=2, heads_q=4, mask=Extra("empty_rows", "bqk")),
]


def worst_rounding(case: Case, impl: str, dtype: torch.dtype) -> float:
    """The largest error after one rounding of the result to dtype, in units of what `hardness` allows."""
    call, leaves = of_case(case, impl, dtype)
    exact, _ = of_case(case, "reference")
    directions = Directions.of(call, leaves)
    ours = second_derivatives(call, leaves, directions)
    theirs = second_derivatives(exact, [x.double() for x in leaves], directions.double())
    worst = 0.0
    for name, scales in hardness(case, leaves, directions).items():
        for x, y, scale in zip(ours[name], theirs[name], scales, strict=True):
            rounding = ROUNDOFF[x.dtype] * (y.abs() + torch.finfo(x.dtype).smallest_normal)
            error = ((x.double() - y).abs() - rounding) / scale.clamp_min(1e-300)
            worst = max(worst, float(error.nan_to_num(torch.inf).max()) * 2.0**24)
    return worst


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding(case: Case, dtype: torch.dtype) -> None:
    """A sum, or out, lse and their tangents between the passes, kept in 16 bits.

    Everything is computed in float32 and rounded once: the bound is a roundoff of the dtype for the result,
    and one of float32 for the sums that make it.
    """
    assert worst_rounding(case, "fallback", dtype) <= 1.0


PENALTY = {"causal": True, "softcap": 3.0}


def penalty(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    """Squared norm of the input gradient of a loss, as in WGAN-GP (Gulrajani et al. 2017)."""
    loss = attention(q, k, v, impl=impl, **PENALTY).sin().sum()
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    return dq.square().sum()


def test_gradient_penalty() -> None:
    """The penalty's gradient goes through dout, and through q, k, v as backward reads them (hazard A3)."""
    leaves = leaf(2, 4, 5, 4), leaf(2, 2, 7, 4), leaf(2, 2, 7, 3)
    ours, theirs = (torch.autograd.grad(penalty(*leaves, impl), leaves) for impl in ("fallback", "reference"))
    torch.testing.assert_close(ours, theirs)
    assert all(x.abs().sum() > 0 for x in ours)


class TestTransforms:
    """Of torch.func, nested, with a bias that maps, and options that cannot be folded into the batch."""

    @pytest.fixture
    def x(self) -> tuple[Tensor, ...]:
        shapes = (3, 1, 4, 5, 4), (3, 1, 2, 7, 4), (3, 1, 2, 7, 3), (3, 4, 1, 7)
        return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    @staticmethod
    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, impl: str = "fallback") -> Tensor:
        return attention(q, k, v, bias=bias, causal=True, dropout_p=0.2, seed=1, impl=impl).sin().sum()

    def reference(self, *x: Tensor) -> Tensor:
        return self.loss(*x, impl="reference")

    def check(self, transform: Callable[[Callable[..., Tensor]], Callable[..., Any]], x: Any) -> None:
        torch.testing.assert_close(transform(self.loss)(*x), transform(self.reference)(*x))

    def test_vmap_of_jvp(self, x: tuple[Tensor, ...]) -> None:
        self.check(lambda f: torch.vmap(lambda *x: torch.func.jvp(f, x, x)), x)

    def test_jvp_of_vmap(self, x: tuple[Tensor, ...]) -> None:
        self.check(lambda f: lambda *x: torch.func.jvp(torch.vmap(f), x, x), x)

    def test_vmap_over_tangents_alone(self, x: tuple[Tensor, ...]) -> None:
        one = tuple(y[0] for y in x)
        self.check(lambda f: torch.vmap(lambda *t: torch.func.jvp(f, one, t)), x)

    def test_penalty_of_each_example(self, x: tuple[Tensor, ...]) -> None:
        def transform(f: Callable[..., Tensor]) -> Callable[..., Any]:
            gradient = torch.func.grad(f)
            return torch.vmap(torch.func.grad(lambda *x: gradient(*x).square().sum(), argnums=(0, 1, 2, 3)))

        self.check(transform, x)

    @pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev])
    @pytest.mark.parametrize("inner", [torch.func.jacfwd, torch.func.jacrev])
    def test_hessian(self, outer: Any, inner: Any, x: tuple[Tensor, ...]) -> None:
        one = tuple(y[0, :, :2, :3, :3] for y in x[:1]) + tuple(y[0, :, :1, :3, :3] for y in x[1:3])
        one += (x[3][0, :2, :, :3],)
        if outer is inner is torch.func.jacfwd:
            with pytest.raises(NotImplementedError, match="forward mode of forward mode"):
                outer(inner(self.loss))(*one)
            return
        self.check(lambda f: outer(inner(f)), one)


def test_products_with_a_hessian_agree() -> None:
    """Forward over reverse and reverse over reverse of the same loss, without torch.func and with."""
    q, t = leaf(1, 2, 6, 4), torch.randn(1, 2, 6, 4, dtype=torch.float64)

    def loss(q: Tensor) -> Tensor:
        return attention(q, q.flip(2), q.cos(), causal=True).square().sum()

    (dq,) = torch.autograd.grad(loss(q), q, create_graph=True)
    (expected,) = torch.autograd.grad(dq, q, t)
    _, by_func = torch.func.jvp(torch.func.grad(loss), (q.detach(),), (t,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, t)
        (gradient,) = torch.autograd.grad(loss(dual), dual)
        by_dual = forward_ad.unpack_dual(gradient).tangent
    assert by_dual is not None
    for found in (by_func, by_dual):
        torch.testing.assert_close(found, expected)


def test_backward_with_a_dual_gradient() -> None:
    """A graph recorded before the level: only the gradient that comes back has a tangent, easily dropped."""
    q, t = leaf(1, 2, 6, 4), torch.randn(1, 2, 6, 4, dtype=torch.float64)
    out = attention(q, q, q, causal=True)
    (expected,) = torch.autograd.grad(out, q, t, retain_graph=True)
    with forward_ad.dual_level():
        (dq,) = torch.autograd.grad(out, q, forward_ad.make_dual(torch.ones_like(out), t))
        tangent = forward_ad.unpack_dual(dq).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, expected)


def test_max_logit_has_no_tangent_and_others_keep_theirs() -> None:
    q = torch.randn(1, 2, 6, 4)

    def call(q: Tensor) -> tuple[Tensor, Tensor]:
        stats = attention(q, q, q, want=("lse", "max_logit"))
        return stats.lse, stats.max_logit

    (_, _), (tlse, tmax) = torch.func.jvp(call, (q,), (q,))
    assert tlse.abs().sum() > 0
    assert torch.count_nonzero(tmax) == 0


@pytest.mark.parametrize("hide", ["mask", "key_lengths", "top-left"])
def test_nan_where_nobody_looks(hide: str) -> None:
    """A NaN in a hidden key, its tangent, or in a row without keys, carried on by a product with 0."""
    sizes = ((2, 2, 20, 4), (2, 2, 30, 4), (2, 2, 30, 3))
    x = [torch.randn(s, dtype=torch.float64) for s in sizes]
    t = [torch.randn(s, dtype=torch.float64) for s in sizes]
    options: dict[str, Any] = {"key_lengths": torch.tensor([17, 30])}
    row: Any = None
    if hide == "mask":
        mask = torch.rand(20, 30) < 0.7
        mask[:, 17:] = False
        mask[5] = False
        options, row = {"mask": mask}, 5
    elif hide == "top-left":
        options = {"causal": True}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        inputs, spec = functional.prepare(q, k, v, options, top_left=hide == "top-left")
        out, lse, *_ = functional.dispatch.run(inputs, spec, "fallback")
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    cols = slice(20 if hide == "top-left" else 17, None)
    entries = slice(0, 1) if hide == "key_lengths" else slice(None)
    poisoned_x, poisoned_t = ([y.clone() for y in z] for z in (x, t))
    for z in (poisoned_x, poisoned_t):
        for y in z[1:]:
            y[entries, :, cols] = torch.nan
        if row is not None:
            z[0][:, :, row] = torch.nan
    cotangents = Directions.of(call, x).cotangents
    clean, poisoned = (
        second_derivatives(call, a, Directions(tuple(b), cotangents))
        for a, b in ((x, t), (poisoned_x, poisoned_t))
    )
    for name in clean:
        assert all(y.isfinite().all() for y in poisoned[name]), name
        torch.testing.assert_close(poisoned[name], clean[name], msg=name)


@pytest.mark.parametrize(("given", "products"), [("q", 3), ("k", 3), ("v", 3), ("qkv", 5)])
def test_tangents_that_are_not_there_cost_nothing(given: str, products: int) -> None:
    """Zeros made of them, and multiplied: q·k, p·v and p·ts·v, or p·tv, are products enough for one."""
    q = torch.randn(1, 2, 32, 16)
    inputs, spec = functional.prepare(q, q, q, {})
    tangents = second_order.Tangents(*(q if x in given else None for x in "qkv"), *(None,) * 4)
    with FlopCounterMode(display=False) as counter:
        second_order.jvp(tangents, inputs, spec)
    assert counter.get_total_flops() <= 2 * 2 * 32 * 32 * 16 * (products + 1)


def test_after_the_kernels() -> None:
    """out and lse of Triton's forward, and its backward, under second derivatives in PyTorch."""
    case = Case("", heads_q=4, seqlen_q=20, seqlen_k=30, causal=True)
    assert worst_rounding(case, "triton", torch.float32) <= 1.0


def test_operators() -> None:
    """Fakes that lie about shapes or strides, results that alias inputs."""
    sizes = ((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 8))
    q, k, v = (torch.randn(s).transpose(1, 2).contiguous().transpose(1, 2) for s in sizes)
    options: dict[str, Any] = {"bias": (torch.randn(4, 1, 7), ALiBi(torch.rand(4))), "sinks": torch.randn(4)}
    inputs, spec = functional.prepare(q, k, v, options)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    out, lse = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5)
    operators = torch.ops.undivided
    torch.library.opcheck(operators.jvp, (*inputs[:7], *inputs, *spec), test_utils=tests)
    for needs in ([True] * 7, [i == 1 for i in range(7)]):
        arguments = (out, lse, *inputs[:7], *inputs, *spec, needs)
        torch.library.opcheck(operators.hvp, arguments, test_utils=tests)


def test_an_entry_does_not_notice_the_others() -> None:
    """Sizes of blocks and of products that depend on the batch, whatever deterministic="batch" says."""
    case = Case("", batch=3, heads_q=4, seqlen_q=40, seqlen_k=50, causal=True, key_lengths=(50, 7, 33))
    q, k, v, options, dout, *_ = case.build(torch.float32)
    options["deterministic"] = "batch"

    def of_entries(entries: slice) -> list[Tensor]:
        leaves = [x[entries].clone().requires_grad_() for x in (q, k, v)]
        own = options | {"key_lengths": options["key_lengths"][entries]}
        out = attention(*leaves, **own)
        first = torch.autograd.grad(out, leaves, dout[entries], create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        call = functools.partial(attention, **own)
        return [*second, *torch.func.jvp(call, tuple(x.detach() for x in leaves), second)]

    for alone, together in zip(of_entries(slice(1, 2)), of_entries(slice(None)), strict=True):
        assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("mask", [Documents(torch.arange(200)[None] // 70), PrefixLM(torch.tensor([30, 90]))])
def test_mask_objects(mask: Mask) -> None:
    """They reach second derivatives as ranges and tiles."""
    leaves = [torch.randn(2, 2, 200, 4, dtype=torch.float64) for _ in range(3)]

    def call(*x: Tensor, impl: str = "fallback") -> tuple[Tensor, Tensor]:
        stats = attention(*x, mask=mask, want=("lse",), impl=impl)
        return stats.out, stats.lse

    directions = Directions.of(call, leaves)
    ours = second_derivatives(call, leaves, directions)
    theirs = second_derivatives(functools.partial(call, impl="reference"), leaves, directions)
    torch.testing.assert_close(ours, theirs)


def test_packed_sequences_are_refused() -> None:
    """Spans ignored: one long sequence."""
    q = torch.randn(1, 2, 6, 4)
    inputs, spec = functional.prepare(q, q, q, {})
    spans = torch.tensor([[0, 4], [4, 6]], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="packed sequences"):
        torch.ops.undivided.jvp(*inputs[:7], *inputs._replace(spans_q=spans, spans_k=spans), *spec)


def test_entropy_is_refused() -> None:
    """Silent zeros for what is differentiable once."""
    q = leaf(1, 2, 6, 4)
    stats = attention(q, q, q, want=("entropy",))
    assert stats.entropy is not None
    (dq,) = torch.autograd.grad(stats.entropy.sum() + stats.out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="entropy"):
        torch.autograd.grad(dq.sum(), q)


def test_without_elements() -> None:
    """A call without queries or keys: zeros, in every mode."""
    for seqlen_q, seqlen_k in ((0, 3), (3, 0)):
        call, leaves = of_case(Case("", seqlen_q=seqlen_q, seqlen_k=seqlen_k), "fallback")
        for results in second_derivatives(call, leaves, Directions.of(call, leaves)).values():
            assert all(torch.count_nonzero(x) == 0 for x in results)


_STEP = """
import re, torch, undivided
torch.set_num_threads(1)
def step(seqlen):
    q, k, v = x = [torch.randn(1, 2, seqlen, 16, requires_grad=True) for _ in range(3)]
    call = lambda q, k, v: undivided.attention(q, k, v, causal=True)
    torch.func.jvp(call, tuple(y.detach() for y in x), tuple(y.detach() for y in x))
    first = torch.autograd.grad(call(*x).sum(), x, create_graph=True)
    torch.autograd.grad(sum(y.square().sum() for y in first), x)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
step(2048)
before = peak()
step(4096)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc: getrusage inherits pytest's")
def test_memory_is_linear() -> None:
    """A matrix of scores kept for a derivative: 2 heads x 4096² x 4 bytes are 128 MiB, each."""
    for _ in range(3):  # what the allocator could not use again only ever adds
        done = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=True)
        if int(done.stdout) < 64 * 1024:
            return
    raise AssertionError(f"{done.stdout} KiB more at the peak")


def test_blocks_that_documents_hide_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of a packed row computed, to be hidden; an entry that visits the blocks of its neighbour."""
    ids = torch.arange(512) // torch.tensor([[64], [128]])
    q, k, v, *moving = torch.randn(6, 2, 1, 512, 8, dtype=torch.float64)
    scores, block = [], second_order._Direction._block

    def counted(self: Any, rows: slice, part: Any, *args: Any) -> Any:
        scores.append(len(self.inputs.q) * (rows.stop - rows.start) * (part.cols.stop - part.cols.start))
        return block(self, rows, part, *args)

    monkeypatch.setattr(second_order._Direction, "_block", counted)
    masks = Documents(ids), (ids[:, :, None] == ids[:, None])[:, None]
    found, expected = (
        torch.func.jvp(lambda *x, mask=mask: attention(*x, mask=mask, impl="fallback"), (q, k, v), (*moving,))
        for mask in masks
    )
    torch.testing.assert_close(found, expected)
    everything = 2 * 512**2  # by the mask without structure
    assert sum(scores) <= 1.5 * everything
