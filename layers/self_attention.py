"""Self-attention with one fused projection: the layer to take when a model is written from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.explain import explain
from ..kernels.functional import attention
from ..kernels.mask_algebra import Mask


class SelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention: x -> out_proj(attention(qkv_proj(x))).

    Every option of `attention` is either a trait of the layer and given here, or belongs to the batch
    and is given to `forward`.

    Args:
        embed_dim: Features of the input and the output.
        num_heads: Query heads.
        num_heads_kv: Heads of keys and values; a divisor of `num_heads`, 1 for multi-query attention.
            None = `num_heads`.
        head_dim: Features per head. None = `embed_dim // num_heads`.
        bias: Whether both projections have an additive bias.
        dropout: Probability of dropping an attention weight in training, `dropout_p` of `attention`.
        causal, window, softcap, scale, impl: As in `attention`.
        device, dtype: Of the parameters.

    Raises:
        ValueError: sizes that do not fit together.
        ValueError, TypeError: an option that `attention` would not take.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if min(embed_dim, num_heads, num_heads_kv) < 1:
            raise ValueError(
                "embed_dim, num_heads and num_heads_kv must be at least 1, "
                f"got {embed_dim}, {num_heads}, {num_heads_kv}"
            )
        if num_heads % num_heads_kv != 0:
            raise ValueError(f"num_heads must be a multiple of num_heads_kv {num_heads_kv}, got {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads != 0:
                raise ValueError(
                    f"embed_dim must be a multiple of num_heads {num_heads} unless head_dim is given, "
                    f"got {embed_dim}"
                )
            head_dim = embed_dim // num_heads
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        example = torch.empty(1, num_heads, 1, head_dim, device="meta")
        explain(  # refuses what `forward` would refuse, in the same words
            example,
            example,
            example,
            causal=causal,
            window=window,
            softcap=softcap,
            scale=scale,
            dropout_p=dropout,
            impl=impl,
        )
        super().__init__()
        self.embed_dim, self.head_dim = embed_dim, head_dim
        self.num_heads, self.num_heads_kv = num_heads, num_heads_kv
        self.dropout, self.causal, self.window = dropout, causal, window
        self.softcap, self.scale, self.impl = softcap, scale, impl
        self.qkv_proj = nn.Linear(
            embed_dim, (num_heads + 2 * num_heads_kv) * head_dim, bias, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | Mask | None = None,
        key_lengths: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(batch, seqlen, embed_dim) -> (batch, seqlen, embed_dim).

        mask (bool, True = may attend, or a mask object), key_lengths (batch,) and bias (float, added to the
        scores) as in `attention`; a row of `x` that may see nothing comes out as the bias of `out_proj`.
        """
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must have shape (batch, seqlen, {self.embed_dim}), got {tuple(x.shape)}")
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_heads_kv, self.num_heads_kv), dim=1)
        out = attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            mask=mask,
            key_lengths=key_lengths,
            bias=bias,
            softcap=self.softcap,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )
        assert isinstance(out, Tensor)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected

    def extra_repr(self) -> str:
        """The traits that the projections' shapes do not show, where they are not the defaults."""
        traits = {
            "dropout": (self.dropout, 0.0),
            "causal": (self.causal, False),
            "window": (self.window, None),
            "softcap": (self.softcap, None),
            "scale": (self.scale, None),
            "impl": (self.impl, None),
        }
        heads = f"{self.embed_dim}, num_heads={self.num_heads}, num_heads_kv={self.num_heads_kv}"
        changed = [f"{name}={value!r}" for name, (value, default) in traits.items() if value != default]
        return ", ".join([heads, f"head_dim={self.head_dim}", *changed])
