"""What a row's weights are like, without the weights: entropy and key_mass, in a second pass that knows lse.

p = exp(s - lse) block by block, in plain PyTorch on any device, whoever computed lse: the fallback has the
blocks. Two operators and the autograd around them, as for attention itself in `ops`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .library import CALL, below_autograd, define
from .spec import N_GRADIENTS, AttentionSpec, Gradients, Inputs, Needs, empty_gradients, is_empty
from .tracing import each_once
from .vmap import folded

N_INPUTS = len(Inputs._fields)


def entropy_and_key_mass(
    inputs: Inputs, spec: AttentionSpec, lse: Tensor, *, entropy: bool, key_mass: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those that are asked for, of the weights before dropout; entropy is differentiable once.

    lse: (batch, heads_q, seqlen_q), -inf for a row without keys, whatever its sink. No gradient goes through
    it: entropy's, in closed form, is the whole one.
    """
    if not entropy and not key_mass:
        return None, None
    # values play no part; of size 0 they cost nothing where blocks are cut and gradients computed
    inputs = inputs._replace(v=inputs.k.detach()[..., :0], seed=None)
    spec = spec._replace(dropout_p=0.0, precise=False, want_lse=True, want_max=False)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:N_GRADIENTS])
    function: Any = _TransformableStatistics if transformed else _Statistics
    call: Any = function.apply if transformed or wanted else _statistics_op
    if torch.compiler.is_compiling():
        inputs = Inputs._make(each_once(inputs))
    found: tuple[Tensor, Tensor] = call(lse.detach(), *inputs, *spec, entropy, key_mass)
    return found[0] if entropy else None, found[1] if key_mass else None


class _Statistics(torch.autograd.Function):
    """The plain way: eager and torch.compile, which takes no jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _statistics_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        lse, *call, _, _ = inputs
        entropy, key_mass = output
        ctx.spec = call[N_INPUTS:]
        ctx.save_for_backward(entropy, lse, *call[:N_INPUTS])
        ctx.mark_non_differentiable(key_mass)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dentropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1 : 1 + N_GRADIENTS]
        wanted: tuple[Tensor | None, ...] = (None,) * N_GRADIENTS
        if dentropy is not None:
            call = dentropy, *ctx.saved_tensors, *ctx.spec
            twice = torch.is_grad_enabled() or forward_ad._current_level >= 0
            refusing: Any = _Backward
            grads = refusing.apply(*call, *needs) if twice else _backward_op(*call, [*needs])
            wanted = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        return (None, *wanted, *(None,) * (len(ctx.needs_input_grad) - 1 - N_GRADIENTS))


class _TransformableStatistics(_Statistics):
    """The same for torch.func transforms and forward-mode AD."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "forward-mode AD (torch.func.jvp, forward_ad) is not available for entropy; "
            "impl='reference' has it, with seqlen_q x seqlen_k memory"
        )


class _Backward(torch.autograd.Function):
    """The backward operator, refusing to be differentiated: never silent zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _backward_op(*args[:-N_GRADIENTS], [*args[-N_GRADIENTS:]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(_TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(_TWICE)


_TWICE = (
    "entropy is differentiable once; impl='reference' is differentiable to any order, "
    "with seqlen_q x seqlen_k memory"
)


def _statistics(lse: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Body of undivided::statistics. What nobody asked for is an empty tensor."""
    inputs, spec, (entropy, key_mass) = _call(args[:-2]), _spec(args[:-2]), args[-2:]
    with below_autograd(), torch.autocast(lse.device.type, enabled=False):
        if is_empty(inputs):
            found = tuple(x.zero_() for x in _allocate(lse, *args))
            return found[0], found[1]
        results = _fallback().attention_statistics(lse, inputs, spec, entropy, key_mass)
    nothing = lse.new_empty(0)
    return results[0] if entropy else nothing, results[1] if key_mass else nothing


def _allocate(lse: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of what `_statistics` returns."""
    inputs, (entropy, key_mass) = _call(args[:-2]), args[-2:]
    batch, heads_q, seqlen_q, _ = inputs.q.shape
    return (
        lse.new_empty((batch, heads_q, seqlen_q) if entropy else (0,)),
        lse.new_empty((batch, heads_q, inputs.k.shape[2]) if key_mass else (0,)),
    )


def _backward(dentropy: Tensor, entropy: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Body of undivided::entropy_backward. A gradient nobody needs is an empty tensor."""
    inputs, spec, needs = _call(args[:-1]), _spec(args[:-1]), args[-1]
    with below_autograd(), torch.autocast(lse.device.type, enabled=False):
        if is_empty(inputs):
            return tuple(g.zero_() for g in _allocate_backward(dentropy, entropy, lse, *args))
        grads: Gradients = _fallback().entropy_backward(dentropy, entropy, lse, inputs, spec, Needs(*needs))
    return tuple(lse.new_empty(0) if g is None else g for g in grads)


def _allocate_backward(dentropy: Tensor, entropy: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Shapes, dtypes and strides of what `_backward` returns."""
    return empty_gradients(_call(args[:-1]), args[-1], lse)


def _call(args: tuple[Any, ...]) -> Inputs:
    return Inputs(*args[:N_INPUTS])


def _spec(args: tuple[Any, ...]) -> AttentionSpec:
    return AttentionSpec(*args[N_INPUTS:])


def _fallback() -> ModuleType:
    return importlib.import_module(".fallback", __package__)


def _fold_vmap(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """vmap of undivided::statistics."""
    return folded(_statistics_op, 1, info, in_dims, args)


def _fold_vmap_backward(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """vmap of undivided::entropy_backward."""
    return folded(_backward_op, 3, info, in_dims, args)


_statistics_op = define(
    "statistics",
    f"(Tensor lse, {CALL}, bool entropy, bool key_mass) -> (Tensor, Tensor)",
    _statistics,
    _allocate,
    _fold_vmap,
)
_backward_op = define(
    "entropy_backward",
    f"(Tensor dentropy, Tensor entropy, Tensor lse, {CALL}, bool[{N_GRADIENTS}] needs)"
    f" -> ({', '.join(['Tensor'] * N_GRADIENTS)})",
    _backward,
    _allocate_backward,
    _fold_vmap_backward,
)
