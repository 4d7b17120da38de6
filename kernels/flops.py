"""Useful floating point operations of a call, for explain() and torch.utils.flop_counter."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .spec import AttentionSpec, Inputs
from .visibility import visible_scores

N_INPUTS = len(Inputs._fields)


def forward_flops(inputs: Inputs, spec: AttentionSpec) -> int:
    """Two products over the scores that causal and window leave visible."""
    return _flops(inputs, spec, products_qk=1, products_v=1)


def backward_flops(inputs: Inputs, spec: AttentionSpec) -> int:
    """Five products over the visible scores, three with head_dim and two with head_dim_v; precise: seven."""
    more = int(spec.precise and inputs.q.element_size() == 2)
    return _flops(inputs, spec, products_qk=3 + more, products_v=2 + more)


def lengths(inputs: Inputs) -> list[tuple[int, int]]:
    """(seqlen_q, seqlen_k) of each batch entry or packed sequence.

    Of packed ones without values, on a meta device say, equal shares of the tokens.
    """
    batch, seqlen_q, seqlen_k = inputs.q.shape[0], inputs.q.shape[2], inputs.k.shape[2]
    spans = inputs.spans_q, inputs.spans_k
    if spans[0] is None or spans[1] is None:
        return [(seqlen_q, seqlen_k)] * batch
    if spans[0].is_meta or type(spans[0]) is not torch.Tensor:
        n = spans[0].shape[0]
        return [(seqlen_q // n, seqlen_k // n)] * n
    of_q, of_k = ((x[:, 1] - x[:, 0]).tolist() for x in spans if x is not None)
    return [*zip(of_q, of_k, strict=True)]


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

    @register_flop_formula(operators.forward, get_raw=True)
    def _(*args: Any, **kwargs: Any) -> int:
        return forward_flops(Inputs(*args[:N_INPUTS]), AttentionSpec(*args[N_INPUTS:-1]))

    @register_flop_formula(operators.backward, get_raw=True)
    def _(*args: Any, **kwargs: Any) -> int:
        given = args[4:-2]
        return backward_flops(Inputs(*given[:N_INPUTS]), AttentionSpec(*given[N_INPUTS:]))


def _flops(inputs: Inputs, spec: AttentionSpec, products_qk: int, products_v: int) -> int:
    head_dim, head_dim_v = inputs.q.shape[3], inputs.v.shape[3]
    scores = inputs.q.shape[1] * sum(visible_scores(spec, *both) for both in lengths(inputs))
    return 2 * scores * (products_qk * head_dim + products_v * head_dim_v)
