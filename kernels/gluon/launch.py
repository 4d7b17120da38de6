"""A Hopper kernel with everything it is about to be called with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from ..triton.launch import current, failure, kind, recall


class Tile(NamedTuple):
    """A tensor of which the copy engine moves boxes; what of a box lies outside is zero, or not written."""

    tensor: Tensor
    box: tuple[int, ...]

    def descriptor(self) -> Any:
        """For the kernel."""
        x = self.tensor
        layout = shared_layout(x.element_size(), x.ndim)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), list(self.box), layout)

    def remake(self) -> Callable[[Tensor], Any]:
        """What makes the descriptor of another tensor that is laid out like this one, without checking it."""
        fields = {**vars(self.descriptor()), "base": None}

        def descriptor(tensor: Tensor) -> Any:
            made = TensorDescriptor.__new__(TensorDescriptor)
            made.__dict__.update(fields, base=tensor)
            return made

        return descriptor


@functools.cache
def shared_layout(element_size: int, rank: int) -> Any:
    """How a box lies in shared memory: rows of a head as products read them, statistics one by one."""
    swizzle = 128 if rank == 4 else 0
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * element_size, rank=rank)


class HopperLaunch(NamedTuple):
    """One launch. arguments are the kernel's run-time parameters, constants its constexprs."""

    kernel: JITFunction[Any]
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told: the first partition is one warpgroup."""
        return {"num_warps": 4, "enable_fp_fusion": True}

    @property
    def needs_scratch(self) -> bool:
        """Its descriptors are made by the host."""
        return False

    def parameters(self) -> list[Any]:
        """Every parameter of the kernel, in its order."""
        given = self.arguments | self.constants
        return [given[name] for name in self.kernel.arg_names]

    def recall(self, device: torch.device) -> None:
        """Raise the BuildError that an earlier attempt ended with."""
        recall(lambda: self._variant(device))

    def run(self, device: torch.device) -> Any:
        """Start the kernel on the current stream of the device its tensors are on; the compiled kernel.

        Raises:
            BuildError: it could not be built.
        """
        self.recall(device)
        try:
            with current(device):
                return self.start()
        except Exception as error:
            raise failure(error, self.kernel, self._variant(device)) from error

    def _variant(self, device: torch.device) -> Hashable:
        """All that decides what is compiled, for what."""
        arguments = (x.tensor if isinstance(x, Tile) else x for x in self.arguments.values())
        return self.kernel, device.index, *map(kind, arguments), *self.constants.values()

    def start(self) -> Any:
        """Compile if need be, and launch."""
        arguments = {name: x.descriptor() if isinstance(x, Tile) else x for name, x in self.arguments.items()}
        return self.kernel[(self.programs,)](**arguments, **self.constants, **self.options)
