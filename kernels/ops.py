"""The operators of torch.library and the autograd around them.

Two operators, `undivided::forward` and `undivided::backward`, take every tensor and every field of
`AttentionSpec`; their schemas are written from those two types. They are opaque to torch.compile and
torch.export and have fakes, vmap rules and FLOP formulas. Autograd lives in plain autograd.Functions
around them: registering it with the operator costs 50 µs a call, loses torch.func.grad, and returns
silent zeros under forward-mode AD. Where nothing listens to operators, their bodies are called.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad

from . import evidence, flops
from .differentials import differentiable_backward, differentiable_jvp
from .library import CALL, NAMESPACE, below_autograd, define
from .spec import (
    N_GRADIENTS,
    AttentionSpec,
    Gradients,
    Inputs,
    Needs,
    empty_gradients,
    is_empty,
    like,
    wide_dtype,
)
from .tracing import each_once
from .vmap import folded

N_INPUTS, N_SPEC = len(Inputs._fields), len(AttentionSpec._fields)

# Modules that offer attention_forward and attention_backward, in the order in which they are tried.
CHAINS = {
    "fallback": ("fallback",),
    "triton": ("triton",),
    "gluon": ("gluon",),
    "auto": ("triton", "fallback"),
    "auto on hopper": ("gluon", "triton", "fallback"),
    "auto on hopper, forward": ("gluon", "triton", "fallback"),
}
_BACKWARD_CHAINS = {**CHAINS, "auto on hopper, forward": CHAINS["auto"]}


Results = tuple[Tensor, Tensor, Tensor | None]
"""(out, lse, max_logit) of forward, or their tangents. Where nobody wants max_logit it is None, or empty
out of an operator."""


def attention(inputs: Inputs, spec: AttentionSpec, impl: str) -> Results:
    """out and lse are differentiable twice in what `Gradients` has; lse is -inf for a row without keys."""
    q, k, v = inputs[:3]
    function: Any
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _teach_counters()
        function = _TransformableAttention
        return function.apply(*inputs, *spec, impl)
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or any(x is not None and x.requires_grad for x in inputs[3:N_GRADIENTS])
    ):
        function = _Attention
        if torch.compiler.is_compiling():
            inputs = Inputs._make(each_once(inputs))
        return function.apply(*inputs, spec, impl)
    return _call_forward(inputs, spec, impl)


def _call_forward(inputs: Inputs, spec: AttentionSpec, impl: str) -> Results:
    """The operator, or its body where nothing listens."""
    if _somebody_listens(inputs):
        return _forward_op(*inputs, *spec, impl)
    return _compute(inputs, spec, impl)


def _somebody_listens(inputs: Inputs) -> bool:
    """Whether it matters that an operator is called: to a tracer, mode, profiler or tensor subclass.

    For all others the dispatcher adds nothing but its own time, 6 µs, or 40 µs when memory is busy.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack():
        _teach_counters()
        return True
    return bool(
        torch._C._len_torch_function_stack()
        or _profiler_enabled()
        or not _PLAIN.issuperset(map(type, inputs))
        or inputs.q.is_meta
        or torch._C._get_tracing_state()
    )


def _teach_counters() -> None:
    if torch._C._len_torch_dispatch_stack() and "torch.utils.flop_counter" in sys.modules:
        flops.teach(NAMESPACE)


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


class _Attention(torch.autograd.Function):
    """The plain way: eager and torch.compile."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Results:
        *tensors, spec, impl = args
        results = _call_forward(Inputs(*tensors), spec, impl)
        _save(ctx, args, results)
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        # Grad mode is on under create_graph: somebody may differentiate again, through q, k, v too.
        transformed = torch.is_grad_enabled() or forward_ad._current_level >= 0
        return _gradients(differentiable_backward if transformed else _call_backward, ctx, dout, dlse)


class _TransformableAttention(torch.autograd.Function):
    """The same for torch.func transforms and forward-mode AD; its calls cost several times more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Results:
        return _forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        *call, impl = inputs
        # vmap's rule would lose a mark that max_logit is not differentiable: its derivatives are zeros.
        _save(ctx, (*call[:N_INPUTS], AttentionSpec(*call[N_INPUTS:]), impl), (*output[:2], None))
        ctx.save_for_forward(*call[:N_INPUTS], *output[:2])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _gradients(differentiable_backward, ctx, dout, dlse)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Results:
        *tensors, out, lse = ctx.saved_tensors
        tout, tlse = differentiable_jvp(out, lse, *tangents[:N_GRADIENTS], *tensors, *ctx.spec, ctx.impl)
        return tout, tlse, torch.zeros_like(tlse) if ctx.spec.want_max else tlse.new_zeros(0)


def _save(ctx: Any, args: tuple[Any, ...], results: Results) -> None:
    *tensors, ctx.spec, ctx.impl = args
    out, lse, max_logit = results
    ctx.save_for_backward(*tensors, out, lse)
    if max_logit is not None:
        ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)


def _gradients(
    operator: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Call `operator`, the one for backward or what stands for it; one gradient per argument of forward."""
    *tensors, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:N_GRADIENTS])
    if dout is None:
        dout = torch.zeros_like(out)
    grads = operator(dout, dlse, out, lse, *tensors, *ctx.spec, ctx.impl, needs)
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return (*wanted, *(None,) * (len(ctx.needs_input_grad) - N_GRADIENTS))


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Body of undivided::forward."""
    out, lse, max_logit = _compute(Inputs(*args[:N_INPUTS]), AttentionSpec(*args[N_INPUTS:-1]), args[-1])
    return out, lse, lse.new_empty(0) if max_logit is None else max_logit


def _compute(inputs: Inputs, spec: AttentionSpec, impl: str) -> Results:
    with below_autograd():
        if is_empty(inputs):
            out, lse, max_logit = _allocate_forward(*inputs, *spec, impl)
            return out.zero_(), lse.fill_(-torch.inf), max_logit.fill_(-torch.inf)
        if len(CHAINS[impl]) > 1:
            _say_if_untried(CHAINS[impl][:-1], inputs.q.device)
        return _first_that_compiles(CHAINS[impl], "attention_forward", inputs, spec)


def _backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Body of undivided::backward. A gradient nobody needs is an empty tensor."""
    grads = _compute_backward(dout, dlse, out, lse, *args)
    return tuple(dout.new_empty(0) if g is None else g for g in grads)


def _call_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The operator, or its body where nothing listens.

    Autograd's is_grads_batched hands in a tensor of many gradients at once, which is none to look at.
    """
    listening = type(args[0]) is not Tensor or _somebody_listens(Inputs(*args[4 : 4 + N_INPUTS]))
    if not listening and not any(map(_is_batched, args[:2])):
        return _compute_backward(*args)
    gradients: tuple[Tensor, ...] = _backward_op(*args)
    return gradients


def _is_batched(x: Tensor | None) -> bool:
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


def _compute_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    *rest, impl, needs = args
    inputs, spec = Inputs(*rest[:N_INPUTS]), AttentionSpec(*rest[N_INPUTS:])
    with below_autograd(), _without_autocast(dout.device):
        if is_empty(inputs):
            return tuple(g.zero_() for g in _allocate_backward(dout, dlse, out, lse, *args))
        gradients: Gradients = _first_that_compiles(
            _BACKWARD_CHAINS[impl], "attention_backward", dout, dlse, out, lse, inputs, spec, Needs(*needs)
        )
    return gradients


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _allocate_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of what `_forward` returns."""
    inputs, spec = Inputs(*args[:N_INPUTS]), AttentionSpec(*args[N_INPUTS:-1])
    q, v = inputs.q, inputs.v
    lse = q.new_empty(q.shape[:3], dtype=wide_dtype(q))
    return like(q, v.shape[3]), lse, torch.empty_like(lse) if spec.want_max else lse.new_empty(0)


def _allocate_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Shapes, dtypes and strides of what `_backward` returns."""
    return empty_gradients(Inputs(*args[:N_INPUTS]), args[-1], dout)


def _first_that_compiles(chain: tuple[str, ...], function: str, *args: Any) -> Any:
    """Run `function` of the first implementation, or of the next one if a kernel cannot be built.

    Only failures before a launch are caught; after a fault on the device nothing is retried.
    """
    for name, then in itertools.pairwise(chain):
        module = _implementation(name)
        try:
            return getattr(module, function)(*args)
        except module.BUILD_ERRORS as error:
            _say_once(f"undivided: {name} could not build a kernel, {then} runs instead: {error}")
    return getattr(_implementation(chain[-1]), function)(*args)


@functools.cache
def _say_if_untried(kernels: tuple[str, ...], device: torch.device) -> None:
    """Warn once where nobody has shown the kernels right on this kind of device."""
    architecture = evidence.architecture(device)
    state = min((evidence.state_of(name, architecture) for name in kernels), key=evidence.STATES.index)
    if state != "run natively":
        warnings.warn(
            f"undivided: its kernels have not been checked on {architecture} (evidence: {state}); "
            "`bash bench/gpu.sh` in a checkout does",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.lru_cache(maxsize=256)
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _implementation(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def _fold_vmap(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """vmap of undivided::forward."""
    return folded(_forward_op, 0, info, in_dims, args)


def _fold_vmap_backward(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """vmap of undivided::backward."""
    return folded(_backward_op, 4, info, in_dims, args)


_forward_op = define(
    "forward", f"({CALL}, str impl) -> (Tensor, Tensor, Tensor)", _forward, _allocate_forward, _fold_vmap
)
_backward_op = define(
    "backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {CALL}, str impl, bool[{N_GRADIENTS}] needs)"
    f" -> ({', '.join(['Tensor'] * N_GRADIENTS)})",
    _backward,
    _allocate_backward,
    _fold_vmap_backward,
)
