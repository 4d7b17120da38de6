"""Fused attention you can trust: one meaning on every path, every gradient, on any machine.

    from undivided import attention

    out = attention(q, k, v, causal=True)  # q, k, v: (batch, heads, seqlen, head_dim)

`attention` runs Triton kernels on a GPU and linear-memory PyTorch elsewhere; `explain` says which
and why. Importing touches no device, file or global setting and imports no triton.
"""

from .kernels.biases import ALiBi, RelativeBias
from .kernels.explain import Explanation, explain
from .kernels.functional import attention, attention_varlen, scaled_dot_product_attention
from .kernels.mask_algebra import Dense, Mask
from .kernels.masks import Causal, Documents, FirstKeys, PrefixLM, Window, from_predicate
from .kernels.merge import merge
from .kernels.spec import AttentionStats
from .kernels.weights import TopWeights, attention_weights

__version__ = "0.1.0"
__all__ = [
    "ALiBi",
    "AttentionStats",
    "Causal",
    "Dense",
    "Documents",
    "Explanation",
    "FirstKeys",
    "Mask",
    "PrefixLM",
    "RelativeBias",
    "TopWeights",
    "Window",
    "attention",
    "attention_varlen",
    "attention_weights",
    "explain",
    "from_predicate",
    "merge",
    "scaled_dot_product_attention",
]
