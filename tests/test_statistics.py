"""Statistics of a call: what they are, by hand; entropy's gradient; who may ask and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from undivided import ALiBi, RelativeBias, attention
from undivided.kernels import fallback, functional, statistics
from undivided.kernels.spec import AttentionStats, Gradients, Needs

INF = math.inf
ALL = ("lse", "max_logit", "entropy", "key_mass")


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def qkv(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Two query heads share a key head; nothing is a power of two."""
    return draw(2, 4, 5, 8, dtype=dtype), draw(2, 2, 7, 8, dtype=dtype), draw(2, 2, 7, 6, dtype=dtype)


def stats(*args: Tensor, want: tuple[str, ...], **options: Any) -> AttentionStats:
    return attention(*args, want=want, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 0), "scale": -0.7},
    "mask": {"mask": torch.arange(35).view(5, 7) % 3 != 1},
    "nothing": {"mask": torch.arange(5)[:, None] != 3},
    "lengths": {"key_lengths": torch.tensor([3, 0])},
    "bias": {"bias": torch.linspace(-3, 3, 35).view(5, 7)},
    "alibi": {"bias": (torch.linspace(-3, 3, 7), ALiBi.of_heads(4)), "softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 8, 4), "scale": 0.0},
    "softcap": {"softcap": 0.7, "dropout_p": 0.4, "seed": 3},
}


def dense_scores(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """By hand, -inf where hidden."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    s = options.get("scale", q.shape[3] ** -0.5) * (q @ k.repeat_interleave(2, 1).mT)
    if "softcap" in options:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    ahead = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    bias = options.get("bias", ())
    for one in bias if isinstance(bias, tuple) else (bias,):
        s = s + (one if isinstance(one, Tensor) else -one.slopes[:, None, None] * ahead.abs())
    seen = options.get("mask", torch.tensor(True)) & (ahead <= (0 if options.get("causal") else seqlen_k))
    if "window" in options:
        left, right = options["window"]
        seen = seen & (ahead >= -left) & (ahead <= right)
    if "key_lengths" in options:
        seen = seen & (torch.arange(seqlen_k) < options["key_lengths"][:, None, None, None])
    return s.masked_fill(~seen, -INF)


@pytest.mark.parametrize("impl", ["reference", "fallback"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_by_hand(name: str, impl: str) -> None:
    """A score before the bias; bits for nats; a softmax without its sink; weights after dropout; NaN."""
    q, k, v = qkv()
    s = dense_scores(q, k, OPTIONS[name])
    sinks = OPTIONS[name].get("sinks", torch.full((4,), -INF)).to(s.dtype)
    e = torch.exp(s)
    p = (e / (e.sum(-1, keepdim=True) + sinks.exp()[:, None, None])).nan_to_num()
    found = stats(q, k, v, want=ALL, impl=impl, **OPTIONS[name])
    torch.testing.assert_close(found.max_logit, s.amax(-1))
    torch.testing.assert_close(found.entropy, -torch.special.xlogy(p, p).sum(-1))
    torch.testing.assert_close(found.key_mass, p.sum(2))


@pytest.mark.parametrize("impl", ["reference", "fallback"])
def test_only_what_was_asked_comes_back(impl: str) -> None:
    """A statistic that costs a pass and that nobody wanted, or one in another's place."""
    q, k, v = qkv()
    everything = stats(q, k, v, want=ALL, impl=impl)
    for name in ALL:
        found = stats(q, k, v, want=(name,), impl=impl)._asdict()
        assert torch.equal(found.pop("out"), everything.out)
        assert [other for other, x in found.items() if x is not None] == [name]
        assert torch.equal(found[name], getattr(everything, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_kernel_has_the_largest_score(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """A maximum in units of products, or of q negated for a negative scale."""
    on_device = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in OPTIONS[name].items()}
    if name == "alibi":
        bias, alibi = on_device["bias"]
        on_device["bias"] = bias.to(device), ALiBi(alibi.slopes.to(device))
    q, k, v = (x.to(device) for x in qkv(dtype))
    found = stats(q, k, v, want=("max_logit", "lse"), impl="triton", **on_device)
    expected = stats(q, k, v, want=("max_logit", "lse"), impl="fallback", **on_device)
    torch.testing.assert_close(found.max_logit, expected.max_logit)
    assert torch.equal(found.lse, stats(q, k, v, want=("lse",), impl="triton", **on_device).lse)


@pytest.mark.parametrize("impl", ["reference", "fallback"])
def test_who_has_a_gradient(impl: str) -> None:
    """A gradient of zeros that looks like one; entropy that hangs on to v."""
    q, k, v = (x.requires_grad_() for x in qkv())
    found = stats(q, k, v, want=ALL, impl=impl)
    assert [name for name, x in found._asdict().items() if x.requires_grad] == ["out", "lse", "entropy"]
    of_v = torch.autograd.grad(found.entropy.sum(), v, allow_unused=True)[0]
    assert of_v is None or not of_v.any()


def leaves_of(name: str) -> tuple[list[Tensor], Any]:
    """What entropy depends on, and a call with other values for it."""
    q, k, v = qkv()
    options, leaves = dict(OPTIONS[name]), [q, k]
    if "sinks" in options:
        options["scale"] = 1.0
        leaves.append(options["sinks"].double())
    if name == "bias":
        leaves += [options["bias"].double(), torch.rand(4).double(), torch.randn(6, 4).double()]

    def entropy(q: Tensor, k: Tensor, *others: Tensor) -> Tensor:
        if name == "bias":
            bias, slopes, table = others
            options["bias"] = bias, ALiBi(slopes), RelativeBias(table, max_distance=5)
        elif others:
            options["sinks"] = others[0]
        return stats(q, k, v, want=("entropy",), impl="fallback", **options).entropy

    return [x.requires_grad_() for x in leaves], entropy


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_of_entropy(name: str) -> None:
    """The closed form without -1, with the keys' share taken for 1, or not through an option."""
    leaves, entropy = leaves_of(name)
    assert gradcheck(entropy, leaves, fast_mode=True)


def test_gradients_through_everything_at_once() -> None:
    """Entropy's share lost where out and lse send theirs too, or added twice."""
    q, k, v = (x.requires_grad_() for x in qkv())
    options = {"causal": True, "softcap": 2.0, "sinks": torch.linspace(-1, 2, 4)}

    def gradients(impl: str) -> tuple[Tensor, ...]:
        found = stats(q, k, v, want=("lse", "entropy"), impl=impl, **options)
        mixed = found.out.sin().sum() + found.lse.cos().sum() + found.entropy.square().sum()
        return torch.autograd.grad(mixed, (q, k, v))

    for ours, theirs in zip(gradients("fallback"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_of_hidden_keys_or_empty_rows() -> None:
    """NaN in a key that nobody sees, or in the query of a row that sees nothing."""
    mask = (torch.arange(5) != 3)[:, None] & (torch.arange(7) != 2)
    q, k, v = (x.requires_grad_() for x in qkv())
    dirty = [x.detach().clone() for x in (q, k, v)]
    dirty[0][:, :, 3] = dirty[1][:, :, 2] = dirty[2][:, :, 2] = math.nan
    dirty = [x.requires_grad_() for x in dirty]
    clean, found = (stats(*x, want=ALL, mask=mask) for x in ((q, k, v), dirty))
    for a, b in zip(clean, found, strict=True):
        assert torch.equal(a, b)
    assert (found.entropy[:, :, 3] == 0).all()
    assert (found.max_logit[:, :, 3] == -INF).all()
    assert (found.key_mass[:, :, 2] == 0).all()
    ours = torch.autograd.grad(found.entropy.sum(), dirty[:2])
    for a, b in zip(ours, torch.autograd.grad(clean.entropy.sum(), (q, k)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axis", ["batch", "seqlen_q", "seqlen_k"])
@pytest.mark.parametrize("impl", ["reference", "fallback"])
def test_sizes_of_zero(axis: str, impl: str) -> None:
    """A maximum over no keys, an empty tensor with the wrong shape."""
    q, k, v = draw(0 if axis == "batch" else 2, 4, 0 if axis == "seqlen_q" else 5, 8), draw(2, 2, 7, 8), None
    k = k[: q.shape[0], :, : 0 if axis == "seqlen_k" else 7]
    v = k[..., :6]
    found = stats(q.requires_grad_(), k, v, want=ALL, impl=impl)
    assert found.max_logit.shape == found.entropy.shape == q.shape[:3]
    assert found.key_mass.shape == (q.shape[0], 4, k.shape[2])
    assert not found.entropy.any()
    assert (found.max_logit == -INF).all() or axis != "seqlen_k"
    assert torch.autograd.grad(found.entropy.sum(), q)[0].shape == q.shape


def test_opcheck() -> None:
    """Fakes that lie about shapes or strides, results that alias inputs."""
    q, k, v = (x.float().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    options = {"causal": True, "sinks": torch.randn(4), "bias": (torch.randn(4, 1, 7), ALiBi.of_heads(4))}
    inputs, spec = functional.prepare(q, k, v, options, want=ALL)
    lse = stats(q, k, v, want=("lse",), **options).lse
    for asked in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(statistics._statistics_op, (lse, *inputs, *spec, *asked))
    needs = [name != "dv" and x is not None for name, x in zip(Gradients._fields, inputs)]
    for some in (needs, [i == 1 for i in range(len(needs))]):
        torch.library.opcheck(statistics._backward_op, (lse.sin(), lse.abs(), lse, *inputs, *spec, some))


def several(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = stats(q, k, v, want=ALL, causal=True)
    return (found.entropy * found.max_logit.clamp_min(-9)).sum() + found.key_mass.amax() + found.out.sum()


def test_compile_is_one_graph_and_equal() -> None:
    """A graph break, or a fake with another answer."""
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in qkv()]
    compiled = torch.compile(several, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), several(*leaves))
    ours, eager = (torch.autograd.grad(call(*leaves), leaves) for call in (compiled, several))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_takes_a_tensor_twice() -> None:
    """Catches self-attention of one tensor, which torch.compile gives no Function twice."""
    torch._dynamo.reset()
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return attention(x, x, x, want=("entropy",)).entropy.square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x) for f in (compiled, call)))


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 7)])
def test_vmap_and_torch_func(bias: Tensor | None) -> None:
    """A batch folded into the wrong axis, or a gradient that functorch does not see."""
    q, k, v = (torch.stack([x, x.flip(0)]) for x in qkv())

    def entropy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stats(q, k, v, want=ALL, bias=bias).entropy

    torch.testing.assert_close(torch.vmap(entropy)(q, k, v)[1], entropy(q[1], k[1], v[1]))

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return entropy(q, k, v).sin().sum()

    mapped = torch.vmap(torch.func.grad(total))(q, k, v)
    torch.testing.assert_close(mapped[0], torch.func.grad(total)(q[0], k[0], v[0]))
    lone = torch.vmap(lambda q: several(q, k[0], v[0]))(q)
    torch.testing.assert_close(lone[1], several(q[1], k[0], v[0]))


def test_differentiable_once() -> None:
    """Silent zeros from a second derivative or from forward-mode AD; the reference has both."""
    q, k, v = (x.requires_grad_() for x in qkv())
    for impl in ("fallback", "reference"):
        entropy = stats(q, k, v, want=("entropy",), impl=impl).entropy
        (dq,) = torch.autograd.grad(entropy.sum(), q, create_graph=True)
        if impl == "reference":
            assert torch.autograd.grad(dq.sum(), q)[0].any()
        else:
            with pytest.raises(NotImplementedError, match="entropy is differentiable once"):
                torch.autograd.grad(dq.sum(), q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode AD"):
        stats(forward_ad.make_dual(q, torch.ones_like(q)), k, v, want=("entropy",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_get_float32(dtype: torch.dtype) -> None:
    """Statistics made from an lse that is good for a backward pass only, or rounded to the inputs' dtype."""
    q, k, v = qkv(dtype)
    found = stats(q, k, v, want=("entropy", "key_mass", "max_logit"))
    exact = stats(q.double(), k.double(), v.double(), want=ALL)
    for name in ALL[1:]:
        x = getattr(found, name)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), getattr(exact, name), atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements that any result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return results


def test_memory_is_linear() -> None:
    """Scores kept as a matrix, of which there would be 2^25."""
    q = torch.randn(1, 2, 4096, 8)
    inputs, spec = functional.prepare(q, q, q, {"causal": True}, want=ALL)
    needs = Needs(dq=True, dk=True)
    with Largest() as largest:
        _, lse, _ = fallback.attention_forward(inputs, spec)
        inputs = inputs._replace(v=q[..., :0])
        entropy, _ = fallback.attention_statistics(lse, inputs, spec, True, True)
        fallback.entropy_backward(torch.ones_like(lse), entropy, lse, inputs, spec, needs)
    assert largest.elements <= 2**21


def test_qk_clip() -> None:
    """What training with MuonClip needs (Kimi K2 report, section 2.1): the largest score of each head."""
    q, k, v = qkv(torch.float32)
    found = stats(q, k, v, want=("max_logit",), causal=True)
    largest = dense_scores(q, k, {"causal": True}).amax((0, 2, 3))
    torch.testing.assert_close(found.max_logit.amax((0, 2)), largest)


def test_compiled_without_gradients() -> None:
    """A model that is evaluated: a Function that none of its inputs differentiates could not be traced."""
    q = torch.randn(1, 2, 9, 8)
    run = torch.compile(
        lambda x: attention(x, x, x, want=("entropy",)).entropy, backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        torch.testing.assert_close(run(q), attention(q, q, q, want=("entropy",)).entropy)
