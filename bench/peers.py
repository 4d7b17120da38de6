"""Who is measured: ours, the conformance kit's adapters, and two that need preparing.

A peer is made ready for a problem before any time is taken: masks that it needs are built, graphs compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..conformance.adapters import ADAPTERS, ARITHMETIC, resolve
from ..conformance.budget import Arithmetic
from ..conformance.cases import Case, Extra, Problem
from ..kernels import dispatch
from ..kernels.functional import attention
from ..kernels.spec import AttentionOptions
from ..kernels.visibility import visible

OURS = "undivided"
LARGEST_SCORES = {"cpu": 2**31, "cuda": 2**35}
"""Bytes of a score matrix that a peer may be given which keeps it, four times with softmax and gradients."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnavailableError(Exception):
    """Why a peer cannot be measured on a problem: a finding, not a fault."""


class Ready(NamedTuple):
    """q, k, v -> out, for one problem. note: what it had to do to express the problem."""

    attend: Attend
    note: str = ""
    arithmetic: Arithmetic = "kernel"


Peer = Callable[[Case, Problem], Ready]


def find(name: str) -> Peer:
    """The peer of that name: one of `PEERS`, an adapter, or "module:target" as `undivided check` takes it."""
    return PEERS.get(name) or functools.partial(_adapter, name)


def _ours(impl: str | None, case: Case, problem: Problem) -> Ready:
    if impl is None:
        impl = "auto"
        if problem.q.is_cuda and dispatch.first_of(dispatch.choose(impl, *problem.prepared())) == "fallback":
            raise UnavailableError("no kernel takes it, and the fallback's time must not pass for theirs")
    attend = functools.partial(attention, **{**problem.given_options(), "impl": impl})
    return Ready(attend, arithmetic=ARITHMETIC[impl])


def _compiled(case: Case, problem: Problem) -> Ready:
    """Ours in a graph of torch.compile."""
    attend, _, arithmetic = _ours(None, case, problem)
    return Ready(_compile(attend), "torch.compile", arithmetic)


def _graphed(case: Case, problem: Problem) -> Ready:
    """Ours in CUDA graphs, one for each direction: nothing is left of the host's time but a replay."""
    if problem.q.device.type != "cuda":
        raise UnavailableError("CUDA graphs need a CUDA device")
    attend, _, arithmetic = _ours(None, case, problem)
    samples = tuple(x.detach().clone().requires_grad_() for x in problem[:3])
    graphed: Any = torch.cuda.make_graphed_callables(attend, samples)
    return Ready(graphed, "CUDA graph", arithmetic)


def _adapter(name: str, case: Case, problem: Problem) -> Ready:
    """A target of the conformance kit; what it cannot hide otherwise is given to it as a dense mask."""
    try:
        target = resolve(name, problem.q.device)
    except (ImportError, ValueError) as error:
        raise UnavailableError(str(error)) from None
    if name == "torch-math":
        _refuse_large_scores(problem)
    # Whether rows are empty need not be asked: none of the cases here has any, and looking takes long.
    claims = replace(target.capabilities, empty_rows=True)
    target, note = replace(target, capabilities=claims), ""
    reason = target.refusal(case, problem.q.dtype)
    if reason is not None and (dense := _dense_mask(problem)) is not None:
        case = replace(case, causal=False, window=None, key_lengths=None, mask=Extra())
        options: AttentionOptions = {**problem.options, "causal": False, "window": None, "mask": dense}
        options["key_lengths"] = None
        problem, note = problem._replace(options=options), "dense mask"
        reason = target.refusal(case, problem.q.dtype)
    if reason is not None:
        raise UnavailableError(f"does not take {reason}")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return target.attend(problem._replace(q=q, k=k, v=v))[0]

    return Ready(attend, note, claims.arithmetic)


def _eager(case: Case, problem: Problem) -> Ready:
    """As models write it: softmax in float32, everything else in q's dtype."""
    _refuse_large_scores(problem)
    mask = _dense_mask(problem)
    hidden = None if mask is None else ~mask
    scale = problem.prepared()[1].scale
    group = case.heads_q // case.heads_kv

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = scale * (q @ k.mT)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return Ready(attend, "" if hidden is None else "dense mask")


def _flex_attention(case: Case, problem: Problem) -> Ready:
    """Compiled, with a block mask by arithmetic; the adapter looks a mask up, and builds it at every call."""
    device = problem.q.device
    if device.type == "cpu":
        raise UnavailableError("on a CPU it compiles C++ for every case; it is measured on GPUs")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    inputs, spec = problem.prepared()
    shift = spec.shift(case.seqlen_q, case.seqlen_k)

    def shown(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        ok = col >= 0
        if spec.left is not None:
            ok = ok & (col >= row + shift - spec.left)
        if spec.right is not None:
            ok = ok & (col <= row + shift + spec.right)
        if inputs.key_lengths is not None:
            ok = ok & (col < inputs.key_lengths[batch])
        if inputs.mask is not None:  # the cases of this room have one for all batch entries and heads
            ok = ok & inputs.mask[0, 0, row, col]
        return ok

    block_mask = None
    if any(x is not None for x in (spec.left, spec.right, inputs.key_lengths, inputs.mask)):
        batch = None if inputs.key_lengths is None else case.batch
        block_mask = create_block_mask(shown, batch, None, case.seqlen_q, case.seqlen_k, device=device)
    compiled = _compile(flex_attention)
    grouped = case.heads_q != case.heads_kv
    return Ready(functools.partial(compiled, block_mask=block_mask, scale=spec.scale, enable_gqa=grouped))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """As torch.compile, but with a backward pass that can be run more than once over the same graph."""
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)


def _dense_mask(problem: Problem) -> Tensor | None:
    """What a problem hides, for those who know no other way to say it: bool, 4-D."""
    ok = visible(*problem.prepared())
    return None if ok is None else ok[(None,) * (4 - ok.ndim)]


def _refuse_large_scores(problem: Problem) -> None:
    batch, heads, seqlen_q, _ = problem.q.shape
    size = batch * heads * seqlen_q * problem.k.shape[2] * problem.q.element_size()
    if size > LARGEST_SCORES[problem.q.device.type]:
        raise UnavailableError(f"it keeps every score, {size / 2**30:.0f} GiB, several times")


PEERS: dict[str, Peer] = {
    OURS: functools.partial(_ours, None),
    **{f"{OURS}-{impl}": functools.partial(_ours, impl) for impl in ARITHMETIC},
    f"{OURS}-compiled": _compiled,
    f"{OURS}-graph": _graphed,
    "torch-flex-compiled": _flex_attention,
    "eager": _eager,
}
DEFAULT = (
    OURS,
    *("torch-cudnn", "torch-flash", "torch-efficient", "torch-math", "torch-flex-compiled", "eager"),
    *("flash-attn2", "flash-attn3", "flash-attn4", "xformers"),
)
NAMES = tuple(dict.fromkeys((*DEFAULT, *PEERS, *ADAPTERS)))
