"""Hugging Face transformers (v5): the attention function and the mask function behind "undivided".

transformers calls the mask function once per forward pass and kind of layer, and the attention
function once per layer with what the mask function returned. Both are needed: a name without a mask
function gets no mask at all and silently attends to padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from ..kernels.functional import attention
from ..kernels.spec import AttentionOptions


def register(name: str = "undivided", function: Callable[..., tuple[Tensor, None]] | None = None) -> None:
    """Make `name` an attention implementation of every transformers model in this process.

    Then `model.set_attn_implementation("undivided")`, or `attn_implementation="undivided"` where a
    model is built. Prefer the former: a model with attention code of its own (Bloom, Falcon, ...)
    then says so and stays as it is, while some of them go silently wrong with the latter.

    name: must not contain "flash", "sdpa", "flex" or "/": transformers gives those a meaning.
    function: called in place of `attention_function`, with its signature.
    """
    reserved = [part for part in ("flash", "sdpa", "flex", "/", "|") if part in name]
    if reserved or not name:
        raise ValueError(f"name must not be empty nor contain {reserved}, got {name!r}")
    AttentionInterface.register(name, function or attention_function)
    AttentionMaskInterface.register(name, make_mask)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, by the contract of transformers' AttentionInterface.

    query: (batch, heads, seqlen_q, head_dim), key and value: (batch, heads_kv, seqlen_k, ...), most
    often transposed views. Returns ((batch, seqlen_q, heads, head_dim_v), None). For the rest see
    `translate`.
    """
    q, k, v, ours = translate(module, query, key, value, attention_mask, **options)
    out = attention(q, k, v, **ours)
    assert isinstance(out, Tensor)  # as no statistics were asked for
    return out.transpose(1, 2), None


def translate(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, AttentionOptions]:
    """q, k, v and the options of `undivided.attention`, from the arguments of a transformers layer.

    attention_mask: None; what `make_mask` makes; (batch, seqlen_k), validity of keys; or, taken
    literally, four axes, bool or float (added to the scores). s_aux: (heads,), attention sinks. The module
    is causal if `is_causal` says so, or, without it, if `module.is_causal` does. Any further keyword is the
    model's own business.

    Raises:
        NotImplementedError: the paged cache of continuous batching.
    """
    if others.get("cache") is not None:
        raise NotImplementedError("undivided: continuous batching (a paged cache) is not available yet")
    if others.get("output_attentions"):
        warnings.warn(
            "undivided never forms attention weights: output_attentions=True gives none, use 'eager'",
            stacklevel=3,
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mask, biases = None, [position_bias]
    if attention_mask is None:
        pass
    elif attention_mask.ndim == 2:
        mask = attention_mask.bool()[:, None, None]
    elif attention_mask.ndim == 3:
        seqlen_k, sliding_window, mask = _read(attention_mask, key.shape[2])
        key, value = key[:, :, :seqlen_k], value[:, :, :seqlen_k]
    else:
        causal, sliding_window = False, None
        if attention_mask.dtype == torch.bool:
            mask = attention_mask
        else:
            biases.append(attention_mask)
    given = tuple(bias[..., : key.shape[2]] for bias in biases if bias is not None)
    reach = None if sliding_window is None else sliding_window - 1
    options: AttentionOptions = {
        "causal": causal,
        "window": None if reach is None else (reach, 0 if causal else reach),
        "mask": mask,
        "bias": given or None,
        "softcap": softcap,
        "sinks": s_aux,
        "scale": scaling,
        "dropout_p": dropout,
    }
    return query, key, value, options


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """What a whole forward pass may see, without a seqlen_q x seqlen_k tensor wherever that is possible.

    Causal, window and bidirectional patterns are known to `attention_function`; what it has to be
    told is which keys are padding. Returns one of
        None                                  every key is valid
        (batch, window, seqlen) bool          validity of the first seqlen keys, there are no others; the
                                              middle axis is expanded: its size is the message
        (1, window, 0) bool                   every key is valid, within the window
        (batch, 1, q_length, kv_length) bool  element by element, literally

    Causal rows end at the last of the seqlen keys. The window travels with the mask because several
    models (Qwen2-MoE, PhiMoE, ...) ask for one here and then do not pass `sliding_window` to the
    attention function.

    Anything but a plain pattern (packed sequences, blocks, chunks, functions of the caller) is left to
    transformers' own dense mask; so is decoding on a static cache, where a dense mask is one row.
    """
    if attention_mask is not None and attention_mask.ndim == 3:
        return attention_mask  # `generate` makes the mask and the model is asked to make it again
    bidirectional = allow_is_bidirectional_skip is not None
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    plain = allow_is_bidirectional_skip if bidirectional else allow_is_causal_skip
    # A static cache counts its keys in a tensor: reading that would wait for the device.
    if plain and not use_vmap and not chunked and not isinstance(q_offset, Tensor):
        seqlen = q_offset + q_length - kv_offset  # keys up to the last query's own
        if not bidirectional:
            return _key_mask(batch_size, seqlen, kv_length, kv_offset, attention_mask, local_size, device)
        if local_size is None:
            return _key_mask(batch_size, kv_length, kv_length, kv_offset, attention_mask, None, device)
        if seqlen == kv_length:
            reach = local_size + 1  # transformers counts the query itself in causal windows only
            return _key_mask(batch_size, seqlen, kv_length, kv_offset, attention_mask, reach, device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
        **others,
    )


def _key_mask(
    batch_size: int,
    seqlen: int,
    kv_length: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    window: int | None,
    device: torch.device | str,
) -> Tensor | None:
    """The first three answers of `make_mask`: the first seqlen of kv_length keys, within a window."""
    valid = None if attention_mask is None else _validity(attention_mask, kv_offset, seqlen)
    window = seqlen if window is None else min(window, seqlen)
    if valid is None:
        if window == seqlen == kv_length:
            return None
        rows, cols = (1, 0) if seqlen == kv_length else (batch_size, seqlen)
        valid = torch.ones(rows, cols, dtype=torch.bool, device=device)
    return valid[:, None].expand(-1, window, -1)


def _validity(attention_mask: Tensor, first: int, seqlen: int) -> Tensor | None:
    """Which of the keys first ... first + seqlen - 1 are no padding, (batch, seqlen); None: all of them.

    Keys past the mask's end are padding, as transformers has it. Only a CPU's mask is looked into: a
    GPU would have to finish its work first, at every forward pass.
    """
    missing = max(0, first + seqlen - attention_mask.shape[1])
    valid = F.pad(attention_mask, (0, missing))[:, first : first + seqlen]
    if valid.device.type == "cpu" and not is_tracing(valid) and bool(valid.all()):
        return None
    return valid


def _read(mask: Tensor, seqlen_k: int) -> tuple[int, int | None, Tensor | None]:
    """(number of keys, window, mask with four axes) from a mask of three axes, see `make_mask`."""
    _, window, seqlen = mask.shape
    if seqlen == 0:
        return seqlen_k, window, None
    return seqlen, None if window == seqlen else window, mask[:, None, :1]
