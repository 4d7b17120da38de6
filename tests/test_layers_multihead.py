"""MultiheadAttention must not be distinguishable from PyTorch's, NaN apart."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undivided.layers import MultiheadAttention, multihead

N, L, S, E, H = 2, 5, 7, 16, 4


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """PyTorch's layer and ours, made from one seed, with biases that are not zero."""
    layers = []
    for cls in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(0)
        layers.append(cls(E, H, **options))
        for name, p in layers[-1].named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p)
    return layers[0], layers[1]  # type: ignore[return-value]


def inputs(layer: nn.MultiheadAttention, kind: str = "cross", batched: bool = True) -> list[Tensor]:
    """query, key, value; kind: self (one tensor), memory (key is value), cross (three tensors)."""

    def make(length: int, features: int) -> Tensor:
        shape = (N, length, features) if layer.batch_first else (length, N, features)
        return torch.randn(shape if batched else (length, features), dtype=layer.out_proj.weight.dtype)

    query = make(L, E).requires_grad_()
    if kind == "self":
        return [query, query, query]
    key = make(S, layer.kdim).requires_grad_()
    return [query, key, key if kind == "memory" else make(S, layer.vdim).requires_grad_()]


def assert_twins(
    theirs: nn.MultiheadAttention, ours: MultiheadAttention, qkv: list[Tensor], **options: Any
) -> None:
    """Same output, weights, and gradients of inputs, parameters and float masks, through both results."""
    masks = [m for m in options.values() if isinstance(m, Tensor) and m.requires_grad]
    results, gradients, names = [], [], ["query", "key", "value", *dict(ours.named_parameters()), "mask"]
    for layer in (theirs, ours):
        out, weights = layer(*qkv, **options)
        torch.manual_seed(1)
        loss = (out * torch.randn(out.shape)).sum()
        if weights is not None:
            loss = loss + (weights * torch.randn(weights.shape)).sum()
        wanted = [*qkv, *layer.parameters(), *masks]
        gradients.append(torch.autograd.grad(loss, wanted, allow_unused=True))
        results.append((out, weights))
    torch.testing.assert_close(results[1], results[0])
    assert results[1][0].is_contiguous() or not results[0][0].is_contiguous()
    for name, a, b in zip([*names, "mask"], gradients[1], gradients[0]):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b.expand_as(a), msg=lambda text, n=name: f"gradient of {n}: {text}")


@pytest.fixture
def attention_calls() -> Iterator[mock.Mock]:
    with mock.patch.object(multihead, "attention", wraps=multihead.attention) as spy:
        yield spy


VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10},
]
WEIGHTS: list[dict[str, Any]] = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_constructor_and_state_dict_are_pytorchs(variant: dict[str, Any], batch_first: bool) -> None:
    """Catches a parameter added, renamed, reordered or initialised from another stream of numbers."""
    options = {**variant, "batch_first": batch_first, "dtype": torch.float64}
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H, **options)
    a, b = theirs.state_dict(), ours.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_twins(theirs, ours, inputs(ours))


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_pytorchs(method: str) -> None:
    """Catches another order, name or default, in ours or in a later PyTorch."""
    theirs = inspect.signature(getattr(nn.MultiheadAttention, method)).parameters
    ours = inspect.signature(getattr(MultiheadAttention, method)).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_layouts(
    weights: dict[str, Any], kind: str, batch_first: bool, batched: bool, dtype: torch.dtype, bias: bool
) -> None:
    """Catches axes exchanged, and a packed projection cut at the wrong rows."""
    theirs, ours = pair(batch_first=batch_first, dtype=dtype, bias=bias)
    assert_twins(theirs, ours, inputs(ours, kind, batched), **weights)


def masks(attn: str, pad: str, dtype: torch.dtype, batched: bool = True) -> dict[str, Tensor]:
    """Arguments for every way to say who may not attend; every query keeps a key."""
    hidden = torch.rand(N * H if batched else H, L, S) < 0.4
    hidden[..., 1] = False
    score = torch.randn(hidden.shape, dtype=dtype)
    padding = torch.arange(S) >= torch.tensor([[S], [S - 3]])
    padding_score = torch.where(padding, -torch.inf, torch.randn(N, S, dtype=dtype))
    if not batched:
        padding, padding_score = padding[1], padding_score[1]
    attn_masks = {
        "none": None,
        "bool": hidden[0],
        "float": score[0].masked_fill(hidden[0], -torch.inf).requires_grad_(),
        "bool3": hidden,
        "float3": score.requires_grad_(),
    }
    padding_masks = {"none": None, "bool": padding, "float": padding_score.requires_grad_()}
    chosen = {"attn_mask": attn_masks[attn], "key_padding_mask": padding_masks[pad]}
    return {name: mask for name, mask in chosen.items() if mask is not None}


# Mixing a bool with a float mask is deprecated in PyTorch, and works.
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("attn", ["none", "bool", "float", "bool3", "float3"])
@pytest.mark.parametrize("pad", ["none", "bool", "float"])
def test_masks(variant: dict[str, Any], weights: dict[str, Any], attn: str, pad: str) -> None:
    """Catches an inverted mask, masks that replace each other, and appended keys that are masked."""
    theirs, ours = pair(batch_first=True, dtype=torch.float64, **variant)
    assert_twins(theirs, ours, inputs(ours), **masks(attn, pad, torch.float64), **weights)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("attn", "pad"), [("bool3", "bool"), ("float3", "float"), ("float", "none")])
def test_masks_unbatched(weights: dict[str, Any], attn: str, pad: str) -> None:
    """Catches masks that are read with a batch axis they do not have."""
    theirs, ours = pair()
    options = {**masks(attn, pad, torch.float32, batched=False), **weights}
    assert_twins(theirs, ours, inputs(ours, batched=False), **options)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", [{}, {"add_zero_attn": True}], ids=str)
def test_is_causal_says_what_attn_mask_says(
    weights: dict[str, Any], padded: bool, variant: dict[str, Any]
) -> None:
    """Catches a hint that changes the result: the mask is its meaning, also for appended keys."""
    theirs, ours = pair(batch_first=True, **variant)
    causal = torch.ones(L, L).triu(1).bool()
    padding = torch.arange(L) >= torch.tensor([[L], [L - 2]]) if padded else None
    options: dict[str, Any] = {"attn_mask": causal, "key_padding_mask": padding, **weights}
    qkv = inputs(ours, "self")
    assert_twins(theirs, ours, qkv, **options)
    hinted, plain = ours(*qkv, **options, is_causal=True), ours(*qkv, **options)
    torch.testing.assert_close(hinted, plain)


def test_is_causal_spares_reading_the_mask(attention_calls: mock.Mock) -> None:
    """Catches a square mask that still reaches attention although the hint makes it needless."""
    _, ours = pair(batch_first=True)
    with mock.patch.object(multihead, "attention", wraps=multihead.attention) as spy:
        ours(
            *inputs(ours, "self"),
            attn_mask=torch.ones(L, L).triu(1).bool(),
            is_causal=True,
            need_weights=False,
        )
    assert spy.call_args.kwargs["causal"] is True
    assert spy.call_args.kwargs["mask"] is None


@pytest.mark.parametrize(
    ("attn", "pad"), [("bool", "bool"), ("bool", "float"), ("float", "bool"), ("none", "bool")]
)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_masks_are_not_expanded(attn: str, pad: str, attention_calls: mock.Mock) -> None:
    """Catches padding multiplied out to N x L x S before it reaches attention."""
    _, ours = pair(batch_first=True)
    ours(*inputs(ours), **masks(attn, pad, torch.float32), need_weights=False)
    for name in ("mask", "bias"):
        x = attention_calls.call_args.kwargs[name]
        assert x is None or x.numel() <= max(N * S, L * S)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_at_its_ends_is_pytorchs(weights: dict[str, Any], p: float) -> None:
    """Catches NaN from 1/(1 - p), and returned weights that are not the dropped ones."""
    theirs, ours = pair(dropout=p)
    assert_twins(theirs, ours, inputs(ours), **weights)
    assert_twins(theirs.eval(), ours.eval(), inputs(ours), **weights)


def test_returned_weights_are_those_that_made_the_output() -> None:
    """Catches weights that were dropped at other places, or for other heads or batch entries."""
    _, ours = pair(dropout=0.4, batch_first=True, dtype=torch.float64)
    q, k, v = inputs(ours)
    out, weights = ours(q, k, v, average_attn_weights=False)
    values = F.linear(v, *(x.chunk(3)[2] for x in (ours.in_proj_weight, ours.in_proj_bias)))
    mixed = weights @ values.unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(out, ours.out_proj(mixed.transpose(1, 2).flatten(2)))
    assert 0.2 < (weights == 0.0).double().mean() < 0.6
    torch.manual_seed(5)
    _, averaged = ours(q, k, v)
    torch.manual_seed(5)
    _, weights = ours(q, k, v, average_attn_weights=False)
    torch.testing.assert_close(averaged, weights.mean(1))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_query_without_keys_gives_zero_where_pytorch_gives_nan(weights: dict[str, Any]) -> None:
    """Catches NaN from fully padded rows, forward or backward."""
    theirs, ours = pair(batch_first=True)
    qkv = inputs(ours)
    padding = torch.tensor([[True] * S, [False] * S])
    if weights["need_weights"]:
        assert theirs(*qkv, key_padding_mask=padding, **weights)[0][0].isnan().all()
    out, seen = ours(*qkv, key_padding_mask=padding, **weights)
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(L, E))
    assert seen is None or not seen[0].any()
    total = out.sum() if seen is None else out.sum() + seen.square().sum()
    for g in torch.autograd.grad(total, [*qkv, *ours.parameters()]):
        assert g.isfinite().all()


def test_averaging_never_holds_every_heads_weights() -> None:
    """Catches heads x L x S memory, in forward or saved for backward."""
    layer = MultiheadAttention(64, 32, batch_first=True)
    x = torch.randn(1, 128, 64)
    one_head = 128 * 128
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        _, weights = layer(x, x, x)
    assert weights.requires_grad
    assert sum(n for n in saved if n >= one_head) <= 2 * one_head


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("way", ["built", "adopted"])
def test_inside_encoder_layers(
    padded: bool, training: bool, norm_first: bool, way: str, attention_calls: mock.Mock
) -> None:
    """Catches the encoder layer's fast path, which computes attention without asking us."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, norm_first=norm_first)
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    ours = copy.deepcopy(stock)
    for block in ours.layers:
        if way == "adopted":
            MultiheadAttention.adopt(block.self_attn)
        else:
            block.self_attn = MultiheadAttention(E, H, 0.0, batch_first=True).train(training)
    ours.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([[L], [L - 2]]) if padded else None
    causal = torch.ones(L, L).triu(1).bool()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for options in ({}, {"mask": causal}, {"mask": causal, "is_causal": True}):
                attention_calls.reset_mock()
                expected = stock(x, src_key_padding_mask=padding, **options)
                torch.testing.assert_close(ours(x, src_key_padding_mask=padding, **options), expected)
                assert attention_calls.call_count == 2


def test_inside_a_decoder_layer() -> None:
    """Catches cross-attention or the causal hint going wrong in the caller PyTorch ships."""
    torch.manual_seed(0)
    stock = nn.TransformerDecoderLayer(E, H, 32, 0.0)
    ours = copy.deepcopy(stock)
    MultiheadAttention.adopt(ours.self_attn)
    MultiheadAttention.adopt(ours.multihead_attn)
    x, memory = torch.randn(L, N, E), torch.randn(S, N, E)
    options = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(L), "tgt_is_causal": True}
    torch.testing.assert_close(ours(x, memory, **options), stock(x, memory, **options))


def test_adopting_keeps_the_object_and_refuses_others() -> None:
    """Catches an optimizer left with parameters that nobody uses, and subclasses robbed of their forward."""
    module = nn.MultiheadAttention(E, H).eval()
    before = dict(module.named_parameters())
    adopted = MultiheadAttention.adopt(module)
    assert adopted is module
    assert not adopted.training
    assert all(before[name] is p for name, p in adopted.named_parameters())
    with pytest.raises(TypeError, match="no subclass, got MultiheadAttention"):
        MultiheadAttention.adopt(adopted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"is_causal": True}, ValueError, "is_causal is a hint about attn_mask"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int)}, TypeError, "attn_mask must be bool"),
        ({"attn_mask": torch.zeros(S, L)}, ValueError, r"attn_mask must have shape \(5, 7\) or \(8, 5, 7\)"),
        ({"key_padding_mask": torch.zeros(S, N)}, ValueError, r"key_padding_mask must have shape \(2, 7\)"),
        ({"query": torch.zeros(N, L, E + 1)}, ValueError, "query must have 16 features"),
        ({"query": torch.zeros(L, E)}, ValueError, "key must have 16 features and 3 axes"),
        ({"value": torch.zeros(N, S + 1, E)}, ValueError, "value must have key's seqlen and batch"),
        ({"query": torch.zeros(N + 1, L, E)}, ValueError, "key must have query's batch size 3"),
    ],
    ids=str,
)
def test_wrong_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    _, ours = pair(batch_first=True)
    arguments = dict(zip(("query", "key", "value"), inputs(ours), strict=True))
    with pytest.raises(error, match=message):
        ours(**{**arguments, **change})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_with_the_way_out() -> None:
    """Catches advice that does not help: PyTorch's argument is no attribute that forward reads."""
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True).eval()
    MultiheadAttention.adopt(layer.self_attn)
    encoder, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([[L], [L - 2]])
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"enable_nested_tensor=False, or .* use_nested_tensor = False"):
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        out = encoder(x, src_key_padding_mask=padding)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), out)


def test_the_recipe_of_the_readme_serves_padded_encoders() -> None:
    """An encoder that turns padded batches into nested tensors on its fast path, which nobody else takes."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(stock)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    recipe = readme.partition("for module in model.modules():")[1:]
    loop = "".join(recipe).partition("\n\n")[0]
    exec(loop, {"model": ours, "torch": torch, "MultiheadAttention": MultiheadAttention})
    assert all(type(block.self_attn) is MultiheadAttention for block in ours.layers)
    x, padding = torch.randn(N, L, E), torch.arange(L) >= torch.tensor([[L], [2]])
    with torch.no_grad():
        expected, out = (model(x, src_key_padding_mask=padding) for model in (stock, ours))
    torch.testing.assert_close(out[~padding], expected[~padding])
