"""Useful floating point operations of a call, for explain() and torch.utils.flop_counter."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .spec import AttentionSpec, Inputs
from .visibility import visible_scores

N_INPUTS = len(Inputs._fields)


def forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, spec: AttentionSpec) -> int:
    """Two products over the scores that causal and window leave visible."""
    return _flops(q_shape, k_shape, v_shape, spec, products_qk=1, products_v=1)


def backward_flops(q_shape: Any, k_shape: Any, v_shape: Any, spec: AttentionSpec) -> int:
    """Five products over the visible scores: three with head_dim, two with head_dim_v."""
    return _flops(q_shape, k_shape, v_shape, spec, products_qk=3, products_v=2)


def teach(namespace: str) -> None:
    """Tell the counters that are active how to count; each copied the known formulas when it was made."""
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    register(namespace)
    operators = getattr(torch.ops, namespace)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, FlopCounterMode):
            for operator in (operators.forward, operators.backward):
                counter.flop_registry.setdefault(operator, flop_registry[operator])


@functools.cache
def register(namespace: str) -> None:
    """Tell torch.utils.flop_counter; only once it is loaded, because loading it imports triton."""
    from torch.utils.flop_counter import register_flop_formula

    operators = getattr(torch.ops, namespace)

    @register_flop_formula(operators.forward)
    def _(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return forward_flops(args[0], args[1], args[2], AttentionSpec(*args[N_INPUTS:-1]))

    @register_flop_formula(operators.backward)
    def _(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        q, k, v, *rest = args[4:]
        return backward_flops(q, k, v, AttentionSpec(*rest[N_INPUTS - 3 : -2]))


def _flops(
    q_shape: Any, k_shape: Any, v_shape: Any, spec: AttentionSpec, products_qk: int, products_v: int
) -> int:
    batch, heads, seqlen_q, head_dim = q_shape
    scores = batch * heads * visible_scores(spec, seqlen_q, k_shape[2])
    return 2 * scores * (products_qk * head_dim + products_v * v_shape[3])
