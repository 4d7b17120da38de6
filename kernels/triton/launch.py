"""A kernel with everything it is about to be called with; and what is known of those that do not build."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import JITFunction

from ..philox import drop_threshold
from ..spec import AttentionSpec, Inputs
from .config import TileConfig, architecture

Strides = tuple[int | None, ...]


class BuildError(RuntimeError):
    """A kernel could not be compiled, or does not fit the device: it was not launched."""


NOT_OF_THE_BUILD = (InterpreterError, torch.AcceleratorError, torch.OutOfMemoryError)
MOST_REMEMBERED = 256
_not_built: dict[Hashable, str] = {}
"""Why, by what the compiler was given: to ask again would take seconds, at every call."""


def recall(variant: Callable[[], Hashable]) -> None:
    """Raise the BuildError that an earlier attempt at a kernel ended with; variant is asked if any did."""
    if _not_built and (reason := _not_built.get(variant())):
        raise BuildError(reason)


def failure(error: Exception, kernel: JITFunction[Any], variant: Hashable) -> Exception:
    """What a launch that raised `error` ends with: a BuildError, for `recall`, if the kernel was not built.

    Triton compiles, loads and launches in one call; whatever the driver did not say came before the launch.
    """
    if isinstance(error, NOT_OF_THE_BUILD) or str(error).startswith("Triton Error ["):  # a fault, perhaps
        return error
    reason = f"{kernel.__name__}: {type(error).__name__}: {error}"
    if len(_not_built) >= MOST_REMEMBERED:
        _not_built.clear()
    _not_built[variant] = reason
    return BuildError(reason)


class Launch(NamedTuple):
    """One launch. arguments are the kernel's run-time parameters, constants its constexprs."""

    kernel: JITFunction[Any]
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: TileConfig

    def options(self) -> dict[str, Any]:
        """What the compiler is told. Fusing s·unit - offset into one FFMA is off in newer Tritons."""
        config = self.config
        return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}

    @property
    def needs_scratch(self) -> bool:
        """Whether the kernel may make descriptors, for which Triton wants memory."""
        return self.config.tma

    def parameters(self) -> list[Any]:
        """Every parameter of the kernel, in its order."""
        names = self.kernel.arg_names[len(self.arguments) :]
        return [*self.arguments, *(self.constants[name] for name in names)]

    def run(self, device: torch.device) -> Any:
        """Start the kernel on the current stream of the device its tensors are on; the compiled kernel.

        Raises:
            BuildError: it could not be built.
        """
        self.recall(device)
        if self.needs_scratch:
            triton.set_allocator(scratch)
        with current(device):
            return self._start(device)

    def recall(self, device: torch.device) -> None:
        """Raise the BuildError that an earlier attempt ended with."""
        recall(lambda: self._variant(device))

    def _start(self, device: torch.device) -> Any:
        try:
            return self.kernel[(self.programs,)](*self.arguments, **self.constants, **self.options())
        except Exception as error:
            raise failure(error, self.kernel, self._variant(device)) from error

    def _variant(self, device: torch.device) -> Hashable:
        """All that decides what is compiled, for what."""
        constants = tuple(self.constants.values())
        return self.kernel, architecture(device), kind(self.arguments), constants, self.config


def kind(x: Any) -> Hashable:
    """What Triton specialises a kernel on."""
    if isinstance(x, tuple):
        return tuple(map(kind, x))
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x == 1, x % 16 == 0, x.bit_length() > 31
    return type(x).__name__


def broadcast_strides(x: Tensor | None) -> Strides | None:
    """Strides of a bias or mask: 0 for a batch or head axis of size 1, None for a row or column axis."""
    if x is None:
        return None
    shape, stride = x.shape, x.stride()
    return (
        0 if shape[0] == 1 else stride[0],
        0 if shape[1] == 1 else stride[1],
        None if shape[2] == 1 else stride[2],
        None if shape[3] == 1 else stride[3],
    )


def dense_slopes(slopes: Tensor | None) -> tuple[Tensor | None, int | None]:
    """ALiBi's slopes in float32, and how far those of the next batch entry are: 0 if it has the same."""
    if slopes is None:
        return None, None
    return slopes.float().contiguous(), 0 if slopes.shape[0] == 1 else slopes.shape[1]


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a GPU is the current one: nothing, if it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for tensor descriptors made inside kernels."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def positive_scale(scale: float) -> float:
    """|scale|, and for 0 something that makes every score vanish but keeps 0·(-inf) out of kernels."""
    return max(abs(scale), 2.0**-120)


def dropped_bits(dropout_p: float) -> int:
    """round(p·2³²) - 1, the last 32-bit word that is dropped, as the int32 with its bits."""
    last = drop_threshold(dropout_p) - 1
    return last if last < 2**31 else last - 2**32


def kept_scale(dropout_p: float) -> float:
    """What kept probabilities are multiplied by; 0 where none is kept."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def dropout_seed(inputs: Inputs, spec: AttentionSpec) -> Tensor | None:
    """The seed, or None where p is so small that no 32-bit word is below its threshold."""
    return inputs.seed if drop_threshold(spec.dropout_p) > 0 else None
