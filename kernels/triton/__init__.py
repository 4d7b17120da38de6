"""Attention in Triton, for GPUs.

A kernel module holds one pass: the `@triton.jit` kernel, written as a sentence made of the device
functions of `tiles`, `visibility` and `softmax`, and the launcher that fills its arguments. Tile sizes
are data, in `config.py`. Nothing outside this folder imports triton, so the package works without it.
"""

from .backward import attention_backward
from .forward import attention_forward
from .launch import BuildError

BUILD_ERRORS = (BuildError, NotImplementedError)
"""What goes wrong before a launch, the second where no tile fits; after it, nothing may be retried."""

__all__ = ["BUILD_ERRORS", "attention_backward", "attention_forward"]
