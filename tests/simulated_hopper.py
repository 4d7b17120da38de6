"""A Hopper GPU that is not there: the kernels of `kernels/gluon` run in the simulator, on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

from gluon_simulator import Edit, simulate
from undivided.conformance.adapters import ours
from undivided.conformance.cases import Case, Problem
from undivided.conformance.evaluation import evaluate
from undivided.conformance.oracle import Results
from undivided.kernels import hopper
from undivided.kernels.gluon.launch import HopperLaunch


def nothing_is_missing(device: torch.device) -> tuple[str, ...]:
    """As `hopper.machine_reasons` says it on a Hopper GPU."""
    return ()


@contextlib.contextmanager
def simulated_hopper(seed: object = 0, edits: Sequence[Edit] = ()) -> Iterator[list[str]]:
    """Within it impl="gluon" takes tensors of the CPU. Gives the names of the kernels launched so far."""
    launched: list[str] = []

    def run(launch: HopperLaunch, device: torch.device) -> None:
        launched.append(launch.kernel.fn.__name__)
        simulate(launch, seed, edits)

    with (
        mock.patch.object(hopper, "machine_reasons", nothing_is_missing),  # a Mock could not be traced
        mock.patch.object(HopperLaunch, "run", run),
    ):
        yield launched


def attend(problem: Problem, seed: object = 0) -> Results:
    """Everything that the kernels compute for one problem."""
    with simulated_hopper(seed):
        return evaluate(ours("gluon"), problem._replace(want=("lse", "max_logit", "entropy")))


def is_taken(case: Case) -> bool:
    """Whether the forward kernel takes a case."""
    with simulated_hopper():
        return not hopper.unsupported_reasons(*case.build(torch.float16).prepared())


def is_taken_backward(case: Case) -> bool:
    """Whether the backward kernel does; if not, Triton's run in the interpreter, slowly and in fp16 only."""
    return hopper.has_backward(*case.build(torch.float16).prepared())
