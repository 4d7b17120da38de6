"""Hugging Face models with our attention give what they give with their own eager attention.

Models are tiny, random and built from their configurations: nothing is downloaded.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers", reason="the optional dependency undivided[hf] is not installed")

import transformers
from transformers import masking_utils

from undivided.interop.transformers import attention_function, make_mask, register

ROOT = Path(__file__).parents[1]
VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral with a window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4),
    "gemma2 with softcap and alternating windows": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0
    ),
    "qwen2-moe, which does not pass its window on": lambda: transformers.Qwen2MoeConfig(
        **GROUPED,
        sliding_window=4,
        use_sliding_window=True,
        max_window_layers=0,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "gpt-oss with sinks and alternating windows": lambda: transformers.GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
    ),
}
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**SMALL),
    "modernbert with windows on both sides": lambda: transformers.ModernBertConfig(
        **SMALL, local_attention=6, global_attn_every_n_layers=2, pad_token_id=0
    ),
}


class Counted:
    """The attention function, counting its calls: a model that bypasses it would pass every comparison."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        self.calls += 1
        return attention_function(*args, **options)


@pytest.fixture
def counted() -> Iterator[Counted]:
    function = Counted()
    register("undivided", function)
    yield function
    register()


def build(kind: Any, config: Any) -> Any:
    torch.manual_seed(1)
    model = kind.from_config(config, attn_implementation="eager")
    return model.eval()


def padding(side: str, batch: int, length: int) -> Tensor | None:
    """(batch, length) of ones and zeros: row b lacks 2·b tokens on that side."""
    if side == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return mask if side == "left" else mask.flip(1)


def run(model: Any, implementation: str, output: str, inputs: dict[str, Any], valid: Tensor | None) -> Any:
    """Output at the valid tokens, and the gradient of every parameter from a fixed random cotangent."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(**inputs)[output]
    if valid is not None:
        out = out[valid.bool()]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * cotangent).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients


def assert_same(model: Any, counted: Counted, output: str, inputs: dict[str, Any], valid: Any = None) -> None:
    expected, expected_gradients = run(model, "eager", output, inputs, valid)
    assert counted.calls == 0
    out, gradients = run(model, "undivided", output, inputs, valid)
    assert counted.calls > 0, "the model bypasses the attention function"
    torch.testing.assert_close(out, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        # Sums over all tokens cancel: judge an entry by the scale of its parameter's gradient.
        scale = expected_gradients[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(gradient / scale, expected_gradients[name] / scale, msg=name)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_equals_eager(name: str, side: str, counted: Counted) -> None:
    """Logits and gradients; catches a lost padding mask, a window off by one, a wrong group of heads."""
    model = build(transformers.AutoModelForCausalLM, DECODERS[name]())
    mask = padding(side, 3, 11)
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (3, 11)), "attention_mask": mask}
    assert_same(model, counted, "logits", inputs, mask)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_equals_eager(name: str, side: str, counted: Counted) -> None:
    """Catches causal attention in an encoder (the interface's default) and one-sided windows."""
    model = build(transformers.AutoModel, ENCODERS[name]())
    mask = padding(side, 3, 11)
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (3, 11)), "attention_mask": mask}
    assert_same(model, counted, "last_hidden_state", inputs, mask)


def test_vision_transformer_equals_eager(counted: Counted) -> None:
    """A model that makes no mask and passes no is_causal."""
    shape = {name: SMALL[name] for name in SMALL if name != "vocab_size"}
    model = build(transformers.AutoModel, transformers.ViTConfig(**shape, image_size=12, patch_size=4))
    assert_same(model, counted, "last_hidden_state", {"pixel_values": torch.randn(2, 3, 12, 12)})


@pytest.mark.parametrize("side", ["none", "right"])
def test_encoder_decoder_with_position_bias_equals_eager(side: str, counted: Counted) -> None:
    """T5: learned bias per head, scale 1, cross attention with other lengths; dbias is compared too."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = build(transformers.AutoModelForSeq2SeqLM, config)
    inputs = {
        "input_ids": torch.randint(1, VOCABULARY, (3, 9)),
        "attention_mask": padding(side, 3, 9),
        "decoder_input_ids": torch.randint(1, VOCABULARY, (3, 5)),
    }
    assert_same(model, counted, "logits", inputs)


def test_float_mask_is_added_to_the_scores(counted: Counted) -> None:
    """Swin hands its relative position bias over as a float mask with four axes."""
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    model = build(transformers.AutoModel, config)
    assert_same(model, counted, "last_hidden_state", {"pixel_values": torch.randn(2, 3, 16, 16)})


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_token_for_token(name: str, cache: str, counted: Counted) -> None:
    """Prefill and decode with left padding; catches keys of an unfilled static cache being attended."""
    model = build(transformers.AutoModelForCausalLM, DECODERS[name]())
    tokens = {
        "input_ids": torch.randint(1, VOCABULARY, (3, 7)),
        "attention_mask": padding("left", 3, 7),
    }
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**tokens, **options, cache_implementation=cache)
    model.set_attn_implementation("undivided")
    out = model.generate(**tokens, **options, cache_implementation=cache)
    assert counted.calls == 9 * 2
    assert torch.equal(out, expected)


def test_packed_sequences_stay_apart(counted: Counted) -> None:
    """Two sequences in one row, told apart by position_ids alone."""
    model = build(transformers.AutoModelForCausalLM, DECODERS["llama"]())
    inputs = {
        "input_ids": torch.randint(1, VOCABULARY, (1, 9)),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
        "use_cache": False,
    }
    assert_same(model, counted, "logits", inputs)


MASKS: dict[str, Callable[..., Any]] = {
    "causal": masking_utils.create_causal_mask,
    "window": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
    "bidirectional": masking_utils.create_bidirectional_mask,
    "bidirectional window": masking_utils.create_bidirectional_sliding_window_mask,
}


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(list(MASKS)),
    cache=st.sampled_from(["none", "dynamic", "static"]),
    past=st.integers(0, 7),
    length=st.integers(1, 8),
    window=st.integers(1, 10),
    pad=st.sampled_from(["none", "left", "right", "random"]),
    extra=st.sampled_from(["none", "packed", "blocks"]),
    batch=st.integers(1, 3),
    forgets_window=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_mask_and_attention_together_equal_the_dense_mask(
    kind: str,
    cache: str,
    past: int,
    length: int,
    window: int,
    pad: str,
    extra: str,
    batch: int,
    forgets_window: bool,
    seed: int,
) -> None:
    """What the mask function makes, read by the attention function, is transformers' dense mask.

    Real caches are filled and asked for their lengths, so that offsets are the ones models see.
    """
    register()
    random = torch.Generator().manual_seed(seed)
    causal = not kind.startswith("bidirectional")
    config = transformers.LlamaConfig(
        **SMALL, sliding_window=window, attention_chunk_size=window + 100 * (kind == "window")
    )
    config.layer_types = ["sliding_attention" if "window" in kind else "full_attention"] * 2
    if not causal:
        cache, past = "none", 0
    past = 0 if cache == "none" else past
    assume(window > 1 or cache == "none")  # transformers' own sliding cache keeps all keys for a window of 1
    filled = make_cache(config, cache, batch, past)
    embeddings = torch.zeros(batch, length, 8)
    attention_mask = random_padding(pad, batch, past + length, random)
    options: dict[str, Any] = {"past_key_values": filled}
    if causal and extra == "packed" and cache == "none":
        attention_mask = None
        options["position_ids"] = (torch.arange(length) % 3)[None].expand(batch, -1)
    if causal and extra == "blocks":
        options["block_sequence_ids"] = (
            torch.arange(past + length).div(3, rounding_mode="floor").expand(batch, -1)
        )
    masks = {}
    for implementation in ("eager", "undivided"):
        config._attn_implementation = implementation
        masks[implementation] = MASKS[kind](config, embeddings, attention_mask, **options)

    q = torch.randn(batch, 2, length, 8, generator=random)
    new = torch.randn(2, batch, 1, length, 8, generator=random)
    k, v = filled.update(new[0], new[1], 0) if filled is not None else new
    scores = q @ k.transpose(-1, -2) + (0.0 if masks["eager"] is None else masks["eager"])
    alive = (scores > -1e30).any(-1, keepdim=True)
    expected = torch.where(alive, scores.softmax(-1) @ v, 0.0).transpose(1, 2)
    kwargs = {"sliding_window": window + (not causal)} if "window" in kind and not forgets_window else {}
    module = SimpleNamespace(is_causal=causal)
    out, _ = attention_function(module, q, k, v, masks["undivided"], scaling=1.0, **kwargs)
    torch.testing.assert_close(out, expected)


def make_cache(config: Any, kind: str, batch: int, past: int) -> Any:
    """A cache of one key head that has seen `past` tokens, or None."""
    if kind == "none":
        return None
    cache = (
        transformers.DynamicCache(config=config)
        if kind == "dynamic"
        else transformers.StaticCache(config=config, max_cache_len=20)
    )
    if past:
        for layer in range(2):
            cache.update(torch.randn(batch, 1, past, 8), torch.randn(batch, 1, past, 8), layer)
    return cache


def random_padding(kind: str, batch: int, length: int, random: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    column = torch.arange(length)
    cut = torch.randint(0, length + 1, (batch, 1), generator=random)
    if kind == "random":
        return torch.rand(batch, length, generator=random) > 0.4
    return column >= cut if kind == "left" else column < cut


@pytest.mark.parametrize("window", [None, 4])
def test_long_masks_stay_small(window: int | None) -> None:
    """A padded batch must not cost a seqlen x seqlen mask, with a window neither."""
    mask = make_mask(2, 4096, 4096, attention_mask=padding("left", 2, 4096).bool(), local_size=window)
    assert mask is not None
    assert mask.untyped_storage().nbytes() <= 2 * 4096


def test_a_full_batch_needs_no_mask() -> None:
    assert make_mask(2, 5, 5, attention_mask=torch.ones(2, 5, dtype=torch.bool)) is None


def test_making_a_mask_does_not_wait_for_the_device() -> None:
    """Asking a GPU's tensor for a truth value waits for all its work; a meta tensor has none to give."""
    mask = make_mask(2, 5, 5, attention_mask=torch.ones(2, 5, dtype=torch.bool, device="meta"), device="meta")
    assert mask is not None
    assert mask.shape == (2, 5, 5)


def test_is_causal_of_the_call_wins_over_the_module() -> None:
    """CLIP's text model passes is_causal=True although its module says False."""
    q, k, v = torch.randn(3, 1, 2, 5, 8)[:, :, None].expand(3, 1, 1, 2, 5, 8).flatten(1, 2)
    module = SimpleNamespace(is_causal=False)
    out, _ = attention_function(module, q, k, v, None, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_output_is_laid_out_for_the_next_reshape() -> None:
    """Models reshape (batch, seqlen, heads, head_dim) to (batch, seqlen, -1): that must not copy."""
    q, k, v = (torch.randn(2, 5, 3, 8).transpose(1, 2) for _ in range(3))
    out, _ = attention_function(SimpleNamespace(is_causal=False), q, k, v, None)
    assert out.shape == (2, 5, 3, 8)
    assert out.is_contiguous()


def test_dropout_is_applied(counted: Counted) -> None:
    """Training passes the probability: at 1 nothing of the values may be left."""
    q = torch.randn(1, 2, 5, 8)
    out, _ = attention_function(SimpleNamespace(is_causal=False), q, q, q, None, dropout=1.0)
    assert torch.equal(out, torch.zeros_like(out))


def test_what_is_not_available_is_refused() -> None:
    """Ignoring a paged cache would give plausible wrong numbers."""
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=r"undivided: .* not available"):
        attention_function(SimpleNamespace(is_causal=True), q, q, q, None, cache=torch.zeros(2))


def test_asking_for_attention_weights_warns() -> None:
    """transformers would hand the caller an empty tuple without a word."""
    q = torch.randn(1, 2, 5, 8)
    with pytest.warns(UserWarning, match="output_attentions"):
        attention_function(SimpleNamespace(is_causal=True), q, q, q, None, output_attentions=True)


@pytest.mark.parametrize("name", ["", "my-flash", "sdpa2", "org/name", "paged|undivided"])
def test_names_with_a_meaning_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must not"):
        register(name)


def test_importing_undivided_does_not_import_transformers_and_works_from_the_root() -> None:
    """transformers probes for a package called `kernels`, which in the root is a folder of ours."""
    script = (
        "import sys, undivided, undivided.interop; assert 'transformers' not in sys.modules;"
        "from undivided.interop.transformers import register; register();"
        "from transformers import BertConfig, BertModel;"
        "model = BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1,"
        " intermediate_size=8, vocab_size=8)); model.set_attn_implementation('undivided');"
        "print(model.config._attn_implementation)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "undivided", done.stderr
