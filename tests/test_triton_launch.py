"""Kernels that cannot be built are a matter for the fallback; launches that fail are not."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to build without Triton")

from triton.runtime.errors import OutOfResources, PTXASError

from undivided.kernels import functional, ops
from undivided.kernels.triton import BUILD_ERRORS, backward, forward, launch, replay

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Q = torch.randn(1, 2, 5, 16, device=DEVICE)


class Broken:
    """Stands for a kernel whose start raises."""

    __name__ = "broken"

    def __init__(self, error: Exception) -> None:
        self.error, self.started = error, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*_: Any, **__: Any) -> None:
            self.started += 1
            raise self.error

        return start


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    """What these tests fail to build must not be remembered after them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ops._say_if_untried(("triton",), Q.device)
    ops._say_once.cache_clear()
    replay.forget()
    yield
    launch._not_built.clear()


def attend(q: torch.Tensor = Q, impl: str = "auto") -> torch.Tensor:
    return ops.attention(*functional.prepare(q, q, q, {"causal": True}), impl)[0]


BUILD_FAILURES = [
    RuntimeError("PassManager::run failed"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    subprocess.CalledProcessError(1, ["gcc"]),
    FileNotFoundError("gcc"),
    AssertionError("shape must be a power of 2"),
    OutOfResources(400, 200, "shared memory"),
    PTXASError("register allocation failed"),
]


@pytest.mark.parametrize("error", BUILD_FAILURES, ids=lambda error: f"{type(error).__name__}: {error}"[:30])
def test_what_does_not_build_is_tried_and_mentioned_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler's error that reaches the user of "auto", or one that is waited for at every call."""
    kernel = Broken(error)
    monkeypatch.setattr(forward, "_forward_kernel", kernel)
    with pytest.warns(RuntimeWarning, match="triton could not build a kernel, fallback runs instead"):
        out = attend()
    assert torch.equal(out, attend(impl="fallback"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attend(), out)
    assert kernel.started == 1
    with pytest.raises(BUILD_ERRORS, match=type(error).__name__):
        attend(impl="triton")
    assert kernel.started == 1
    attend(torch.randn(1, 2, 5, 32, device=DEVICE))
    assert kernel.started == 2, "another head_dim is another kernel"


FAULTS = [
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("Triton Error [HIP]:  Code: 700, Messsage: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    torch.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_a_fault_is_neither_retried_nor_remembered(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault on the device, whatever the fallback computes there is garbage (hazard D7)."""
    kernel = Broken(error)
    monkeypatch.setattr(forward, "_forward_kernel", kernel)
    monkeypatch.setattr(
        ops._implementation("fallback"), "attention_forward", lambda *_: pytest.fail("retried")
    )
    for _ in range(2):
        with pytest.raises(type(error), match=r"Error \[|CUDA"):
            attend()
    assert kernel.started == 2


def test_a_backward_that_lacks_a_kernel_starts_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first kernels would work for nothing, at every call."""
    dq, statistics = (
        Broken(RuntimeError("PassManager::run failed")),
        Broken(OutOfResources(2, 1, "tensor memory")),
    )
    q = Q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(q, "fallback").sum(), q)
    monkeypatch.setattr(backward, "dq_kernel", dq)
    with pytest.warns(RuntimeWarning, match="broken: RuntimeError: PassManager"):
        (first,) = torch.autograd.grad(attend(q).sum(), q)
    monkeypatch.setattr(backward, "_row_statistics_kernel", statistics)
    (second,) = torch.autograd.grad(attend(q).sum(), q)
    assert (dq.started, statistics.started) == (1, 0)
    for gradient in (first, second):
        torch.testing.assert_close(gradient, expected)


def test_no_tile_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "tile_config", lambda *_: None)
    with pytest.warns(RuntimeWarning, match="larger than any tile"):
        assert torch.equal(attend(), attend(impl="fallback"))


def test_memory_of_failures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_REMEMBERED", 2)
    monkeypatch.setattr(forward, "_forward_kernel", Broken(FileNotFoundError("gcc")))
    for head_dim in (16, 17, 18, 19):
        attend(torch.randn(1, 2, 5, head_dim, device=DEVICE))
        assert len(launch._not_built) <= 2


REAL = """
import dataclasses, torch, warnings
from undivided.bench.static.absent_gpu import absent_gpu
from undivided.bench.static.targets import TARGETS
from undivided.kernels import functional, ops

q = torch.randn(1, 2, 16, 64, dtype=torch.float16)
inputs, spec = functional.prepare(q, q, q, {})
with absent_gpu(dataclasses.replace(TARGETS["sm_90"], shared_per_cta=1024)) as launches:
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out, _, _ = ops.attention(inputs, spec, "auto")
        assert torch.equal(out, ops.attention(inputs, spec, "fallback")[0])
        print(*(w.message for w in said if "fallback runs" in str(w.message)))
assert not launches
"""


@pytest.mark.compile
def test_with_triton_itself(tmp_path: Path) -> None:
    """Its own error for a kernel that does not fit, from its own launch."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", REAL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\n")[:2]
    assert "_forward_kernel: OutOfResources: out of resource: shared memory" in first
    assert second == ""
