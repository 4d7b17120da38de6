"""The static figures are right: on kernels compiled here for GPUs that are not, and on planted faults."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the compile lane needs Triton")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from undivided.bench.static import __main__ as lane  # noqa: E402
from undivided.bench.static import document, gates, record, report, sass  # noqa: E402
from undivided.bench.static.absent_gpu import absent_gpu  # noqa: E402
from undivided.bench.static.instructions import classify, product_of  # noqa: E402
from undivided.bench.static.loops import hot_loops  # noqa: E402
from undivided.bench.static.model import Work  # noqa: E402
from undivided.bench.static.targets import TARGETS  # noqa: E402

LISTING = """
\t.section\t.text.k,"ax",@progbits
k:
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
.L_x_2:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 &wr=0x1 ?wait=5 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/                   STL [R1], R3 ;
        /*0070*/              @P1  BRA `(.L_x_1) ;
        /*0080*/                   STL [R1+0x4], R3 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_loop_with_a_nested_wait_is_one_hot_loop() -> None:
    """A spin-wait inside the main loop must not be taken for the innermost loop."""
    (function,) = sass.parse(LISTING)
    (iteration,) = hot_loops(function)
    assert [ins.base for ins in iteration] == [
        "LDGSTS",
        "SYNCS",
        "BRA",
        "HGMMA",
        "MUFU",
        "STL",
        "BRA",
    ]
    assert function.instructions[2].operands == "P0, [UR4], R5"  # without the scheduling notes


PARTS = """
\t.section\t.text.k,"ax",@progbits
.text.k:
        /*0000*/              @P0  BRA `(.L_x_2) ;
        /*0010*/                   EXIT ;
.L_x_1:
        /*0020*/                   MOV R2, R3 ;
.L_x_2:
        /*0030*/                   BRX R2 -0x30                 (*"BRANCH_TARGETS .L_x_1,.L_x_3"*) ;
.L_x_3:
        /*0040*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
        /*0050*/              @!P0 BRA `(.L_x_3) ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5 ;
        /*0080*/              @!P1 BRA `(.L_x_6) ;
.L_x_4:
        /*0090*/                   MUFU.EX2 R3, R3 ;
.L_x_5:
        /*00a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*00b0*/              @P1  BRA `(.L_x_5) ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_6:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5 ;
        /*00e0*/              @!P1 BRA `(.L_x_6) ;
        /*00f0*/                   BRA `(.L_x_4) ;
"""


def test_the_part_of_a_warp_is_reached_through_a_table() -> None:
    """Warps with parts of their own branch by a table: unread, what is no loop would be taken for one."""
    (function,) = sass.parse(PARTS)
    assert function.instructions[3].branch_targets == [".L_x_1", ".L_x_3"]
    (iteration,) = hot_loops(function)
    assert [ins.base for ins in iteration] == ["HGMMA", "BRA"]


@pytest.mark.parametrize(
    ("op", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 / 4),
        ("HMMA.16816.F32", 2 * 16 * 8 * 16),
        ("FFMA", None),
    ],
)
def test_flops_of_a_matrix_instruction(op: str, flops: float | None) -> None:
    product = product_of(sass.Instruction("", op, ""))
    assert (product and product.flops_per_warp) == flops


def test_classes() -> None:
    """LDL and STL are the spills; an EX2 is not any MUFU."""
    ops = {"LDL.LU": "spill", "STL": "spill", "MUFU.EX2": "exp2", "MUFU.RCP": "mufu", "FFMA": "ffma"}
    assert {op: classify(sass.Instruction("", op, "")) for op in ops} == ops


@JITFunction  # not @triton.jit, which TRITON_INTERPRET=1 would turn into something that cannot compile
def product_loop(a, b, out, steps, SIZE: tl.constexpr):
    """out = Σ exp2(aᵢ·b): a main loop with a product of SIZE³ and SIZE² exponentials."""
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    right = tl.load(b + offsets)
    total = tl.full([SIZE, SIZE], 0.0, tl.float32)
    for i in range(steps):
        left = tl.load(a + i * SIZE * SIZE + offsets)
        total += tl.math.exp2(tl.dot(left, right))
    tl.store(out + offsets, total)


def compiled(architecture: str, **options: Any) -> report.Figures:
    """Figures of product_loop, compiled in a process of its own.

    The interpreter puts its own functions into triton.language while it runs, and a kernel that failed
    there, in a test of this process, may have left them behind.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, architecture, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return document.figures_of(json.loads(done.stdout))


def compile_here(architecture: str, options: dict[str, Any]) -> report.Figures:
    size = 64
    a, b, out = (
        torch.empty(size, size, dtype=d, device="meta") for d in (torch.half, torch.half, torch.float)
    )
    with absent_gpu(TARGETS[architecture]) as launches:
        product_loop[(1,)](a, b, out, 7, SIZE=size, num_warps=4, **options)
    return report.figures(launches[0].kernel, TARGETS[architecture], Work(flops=2 * size, l2_bytes=0))


@pytest.fixture(params=["sm_80", "sm_90"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_figures_of_a_small_kernel(architecture: str) -> None:
    """Work per iteration is known in advance: SIZE³ products and SIZE² exponentials over 4 warps."""
    figures = compiled(architecture)
    loop = figures.main_loop
    assert loop is not None
    assert loop.matrix_flops * 4 == 2 * 64**3
    assert loop.count("exp2") * 32 * 4 == 64 * 64
    assert figures.matrix == (TARGETS[architecture].matrix_instruction,)
    assert (figures.spills, figures.spills_in_loops) == (0, 0)
    assert figures.ctas_per_sm is not None
    assert figures.ctas_per_sm > 1
    assert loop.slots == 32 * (loop.instructions - loop.count("matrix")) / (64 * 64 / 4)


def test_spills_are_found_in_the_loop(architecture: str) -> None:
    """Too few registers for the accumulators: the compiler has to spill, and we must see where."""
    figures = compiled(architecture, maxnreg=64)
    assert figures.registers <= 64
    assert figures.spills_in_loops


def test_amd_figures_come_from_the_assembly() -> None:
    figures = compiled("gfx942")
    assert figures.matrix == ("v_mfma",)
    assert figures.registers > 0


VARIANT = report.Variant(128, "bfloat16", "plain")
MIX = {"matrix": 16, "exp2": 66, "ffma": 66, "other": 352}
GOOD = report.Figures(
    tile=(128, 128),
    registers=200,
    spills=0,
    spills_in_loops=0,
    shared=100 * 1024,
    num_warps=8,
    num_stages=2,
    ctas_per_sm=1,
    matrix=("HGMMA",),
    loops=(report.Loop(500, MIX, 2**20, slots=8.0, shared_bytes=0.0, exp2_under_product=0),),
    work=None,
)


def missed(**changes: Any) -> list[str]:
    loop = dataclasses.replace(
        GOOD.loops[0], **{name: changes.pop(name) for name in ("slots", "mix") if name in changes}
    )
    figures = dataclasses.replace(GOOD, loops=(loop,), **changes)
    return list(gates.failures(report.Row("sm_90", "forward", VARIANT, figures, triton="3.6.0")))


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ({"spills_in_loops": 1}, "inside a loop"),
        ({"spills": 100}, "100 spills"),
        ({"shared": 2**20}, "shared memory"),
        ({"matrix": ("HMMA",)}, "HGMMA"),
        ({"matrix": ("HGMMA", "HMMA")}, "HGMMA"),
        ({"slots": 30.0}, "30.00 slots"),
        ({"mix": MIX | {"ffma": 2, "fmul": 64}}, "2 FFMA"),
    ],
)
def test_gates_catch_planted_faults(fault: dict[str, Any], word: str) -> None:
    assert missed() == []
    (sentence,) = missed(**fault)
    assert word in sentence


def test_what_does_not_compile_misses_the_gate() -> None:
    row = report.Row("sm_90", "forward", VARIANT, None, "OutOfResources: shared memory")
    assert list(gates.failures(row)) == ["does not compile: OutOfResources: shared memory"]


def recorded_row(**changes: Any) -> report.Row:
    """The plain forward as it was recorded, with changes."""
    version, entries = record.recorded()
    entry = entries["sm_90", "forward", VARIANT]
    loop = dataclasses.replace(GOOD.loops[0], slots=changes.pop("slots", 1.0) * entry.slots)
    figures = dataclasses.replace(GOOD, loops=(loop,), **changes)
    return report.Row("sm_90", "forward", VARIANT, figures, triton=version)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"slots": 1.02}, "slots per score"),  # an instruction in six scores
        ({"slots": 0.98}, "slots per score"),  # better: to be recorded
        ({"spills_in_loops": 1}, "1 spills inside loops"),
    ],
)
def test_a_plain_kernel_that_differs_from_its_record_is_noticed(change: dict[str, Any], word: str) -> None:
    """An option that costs something where nobody asks for it, below the margin of the gates."""
    assert list(record.differences(recorded_row(slots=1.005))) == []
    (sentence,) = record.differences(recorded_row(**change))
    assert word in sentence
    other = dataclasses.replace(recorded_row(**change), triton="3.6.1")
    assert list(record.differences(other)) == []
    assert record.said([other]).startswith("not compared")
    assert record.said([recorded_row()]).startswith("1 kernels compared")


def test_every_kernel_of_a_plain_or_causal_call_is_recorded() -> None:
    """A kernel that lost its loop, or its name, drops out of the record and is compared no more."""
    kernels = ("forward", "dkdv", "dq")
    expected = {(name, kernel, variant) for name, variant in record.cases() for kernel in kernels}
    assert set(record.recorded()[1]) == expected


def test_what_was_recorded_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that its own rows differ from."""
    rows = [recorded_row(slots=1.2345), dataclasses.replace(recorded_row(), architecture="sm_80")]
    rows = [dataclasses.replace(row, triton=triton.__version__) for row in rows]
    without_a_loop = dataclasses.replace(GOOD, loops=())
    monkeypatch.setattr(record, "_FILE", tmp_path / "record.json")
    try:
        record.write([*rows, report.Row("sm_90", "row_statistics", VARIANT, without_a_loop)])
        assert len(record.recorded()[1]) == 2
        assert [*map(list, map(record.differences, rows))] == [[], []]
    finally:
        monkeypatch.undo()
        record.recorded.cache_clear()


def test_a_part_of_the_record_is_not_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other half would be gone."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(lane, "compile_all", lambda *_: [])
    for part in (["--head-dim", "64"], ["--arch", "sm_90"], ["--options", "plain"]):
        with pytest.raises(SystemExit):
            lane.main(["--record-slots", *part])
        assert "--record-slots" in capsys.readouterr().err


@pytest.mark.parametrize("part", [[], ["--full", "--head-dim", "64"], ["--full", "--options", "plain"]])
def test_a_part_of_the_lane_is_not_recorded(
    part: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """evidence.json would say that everything compiled where only some of it did."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(lane, "compile_all", lambda *_: [])
    with pytest.raises(SystemExit):
        lane.main([*part, "--record"])
    assert "--record" in capsys.readouterr().err


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(compile_here(sys.argv[1], json.loads(sys.argv[2])))))
