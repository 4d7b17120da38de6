"""Attention as `nn.Module`: projections around `kernels`, and no knowledge of how it is computed."""

from .multihead import MultiheadAttention
from .self_attention import SelfAttention

__all__ = ["MultiheadAttention", "SelfAttention"]
