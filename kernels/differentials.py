"""Derivatives of derivatives: the operators of `second_order`, and how autograd composes them.

Forward mode of attention is `Jvp`. The gradients are `Backward`; they move by `Hvp` along tangents of the
inputs, and are linear in dout and dlse. Reverse mode of either needs nothing more: it is `Hvp` by the inputs,
`Jvp` by the cotangents, `Backward` by the tangents. Everything else would be of third order, or forward mode
twice, and raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import CALL, NAMESPACE, below_autograd, define
from .spec import N_GRADIENTS, AttentionSpec, Inputs, Needs, empty_gradients, is_empty, like, wide_dtype
from .vmap import one_by_one

N_INPUTS = len(Inputs._fields)
Gradient = Tensor | None


def differentiable_backward(*args: Any) -> tuple[Tensor, ...]:
    """The backward operator, differentiable once more: dout, dlse, out, lse, inputs, spec, impl, needs."""
    *call, needs = args
    gradients: tuple[Tensor, ...] = _apply(Backward, *call, *needs)
    return gradients


def differentiable_jvp(*args: Any) -> tuple[Tensor, Tensor]:
    """How out and lse move along tangents: out, lse, tangents, inputs, spec, impl."""
    moved: tuple[Tensor, Tensor] = _apply(Jvp, *args)
    return moved


class Backward(torch.autograd.Function):
    """`differentiable_backward`.

    Functions have flat arguments: the rule of vmap counts one for each in every list and named tuple.
    out and lse are functions of the inputs, and the closed forms know it: they have no gradients here.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = getattr(torch.ops, NAMESPACE).backward.default(*_nested(args))
        return gradients

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, args, 4 + N_INPUTS)

    @staticmethod
    def backward(ctx: Any, *cotangents: Gradient) -> tuple[Gradient, ...]:
        dout, dlse, _, _, *inputs = ctx.saved_tensors
        spec, needed = ctx.rest[: -N_GRADIENTS - 1], ctx.rest[-N_GRADIENTS:]
        wanted = [*ctx.needs_input_grad]
        tangents = _where(needed, cotangents)
        tout, tlse, *moved = _apply(Hvp, dout, dlse, *tangents, *inputs, *spec, *wanted[4 : 4 + N_GRADIENTS])
        return *_where(wanted[:2], (tout, tlse)), None, None, *_of_inputs(ctx, 4, moved)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Gradient, ...]:
        dout, dlse, *others = ctx.saved_tensors
        spec, needs = ctx.rest[: -N_GRADIENTS - 1], ctx.rest[-N_GRADIENTS:]
        tdout, tdlse, *moving = tangents[: 4 + N_GRADIENTS]
        moving = moving[2:]
        moved: list[Gradient] = [None] * N_GRADIENTS
        if any(x is not None for x in moving):
            _, _, *moved = _apply(Hvp, dout, dlse, *moving, *others[2:], *spec, *needs)
        if tdout is not None or tdlse is not None:
            tdout = torch.zeros_like(dout) if tdout is None else tdout
            linear = _apply(Backward, tdout, tdlse, *others, *ctx.rest)
            moved = [y if x is None else x + y for x, y in zip(moved, linear, strict=True)]
        return tuple(moved)


class Jvp(torch.autograd.Function):
    """`differentiable_jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        moved: tuple[Tensor, Tensor] = _jvp_op(*args[2:-1])
        return moved

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, args, 2 + N_GRADIENTS + N_INPUTS)

    @staticmethod
    def backward(ctx: Any, dout: Gradient, dlse: Gradient) -> tuple[Gradient, ...]:
        out, lse, *others = ctx.saved_tensors
        tangents, inputs = others[:N_GRADIENTS], others[N_GRADIENTS:]
        *spec, _ = ctx.rest
        dout = torch.zeros_like(out) if dout is None else dout
        wanted = [*ctx.needs_input_grad[2:]]
        of_tangents, of_inputs = wanted[:N_GRADIENTS], wanted[N_GRADIENTS : 2 * N_GRADIENTS]
        linear: tuple[Gradient, ...] = (None,) * N_GRADIENTS
        if any(of_tangents):
            linear = _where(
                of_tangents, _apply(Backward, dout, dlse, out, lse, *inputs, *ctx.rest, *of_tangents)
            )
        moved: tuple[Gradient, ...] = (None,) * N_GRADIENTS
        if any(of_inputs):
            _, _, *moved = _apply(Hvp, dout, dlse, *tangents, *inputs, *spec, *of_inputs)
        return None, None, *linear, *_of_inputs(ctx, 2 + N_GRADIENTS, moved)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "fused attention has no forward mode of forward mode (jvp of jvp): take forward mode of reverse "
            f"mode, or reverse mode of forward mode; {_REFERENCE}"
        )


class Hvp(torch.autograd.Function):
    """How gradients move along tangents; refuses to be differentiated: never silent zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        moved: tuple[Tensor, ...] = _hvp_op(*_nested(args))
        return moved

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Gradient) -> None:
        raise NotImplementedError(_THRICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(_THRICE)


_REFERENCE = "impl='reference' is differentiable to any order, with seqlen_q x seqlen_k memory"
_THRICE = (
    "fused attention is differentiable twice, this would be a third derivative (products with the Hessian: "
    f"torch.func.jvp of torch.func.grad, or torch.autograd.functional.vhp); {_REFERENCE}"
)


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _save(ctx: Any, args: tuple[Any, ...], n_tensors: int) -> None:
    ctx.rest = args[n_tensors:]
    ctx.save_for_backward(*args[:n_tensors])
    ctx.save_for_forward(*args[:n_tensors])
    ctx.set_materialize_grads(False)


def _nested(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments as the operators take them: with a list of needs."""
    return *args[:-N_GRADIENTS], list(args[-N_GRADIENTS:])


def _where(needs: Any, gradients: Any) -> tuple[Gradient, ...]:
    """An operator's results as far as somebody needs them: the others are empty."""
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _of_inputs(ctx: Any, first: int, gradients: Any) -> tuple[Gradient, ...]:
    """A gradient for each argument of a Function from its inputs on; `first` is where they start."""
    needs = ctx.needs_input_grad[first:]
    return *_where(needs[:N_GRADIENTS], gradients), *(None,) * (len(needs) - N_GRADIENTS)


def _jvp(*args: Any) -> tuple[Tensor, Tensor]:
    """Body of undivided::jvp."""
    from . import second_order

    tangents, inputs, spec = _call(args)
    with below_autograd(), torch.autocast(inputs.q.device.type, enabled=False):
        if is_empty(inputs):
            tout, tlse = _allocate_jvp(*args)
            return tout.zero_(), tlse.zero_()
        return second_order.jvp(second_order.Tangents(*tangents), inputs, spec)


def _hvp(dout: Tensor, dlse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Body of undivided::hvp. A gradient nobody needs is an empty tensor."""
    from . import second_order

    tangents, inputs, spec = _call(args[:-1])
    with below_autograd(), torch.autocast(inputs.q.device.type, enabled=False):
        if is_empty(inputs):
            return tuple(x.zero_() for x in _allocate_hvp(dout, dlse, *args))
        tout, tlse, moved = second_order.hvp(
            dout, dlse, second_order.Tangents(*tangents), inputs, spec, Needs(*args[-1])
        )
    return tout, tlse, *(dout.new_empty(0) if x is None else x for x in moved)


def _call(args: tuple[Any, ...]) -> tuple[tuple[Gradient, ...], Inputs, AttentionSpec]:
    """(tangents, inputs, spec) of an operator's arguments."""
    n = N_GRADIENTS + N_INPUTS
    inputs = Inputs(*args[N_GRADIENTS:n])
    if inputs.spans_q is not None:
        raise NotImplementedError(
            f"packed sequences are differentiable once, and in reverse mode only; {_REFERENCE}"
        )
    return args[:N_GRADIENTS], inputs, AttentionSpec(*args[n:])


def _allocate_jvp(*args: Any) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of what `_jvp` returns."""
    _, inputs, _ = _call(args)
    q = inputs.q
    return like(q, inputs.v.shape[3]), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


def _allocate_hvp(dout: Tensor, dlse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Shapes, dtypes and strides of what `_hvp` returns."""
    _, inputs, _ = _call(args[:-1])
    return *_allocate_jvp(*args[:-1]), *empty_gradients(inputs, args[-1], dout)


_TANGENTS = ", ".join(f"Tensor? t{name}" for name in Inputs._fields[:N_GRADIENTS])
_jvp_op: Any = define(
    "jvp",
    f"({_TANGENTS}, {CALL}) -> (Tensor, Tensor)",
    _jvp,
    _allocate_jvp,
    lambda info, in_dims, *args: one_by_one(_jvp_op, info, in_dims, args),
)
_hvp_op: Any = define(
    "hvp",
    f"(Tensor dout, Tensor? dlse, {_TANGENTS}, {CALL}, bool[{N_GRADIENTS}] needs)"
    f" -> ({', '.join(['Tensor'] * (2 + N_GRADIENTS))})",
    _hvp,
    _allocate_hvp,
    lambda info, in_dims, *args: one_by_one(_hvp_op, info, in_dims, args),
)
