"""Calls that are launched again without asking Triton: by kernels that note how they are launched."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="nothing is launched without Triton")

from triton import knobs
from triton.runtime.driver import driver

from simulated_hopper import simulated_hopper
from undivided.bench import launch_cost
from undivided.conformance.cases import Case, Extra
from undivided.kernels import gluon, hopper
from undivided.kernels.gluon import hopper_backward, hopper_forward
from undivided.kernels.spec import N_GRADIENTS, Inputs, Needs
from undivided.kernels.triton import attention_backward, attention_forward, backward, forward, replay
from undivided.kernels.triton.config import TileConfig
from undivided.kernels.triton.launch import BuildError, Launch

CPU = torch.device("cpu")
TILE = TileConfig(32, 32, 4, 1)


class Noted:
    """Stands for a kernel: notes what it is launched with, by Triton, or again, by the launcher it gave."""

    def __init__(self, names: list[str]) -> None:
        self.arg_names, self.__name__, self.pre_run_hooks = names, "noted", list[Any]()
        self.asked: list[list[Any]] = []
        self.again: list[list[Any]] = []
        self.error: Exception | None = None

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        def start(*arguments: Any, **named: Any) -> Any:
            given = dict(zip(self.arg_names, arguments), **named)
            self.asked.append([*grid, *(given[name] for name in self.arg_names)])
            if self.error:
                raise self.error
            return SimpleNamespace(run=self.launcher, function=1, packed_metadata=2)

        return start

    def launcher(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert (y, z, *rest[:5]) == (1, 1, 1, 2, None, None, None)
        if self.error:
            raise self.error
        self.again.append([x, *rest[5:]])


class GPU:
    """What Triton's driver says."""

    device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    there = GPU()
    monkeypatch.setattr(driver, "_active", there)
    monkeypatch.setattr(replay, "_known", {})
    return there


@pytest.fixture
def kernel() -> Noted:
    return Noted(["x_ptr", "strides", "y_ptr", "n", "BLOCK"])


def call(kernel: Noted, x: Tensor | None, y: Tensor | None, n: int = 3, copied: bool = False) -> None:
    """A call with two tensors and an option."""
    strides = None if x is None else x.stride()
    read = y.clone() if copied and y is not None else y
    replay.run(n, (x, y), CPU, lambda: [Launch(kernel, 5, (x, strides, read, n), {"BLOCK": 16}, TILE)])  # type: ignore[arg-type]


def half(*shape: int, offset: int = 0) -> Tensor:
    return torch.zeros(64, dtype=torch.float16)[offset:].as_strided(shape, (4, 1))


def test_a_call_like_an_earlier_one_is_not_asked_about(kernel: Noted) -> None:
    """A launch with the tensors of the earlier call, or without what is no tensor."""
    for _ in range(2):  # what is met once is not worth remembering
        call(kernel, half(2, 4), half(2, 4))
    x, y = half(2, 4), half(2, 4)
    call(kernel, x, y)
    assert len(kernel.asked) == 2
    assert kernel.again == [[5, x.data_ptr(), (4, 1), y.data_ptr(), 3, 16]]


OTHERS: dict[str, Callable[[Noted], None]] = {
    "alignment": lambda kernel: call(kernel, half(2, 4, offset=1), half(2, 4)),
    "alignment of the last": lambda kernel: call(kernel, half(2, 4), half(2, 4, offset=4)),
    "dtype": lambda kernel: call(kernel, half(2, 4).bfloat16(), half(2, 4)),
    "shape": lambda kernel: call(kernel, half(2, 3), half(2, 4)),
    "strides": lambda kernel: call(kernel, torch.zeros(4, 2, dtype=torch.float16).T, half(2, 4)),
    "absent": lambda kernel: call(kernel, half(2, 4), None),
    "the other is absent": lambda kernel: call(kernel, None, half(2, 4)),
    "option": lambda kernel: call(kernel, half(2, 4), half(2, 4), n=4),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_each_variant_is_its_own(other: Callable[[Noted], None], kernel: Noted) -> None:
    """A kernel compiled for addresses that are multiples of 16, run on one that is not."""
    for _ in range(2):
        call(kernel, half(2, 4), half(2, 4))
    for _ in range(2):
        other(kernel)
    assert (len(kernel.asked), len(kernel.again)) == (4, 0)
    other(kernel)
    call(kernel, half(2, 4), half(2, 4))
    assert (len(kernel.asked), len(kernel.again)) == (4, 2)


def test_a_device_has_its_own(kernel: Noted, gpu: GPU) -> None:
    """A function loaded on one GPU, launched on another."""
    for device, asked in ((0, 1), (0, 2), (0, 2), (1, 3), (1, 3)):
        gpu.device = device
        call(kernel, half(2, 4), half(2, 4))
        assert len(kernel.asked) == asked


def test_one_tensor_in_two_places_tells_nothing_of_two(kernel: Noted) -> None:
    """attention(x, x, x), remembered as if k and v were always q."""
    x = half(2, 4)
    for _ in range(2):
        call(kernel, x, x)
    y = half(2, 4)
    for _ in range(2):
        call(kernel, x, y)
    assert len(kernel.asked) == 3
    assert kernel.again == [[5, x.data_ptr(), (4, 1), y.data_ptr(), 3, 16]]


def test_a_copy_made_on_the_way_is_made_again(kernel: Noted) -> None:
    """The kernel reads the copy of an earlier call's tensor."""
    for _ in range(4):
        call(kernel, half(2, 4), half(2, 4), copied=True)
    assert (len(kernel.asked), len(kernel.again)) == (4, 0)


def test_no_tensor_outlives_its_call(kernel: Noted) -> None:
    """Gigabytes that a table of launches keeps."""
    x, y = half(2, 4), half(2, 4)
    gone = [weakref.ref(x), weakref.ref(y)]
    for _ in range(2):
        call(kernel, x, y)
    kernel.asked.clear()
    del x, y
    gc.collect()
    assert any(replay._known.values())
    assert [ref() for ref in gone] == [None, None]


def test_memory_of_calls_is_bounded(kernel: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that grows with every length that a server meets."""
    monkeypatch.setattr(replay, "MOST_REMEMBERED", 3)
    for n in range(10):
        call(kernel, half(2, 4), half(2, 4), n)
        assert len(replay._known) <= 3


def test_who_listens_hears_every_launch(kernel: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler that sees the first call only; TRITON_DEBUG without effect."""

    def heard() -> int:
        before = len(kernel.asked)
        call(kernel, half(2, 4), half(2, 4))
        return len(kernel.asked) - before

    assert (heard(), heard(), heard()) == (1, 1, 0)
    hook = lambda *_, **__: None  # noqa: E731
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        assert heard()
        chain.remove(hook)
        assert not heard()
    kernel.pre_run_hooks.append(hook)
    assert heard()
    kernel.pre_run_hooks.clear()
    for place, name, value in (
        (knobs.runtime, "debug", True),
        (knobs.runtime, "launch_enter_hook", None),
        (knobs.runtime, "add_stages_inspection_hook", hook),
        (knobs.compilation, "instrumentation_mode", "fpsan"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(place, name, value, raising=False)
            assert heard(), name
    assert not heard()


def test_what_fails_is_not_remembered(kernel: Noted) -> None:
    """A launch that never was, repeated; a fault on the device taken for a kernel that does not build."""
    kernel.error = RuntimeError("PassManager::run failed")
    with pytest.raises(BuildError):
        call(kernel, half(2, 4), half(2, 4))
    assert not replay._known
    kernel.error = None
    other = Noted(kernel.arg_names)
    for _ in range(3):
        call(other, half(2, 4), half(2, 4))
    other.error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal") as raised:
        call(other, half(2, 4), half(2, 4))
    assert not isinstance(raised.value, BuildError)


def test_another_triton_gets_the_ordinary_launch(kernel: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher called with arguments in last year's order; the interpreter, which returns nothing."""
    monkeypatch.setattr(replay, "EXPECTED", ("kernel.launch(everything)",))
    replay._as_expected.cache_clear()
    try:
        for _ in range(3):
            call(kernel, half(2, 4), half(2, 4))
    finally:
        replay._as_expected.cache_clear()
    assert not kernel.again
    monkeypatch.setattr(Noted, "__getitem__", lambda *_: lambda *_, **__: None)
    for _ in range(3):
        call(kernel, half(2, 4), half(2, 3))
    assert not any(call.starts for call in replay._known.values() if call)


def test_this_triton_is_as_expected() -> None:
    """The lines that are looked for are nowhere: every call takes the slow way, and nobody notices."""
    assert replay._as_expected()


CASES = {
    "plain": Case("plain", batch=2, heads_q=4, heads_kv=2, seqlen_q=20, seqlen_k=33),
    "causal": Case("causal", causal=True, seqlen_q=20, seqlen_k=33, head_dim=32),
    "busy": Case(
        "busy", bias=Extra(axes="hk"), alibi="h", sinks=True, softcap=2.0, dropout_p=0.5, window=(3, 4)
    ),
    "mask": Case("mask", mask=Extra(axes="bqk"), batch=2, key_lengths=(3, 5), seqlen_q=5, seqlen_k=7),
}


def noted(monkeypatch: pytest.MonkeyPatch, *kernels: tuple[Any, str]) -> list[Noted]:
    """Put such kernels in the place of others."""
    made = []
    for module, name in kernels:
        names = list(inspect.signature(getattr(module, name).fn).parameters)
        made.append(Noted(names))
        monkeypatch.setattr(module, name, made[-1])
    return made


def read(launched: list[Any], inputs: Inputs, others: dict[str, Tensor]) -> list[Any]:
    """Parameters in words: whose address, or which descriptor of whom; results are "new"."""
    owners = {x.data_ptr(): name for name, x in {**inputs._asdict(), **others}.items() if x is not None}

    def word(x: Any) -> Any:
        if isinstance(x, Tensor):
            return owners.get(x.data_ptr(), "new")
        if hasattr(x, "block_shape"):
            return word(x.base), x.shape, x.strides, x.block_shape, x.layout, x.padding
        return owners.get(x, "new") if isinstance(x, int) and x > 2**40 else x

    return list(map(word, launched))


def same_again(kernels: list[Noted], before: Inputs, after: Inputs, others: list[dict[str, Tensor]]) -> None:
    """Each kernel was launched by Triton with the tensors `before`, twice, and again with those `after`."""
    assert any(kernel.asked for kernel in kernels)
    for kernel in kernels:
        assert 2 * len(kernel.again) == len(kernel.asked)
        for asked, again in zip(kernel.asked[: len(kernel.again)], kernel.again, strict=True):
            assert read(again, after, others[1]) == read(asked, before, others[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_is_launched_again_as_it_would_be(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter of the forward kernel that is another's, or that depends on more than is remembered."""
    kernels = noted(monkeypatch, (forward, "_forward_kernel"))
    (before, spec), (after, _) = (case.build(torch.float32).prepared() for _ in range(2))
    for inputs in (before, before, after):
        attention_forward(inputs, spec._replace(want_max=True))
    same_again(kernels, before, after, [{}, {}])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backward_is_launched_again_as_it_would_be(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of the four kernels of backward."""
    names = ("dkdv_kernel", "dq_kernel", "dbias_kernel", "_row_statistics_kernel")
    kernels = noted(monkeypatch, *((backward, name) for name in names))
    calls, others = [], []
    for _ in range(3):
        problem = case.build(torch.float32)
        inputs, spec = problem.prepared()
        mine = {"dout": problem.dout, "out": problem.dout.clone(), "lse": problem.dlse.clone()}
        needs = Needs(*(x is not None for x in inputs[:N_GRADIENTS]))
        attention_backward(mine["dout"], None, mine["out"], mine["lse"], inputs, spec, needs)
        calls.append(inputs)
        others.append(mine)
    same_again(kernels, calls[0], calls[2], others[::2])


def test_hopper_is_launched_again_as_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor of another tensor, or without what its checks filled in."""
    kernels = noted(
        monkeypatch,
        (hopper_forward, "_forward_kernel"),
        (hopper_backward, "_backward_kernel"),
        (backward, "_row_statistics_kernel"),
    )
    monkeypatch.setattr(hopper, "machine_reasons", lambda _: ())
    case = Case("hopper", batch=2, heads_q=4, heads_kv=2, seqlen_q=20, seqlen_k=33, head_dim=64, causal=True)
    calls, others = [], []
    for _ in range(3):
        problem = case.build(torch.float16)
        inputs, spec = problem.prepared()
        out, lse, _ = gluon.attention_forward(inputs, spec)
        dout = problem.dout.contiguous()
        gluon.attention_backward(dout, None, out, lse, inputs, spec, Needs(True, True, True))
        calls.append(inputs)
        others.append({"dout": dout})
    same_again(kernels, calls[0], calls[2], others[::2])


def test_a_simulated_launch_is_not_remembered() -> None:
    """A simulator that is asked once, and then passed by."""
    with simulated_hopper():
        for _ in range(2):
            hopper_forward.attention_forward(*Case("x", head_dim=64).build(torch.float16).prepared())
    assert not any(call.starts for call in replay._known.values() if call)


@pytest.mark.compile
def test_host_time_is_measured_without_a_gpu() -> None:
    """A driver's function that the stand-in lacks; figures that silently vanish; no call launched again."""
    found = launch_cost.host_us()
    assert {"triton, forward", "gluon, forward", "gluon, forward + backward"} <= found.keys()
    for impl in ("triton", "gluon"):
        assert found[f"{impl}, forward"] < found[f"{impl}, forward of a shape not seen before"]


REAL = """
import torch
from undivided.bench.static.absent_gpu import absent_gpu
from undivided.bench.static.targets import TARGETS
from undivided.kernels.spec import AttentionSpec, Inputs
from undivided.kernels.triton import attention_forward, replay

def attend(offset=0, dtype=torch.float16):
    q = torch.zeros(2 * 16 * 16 + 8, dtype=dtype)[offset:][: 2 * 16 * 16].view(1, 2, 16, 16)
    attention_forward(Inputs(q, q.clone(), q.clone()), AttentionSpec(1.0))

with absent_gpu(TARGETS["sm_90"]) as launches:
    for offset, dtype in 3 * [(0, torch.float16), (1, torch.float16), (0, torch.bfloat16)]:
        attend(offset, dtype)
handles = [launch.handle for launch in launches]
print(sum(len(call.starts) for call in replay._known.values()), [handles.index(x) for x in handles])
print({launch.kernel.name for launch in launches}, len({launch.grid for launch in launches}))
"""


@pytest.mark.compile
def test_with_triton_itself() -> None:
    """Triton specialises on something that is not looked at here."""
    done = subprocess.run(
        [sys.executable, "-c", REAL],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3 [0, 1, 2, 0, 1, 2, 0, 1, 2]", "{'_forward_kernel'} 1"]
