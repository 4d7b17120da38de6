"""The vmap rules of the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spec import Inputs


def folded(
    operator: Any, first: int, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Fold the mapped axis into the batch; `first` is where the tensors of Inputs start.

    With a bias of any kind or sinks (their gradients are sums over the batch of one example) or dropout (its
    bits depend on the batch index within one example), and where tensors have no batch axis, the examples run
    one after the other.
    """
    size = info.batch_size
    inputs = Inputs(*args[first : first + len(Inputs._fields)])
    n_tensors = first + len(Inputs._fields)
    flat_dims = [*in_dims[:n_tensors]]
    apart = (*inputs[3:7], inputs.tiles, inputs.spans_q, inputs.seed)
    if any(x is not None for x in apart):
        return one_by_one(operator, info, in_dims, args)
    batch = inputs.q.shape[0] if flat_dims[first] is None else inputs.q.movedim(flat_dims[first], 0).shape[1]
    folded: list[Tensor | None] = []
    for x, d in zip(args[:n_tensors], flat_dims, strict=True):
        if x is None or (d is None and x.shape[0] == 1 != batch):  # a mask for the whole batch stays one
            folded.append(x)
            continue
        x = x.movedim(d, 0) if d is not None else x.expand(size, *x.shape)
        x = x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
        folded.append(x if x.ndim == 4 else x.contiguous())  # lengths and ranges are promised dense
    outs = operator(*folded, *args[n_tensors:])
    mapped = [o.ndim > 1 for o in outs]  # a gradient nobody needs is empty and has one axis
    results = tuple(o.unflatten(0, (size, -1)) if m else o for o, m in zip(outs, mapped, strict=True))
    return results, tuple(0 if m else None for m in mapped)


def one_by_one(
    operator: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Run the examples one after the other."""
    # The operator's other arguments, lists among them, have no axis; how their in_dims look varies.
    runs = [
        operator(*(x.select(d, i) if isinstance(d, int) else x for x, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(outs) for outs in zip(*runs, strict=True)), (0,) * len(runs[0])
