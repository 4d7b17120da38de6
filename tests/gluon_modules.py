"""Triton's modules as a simulated kernel imports them: the names of Gluon, over `gluon_language`.

A dtype is torch's, a layout nothing. A name that is missing here raises when it is used, not before.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gluon_language as device
from gluon_arithmetic import (
    Scalar,
    cast,
    cdiv,
    elementwise,
    fma,
    maximum,
    minimum,
    reduce_max,
    reduce_min,
    reduce_sum,
    scalar,
    where,
)
from gluon_hardware import require
from gluon_memory import SharedMemory

TRITON_VERSION = "3.6.0"


class Absent:
    """A name that the simulator does not know: it may be imported and annotate, not be used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")

    def __getitem__(self, _: object) -> Absent:
        return self

    def __call__(self, *_: object, **__: object) -> Any:
        raise NotImplementedError(f"the simulator has no {self._name}")


class FakeModule(types.ModuleType):
    """A module of some names, of which all others are `Absent`."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


def _layout(*_: Any, **fields: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"parent": None, **fields})


LAYOUTS = (
    "AutoLayout",
    "BlockedLayout",
    "SliceLayout",
    "DotOperandLayout",
    "NVMMADistributedLayout",
    "NVMMASharedLayout",
    "SwizzledSharedLayout",
)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, shape))


LANGUAGE: dict[str, Any] = {
    **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")},
    **{name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64", "uint8")},
    **{name: getattr(torch, name) for name in ("uint32", "uint64")},
    "int1": torch.bool,
    "constexpr": lambda x: x,
    "tensor": Tensor,
    "shared_memory_descriptor": SharedMemory,
    **dict.fromkeys(LAYOUTS, _layout),
    "program_id": lambda axis: Scalar(0 if axis else device.running().program),
    "num_programs": lambda axis: Scalar(1 if axis else device.running().programs),
    "num_warps": lambda: device.running().scheduler.current.warps,
    "static_range": range,
    "static_assert": lambda good, what="": require(good, f"static_assert: {what}"),
    "device_assert": lambda good, what="", mask=None: require(bool(torch.as_tensor(good).all()), what),
    "assume": lambda good: require(bool(good), "what a kernel assumes is not so"),
    "multiple_of": lambda x, _: x,
    "max_constancy": lambda x, _: x,
    "max_contiguous": lambda x, _: x,
    "to_tensor": scalar,
    "cast": cast,
    "arange": lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
    "full": lambda shape, value, dtype, layout=None: torch.full(_shape(shape), value, dtype=dtype),
    "zeros": lambda shape, dtype, layout=None: torch.zeros(_shape(shape), dtype=dtype),
    "full_like": lambda x, value, dtype=None, **_: torch.full_like(x, value, dtype=dtype),
    "zeros_like": lambda x, dtype=None, **_: torch.zeros_like(x, dtype=dtype),
    "convert_layout": lambda x, layout, **_: x,
    "set_auto_layout": lambda x, layout: x,
    "expand_dims": lambda x, axis: x.unsqueeze(axis),
    "permute": lambda x, order: x.permute(*order),
    "reshape": lambda x, shape: x.reshape(_shape(shape)),
    "where": where,
    "maximum": maximum,
    "minimum": minimum,
    "max": reduce_max,
    "min": reduce_min,
    "sum": reduce_sum,
    "cdiv": cdiv,
    "fma": fma,
    "exp": elementwise(torch.exp, math.exp),
    "exp2": elementwise(torch.exp2, lambda x: 2.0**x),
    "log": elementwise(torch.log, lambda x: math.log(x) if x else -math.inf),
    "log2": elementwise(torch.log2, lambda x: math.log2(x) if x else -math.inf),
    "sqrt": elementwise(torch.sqrt, math.sqrt),
    "rsqrt": elementwise(torch.rsqrt, lambda x: 1 / math.sqrt(x)),
    "floor": elementwise(torch.floor, math.floor),
    "ceil": elementwise(torch.ceil, math.ceil),
    "abs": abs,
    "load": device.load,
    "store": device.store,
    "atomic_add": device.atomic_add,
    "inline_asm_elementwise": device.inline_asm_elementwise,
    "thread_barrier": lambda: device.running().scheduler.pause(),
    "allocate_shared_memory": device.allocate_shared_memory,
    "warp_specialize": device.warp_specialize,
}

MBARRIER: dict[str, Any] = {
    "MBarrierLayout": _layout,
    "allocate_mbarrier": lambda batch=None, **_: device.allocate_shared_memory(torch.int64, [batch or 1, 1]),
    "init": device.mbarrier_init,
    "expect": device.mbarrier_expect,
    "arrive": device.mbarrier_arrive,
    "wait": device.mbarrier_wait,
    "invalidate": lambda memory: None,
}

TMA: dict[str, Any] = {
    # as Triton 3.6 calls them, and as later ones do
    "async_copy_global_to_shared": device.copy_in,
    "async_copy_shared_to_global": device.copy_out,
    "async_load": device.copy_in,
    "async_store": device.copy_out,
    "async_atomic_add": device.copy_out_adding,
    "store_wait": lambda pendings: device.running().wait_stores(int(pendings)),
}


def fake_modules() -> dict[str, types.ModuleType]:
    """Everything that can be imported from triton in a simulated module, by dotted name."""
    gluon, hopper = "triton.experimental.gluon", "triton.experimental.gluon.language.nvidia.hopper"
    contents: dict[str, dict[str, Any]] = {
        "triton": {"__version__": TRITON_VERSION, "jit": device.jit, "cdiv": lambda a, b: -(-a // b)},
        "triton.language": LANGUAGE,
        "triton._C": {},
        "triton._C.libtriton": {},
        "triton._C.libtriton.ir": {"DESCRIPTOR_REDUCE_KIND": types.SimpleNamespace(ADD="add")},
        "triton.experimental": {},
        gluon: {"jit": device.jit, "constexpr_function": device.jit},
        f"{gluon}.language": LANGUAGE,
        f"{gluon}.language._core": {
            **LANGUAGE,
            "builtin": device.builtin,
            "_unwrap_if_constexpr": lambda x: x,
        },
        f"{gluon}.language.nvidia": {},
        hopper: {
            "fence_async_shared": lambda cluster=False: device.running().fence(),
            "warpgroup_mma": device.warpgroup_mma,
            "warpgroup_mma_wait": device.warpgroup_mma_wait,
        },
        f"{hopper}.tma": TMA,
        f"{hopper}.mbarrier": MBARRIER,
    }
    modules: dict[str, types.ModuleType] = {name: FakeModule(name, names) for name, names in contents.items()}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules
