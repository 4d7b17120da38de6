"""`torch.nn.MultiheadAttention` computed by this package: same constructor, call, parameters and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.functional import attention
from ..kernels.spec import AttentionOptions
from ..kernels.weights import attention_weights


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: equal seeds, equal parameters; state dicts load both ways.

    With `need_weights=False` nothing of size seqlen_q x seqlen_k is made. Differences from PyTorch's:

    - A query that may attend to no key gets attention 0, thus the bias of `out_proj`, and zero gradients;
      PyTorch's gives NaN with `need_weights=True` and in its inference fast path.
    - `is_causal` replaces `attn_mask` wherever its meaning is clear, that is with as many queries as keys
      and neither `add_bias_kv` nor `add_zero_attn`, also beside a padding mask and with `need_weights=True`.
    - Dropout draws from PyTorch's generator, but not the same elements as PyTorch's.
    - Nested tensors are refused. `nn.TransformerEncoder` makes them of padded batches without gradients:
      build it with `enable_nested_tensor=False`, or set its `use_nested_tensor = False`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.register_forward_pre_hook(_decline_fast_path)

    @classmethod
    def adopt(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """Turn PyTorch's layer, in place, into this one: same object, parameters, hooks and mode."""
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(
                f"module must be a torch.nn.MultiheadAttention and no subclass, got {type(module).__name__}"
            )
        module.__class__ = cls
        module.register_forward_pre_hook(_decline_fast_path)
        assert isinstance(module, cls)
        return module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, weights) as `torch.nn.MultiheadAttention.forward`, to which shapes and masks belong.

        L queries, S keys, N batch entries, H heads. query: (L, N, embed_dim), with `batch_first`
        (N, L, embed_dim), unbatched (L, embed_dim); key and value likewise with S, kdim, vdim.
        key_padding_mask: (N, S), unbatched (S,). attn_mask: (L, S) or (N * H, L, S). Both: bool with
        True = may NOT attend, or float and added to the scores. weights: (N, L, S), the mean over heads,
        or (N, H, L, S); without N if unbatched; after dropout, as PyTorch's; None if not needed.

        Raises:
            ValueError: a shape that does not fit, or `is_causal` without `attn_mask`.
            TypeError: a mask that is neither bool nor float, or a nested tensor.
        """
        self._check_inputs(query, key, value)
        q, k, v = self._project(query, key, value)
        options = self._options(q, k, attn_mask, key_padding_mask, is_causal, batched=query.dim() == 3)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

        weights = None
        if need_weights:
            if options["dropout_p"] > 0.0:  # weights and output must lose the same elements
                options["seed"] = torch.randint(2**63 - 1, (), device=q.device)
            out, lse, *_ = attention(q, k, v, want=("lse",), **options)
            assert lse is not None
            weights = attention_weights(q, k, lse, reduce="mean" if average_attn_weights else None, **options)
            weights = weights.to(torch.softmax(q.new_zeros(1), 0).dtype)  # autocast may want another than q's
        else:
            out = attention(q, k, v, **options)

        merged = out.transpose(1, 2).flatten(2)  # [N, L, embed_dim]
        if query.dim() == 2:
            merged = merged.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            merged = merged.transpose(0, 1)
        return F.linear(merged, self.out_proj.weight, self.out_proj.bias), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v as views (N, heads, seqlen, head_dim); inputs that are one object share one product."""
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
        elif query is key and key is value:
            parts = list(F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1))
        else:
            sizes = [1, 2] if key is value else [1, 1, 1]
            rows = [size * self.embed_dim for size in sizes]
            biases = [None] * len(rows) if bias is None else bias.split(rows)
            products = zip((query, key, value), self.in_proj_weight.split(rows), biases, sizes)
            parts = [part for x, w, b, size in products for part in F.linear(x, w, b).chunk(size, dim=-1)]
        return [self._split_heads(part) for part in parts]

    def _split_heads(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _append(self, x: Tensor, extra: Tensor) -> Tensor:
        """x: (N, heads, S, head_dim) with one more key or value, extra: (1, 1, embed_dim), for all N."""
        extra = extra.to(x.dtype).view(1, self.num_heads, 1, self.head_dim)
        return torch.cat([x, extra.expand(x.shape[0], -1, -1, -1)], dim=2)

    def _options(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        *,
        batched: bool,
    ) -> AttentionOptions:
        """PyTorch's masks in the terms of `attention`, without making a larger one than those given.

        A bool mask becomes `mask`, a float one `bias`. Of two bool masks the padding, which is small,
        becomes a bias of 0 and -inf; only two float masks have to be added.
        """
        batch, heads, seqlen_q, _ = q.shape
        seqlen_k = k.shape[2]
        extra = (self.bias_k is not None) + self.add_zero_attn
        if is_causal:
            if attn_mask is None:
                raise ValueError("is_causal is a hint about attn_mask, which must be given with it, got None")
            if seqlen_q == seqlen_k and not extra:
                attn_mask = None
            else:
                is_causal = False

        pad, attn = key_padding_mask, attn_mask
        if pad is not None:
            _check_mask("key_padding_mask", pad, [(batch, seqlen_k) if batched else (seqlen_k,)])
            pad = _more_keys(pad.reshape(batch, 1, 1, seqlen_k), extra)
        if attn is not None:
            _check_mask("attn_mask", attn, [(seqlen_q, seqlen_k), (batch * heads, seqlen_q, seqlen_k)])
            attn = _more_keys(attn if attn.dim() == 2 else attn.unflatten(0, (batch, heads)), extra)

        if pad is not None and attn is not None:
            if pad.dtype == torch.bool and attn.dtype == torch.bool:
                pad = torch.zeros_like(pad, dtype=q.dtype).masked_fill(pad, -torch.inf)
            elif pad.dtype != torch.bool and attn.dtype != torch.bool:
                attn, pad = attn + pad, None
        mask = bias = None
        for part in (pad, attn):
            if part is not None and part.dtype == torch.bool:
                mask = ~part
            elif part is not None:
                bias = part
        dropout_p = self.dropout if self.training else 0.0
        return {"causal": is_causal, "mask": mask, "bias": bias, "dropout_p": dropout_p}

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, features), x in zip(sizes.items(), (query, key, value)):
            if x.is_nested:
                raise TypeError(
                    f"{name} must be a dense tensor, got a nested one; build nn.TransformerEncoder with "
                    "enable_nested_tensor=False, or set its use_nested_tensor = False"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != features:
                raise ValueError(
                    f"{name} must have {features} features and 3 axes, or 2 unbatched, like query, "
                    f"got shape {tuple(x.shape)}"
                )
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(f"value must have key's seqlen and batch, got {value.shape} for {key.shape}")
        n = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[n] != query.shape[n]:
            raise ValueError(f"key must have query's batch size {query.shape[n]}, got {key.shape[n]}")


def _decline_fast_path(module: nn.Module, args: Any) -> None:
    """Forward pre-hook that does nothing: its presence keeps nn.TransformerEncoderLayer in inference from
    computing attention itself, past its submodules."""


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True = may not attend) or float (added), got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")


def _more_keys(mask: Tensor, extra: int) -> Tensor:
    """The mask with `extra` more keys, which everybody may attend to."""
    return F.pad(mask, (0, extra)) if extra else mask
