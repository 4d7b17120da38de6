"""The attention functions that can be checked by name: ours, PyTorch's, and other people's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.spec import DTYPES
from .budget import Arithmetic
from .cases import Problem
from .target import EVERYTHING, Target

ARITHMETIC: dict[str, Arithmetic] = {
    "auto": "kernel",
    "reference": "wide",
    "fallback": "wide",
    "triton": "kernel",
}


def ours(impl: str) -> Target:
    """One of this package's implementations, through its public path: prepare, choose, run."""

    def attend(problem: Problem) -> tuple[Tensor, Tensor]:
        inputs, spec = problem.prepared()
        return dispatch.run(inputs, spec, dispatch.choose(impl, inputs, spec))

    return Target(
        f"undivided {impl}", attend, replace(EVERYTHING, dtypes=_dtypes(impl), arithmetic=ARITHMETIC[impl])
    )


def _dtypes(impl: str) -> tuple[torch.dtype, ...]:
    if impl == "reference":  # 16-bit inputs are widened by whoever calls it
        return torch.float32, torch.float64
    if impl == "triton":
        interpreted = (torch.float16, torch.float32)
        return (*interpreted, torch.bfloat16) if torch.cuda.is_available() else interpreted
    return DTYPES
