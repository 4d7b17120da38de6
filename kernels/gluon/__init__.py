"""Attention for Hopper GPUs, in Gluon: Triton's language for those who place tiles, barriers and warps.

Same calls as `triton`. Forward and backward each have a module with the kernel and its launcher; who works
on what and who sees whom is in `positions`, sizes are data in `config`, `compat` hides what differs between
Tritons.
"""

from torch import Tensor

from .. import hopper
from ..spec import AttentionSpec, Gradients, Inputs, Needs
from ..triton import BUILD_ERRORS
from ..triton import attention_backward as _portable_backward
from .hopper_backward import attention_backward as _hopper_backward
from .hopper_forward import attention_forward


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Needs,
) -> Gradients:
    """Gradients of one call, by the Hopper kernel if it takes it, else by those of `triton`.

    It makes dq, dk and dv in one pass: where fewer are asked for, the others compute less.
    """
    wants_all = needs.dq and (needs.dk or needs.dv)
    backward = _hopper_backward if wants_all and hopper.has_backward(inputs, spec) else _portable_backward
    return backward(dout, dlse, out, lse, inputs, spec, needs)


__all__ = ["BUILD_ERRORS", "attention_backward", "attention_forward"]
