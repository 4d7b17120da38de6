"""Does the simulator notice what goes wrong between partitions? Bugs planted in a kernel, one at a time."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="the kernels are written in it")

import gluon_toy
from gluon_arithmetic import Float, Scalar, Wide, cdiv, maximum, reduce_max
from gluon_memory import Descriptor
from gluon_modules import Absent
from gluon_partitions import DeadlockError, SimulationError
from gluon_simulator import Edit, simulate

SEEDS = 40
"""Orders of events in which a bug must show."""
ROWS = 700


class Tile(NamedTuple):
    tensor: Tensor
    box: tuple[int, ...]


class Toy(NamedTuple):
    """A launch; all its numbers are small integers, so that sums in any order are exact."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]


def launch_toy(n_rows: int = ROWS, programs: int = 2, stages: int = 2) -> Toy:
    """Outputs are NaN, with more of it behind the row sums; what is added to is 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (n_rows, 64), generator=generator).half()
    w = torch.randint(-1, 2, (64, 64), generator=generator).half()
    y, z = torch.full((n_rows, 64), torch.nan).half(), torch.zeros(64, 64)
    sums = torch.full((n_rows + 64,), torch.nan)
    arguments = {
        "x_tile": Tile(x, (128, 64)),
        "w_tile": Tile(w, (64, 64)),
        "y_tile": Tile(y, (64, 64)),
        "z_tile": Tile(z, (64, 32)),
        "sums": sums,
        "n_rows": n_rows,
    }
    return Toy(gluon_toy.toy, programs, arguments, {"STAGES": stages}, {"num_warps": 4})


def is_right(toy: Toy) -> bool:
    """Every output exactly, and nothing else written."""
    x, w, y, z = (toy.arguments[f"{name}_tile"].tensor for name in "xwyz")
    expected, sums = x.float() @ w.float(), toy.arguments["sums"]
    return (
        torch.equal(y.float(), expected)
        and torch.equal(sums[: len(x)], expected.sum(1))
        and bool(sums[len(x) :].isnan().all())
        and torch.equal(z, expected.mT @ x.float())
    )


def outcome(seed: int, *edits: Edit) -> str:
    """What came of a run: right, wrong, or what broke."""
    toy = launch_toy()
    try:
        simulate(toy, seed, edits)
    except SimulationError as error:
        return f"{type(error).__name__}: {error}"
    return "right" if is_right(toy) else "wrong"


@pytest.mark.parametrize(
    ("n_rows", "programs", "stages"), [(700, 2, 2), (1, 1, 1), (257, 3, 2), (1100, 2, 3)]
)
def test_a_right_kernel_is_right_in_every_order(n_rows: int, programs: int, stages: int) -> None:
    """A simulator that finds what is not there."""
    for seed in range(8):
        toy = launch_toy(n_rows, programs, stages)
        simulate(toy, seed)
        assert is_right(toy)


def edit(old: str, new: str = "") -> Edit:
    return Edit("gluon_toy", old, new)


WAIT_FULL = "        mbarrier.wait(full.index(stage), (step // STAGES) & 1)\n"
WAIT_EMPTY = "        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)\n"
RELEASE = "        mbarrier.arrive(empty.index(stage), count=1)\n"
ANNOUNCE = "        mbarrier.expect(full.index(stage), x_tile.block_type.nbytes)\n"
Z_DONE = "        z = warpgroup_mma_wait(0, deps=[z])\n"
EXCHANGE_FENCE = "        fence_async_shared()\n        named_barrier(2"
FINAL_FENCE = "    fence_async_shared()\n    copy_adding"
STORE_WAIT = "        tma.store_wait(0)\n"

BUGS = {
    "a tile is read before it has landed": (edit(WAIT_FULL), "wrong"),
    "w is read before it has landed": (edit("    mbarrier.wait(there.index(0), 0)\n"), "wrong"),
    "a tile is loaded before it is free": (edit(WAIT_EMPTY), "wrong"),
    "the consumers wait for the phase before": (
        edit(WAIT_FULL, WAIT_FULL.replace("& 1)", "& 1 ^ 1)")),
        "DeadlockError",
    ),
    "the phase is that of another number of stages": (
        edit(WAIT_FULL, WAIT_FULL.replace("STAGES", "(STAGES + 1)")),
        "DeadlockError",
    ),
    "the producer waits for the phase after": (
        edit(WAIT_EMPTY, WAIT_EMPTY.replace(" ^ 1", "")),
        "DeadlockError",
    ),
    "a buffer is released before the product that reads it": (
        edit(Z_DONE + RELEASE, RELEASE + Z_DONE),
        "wrong",
    ),
    "a buffer is never released": (edit(RELEASE), "DeadlockError"),
    "one consumer is enough to release": (
        edit("mbarrier.init(empty.index(stage), count=2)", "mbarrier.init(empty.index(stage), count=1)"),
        "wrong",
    ),
    "three consumers are needed to release": (
        edit("mbarrier.init(empty.index(stage), count=2)", "mbarrier.init(empty.index(stage), count=3)"),
        "DeadlockError",
    ),
    "a consumer releases twice": (edit(RELEASE, RELEASE * 2), "wrong"),
    "an mbarrier is not initialised": (
        edit("        mbarrier.init(full.index(stage), count=1)\n"),
        "nobody initialised",
    ),
    "no bytes are announced": (edit(ANNOUNCE), "DeadlockError"),
    "too few bytes are announced": (edit(ANNOUNCE, ANNOUNCE.replace("nbytes", "nbytes // 2")), "more bytes"),
    "too many bytes are announced": (
        edit(ANNOUNCE, ANNOUNCE.replace("nbytes", "nbytes * 2")),
        "DeadlockError",
    ),
    "an accumulator is used in flight": (
        edit("y = warpgroup_mma_wait(0, deps=[y])", "y = warpgroup_mma_wait(1, deps=[y])"),
        "in flight",
    ),
    "no fence between writing and the product": (
        edit(EXCHANGE_FENCE, EXCHANGE_FENCE.replace("        fence_async_shared()\n", "")),
        "without a fence",
    ),
    "no fence between writing and the copy": (
        edit(FINAL_FENCE, "    copy_adding"),
        "without a fence",
    ),
    "a fence before writing": (
        edit(
            "        mine.store(y.to(exchange.dtype))\n        fence_async_shared()\n",
            "        fence_async_shared()\n        mine.store(y.to(exchange.dtype))\n",
        ),
        "without a fence",
    ),
    "no barrier before a shared buffer is written": (edit("named_barrier(1, 256)", "pass"), "wrong"),
    "no barrier before what the other wrote is read": (edit("named_barrier(2, 256)", "pass"), "wrong"),
    "a barrier that one half passes alone": (edit("named_barrier(1, 256)", "named_barrier(1, 128)"), "wrong"),
    "a barrier that waits for more than there are": (
        edit("named_barrier(2, 256)", "named_barrier(2, 384)"),
        "DeadlockError",
    ),
    "halves at different barriers": (
        edit("named_barrier(1, 256)", "named_barrier(3 + HALF, 256)"),
        "DeadlockError",
    ),
    "a buffer is written while it is copied out": (edit(STORE_WAIT), "wrong"),
    "the program ends while it is copied out": (
        edit("half.index(HALF))\n    tma.store_wait(0)", "half.index(HALF))"),
        "ends before",
    ),
    "a buffer beyond the ring": (edit("ring.index(stage)", "ring.index(stage + 1)"), "buffer 2 of 2"),
    "the mask lets a row too many through": (edit("rows < n_rows", "rows <= n_rows"), "wrong"),
    "the mask hides a row": (edit("rows < n_rows", "rows < n_rows - 1"), "wrong"),
    "no mask": (edit(", mask=rows < n_rows"), "outside its tensor"),
    "an address beyond int32": (
        edit("sums + rows", "sums + (row * 40000000 - row * 40000000) + rows"),
        "overflows",
    ),
}
"""By what is wrong: the edit, and what some run must say."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_shows(bug: str) -> None:
    """A hand-over between partitions that is not modelled, or orders so tame that nothing goes wrong."""
    planted, expected = BUGS[bug]
    outcomes = set()
    for seed in range(SEEDS):
        outcomes.add(outcome(seed, planted))
        if any(expected in found for found in outcomes):
            return
    pytest.fail(f"{expected!r} is none of {outcomes}")


def test_a_seed_is_an_order() -> None:
    """A failure that nobody can look at again; and seeds that are all the same order."""
    planted = edit(STORE_WAIT)
    outcomes = [outcome(seed, planted) for seed in range(12)]
    assert outcomes == [outcome(seed, planted) for seed in range(12)]
    assert len(set(outcomes)) > 1


def test_a_deadlock_says_who_waits_for_what() -> None:
    """An error that only says that something hangs."""
    with pytest.raises(DeadlockError, match=r"multiply 1 waits for parity 0 of an mbarrier .* 1 arrivals"):
        simulate(launch_toy(), 0, [edit(ANNOUNCE)])


def test_an_edit_that_fits_nowhere_is_refused() -> None:
    """A bug that is not planted because the kernel has changed, and passes for one that was found."""
    with pytest.raises(ValueError, match="has no 'no such text'"):
        simulate(launch_toy(), 0, [edit("no such text")])


def test_the_imported_kernel_does_not_notice() -> None:
    """Fakes that stay behind where the kernel would be compiled."""
    triton, kernel = sys.modules["triton"], gluon_toy.toy
    simulate(launch_toy(), 0)
    assert sys.modules["triton"] is triton
    assert gluon_toy.toy is kernel
    assert gluon_toy.gl.arange.__module__.startswith("triton.")


def test_scalars_are_computed_like_in_c() -> None:
    """floor(-1 / 2) where a GPU has 0; an overflow that Python does not know."""
    assert (Scalar(-5) // 2, Scalar(-5) % 3, 5 // Scalar(-2), cdiv(Scalar(-1), 64)) == (-2, -2, -2, 0)
    assert isinstance(3 * Scalar(2) - 1, Scalar)
    with pytest.raises(SimulationError, match="overflows"):
        Scalar(2**16) * Scalar(2**15)
    assert Scalar(2**16).to(torch.int64) * 2**15 == Wide(2**31)
    assert Float(1) + 2.0**-30 == Float(1.0)
    assert (Float(0.3).to(torch.int32, bitcast=True) & 0x7F800000).to(torch.float32, bitcast=True) == 0.25


def test_maxima_pass_over_nan() -> None:
    """NaN that spreads in the simulator and not on the device, or the other way round."""
    x = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    assert torch.equal(maximum(x[0], -1.0), torch.tensor([1.0, -1.0]))
    assert torch.equal(reduce_max(x, 1).isnan(), torch.tensor([False, True]))


@pytest.mark.parametrize(
    ("tensor", "box"),
    [
        (torch.zeros(8, 12).half(), (8, 8)),
        (torch.zeros(8, 16).half()[:, 1:9], (8, 8)),
        (torch.zeros(16, 8).half().mT, (8, 8)),
        (torch.zeros(512, 8).half(), (512, 8)),
        (torch.zeros(8, 8).half(), (1, 8, 8)),
        (torch.zeros(0, 8).half(), (8, 8)),
    ],
    ids=["stride", "alignment", "last stride", "box", "axes", "empty"],
)
def test_the_copy_engine_takes_no_other_tensor(tensor: Tensor, box: tuple[int, ...]) -> None:
    """A descriptor that a driver would refuse."""
    with pytest.raises(SimulationError):
        Descriptor(tensor, box)


def test_what_is_not_simulated_is_not_guessed() -> None:
    """A name that does nothing where a kernel needs it to."""
    with pytest.raises(NotImplementedError, match=r"no gl\.histogram"):
        Absent("gl").histogram()
