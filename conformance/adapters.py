"""The attention functions that can be checked by name: ours, PyTorch's, and other people's."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..kernels import dispatch
from ..kernels.spec import DTYPES, AttentionStats
from . import library_adapters, multihead_adapters, torch_adapters
from .budget import Arithmetic
from .cases import OPTIONS, Case, Problem
from .target import EVERYTHING, Capabilities, Target, as_code, claim, target

ARITHMETIC: dict[str, Arithmetic] = {
    "auto": "kernel",
    "reference": "wide",
    "fallback": "wide",
    "triton": "kernel",
    "gluon": "kernel",
}


def ours(impl: str, native: bool | None = None) -> Target:
    """One of this package's implementations, through its public path: prepare, choose, run.

    native: claim what kernels take on a GPU, not in the interpreter; by default if there is one.
    """
    native = torch.cuda.is_available() if native is None else native

    def attend(problem: Problem) -> AttentionStats:
        inputs, spec = problem.prepared(problem.want)
        return dispatch.run(inputs, spec, dispatch.choose(impl, inputs, spec), problem.want)

    claims = replace(EVERYTHING, dtypes=_dtypes(impl, native), arithmetic=ARITHMETIC[impl])
    denied: dict[str, Any] = dict.fromkeys(_denied(impl), False)
    claims = replace(claims, **denied)
    claims = replace(
        claims, max_head_dim=dispatch.MAX_HEAD_DIM if impl in ("triton", "gluon") else sys.maxsize
    )
    if impl == "triton":
        # The interpreter truncates where it stores bfloat16: the gradient of such a bias beside others.
        claims = replace(claims, any_bias_dtype=native)
    return Target(f"undivided {impl}", attend, claims)


@functools.cache
def _denied(impl: str) -> frozenset[str]:
    """The claims that `dispatch` does not let an implementation make: it is asked with each option."""
    bare = Target("", lambda problem: (problem.q, None), Capabilities())
    options = [Case(name, **fields) for name, fields in OPTIONS.items()]

    def reasons(case: Case) -> set[str]:
        return {*dispatch.unsupported_reasons(impl, *case.build(torch.float32).prepared())}

    of_the_machine = reasons(Case("plain"))
    refused = [bare.refusal(case, torch.float32) for case in options if reasons(case) - of_the_machine]
    return frozenset(claim for claim in refused if claim is not None)


def _ours_on(impl: str, device: torch.device) -> Target:
    made = ours(impl)
    problem = Case("plain").build(made.capabilities.dtypes[0], device)
    reasons = dispatch.unsupported_reasons(impl, *problem.prepared())
    if reasons:
        raise ValueError(f"undivided-{impl} cannot run: {'; '.join(reasons)}")
    return made


def _dtypes(impl: str, native: bool) -> tuple[torch.dtype, ...]:
    if impl == "reference":  # 16-bit inputs are widened by whoever calls it
        return torch.float32, torch.float64
    if impl == "triton":
        return (torch.float16, torch.float32, *[torch.bfloat16] * native)
    if impl == "gluon":
        return (torch.float16, torch.bfloat16)
    return DTYPES


Maker = Callable[[torch.device], Target]

ADAPTERS: dict[str, Maker] = {
    **{f"undivided-{impl}": partial(_ours_on, impl) for impl in ARITHMETIC},
    **{f"torch-{name}": partial(torch_adapters.sdpa, name) for name in torch_adapters.BACKENDS},
    "torch-flex": torch_adapters.flex,
    "torch-flex-compiled": torch_adapters.flex_compiled,
    "torch-mha": partial(multihead_adapters.multihead, False),
    "torch-mha-weights": partial(multihead_adapters.multihead, True),
    "transformers-eager": library_adapters.transformers_eager,
    "flash-attn2": library_adapters.flash_attn2,
    "flash-attn3": library_adapters.flash_attn3,
    "flash-attn4": library_adapters.flash_attn4,
    "xformers": library_adapters.xformers,
}
"""Makers of targets, by name. What one claims may depend on the device. One raises ImportError if the
package it needs cannot be imported, and ValueError if the device is not one it runs on."""


class UnknownTargetError(ValueError):
    """A text that names no attention function."""


def resolve(text: str, device: str | torch.device | None = None, **claims: Any) -> Target:
    """The target that a text names: an adapter, or "module:function", which is imported, that is executed.

    claims: fields of `Capabilities` that differ from what the adapter claims, or from the defaults.

    Raises:
        UnknownTargetError: there is no such adapter or function. Further, what importing it raises.
    """
    if text in ADAPTERS:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = ADAPTERS[text](device)
    else:
        function = _load(text)
        found = function if isinstance(function, Target) else target(function, text)
    capabilities = claim(found.capabilities, claims)
    return replace(found, capabilities=capabilities, origin=as_code(text, claims))


def _load(text: str) -> Any:
    module, _, path = text.partition(":")
    if not module or not path:
        raise UnknownTargetError(
            f"{text!r} is neither an adapter ({', '.join(ADAPTERS)}) nor of the form module:function"
        )
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        if not hasattr(found, name):
            raise UnknownTargetError(f"{text!r}: there is no {name} in {found.__name__}")
        found = getattr(found, name)
    if not callable(found) and not isinstance(found, Target):
        raise UnknownTargetError(f"{text!r} is no function but {type(found).__name__}")
    return found
