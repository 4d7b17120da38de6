"""A GPU that is not there, behind Triton's own launcher for NVIDIA's: everything that the host does.

`absent_gpu` notes launches where Triton would fill in arguments for the driver. Here Triton's own launcher
does, in C, as on a GPU; only the driver below it, `libcuda`, is a stand-in that answers at once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triton.runtime.driver import driver

from .absent_gpu import AbsentGPU
from .targets import Target

SOURCE = """
#include <stdint.h>
#include <string.h>
#define ANSWER(name, given, ...) int name given { __VA_ARGS__; return 0; }
ANSWER(cuCtxGetCurrent, (void **x), *x = (void *)1)
ANSWER(cuCtxSetCurrent, (void *x))
ANSWER(cuCtxGetDevice, (int *x), *x = 0)
ANSWER(cuCtxGetLimit, (size_t *x, int which), *x = 0)
ANSWER(cuCtxSetLimit, (int which, size_t x))
ANSWER(cuDeviceGet, (int *x, int number), *x = number)
ANSWER(cuDeviceGetAttribute, (int *x, int which, int device), *x = 1 << 18)
ANSWER(cuDevicePrimaryCtxRetain, (void **x, int device), *x = (void *)1)
ANSWER(cuDriverGetVersion, (int *x), *x = 13000)
ANSWER(cuFuncGetAttribute, (int *x, int which, void *function), *x = 1024)
ANSWER(cuFuncSetAttribute, (void *function, int which, int x))
ANSWER(cuFuncSetCacheConfig, (void *function, int x))
ANSWER(cuGetErrorString, (int error, const char **x), *x = "")
ANSWER(cuModuleGetFunction, (void **x, void *module, const char *name), *x = (void *)1)
ANSWER(cuModuleLoadData, (void **x, const void *image), *x = (void *)1)
ANSWER(cuModuleUnload, (void *module))
ANSWER(cuOccupancyMaxActiveClusters, (int *x, void *function, const void *config), *x = 1)
ANSWER(cuPointerGetAttribute, (void *x, int which, uint64_t address), *(uint64_t *)x = address)
ANSWER(cuStreamIsCapturing, (void *stream, int *x), *x = 0)
ANSWER(cuTensorMapEncodeTiled, (void *x, ...), memset(x, 0, 128))
ANSWER(cuTensorMapEncodeIm2col, (void *x, ...), memset(x, 0, 128))
ANSWER(cuLaunchKernelEx, (const void *config, void *function, void **arguments, void **extra))
int cuPointerGetAttributes(unsigned n, int *which, void **x, uint64_t address) {
    for (unsigned i = 0; i < n; i++) *(uint64_t *)x[i] = address;
    return 0;
}
"""
"""What Triton 3.6 to 3.9 calls of the driver."""
NAME = "libcuda.so.1"


class IdleGPU(AbsentGPU):
    """NVIDIA's driver as Triton has it, for a target that is not there."""

    def __init__(self, target: Target) -> None:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        super().__init__(target)
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher  # type: ignore[method-assign]

    def get_current_device(self) -> int:
        """As the functions in C want it."""
        return 0


@contextmanager
def idle_gpu(target: Target, folder: Path) -> Iterator[None]:
    """Make Triton believe in such a GPU; to be entered in a process that has not loaded libcuda.

    folder: for the stand-in.

    Raises:
        CalledProcessError, FileNotFoundError: there is no C compiler, which Triton needs too.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc"
    source, library = folder / "libcuda.c", folder / NAME
    source.write_text(SOURCE, encoding="utf-8")
    options = ["-shared", "-fPIC", "-O2", f"-Wl,-soname,{NAME}"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # whoever asks for that name gets the one loaded
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    before = driver._active
    driver.set_active(IdleGPU(target))
    try:
        yield
    finally:
        driver.set_active(before)
