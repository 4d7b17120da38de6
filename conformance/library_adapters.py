"""Attention out of other packages as targets: transformers, flash-attn 2, 3 and 4, xFormers.

None of them is needed; a maker imports its package and says so if it is not there.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..kernels.visibility import visible
from .cases import Problem
from .target import Capabilities, Target

SIXTEEN_BITS = (torch.float16, torch.bfloat16)

STAND_IN = "our call of it was tested with a stand-in of the same signature, not with the package"


def _flash_claims(**differing: Any) -> Capabilities:
    return Capabilities(
        dtypes=SIXTEEN_BITS,
        gqa=True,
        causal=True,
        window=True,
        softcap=True,
        lse=True,
        deterministic=False,
        **differing,
    )


CLAIMS = {
    "transformers-eager": Capabilities(
        alignments=("bottom-right", "top-left"),
        different_head_dims=True,
        causal=True,
        window=True,
        mask=True,
        mask_and_causal=True,
        key_lengths=True,
        bias=True,
        bias_gradient=True,
        gqa=True,
        compiles=True,
    ),
    "flash-attn2": _flash_claims(different_head_dims=False, lse_gradient=False),
    "flash-attn3": _flash_claims(
        different_head_dims=False, lse_gradient=False, head_dims=tuple(range(8, 257, 8))
    ),
    "flash-attn4": _flash_claims(
        different_head_dims=False, lse_gradient=True, head_dims=tuple(range(8, 129, 8))
    ),
    "xformers": Capabilities(
        different_head_dims=True,
        causal=True,
        window=True,
        mask=True,
        mask_and_causal=True,
        bias=True,
        bias_gradient=True,
        deterministic=False,
    ),
}
"""By the name of the adapter."""


def transformers_eager(device: torch.device) -> Target:
    """The eager attention of transformers' Llama, with the additive mask that transformers makes."""
    eager = _import("transformers-eager", "transformers.models.llama.modeling_llama").eager_attention_forward

    def attend(problem: Problem) -> tuple[Tensor, None]:
        inputs, spec = problem.prepared()
        module = SimpleNamespace(num_key_value_groups=inputs.q.shape[1] // inputs.k.shape[1], training=True)
        mask = _additive(problem, torch.finfo(inputs.q.dtype).min)
        out, _ = eager(module, *inputs[:3], mask, scaling=spec.scale)
        return out.transpose(1, 2), None

    return Target(
        "transformers-eager",
        attend,
        CLAIMS["transformers-eager"],
        "Llama's; hidden scores get the dtype's minimum",
    )


def flash_attn2(device: torch.device) -> Target:
    """flash-attn 2.8: `flash_attn.flash_attn_func`."""
    attention = _import("flash-attn2", "flash_attn").flash_attn_func

    def attend(problem: Problem) -> tuple[Tensor, Tensor]:
        out, lse, _ = attention(
            *_seqlen_first(problem), **_flash_options(problem, unbounded=-1), return_attn_probs=True
        )
        return out.transpose(1, 2), lse

    return Target("flash-attn2", attend, CLAIMS["flash-attn2"], STAND_IN)


def flash_attn3(device: torch.device) -> Target:
    """flash-attn 3: `flash_attn_interface.flash_attn_func`."""
    attention = _import("flash-attn3", "flash_attn_interface").flash_attn_func

    def attend(problem: Problem) -> tuple[Tensor, Tensor]:
        out, lse = attention(
            *_seqlen_first(problem), **_flash_options(problem, unbounded=-1), return_attn_probs=True
        )
        return out.transpose(1, 2), lse

    return Target("flash-attn3", attend, CLAIMS["flash-attn3"], STAND_IN)


def flash_attn4(device: torch.device) -> Target:
    """flash-attn 4, in CuTe: `flash_attn.cute.flash_attn_func`."""
    attention = _import("flash-attn4", "flash_attn.cute").flash_attn_func

    def attend(problem: Problem) -> tuple[Tensor, Tensor]:
        out, lse = attention(
            *_seqlen_first(problem), **_flash_options(problem, unbounded=None), return_lse=True
        )
        return out.transpose(1, 2), lse

    return Target("flash-attn4", attend, CLAIMS["flash-attn4"], STAND_IN)


def xformers(device: torch.device) -> Target:
    """`xformers.ops.memory_efficient_attention`."""
    ops = _import("xformers", "xformers.ops")
    biases = _import("xformers", "xformers.ops.fmha.attn_bias")

    def attn_bias(problem: Problem) -> object:
        inputs, spec = problem.prepared()
        if inputs.bias is not None or inputs.mask is not None:
            batch, heads, seqlen_q, _ = problem.q.shape
            bias = _additive(problem, -torch.inf)
            return None if bias is None else bias.expand(batch, heads, seqlen_q, problem.k.shape[2])
        if spec.left is None and spec.right is None:
            return None
        if spec.left is None and spec.right == 0:
            return biases.LowerTriangularFromBottomRightMask()
        longest = problem.q.shape[2] + problem.k.shape[2]
        sides = (longest if side is None else side for side in (spec.left, spec.right))
        return biases.LocalAttentionFromBottomRightMask(*sides)

    def attend(problem: Problem) -> tuple[Tensor, None]:
        out = ops.memory_efficient_attention(
            *_seqlen_first(problem), attn_bias(problem), scale=problem.options.get("scale")
        )
        return out.transpose(1, 2), None

    return Target("xformers", attend, CLAIMS["xformers"], f"a mask becomes a bias of full shape; {STAND_IN}")


def _import(adapter: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{adapter} needs {module}, which cannot be imported: {error}") from error


def _seqlen_first(problem: Problem) -> tuple[Tensor, ...]:
    """q, k, v as (batch, seqlen, heads, head_dim)."""
    return tuple(x.transpose(1, 2) for x in problem[:3])


def _flash_options(problem: Problem, unbounded: int | None) -> dict[str, object]:
    """What the generations of flash_attn_func have in common."""
    options = problem.options
    left, right = options.get("window") or (None, None)
    return {
        "softmax_scale": options.get("scale"),
        "causal": options.get("causal", False),
        "window_size": tuple(unbounded if side is None else side for side in (left, right)),
        "softcap": options.get("softcap") or 0.0,
    }


def _additive(problem: Problem, hidden: float) -> Tensor | None:
    """Everything that hides a key, and the bias, as numbers to add to the scores."""
    inputs, spec = problem.prepared()
    seen, bias = visible(inputs, spec), inputs.bias
    if seen is None:
        return bias
    return torch.where(seen, 0.0 if bias is None else bias, hidden).to(inputs.q.dtype)
