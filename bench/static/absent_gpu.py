"""A Triton driver for a GPU that is not there: kernels are compiled for it, launches noted and not done.

Under it the launchers of `kernels/triton` run unchanged, on meta tensors say, so what gets compiled is, to
the last specialised argument, what the same call compiles on that GPU: no second description can drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from .targets import Target


class Launch(NamedTuple):
    """One launch that did not happen."""

    function: Any  # the @triton.jit function
    handle: object  # what stands for the loaded binary
    device: GPUTarget
    grid: tuple[int, int, int]

    @property
    def kernel(self) -> Any:
        """The CompiledKernel behind it, with its intermediate texts in `.asm`."""
        compiled = self.function.device_caches[self.device][0].values()
        return next(kernel for kernel in compiled if kernel.function is self.handle)


class AbsentGPU:
    """What Triton's runtime asks of a driver, answered for `target` without a device."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.launches: list[Launch] = []
        self.utils = self  # the runtime reaches load_binary and get_device_properties through .utils

    def get_current_target(self) -> GPUTarget:
        return self.target.triton

    def get_current_device(self) -> GPUTarget:
        """Triton keys its per-device caches by this, so each target has its own."""
        return self.target.triton

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_device_properties(self, device: GPUTarget) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared_per_cta}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: GPUTarget
    ) -> tuple[object, object, int, int, int]:
        """(module, function, registers, spills, most threads), as the real one answers."""
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Triton keeps the result with the kernel, beyond the life of this driver."""

        def launch(x: int, y: int, z: int, stream: int, handle: object, *args: object) -> None:
            driver.active.launches.append(Launch(source.fn, handle, self.target.triton, (x, y, z)))

        return launch


@contextmanager
def absent_gpu(target: Target) -> Iterator[list[Launch]]:
    """Make Triton believe in a GPU of that architecture; yields the list that its launches are noted in."""
    before = driver._active
    gpu = AbsentGPU(target)
    driver.set_active(gpu)
    try:
        yield gpu.launches
    finally:
        driver.set_active(before)
