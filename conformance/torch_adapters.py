"""PyTorch's own attention as targets: each backend of scaled_dot_product_attention, and flex_attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.spec import DTYPES
from ..kernels.visibility import visible
from .cases import Problem
from .target import Attend, Capabilities, Target

BACKENDS = {
    "sdpa": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""By the name of the adapter, without "torch-"; sdpa leaves the choice to PyTorch."""

SDPA = Capabilities(
    dtypes=DTYPES,
    alignments=("top-left",),
    different_head_dims=True,
    empty=True,
    gqa=True,
    causal=True,
    mask=True,
    mask_and_causal=True,
    bias=True,
    bias_gradient=True,
    compiles=True,
)
"""What the one function takes. Its documentation forbids attn_mask with is_causal; some backends take them
all the same, so every backend is asked."""

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
MULTIPLES_OF_8 = tuple(range(8, 257, 8))

EXCEPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("math", "cpu"): {"dropout": True},
    ("math", "cuda"): {"dropout": True},
    ("flash", "cpu"): {"different_head_dims": False, "bias_gradient": False},
    ("flash", "cuda"): {
        "dtypes": SIXTEEN_BITS,
        "different_head_dims": False,
        "mask": False,
        "bias": False,
        "dropout": True,
        "deterministic": False,
    },
    ("efficient", "cuda"): {
        "dtypes": (*SIXTEEN_BITS, torch.float32),
        "head_dims": MULTIPLES_OF_8,
        "gqa": False,
        "dropout": True,
        "deterministic": False,
    },
    ("cudnn", "cuda"): {
        "dtypes": SIXTEEN_BITS,
        "head_dims": MULTIPLES_OF_8,
        "max_head_dim": 128,
        "bias_gradient": False,
        "dropout": True,
        "deterministic": False,
    },
    ("sdpa", "cuda"): {"deterministic": False},
}
"""What a backend says, by documentation or warning, that it does not take, or takes besides."""

CUDNN_LARGEST_HEAD_DIM = 256
"""Where PyTorch says that it is taken: on Hopper GPUs with cuDNN 9.10 (its sdp_utils.cpp)."""


def sdpa(name: str, device: torch.device) -> Target:
    """`torch.nn.functional.scaled_dot_product_attention`, held to one backend."""
    backend = BACKENDS[name]
    if name in ("efficient", "cudnn") and device.type != "cuda":
        raise ValueError(f"torch-{name} runs on a CUDA device only, not on {device}")

    def attend(problem: Problem) -> tuple[Tensor, None]:
        q, k, v, options = problem.q, problem.k, problem.v, problem.options
        with _only(backend), _seeded(problem):
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_attn_mask(problem),
                is_causal=options.get("causal", False),
                dropout_p=options.get("dropout_p", 0.0),
                scale=options.get("scale"),
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out, None

    found = claims(name, device.type)
    if name == "cudnn" and _cudnn_takes(CUDNN_LARGEST_HEAD_DIM, device):
        found = replace(found, max_head_dim=CUDNN_LARGEST_HEAD_DIM)
    return Target(f"torch-{name}", attend, found, "held to what scaled_dot_product_attention takes")


def claims(name: str, device_type: str) -> Capabilities:
    """What a backend takes on every device of a type; `sdpa` asks the one that is here for more."""
    return replace(SDPA, **EXCEPTIONS.get((name, device_type), {}))


def _cudnn_takes(head_dim: int, device: torch.device) -> bool:
    """What PyTorch says; without a GPU, no."""
    if not torch.cuda.is_available():
        return False
    q = torch.empty(1, 1, 64, head_dim, dtype=torch.float16, device=device)
    return can_use_cudnn_attention(SDPAParams(q, q, q, None, 0.0, False, False))


def flex(device: torch.device) -> Target:
    """`flex_attention`, not compiled: the formula written out, forward only on a CPU."""
    return Target("torch-flex", _flex(_flex_attention()), _flex_claims(device), _FLEX_NOTE)


def flex_compiled(device: torch.device) -> Target:
    """`flex_attention` under torch.compile. On a CPU without lse and gradients."""
    claims = replace(
        _flex_claims(device),
        dtypes=(*SIXTEEN_BITS, torch.float32),
        head_dims=(16, 32, 40, 64, 80, 128, 192),
        lse=device.type != "cpu",
    )
    compiled = torch.compile(_flex_attention(), dynamic=False)

    def attend(problem: Problem) -> tuple[Tensor, Tensor | None]:
        torch.compiler.reset()  # every case is another kernel, and PyTorch gives up after eight of them
        return _flex(compiled, claims.lse)(problem)

    note = f"{_FLEX_NOTE}; compiles a kernel for every question, which takes a while"
    return Target("torch-flex-compiled", attend, claims, note)


_FLEX_NOTE = "masks, lengths, windows and biases become functions that look them up"


def _flex_claims(device: torch.device) -> Capabilities:
    on_gpu = device.type == "cuda"
    return replace(
        SDPA,
        alignments=("bottom-right", "top-left"),
        backward=on_gpu,
        window=True,
        key_lengths=True,
        any_bias_dtype=True,
        bias_gradient=False,
        softcap=True,
        lse=True,
        lse_gradient=on_gpu,
        compiles=False,
    )


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def _flex(attention: Callable[..., Any], lse: bool = True) -> Attend:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    def attend(problem: Problem) -> tuple[Tensor, Tensor | None]:
        inputs, spec = problem.prepared()
        q, k, v, bias = *inputs[:3], inputs.bias
        if bias is not None:  # score.dtype, where the function is traced, is not that of the score
            bias = bias.to(torch.promote_types(q.dtype, torch.float32))
        seen = visible(inputs, spec)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if spec.softcap is not None:
                score = spec.softcap * torch.tanh(score / spec.softcap)
            return score if bias is None else score + _at(bias, b, h, i, j)

        block_mask = None
        if seen is not None:
            sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
            block_mask = create_block_mask(lambda b, h, i, j: _at(seen, b, h, i, j), *sizes, device=q.device)
        answer = attention(
            q,
            k,
            v,
            score_mod=None if spec.softcap is None and bias is None else score_mod,
            block_mask=block_mask,
            scale=spec.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True) if lse else None,
        )
        return (answer[0], answer[1].lse) if lse else (answer, None)

    return attend


def _at(x: Tensor, *index: Tensor) -> Tensor:
    """The element that broadcasting would put there."""
    last = index[len(index) - x.ndim :]
    return x[tuple(i if size > 1 else torch.zeros_like(i) for i, size in zip(last, x.shape))]


def _attn_mask(problem: Problem) -> Tensor | None:
    """PyTorch has one argument for both: a mask that is True where one may attend, a bias that is added."""
    mask, bias = problem.options.get("mask"), problem.options.get("bias")
    assert bias is None or isinstance(bias, Tensor), "no ALiBi is claimed"
    assert mask is None or isinstance(mask, Tensor), "no mask object is claimed"
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -torch.inf)


def _only(backend: SDPBackend | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


@contextlib.contextmanager
def _seeded(problem: Problem) -> Iterator[None]:
    """PyTorch draws dropout from its generator; an int seed becomes the generator's, for this call."""
    seed = problem.options.get("seed")
    if not problem.options.get("dropout_p") or not isinstance(seed, int):
        yield
        return
    device = problem.q.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
