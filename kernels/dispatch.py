"""Who computes a call: why each implementation can or cannot, the choice, and the way to it."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Collection

import torch

from . import hopper, ops, reference
from .sinks import lse_of_empty_rows
from .spec import IMPLEMENTATIONS, AttentionSpec, AttentionStats, Inputs, wide_dtype
from .statistics import entropy_and_key_mass
from .tracing import constant_when_traced

MAX_HEAD_DIM = 256
DEFAULT_IMPL = os.environ.get("UNDIVIDED_IMPL") or "auto"


def unsupported_reasons(impl: str, inputs: Inputs, spec: AttentionSpec) -> list[str]:
    """Why `impl` cannot take the call; empty if it can."""
    if impl == "gluon":
        return hopper.unsupported_reasons(inputs, spec)
    if impl != "triton":
        return []
    q, v = inputs.q, inputs.v
    reasons = list(_triton_is_missing(q.device))
    if q.dtype == torch.float64:
        reasons.append("dtype float64 is computed by the reference and the fallback only")
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        reasons.append("Triton's interpreter multiplies bfloat16 wrongly")
    if inputs.table is not None:
        reasons.append("a RelativeBias is computed by the reference and the fallback only")
    for name, head_dim in (("head_dim", q.shape[-1]), ("head_dim of v", v.shape[-1])):
        if head_dim > MAX_HEAD_DIM:
            reasons.append(f"{name} {head_dim} is larger than {MAX_HEAD_DIM}")
    return reasons


def choose(impl: str | None, inputs: Inputs, spec: AttentionSpec) -> str:
    """The implementation to run: an order is followed or refused, "auto" finds one.

    Returns a name of `ops` for a chain where kernels are tried first, and others if they do not compile.

    Raises:
        ValueError: no such implementation. NotImplementedError: an order that cannot be followed.
    """
    impl = DEFAULT_IMPL if impl is None else impl
    if impl == "auto":
        if not _is_on_gpu(inputs) or unsupported_reasons("triton", inputs, spec):
            return "fallback"
        if not hopper.is_faster("forward", inputs, spec) or unsupported_reasons("gluon", inputs, spec):
            return "auto"
        return "auto on hopper" if hopper.is_faster("backward", inputs, spec) else "auto on hopper, forward"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    reasons = unsupported_reasons(impl, inputs, spec)
    if reasons:
        raise NotImplementedError(
            f"impl={impl!r} cannot take this call: {'; '.join(reasons)}. impl='auto' would run the fallback"
        )
    return impl


def _is_on_gpu(inputs: Inputs) -> bool:
    return inputs.q.is_cuda


def first_of(choice: str) -> str:
    """The implementation that is tried first for what `choose` returned."""
    return ops.CHAINS[choice][0] if choice in ops.CHAINS else choice


def run(inputs: Inputs, spec: AttentionSpec, impl: str, want: Collection[str] = ()) -> AttentionStats:
    """out and lse by what `choose` returned, and those of the other statistics that `want` names.

    The spec must be that of a call which wants them: `options.make_spec`.
    """
    max_logit = entropy = key_mass = None
    if inputs.sinks is not None and spec.want_lse:  # read twice: gradients are added before they are rounded
        inputs = inputs._replace(sinks=inputs.sinks.to(wide_dtype(inputs.sinks)))
    if impl == "reference":
        out, lse = reference.attention(inputs, spec)
        if not {"lse"}.issuperset(want):
            max_logit, entropy, key_mass = reference.statistics(inputs, spec)
    else:
        out, lse, max_logit = ops.attention(inputs, spec, impl)
        entropy, key_mass = entropy_and_key_mass(
            inputs, spec, lse, entropy="entropy" in want, key_mass="key_mass" in want
        )
    if inputs.sinks is not None and spec.want_lse:
        lse = lse_of_empty_rows(lse, inputs.sinks, inputs.spans_q)
    return AttentionStats(
        out,
        lse,
        max_logit if "max_logit" in want else None,
        entropy if "entropy" in want else None,
        key_mass if "key_mass" in want else None,
    )


@constant_when_traced
def _triton_is_missing(device: torch.device) -> tuple[str, ...]:
    """Reasons that lie in the machine."""
    return _ask_the_machine(device)


@functools.cache
def _ask_the_machine(device: torch.device) -> tuple[str, ...]:
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed",)
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return (f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0",)
        return ()
    if device.type == "meta":
        return ()
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ()
    return (f"device {device.type} runs no Triton kernel (on CPU: only with TRITON_INTERPRET=1)",)
