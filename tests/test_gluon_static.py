"""What the compile lane asks of the Hopper kernels, and that it sees when a kernel no longer has it.

Kernels are compiled in processes of their own: this one may be the interpreter's (tests/test_static.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the compile lane needs Triton")

from undivided.bench.static import __main__ as lane  # noqa: E402
from undivided.bench.static import assembly, document, gates, hopper  # noqa: E402
from undivided.bench.static.report import Row, Variant  # noqa: E402
from undivided.kernels import evidence  # noqa: E402
from undivided.kernels.gluon import hopper_forward  # noqa: E402
from undivided.kernels.gluon.config import BackwardTile, ForwardTile  # noqa: E402

PLAIN = Variant(64, "bfloat16", "plain", "gluon")
INDENT = 12 * " "
NEXT_KEYS = "k_full.index((j + 1) % STAGES), ((j + 1) // STAGES) & 1, pred=j + 1 < n_tiles"
WAIT_AFTER_SOFTMAX = f"{INDENT}mbarrier.wait({NEXT_KEYS})\n"
FIRST_IN_ROUND = f"{INDENT}stage = j % STAGES\n"
WAIT_BEFORE_PRODUCT = f"{FIRST_IN_ROUND}{INDENT}mbarrier.wait(k_full.index(stage), (j // STAGES) & 1)\n"


def changed(module: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    """A module of the package with its source changed; kernels are compiled from files."""
    source = Path(str(module.__file__)).read_text()
    for before, after in changes:
        assert source.count(before) == 1, f"{module.__name__} no longer holds this once: {before!r}"
        source = source.replace(before, after)
    path = Path(tempfile.mkdtemp()) / "changed.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.changed", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def shipped() -> list[Row]:
    return [hopper.compile_launch(launch, PLAIN) for launch in hopper.launches(PLAIN)]


def not_held_apart() -> list[Row]:
    """The wait for the next keys in front of the product that needs them: softmax and wait are one block."""
    made = changed(hopper_forward, (WAIT_AFTER_SOFTMAX, ""), (FIRST_IN_ROUND, WAIT_BEFORE_PRODUCT))
    hopper.forward_launch = made.forward_launch
    return [hopper.compile_launch(hopper.launches(PLAIN)[0], PLAIN)]


def too_many_keys() -> list[Row]:
    """Scores that do not fit into the registers of a group."""
    return [hopper.compile_launch(hopper.launches(PLAIN, forward=ForwardTile(256, 2, 2))[0], PLAIN)]


def one_tile_of_ds() -> list[Row]:
    """Without the second one the backward has no wait that ends the block of its exponentials."""
    tile = BackwardTile(64, 2, 2, 1)
    return [hopper.compile_launch(hopper.launches(PLAIN, backward=tile)[1], PLAIN)]


PLANS: dict[str, Callable[[], list[Row]]] = {
    plan.__name__: plan for plan in (shipped, not_held_apart, too_many_keys, one_tile_of_ds)
}


def rows_of(folder: Path, *plans: str) -> dict[str, list[Row]]:
    """What came of the plans, compiled in a process of their own."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, __file__, str(folder), *plans]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {plan: document.read(folder / plan)[1] for plan in plans}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return rows_of(tmp_path_factory.mktemp("shipped"), "shipped")["shipped"]


@pytest.mark.compile
def test_shipped_kernels_keep_their_products_under_way(rows: list[Row]) -> None:
    """A forward and a backward, every exponential of every group under a product, by the assembler in use."""
    assert [row.kernel for row in rows] == ["forward", "backward"]
    for row, groups in zip(rows, (hopper.config.FORWARD[64].groups, 2)):
        assert list(gates.failures(row)) == []
        assert row.figures is not None
        assert row.figures.assembly is not None
        assert row.figures.assembly.assembler.startswith("ptxas ")
        assert len(row.figures.loops) == groups, "the loop of a group was not found"


@pytest.mark.compile
def test_faults_planted_in_the_source_are_seen(tmp_path: Path) -> None:
    """The assembler lifts a wait above the softmax, without a word; or serialises and spills, with one."""
    found = rows_of(tmp_path, "not_held_apart", "too_many_keys", "one_tile_of_ds")
    missed = {plan: "; ".join(gates.failures(row)) for plan, (row,) in found.items()}
    assert "exponentials lie under a product" in missed["not_held_apart"]
    (row,) = found["not_held_apart"]
    assert row.figures is not None
    assert all(8 * (loop.exp2_under_product or 0) < loop.count("exp2") for loop in row.figures.loops)
    assert "products wait for each other: C7512 of ptxas " in missed["too_many_keys"]
    assert "bytes spilled" in missed["too_many_keys"]
    assert "exponentials lie under a product" in missed["one_tile_of_ds"]


def shared(row: Row) -> dict[str, Any]:
    return {"shared": 2**18}


def other_instruction(row: Row) -> dict[str, Any]:
    return {"matrix": ("HGMMA", "HMMA")}


def a_lost_group(row: Row) -> dict[str, Any]:
    assert row.figures is not None
    return {"loops": row.figures.loops[1:]}


def one_exponential_alone(row: Row) -> dict[str, Any]:
    assert row.figures is not None
    first, *others = row.figures.loops
    return {"loops": (replace(first, exp2_under_product=(first.exp2_under_product or 0) - 1), *others)}


def spilled(row: Row) -> dict[str, Any]:
    assert row.figures is not None
    assert row.figures.assembly is not None
    limit = hopper.SPILLED.get((row.kernel, 64, "plain"), 0)
    return {"assembly": row.figures.assembly._replace(spilled=limit + 4)}


def serialised(row: Row) -> dict[str, Any]:
    assert row.figures is not None
    assert row.figures.assembly is not None
    return {"assembly": row.figures.assembly._replace(serialised=("C7510",))}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (shared, "bytes of shared memory"),
        (other_instruction, "must be HGMMA alone"),
        (a_lost_group, "are useful"),
        (one_exponential_alone, "exponentials lie under a product"),
        (spilled, "bytes spilled, at most"),
        (serialised, "C7510"),
    ],
)
def test_each_gate_catches_its_fault(
    rows: list[Row], fault: Callable[[Row], dict[str, Any]], words: str
) -> None:
    """One figure of a shipped kernel made worse: one sentence."""
    for row in rows:
        assert row.figures is not None
        (sentence,) = gates.failures(replace(row, figures=replace(row.figures, **fault(row))))
        assert words in sentence


@pytest.mark.compile
def test_inspect_shows_them(rows: list[Row], tmp_path: Path) -> None:
    """The same figures as the lane's, and heads narrower than their tile."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "undivided", "inspect", "--impl", "gluon", "--json", "figures.json"]
    done = subprocess.run(
        [*command, "--head-dim", "40"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gluon bfloat16 d40 plain" in done.stdout
    inspected = document.read(tmp_path / "figures.json")[1]
    assert [row.kernel for row in inspected] == ["forward", "backward"]
    assert [row.figures for row in inspected] == [row.figures for row in rows]


def test_a_kernel_of_which_nothing_is_known_is_no_pass() -> None:
    assert list(gates.failures(Row("sm_90", "forward", PLAIN, None, "OutOfResources: registers"))) == [
        "does not compile: OutOfResources: registers"
    ]


LOG = """
ptxas-blackwell info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are \
serialized due to non wgmma instructions defining accumulator registers of a wgmma in the function 'first'
ptxas-blackwell info    : 11 bytes gmem
ptxas-blackwell info    : Compiling entry function 'first' for 'sm_90a'
ptxas-blackwell info    : Function properties for first
    48 bytes stack frame, 96 bytes spill stores, 192 bytes spill loads
ptxas-blackwell info    : Used 168 registers, used 3 barriers, 48 bytes cumulative stack size

ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_what_the_assembler_says_is_said_of_its_kernel() -> None:
    """A warning that is lost, or another kernel's; loads are spills too."""
    assert assembly.understood(LOG, "ptxas 13.4") == {
        "first": ("ptxas 13.4", 192, ("C7510",)),
        "second": ("ptxas 13.4", 0, ()),
    }


def test_evidence_is_noted_by_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper kernel that does not compile says nothing against the others, nor they for it."""
    noted: list[evidence.Evidence] = []
    monkeypatch.setattr(evidence, "record", noted.extend)
    figures: Any = object()
    of_triton = Variant(64, "bfloat16", "plain")
    fine = Row("sm_90", "forward", of_triton, figures)
    lane.note_evidence([fine, Row("sm_90", "forward", PLAIN, figures), Row("sm_90", "backward", PLAIN, None)])
    assert [entry[:4] for entry in noted] == [("triton", "sm_90", triton.__version__, "compiled")]
    noted.clear()
    lane.note_evidence([fine, Row("sm_90", "forward", PLAIN, figures)])
    assert {entry[:2] for entry in noted} == {("triton", "sm_90"), ("gluon", "sm_90")}


KEYS = """
import json, torch
from triton import knobs
from undivided.bench.static import hopper
from undivided.bench.static.absent_gpu import absent_gpu
from undivided.bench.static.report import Variant
from undivided.bench.static.targets import TARGETS

keys = {}

def note(*, key, fn, **_):  # answering True leaves it at that: nothing is compiled or launched
    keys.setdefault(fn.name, set()).add(key)
    return True

knobs.runtime.jit_cache_hook = note
with absent_gpu(TARGETS["sm_90"]):
    for hopper.SEQLEN in (*range(4, 65, 4), 100, 1000, 4096, 65536):
        for hopper.BATCH in (1, 2, 3):
            for launch in hopper.launches(Variant(64, "bfloat16", "causal", "gluon")):
                launch.start()
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


def test_no_sequence_length_recompiles() -> None:
    """Triton specialises integers that are 1 or multiples of 16: lengths must be exempt from that.

    (hazard T4)
    """
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", KEYS], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert len(counts) == 2, counts
    assert set(counts.values()) == {1}, counts


if __name__ == "__main__":
    for plan in sys.argv[2:]:
        Path(sys.argv[1], plan).write_text(document.written(PLANS[plan]()))
