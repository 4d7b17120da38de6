"""SelfAttention against nn.Linear and PyTorch's attention; what all layers owe to nn.Module."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undivided import attention
from undivided.kernels import dispatch
from undivided.layers import MultiheadAttention, SelfAttention


def composed(layer: SelfAttention, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The same layer in PyTorch's words, with heads of keys and values repeated."""
    h, h_kv, d = layer.num_heads, layer.num_heads_kv, layer.head_dim
    parts = F.linear(x, layer.qkv_proj.weight, layer.qkv_proj.bias).split((h * d, h_kv * d, h_kv * d), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in parts)
    k, v = (part.repeat_interleave(h // h_kv, dim=1) for part in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=layer.scale)
    return F.linear(out.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)


def assert_same_gradients(layer: nn.Module, x: Tensor, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected)
    wanted, names = [x, *layer.parameters()], ["x", *(name for name, _ in layer.named_parameters())]
    dout = torch.randn_like(expected)
    got = torch.autograd.grad(actual, wanted, dout)
    for name, a, b in zip(names, got, torch.autograd.grad(expected, wanted, dout), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_heads_kv", [None, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_projection_attention_projection(
    dtype: torch.dtype, num_heads_kv: int | None, bias: bool
) -> None:
    """Catches q, k, v cut from the fused projection in the wrong order or width, and wrong grouping."""
    torch.manual_seed(0)
    layer = SelfAttention(24, 4, num_heads_kv=num_heads_kv, bias=bias, dtype=dtype)
    x = torch.randn(2, 9, 24, dtype=dtype, requires_grad=True)
    assert_same_gradients(layer, x, layer(x), composed(layer, x))


def test_head_dim_need_not_divide_embed_dim() -> None:
    """Catches an out_proj sized by embed_dim rather than by the heads."""
    torch.manual_seed(0)
    layer = SelfAttention(10, 3, head_dim=8, scale=-0.3)
    x = torch.randn(2, 5, 10, requires_grad=True)
    assert_same_gradients(layer, x, layer(x), composed(layer, x))


def test_traits_and_batch_options_reach_attention_together() -> None:
    """Catches an option of the layer or of the call that is accepted and dropped."""
    torch.manual_seed(0)
    layer = SelfAttention(16, 4, num_heads_kv=2, causal=True, window=(3, None))
    x = torch.randn(2, 8, 16, requires_grad=True)
    mask = torch.rand(8, 8) > 0.2
    lengths = torch.tensor([8, 5])
    bias = torch.randn(4, 8, 8)
    i, j = torch.arange(8)[:, None], torch.arange(8)
    ok = (j <= i) & (j >= i - 3) & mask & (j < lengths[:, None, None, None])
    out = layer(x, mask=mask, key_lengths=lengths, bias=bias)
    assert_same_gradients(layer, x, out, composed(layer, x, torch.where(ok, bias, -torch.inf)))


def test_softcap_is_applied() -> None:
    """Catches a softcap that is stored and not passed on."""
    torch.manual_seed(0)
    layer = SelfAttention(8, 1, softcap=0.01)
    x = torch.randn(1, 6, 8)
    nearly_uniform = layer.qkv_proj(x)[..., 16:].mean(1, keepdim=True)
    torch.testing.assert_close(layer(x), layer.out_proj(nearly_uniform).expand(1, 6, 8), rtol=0.0, atol=1e-2)
    assert (composed(layer, x) - layer(x)).abs().max() > 1e-2


def test_a_row_that_sees_nothing_gives_the_bias_of_out_proj() -> None:
    """Catches NaN from padding rows."""
    layer = SelfAttention(8, 2)
    x = torch.randn(2, 4, 8, requires_grad=True)
    out = layer(x, key_lengths=torch.tensor([0, 4]))
    torch.testing.assert_close(out[0], layer.out_proj.bias.expand(4, 8))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert not dx[0].any()
    assert dx[1].isfinite().all()


def test_self_attention_drops_only_in_training() -> None:
    """Catches dropout in eval mode, and a layer that forgets to drop."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    layer = SelfAttention(8, 2, dropout=1.0)
    torch.testing.assert_close(layer(x), layer.out_proj.bias.expand(2, 6, 8))
    torch.testing.assert_close(layer.eval()(x), composed(layer, x))
    layer = SelfAttention(8, 2, dropout=0.5)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim"),
        ({"embed_dim": 8, "num_heads": 4, "num_heads_kv": 3}, "num_heads must be a multiple"),
        ({"embed_dim": 8, "num_heads": 0}, "at least 1"),
        ({"embed_dim": 8, "num_heads": 2, "head_dim": 0}, "head_dim"),
        ({"embed_dim": 8, "num_heads": 2, "dropout": 1.5}, "dropout"),
    ],
)
def test_wrong_sizes_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfAttention(**arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (-1, 0)},
        {"window": 3},
        {"softcap": 0.0},
        {"scale": float("nan")},
        {"scale": "large"},
        {"impl": "tritn"},
    ],
    ids=str,
)
def test_wrong_options_are_refused_when_the_layer_is_made(options: dict[str, Any]) -> None:
    """Catches a layer that is built, saved and loaded, and fails at its first batch; words that differ."""
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises((ValueError, TypeError)) as expected:
        attention(x, x, x, **options)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        SelfAttention(8, 2, **options)


def test_a_layer_can_be_made_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check at construction that asks for the machine of the first call."""
    monkeypatch.setattr(dispatch, "_triton_is_missing", lambda device: ("triton is not installed",))
    layer = SelfAttention(8, 2, impl="triton", device="meta")
    assert layer.impl == "triton"


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(batch, seqlen, 8\), got \(4, 8\)"):
        SelfAttention(8, 2)(torch.randn(4, 8))


def test_repr_shows_what_is_not_the_default() -> None:
    shown = repr(SelfAttention(8, 4, num_heads_kv=2, causal=True, window=(5, None)))
    assert "num_heads_kv=2" in shown
    assert "causal=True" in shown
    assert "window=(5, None)" in shown
    assert "softcap" not in shown


class Both(nn.Module):
    """The two layers in one module that takes one tensor."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.mha = MultiheadAttention(16, 4, batch_first=True)
        self.own = SelfAttention(16, 4, num_heads_kv=2, causal=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out, weights = self.mha(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)
        out = self.own(out)
        return out if weights is None else out + weights.mean()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same(copied: object) -> None:
    """Catches hooks or state that cannot be pickled or that still point to the original."""
    torch.manual_seed(0)
    module, x = Both(), torch.randn(2, 5, 16)
    twin = copied(module)  # type: ignore[operator]
    assert torch.equal(module(x), twin(x))
    with torch.no_grad():
        twin.mha.in_proj_weight.zero_()
    assert not torch.equal(module(x), twin(x))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_compiles_into_one_graph(need_weights: bool, padded: bool) -> None:
    """Catches graph breaks in forward and different values or gradients under torch.compile."""
    torch.manual_seed(0)
    module, x = Both(need_weights), torch.randn(2, 5, 16, requires_grad=True)
    padding = torch.arange(5) >= torch.tensor([[5], [3]]) if padded else None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_gradients(module, x, compiled(x, padding), module(x, padding))


def test_a_new_length_does_not_recompile_for_ever() -> None:
    """Catches sequence lengths baked into the graph (one compile each)."""
    torch._dynamo.reset()
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    module = Both()
    compiled = torch.compile(module, fullgraph=True, backend=count)
    with torch.no_grad():
        for length in (5, 6, 7, 8, 9):
            x = torch.randn(2, length, 16)
            torch.testing.assert_close(compiled(x), module(x))
    assert len(graphs) <= 2


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_trains_fp32_parameters_in_bfloat16(need_weights: bool) -> None:
    """Catches operands of mixed dtypes, and more rounding than PyTorch's layer has under autocast."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, add_bias_kv=True, batch_first=True)
    ours = MultiheadAttention(16, 4, add_bias_kv=True, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 16)
    exact = theirs(x, x, x, need_weights=need_weights)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (layer(x, x, x, need_weights=need_weights) for layer in (theirs, ours))
    for a, b, right in zip(actual, expected, exact, strict=True):
        if right is None:
            assert a is None
            continue
        assert a.dtype == b.dtype
        assert (a - right).abs().max() <= 2 * (b - right).abs().max()
    sum(a.sum() for a in actual if a is not None).backward()
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all(), name
