"""What is checked: an attention function, what it claims to take, and how a `Problem` is put to it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.spec import AttentionStats
from .budget import Arithmetic
from .cases import Case, Problem
from .guard import require

Attend = Callable[[Problem], tuple[Any, ...]]
"""The first fields of an `AttentionStats`, out and as many others as there are, of a problem; out, lse and
entropy attached to its q, k, v and bias."""

Alignment = Literal["bottom-right", "top-left"]


@dataclass(frozen=True)
class Capabilities:
    """What a function claims to take. It is only asked what it claims, and held to all of that.

    alignments: where the last query stands with causal or a window; both if it can be told. rectangular:
    seqlen_q may differ from seqlen_k. different_head_dims: v's may differ from q's. any_strides: q, k, v
    need not be contiguous. mask_and_causal: both in one call, ANDed. mask_objects: mask may be an
    `undivided.Mask`. lse: it returns one; lse_gradient: which is differentiable. max_logit, entropy,
    entropy_gradient, key_mass: likewise. dropout: with an int seed; the elements it drops are those of this
    package (`same_dropout`) or its own. empty: sizes of 0.
    any_bias_dtype: bias may have another float dtype than q. precise: if asked, no rounding of out reaches
    backward's delta. double_backward, jvp: gradients are differentiable, and forward-mode AD works.
    Whoever claims neither may refuse. deterministic: the same call gives the same bits. batch_invariant: with
    deterministic="batch" those of a batch entry depend on no other one, nor on its place. compiles: it can be
    traced, with fake tensors too. arithmetic: see `budget`.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    head_dims: tuple[int, ...] | None = None
    max_head_dim: int = 256
    alignments: tuple[Alignment, ...] = ("bottom-right",)
    arithmetic: Arithmetic = "kernel"
    backward: bool = True
    batch: bool = True
    rectangular: bool = True
    different_head_dims: bool = False
    any_strides: bool = True
    empty: bool = False
    scale: bool = True
    gqa: bool = False
    causal: bool = False
    window: bool = False
    mask: bool = False
    mask_and_causal: bool = False
    mask_objects: bool = False
    empty_rows: bool = True
    nan_in_hidden_keys: bool = True
    key_lengths: bool = False
    bias: bool = False
    any_bias_dtype: bool = False
    bias_gradient: bool = False
    softcap: bool = False
    sinks: bool = False
    alibi: bool = False
    relative_bias: bool = False
    packed: bool = False
    dropout: bool = False
    same_dropout: bool = False
    precise: bool = False
    lse: bool = False
    lse_gradient: bool = False
    double_backward: bool = False
    jvp: bool = False
    max_logit: bool = False
    entropy: bool = False
    entropy_gradient: bool = False
    key_mass: bool = False
    deterministic: bool = True
    batch_invariant: bool = False
    compiles: bool = False


_PLURAL = ("dtypes", "alignments", "head_dims")
_CLAIMS: dict[str, Any] = {field.name: True for field in fields(Capabilities) if field.type == "bool"}
EVERYTHING = Capabilities(alignments=("bottom-right", "top-left"), **_CLAIMS)


@dataclass(frozen=True)
class Target:
    """An attention function under test.

    note: what a reader must know, "a stand-in" say. origin: the arguments of `adapters.resolve` that make
    it again, as code.
    """

    name: str
    attend: Attend
    capabilities: Capabilities
    note: str = ""
    origin: str = ""

    def statistics(self, problem: Problem) -> AttentionStats:
        """What `attend` returns, by name; also what is not claimed."""
        out, *others = self.attend(problem)
        require(isinstance(out, Tensor), f"out is {type(out).__name__}, not a tensor")
        assert isinstance(out, Tensor)
        return AttentionStats(out, *others)

    def fitted(self, case: Case) -> Case:
        """The case in sizes and strides that are claimed, so that a small claim is asked every option too."""
        claims = self.capabilities
        changes: dict[str, Any] = {
            name: self._nearest_head_dim(size)
            for name, size in (("head_dim", case.head_dim), ("head_dim_v", case.head_dim_v))
            if size is not None
        }
        if not claims.rectangular and case.seqlen_q != case.seqlen_k:
            changes["seqlen_q"] = changes["seqlen_k"] = max(case.seqlen_q, case.seqlen_k)
        if not claims.batch:
            changes["batch"] = min(case.batch, 1)
        if not claims.any_strides:
            changes["layout"] = "bhsd"
        return replace(case, **changes)

    def _nearest_head_dim(self, size: int) -> int:
        dims = self.capabilities.head_dims
        if dims is None:
            return min(size, self.capabilities.max_head_dim)
        return min((d for d in dims if d >= size), default=max(dims))

    def refusal(self, case: Case, dtype: torch.dtype) -> str | None:
        """Why a case is not asked; None if it is."""
        claims, aligned = self.capabilities, case.causal or case.window is not None
        head_dims = {case.head_dim, case.head_dim_v or case.head_dim}
        alignment = "top-left" if case.top_left else "bottom-right"
        square = all(seqlen_q == seqlen_k for seqlen_q, seqlen_k in case.lengths)
        needs = {
            f"dtype {dtype}": dtype in claims.dtypes,
            "head_dim": max(head_dims) <= claims.max_head_dim
            and (claims.head_dims is None or head_dims <= {*claims.head_dims}),
            "different_head_dims": claims.different_head_dims or len(head_dims) == 1,
            "rectangular": claims.rectangular or square,
            f"alignment {alignment}": not aligned or square or alignment in claims.alignments,
            "packed": case.packed is None or (claims.packed and case.makes_sense_packed()),
            "batch": claims.batch or len(case.lengths) == 1 or case.packed is not None,
            "empty": claims.empty or (len(case.lengths) > 0 and 0 not in itertools.chain(*case.lengths)),
            "any_strides": claims.any_strides or case.layout == "bhsd",
            "scale": claims.scale or case.scale is None,
            "gqa": claims.gqa or case.heads_q == case.heads_kv,
            "causal": claims.causal or not case.causal,
            "window": claims.window or case.window is None,
            "mask": claims.mask or case.mask is None,
            "mask_and_causal": claims.mask_and_causal or case.mask is None or not aligned,
            "mask_objects": claims.mask_objects or not case.mask_object,
            "key_lengths": claims.key_lengths or case.key_lengths is None,
            "bias": claims.bias or case.bias is None,
            "any_bias_dtype": claims.any_bias_dtype or case.bias is None or case.bias.dtype in (None, dtype),
            "softcap": claims.softcap or case.softcap is None,
            "sinks": claims.sinks or not case.sinks,
            "alibi": claims.alibi or not case.alibi,
            "relative_bias": claims.relative_bias or case.relative is None,
            "dropout": claims.same_dropout or case.dropout_p == 0.0,
            "batch_invariant": claims.batch_invariant or not case.batch_invariant,
            "precise": claims.precise or not case.precise,
            "entropy_gradient": claims.entropy_gradient or not case.entropy,
            "empty_rows": claims.empty_rows or not case.build(torch.float32).has_empty_rows(),
        }
        return next((name for name, met in needs.items() if not met), None)


def target(function: Callable[..., Any], name: str | None = None, **capabilities: Any) -> Target:
    """A function `fn(q, k, v, **options) -> out or (out, lse, ...)` with this package's names and layout.

    It may return as many fields of `undivided.AttentionStats`, in their order, as it likes; None for what it
    has not.

    Only the options that a problem has are passed, out of `undivided.attention`'s: causal, window, mask,
    key_lengths, bias, softcap, sinks, scale, dropout_p, seed, precise and deterministic. q, k, v: (batch,
    heads, seqlen, head_dim). capabilities: fields of `Capabilities`.

    Raises:
        TypeError: an unknown capability.
    """
    claims = claim(Capabilities(), capabilities)

    def attend(problem: Problem) -> tuple[Any, ...]:
        where = problem.sequences
        if where is None:
            answer = function(problem.q, problem.k, problem.v, **problem.given_options())
        else:
            limits = {"max_seqlen_q": where.max_seqlen_q, "max_seqlen_k": where.max_seqlen_k}
            answer = function(*problem.packed(), *where[:2], **limits, **problem.given_options())
        if not isinstance(answer, (tuple, list)):
            answer = (answer,)
        fields = AttentionStats._fields
        require(
            0 < len(answer) <= len(fields), f"returns {len(answer)} things, not out or ({', '.join(fields)})"
        )
        if where is not None:
            answer = [None if x is None else x.transpose(0, 1)[None] for x in answer]
        return tuple(answer)

    name = name or str(getattr(function, "__name__", "attention"))
    module, path = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
    origin = as_code(f"{module}:{path}", capabilities) if _is_at(function, module, path) else ""
    return Target(name, attend, claims, origin=origin)


def _is_at(function: object, module: str, path: str) -> bool:
    """Whether another process finds a function by that name: no lambda, no method of an object."""
    found: object = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is function and module != "__main__"


class ClaimError(ValueError):
    """Claims that no function can hold."""


NEEDS = {
    "batch_invariant": ("batch",),
    "mask_and_causal": ("mask",),
    "any_bias_dtype": ("bias",),
    "bias_gradient": ("bias", "backward"),
    "same_dropout": ("dropout",),
    "precise": ("backward",),
    "lse_gradient": ("lse", "backward"),
    "entropy_gradient": ("entropy", "backward"),
}
"""Claims that say nothing without others."""


def claim(capabilities: Capabilities, changes: Mapping[str, Any]) -> Capabilities:
    """The same claims but for some.

    Raises:
        TypeError: there is no such claim, or it is of another type.
        ClaimError: nothing is left to ask.
    """
    known = [field.name for field in fields(Capabilities)]
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    for key, value in changes.items():
        if key not in known:
            raise TypeError(f"unknown capability {key!r}; there are {', '.join(known)}")
        if key in _CLAIMS and not isinstance(value, bool):
            raise TypeError(f"{key} must be True or False, got {value!r}")
        if key in _PLURAL and not isinstance(value, tuple) and (key, value) != ("head_dims", None):
            raise TypeError(f"{key} must be a tuple, got {value!r}")
    found = replace(capabilities, **changes)
    for key in changes:
        missing = [need for need in NEEDS.get(key, ()) if not getattr(found, need)]
        if getattr(found, key) and missing:
            raise ClaimError(f"{key} is claimed without {' and '.join(missing)}")
    empty = [key for key in ("dtypes", "alignments", "head_dims") if getattr(found, key) == ()]
    if empty:
        raise ClaimError(f"{empty[0]} is empty")
    if found.max_head_dim < 1 or min(found.head_dims or (1,)) < 1:
        raise ClaimError("head dims must be positive")
    return found


def as_code(text: str, claims: Mapping[str, Any]) -> str:
    """Arguments of a call of `adapters.resolve`."""
    return ", ".join([repr(text), *(f"{name}={value!r}" for name, value in claims.items())])
