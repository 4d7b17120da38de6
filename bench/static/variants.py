"""Which calls the lane compiles: the real launchers run on tensors without data, under an absent GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels import spec as contract
from ...kernels.biases import ALiBi
from ...kernels.options import make_spec
from ...kernels.triton import attention_backward, attention_forward
from ...kernels.validation import make_inputs
from . import hopper
from .absent_gpu import absent_gpu
from .report import Row, Variant, figures, kernel_name, root_cause
from .targets import TARGETS

BATCH, HEADS_Q, HEADS_KV, SEQLEN = 2, 8, 2, 2048


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "window": lambda: {"window": (512, 0)},
    "lengths": lambda: {"key_lengths": _tensor(BATCH, dtype=torch.int32)},
    "mask": lambda: {"mask": _tensor(BATCH, 1, SEQLEN, SEQLEN, dtype=torch.bool)},
    "bias": lambda: {"bias": _tensor(1, HEADS_Q, SEQLEN, SEQLEN, dtype=torch.bfloat16)},
    "alibi": lambda: {"bias": ALiBi(_tensor(HEADS_Q, dtype=torch.float32))},
    "softcap": lambda: {"softcap": 30.0},
    "precise": lambda: {"precise": True},
    "dropout": lambda: {"dropout_p": 0.1},
    "all": lambda: {
        "causal": True,
        "key_lengths": _tensor(BATCH, dtype=torch.int32),
        "mask": _tensor(BATCH, 1, 1, SEQLEN, dtype=torch.bool),
        "bias": (
            _tensor(1, HEADS_Q, SEQLEN, SEQLEN, dtype=torch.float32),
            ALiBi(_tensor(HEADS_Q, dtype=torch.float32)),
        ),
        "softcap": 30.0,
        "sinks": _tensor(HEADS_Q, dtype=torch.float32),
        "dropout_p": 0.1,
    },
}


# Who sees whom, as mask objects and packed calls say it: tensors of `Inputs`.
VISIBLE: dict[str, Callable[[], dict[str, Tensor]]] = {
    "documents": lambda: dict.fromkeys(("ranges", "key_ranges"), _tensor(1, 2, SEQLEN, dtype=torch.int32)),
    "streaming": lambda: dict.fromkeys(("ranges", "key_ranges"), _tensor(1, 4, SEQLEN, dtype=torch.int32)),
    "tiles": lambda: {
        "tiles": _tensor(1, 1, SEQLEN // 128, SEQLEN // 128, dtype=torch.int32),
        "bits": _tensor(16, 128, 4, dtype=torch.int32),
        "visits_q": _tensor(1, 1, SEQLEN // 128, SEQLEN // 128 + 2, dtype=torch.int32),
        "visits_k": _tensor(1, 1, SEQLEN // 128, SEQLEN // 128 + 2, dtype=torch.int32),
    },
    "packed": lambda: {
        "spans_q": _tensor(16, 2, dtype=torch.int32),
        "spans_k": _tensor(16, 2, dtype=torch.int32),
    },
}


def full() -> list[tuple[str, Variant]]:
    """Everything that ships, on every architecture: each option, head dimension and dtype."""
    cases = [
        *itertools.product((64, 128), ("bfloat16",), (*OPTIONS, *VISIBLE)),
        *itertools.product((32, 256), ("bfloat16",), ("plain", "all")),
        *itertools.product((64, 128), ("float16",), ("plain",)),
        *itertools.product((64, 128), ("float32",), ("plain", "all")),
    ]
    return [*((name, Variant(*case)) for name in TARGETS for case in cases), *hopper.full()]


def sample() -> list[tuple[str, Variant]]:
    """What a change is checked with: the plain loops wherever a gate looks, and each option once."""
    plain = [Variant(head_dim, "bfloat16", "plain") for head_dim in (64, 128)]
    options = [Variant(128, "bfloat16", name) for name in (*OPTIONS, *VISIBLE) if name != "plain"]
    return [
        *(("sm_90", variant) for variant in (*plain, *options)),
        *(("sm_80", variant) for variant in plain),
        ("sm_90", Variant(64, "float32", "plain")),
        ("sm_100", plain[1]),
        ("sm_120", plain[1]),
        ("gfx942", plain[1]),
        *hopper.sample(),
    ]


def compile_variant(architecture: str, variant: Variant) -> list[Row]:
    """Compile the kernels of a forward and a backward; one row each, and one for an error."""
    if variant.implementation == "gluon":
        return [hopper.compile_launch(launch, variant) for launch in hopper.launches(variant)]
    return compiled(architecture, variant, lambda: call(variant))


def compiled(architecture: str, variant: Variant, run: Callable[[], object], name: str = "") -> list[Row]:
    """A row for each kernel that `run` launches, and one, under `name` if there is one, for its error."""
    target = TARGETS[architecture]
    error = None
    with absent_gpu(target) as launches:
        try:
            run()
        except Exception as reason:  # whatever the compiler raises is what the row reports
            error = root_cause(reason)
    kernels = [launch.kernel for launch in launches]
    rows = [Row(architecture, kernel_name(x), variant, figures(x, target)) for x in kernels]
    if error is not None:
        rows.append(Row(architecture, name or f"after {len(rows)} kernels", variant, None, error))
    return rows


def call(variant: Variant) -> None:
    """Forward and backward as `ops` calls them, on tensors without data."""
    dtype = getattr(torch, variant.dtype)
    q, dout = (_tensor(BATCH, HEADS_Q, SEQLEN, variant.head_dim, dtype=dtype) for _ in range(2))
    k, v = (_tensor(BATCH, HEADS_KV, SEQLEN, variant.head_dim, dtype=dtype) for _ in range(2))
    options: contract.AttentionOptions = {**contract.DEFAULTS, **OPTIONS.get(variant.options, dict)()}  # type: ignore[typeddict-item]
    inputs = make_inputs(q, k, v, options)._replace(**VISIBLE.get(variant.options, dict)())
    if inputs.spans_q is not None:
        inputs = inputs._replace(**{x: getattr(inputs, x)[:1] for x in ("q", "k", "v")})
        dout = dout[:1]
    spec = make_spec(variant.head_dim, options, top_left=False, tf32=False)
    out, lse, _ = attention_forward(inputs, spec)
    needs = contract.Needs(*(x is not None for x in inputs[: contract.N_GRADIENTS]))
    attention_backward(dout, None, out, lse, inputs, spec, needs)
