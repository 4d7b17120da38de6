"""`undivided inspect`: what it finds in listings written by hand and in compiled kernels; planted faults.

Kernels are compiled in processes of their own: this one may be the interpreter's (tests/test_static.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="kernels are compiled by Triton")

from undivided.__main__ import main  # noqa: E402
from undivided.bench.static import against, command, document, model, processes, tables  # noqa: E402
from undivided.bench.static.in_flight import exp2_under_product  # noqa: E402
from undivided.bench.static.instructions import CLASSES, shared_bytes  # noqa: E402
from undivided.bench.static.report import Loop, Row, loop_figures  # noqa: E402
from undivided.bench.static.sass import Instruction  # noqa: E402
from undivided.bench.static.variants import compiled  # noqa: E402
from undivided.kernels import call_flags  # noqa: E402
from undivided.kernels.spec import DEFAULTS  # noqa: E402

HEAD_DIM = 64
MMA = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
LAST = f"{MMA}, gsb0"
WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
EXP2 = "MUFU.EX2 R3, R3"


def listing(*lines: str) -> tuple[Instruction, ...]:
    parts = [line.partition(" ") for line in lines]
    return tuple(Instruction("", op, operands) for op, _, operands in parts)


@pytest.mark.parametrize(
    ("lines", "under"),
    [
        ([MMA, LAST, WAIT, EXP2, EXP2], 0),
        ([MMA, EXP2, LAST, EXP2, WAIT, EXP2], 2),
        ([EXP2, MMA, EXP2, LAST, WAIT], 1),
        ([LAST, LAST, WAIT_BUT_ONE, EXP2, WAIT, EXP2], 1),
        ([LAST, WAIT_BUT_ONE, EXP2, WAIT], 1),
        ([EXP2, WAIT, EXP2, LAST], 1),
        ([LAST, WAIT, "MUFU.RCP R3, R3", EXP2, LAST, WAIT, LAST, "MUFU.RCP R3, R3", WAIT], 0),
        (["HMMA.16816.F32 R4, R8, R10, R4", EXP2], None),
        (["UTCHMMA gdesc[UR8], gdesc[UR4], tmem[UR6]", EXP2], None),
    ],
    ids=[
        *("waited for", "between", "before and between", "second group", "one group left"),
        *("left by the turn before", "not an exponential", "HMMA", "tcgen05"),
    ],
)
def test_exponentials_under_a_product(lines: list[str], under: int | None) -> None:
    assert exp2_under_product(listing(*lines)) == under


def test_a_wait_that_is_not_understood_is_no_answer() -> None:
    """Catches a finder that goes on counting after the disassembler's words have changed."""
    with pytest.raises(ValueError, match="for how many"):
        exp2_under_product(listing(LAST, "WARPGROUP.DEPBAR.LE gsb1", EXP2))


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", (64 + 128) * 16 * 2 / 4),
        ("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88", 128 * 16 * 2 / 4),
        ("HMMA.16816.F32 R4, R8, R10, R4", 0),
        ("LDSM.16.M88.4 R4, [R2]", 512),
        ("LDSM.16.M88 R4, [R2]", 128),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 512),
        ("LDS R4, [R2]", 128),
        ("FFMA R4, R4, R4, R4", 0),
    ],
)
def test_shared_memory_that_an_instruction_moves(line: str, moved: float) -> None:
    """Operands in registers cost nothing, those behind a descriptor are fetched."""
    assert shared_bytes(*listing(line)) == moved


def inspect(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that can compile."""
    return subprocess.run(
        [sys.executable, "-m", "undivided", "inspect", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0", **environment},
        cwd=folder,
        check=False,
    )


FLAGS = ("--head-dim", str(HEAD_DIM), "--kernel", "forward", "dq")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures of a real forward and a real dq, as the command wrote them; what it said lies beside them."""
    folder = tmp_path_factory.mktemp("inspect")
    done = inspect(folder, *FLAGS, "--json", "figures.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder / "figures.json"


@pytest.fixture
def rows(file: Path) -> list[Row]:
    return document.read(file)[1]


@pytest.fixture
def loop(rows: list[Row]) -> Loop:
    assert rows[0].main_loop is not None
    return rows[0].main_loop


def test_a_real_forward_and_a_real_dq(rows: list[Row]) -> None:
    """dq computes its exponentials under the product of dout and vᵀ; a forward has nothing to wait beside."""
    forward, dq = (next(row for row in rows if row.kernel == name) for name in ("forward", "dq"))
    for row in (forward, dq):
        loop, figures = row.main_loop, row.figures
        assert figures is not None
        assert loop is not None
        assert figures.matrix == ("HGMMA",)
        assert set(loop.mix) <= set(CLASSES)
        assert sum(loop.mix.values()) == loop.instructions
        assert figures.tile is not None
        scores = figures.tile[0] * figures.tile[1]
        assert figures.work is not None
        assert loop.matrix_flops * figures.num_warps == scores * figures.work.flops
        assert loop.count("exp2") * 32 * figures.num_warps >= scores
        assert loop.slots is not None
        non_matrix = loop.instructions - loop.count("matrix")
        assert loop.slots == pytest.approx(non_matrix * 32 * figures.num_warps / scores)
        assert row.bound is not None
        assert row.bound.clocks >= max(row.bound.parts.values())
    assert forward.main_loop is not None
    assert forward.main_loop.exp2_under_product == 0
    assert dq.main_loop is not None
    under, of_all = dq.main_loop.exp2_under_product, dq.main_loop.count("exp2")
    assert under is not None
    assert of_all / 2 < under <= of_all


def test_everything_says_that_it_is_no_speed(file: Path) -> None:
    stdout, stderr = ((file.parent / name).read_text() for name in ("stdout", "stderr"))
    assert document.NOTE in stdout
    assert json.loads(file.read_text())["note"] == document.NOTE
    assert "[1/2]" in stderr, "compiling takes long: it says how far it is"
    assert f"sm_90, triton {triton.__version__}: bfloat16 d{HEAD_DIM} plain" in stdout
    for name in ("registers", "spills (in loops)", "slots per score", "exp2 under wgmma", "bound by"):
        assert name in stdout


def test_json_holds_everything(file: Path, tmp_path: Path) -> None:
    """What is read and written again is the same, to the letter."""
    call, rows = document.read(file)
    assert call["head_dim"] == HEAD_DIM
    assert document.written(rows, call=call).splitlines()[2:] == file.read_text().splitlines()[2:]
    again = tmp_path / "again.json"
    again.write_text(document.written(rows, call=call))
    assert document.read(again) == (call, rows)


def test_a_mix_that_lacks_something_is_seen(loop: Loop, file: Path, tmp_path: Path) -> None:
    """A planted fault: an instruction in no class, or in two."""
    with pytest.raises(ValueError, match="a mix of"):
        replace(loop, mix=loop.mix | {"exp2": loop.mix["exp2"] + 1})
    content = json.loads(file.read_text())
    del content["kernels"][0]["figures"]["loops"][0]["mix"]["exp2"]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(content))
    with pytest.raises(document.DocumentError, match="a mix of"):
        document.read(broken)


def test_a_mix_is_of_classes() -> None:
    made = loop_figures(listing(MMA, LAST, WAIT, EXP2, "MUFU.TANH R1, R1", "UIADD3 UR4", "QUUX R1"), None)
    assert made.mix == {"matrix": 2, "barrier": 1, "exp2": 1, "mufu": 1, "uniform": 1, "other": 1}
    assert (made.instructions, made.slots, made.issued) == (7, None, None)


def test_the_model_names_what_takes_longest() -> None:
    """At head_dim 64 the exponentials of a forward take as long as its products (16 a clock, 4096 FLOPs)."""
    work = model.work("forward", 64, 64, (128, 128))
    assert work == (2 * 2 * 64, 2 * 2 * 64 / 128)
    assert work is not None
    few = model.bound("sm_90", work, model.Issued(6.0, mufu=1.01), 2, 2)
    many = model.bound("sm_90", work, model.Issued(9.0, mufu=1.01), 2, 2)
    assert few is not None
    assert many is not None
    assert (few.by, many.by) == ("mufu", "issue")
    assert few.parts["tensor"] == 1 / 16
    short = model.work("dkdv", 80, 40, (128, 16))
    assert short == (2 * (2 * 128 + 2 * 64), (80 + 40) * 2 / 16), "products are padded, loads are not"
    assert model.bound("sm_100", work, model.Issued(6.0), 1, 2) is None
    assert model.work("row_statistics", 64, 64, (32, 32)) is None


def changed(rows: list[Row], **figures: Any) -> list[Row]:
    """Of another Triton, with other figures for the first kernel."""
    first = rows[0].figures
    assert first is not None
    return [
        replace(row, triton="9.9") for row in [replace(rows[0], figures=replace(first, **figures)), *rows[1:]]
    ]


def test_a_comparison_says_what_differs_and_nothing_else(rows: list[Row]) -> None:
    assert rows[0].figures is not None
    assert tables.differences([rows, rows]) == []
    registers = str(rows[0].figures.registers)
    other = changed(rows, registers=7)
    assert tables.differences([rows, other]) == [["sm_90", "forward", "registers", registers, "7"]]
    assert tables.differences([rows, rows[1:]]) == [["sm_90", "forward", "kernel", "there", "not there"]]


Command = Callable[..., int]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> Command:
    """The command in this process, where compiling gives `rows`."""

    def run(*arguments: str, gives: list[Row] = rows) -> int:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr(processes, "in_processes", lambda *_: gives)
        return main(["inspect", *arguments])

    return run


def test_against_an_earlier_run(
    asked: Command, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "earlier.json"
    call = call_flags.Call(head_dim=HEAD_DIM)
    earlier.write_text(document.written(changed(rows, spills=1234), call=asdict(call)))
    assert asked(*FLAGS, "--against", str(earlier)) == 0
    said = capsys.readouterr().out
    assert "differences: 1" in said
    assert "1234 (0)" in said
    assert "9.9 (earlier.json)" in said
    assert asked(*FLAGS, "--causal", "--against", str(earlier)) == 2
    assert f"--against {earlier} is of another call: causal was False, not True" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.compile
def test_against_a_folder_with_a_triton(file: Path, tmp_path: Path) -> None:
    """The same Triton under another path: a process of its own finds it there, and nothing differs."""
    (tmp_path / "triton").symlink_to(Path(triton.__file__).parent)
    done = inspect(tmp_path, *FLAGS, "--against", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"again, under the triton in {tmp_path}" in done.stderr
    assert "differences: 0" in done.stdout


def test_what_does_not_compile_is_a_failure(
    asked: Command, rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise RuntimeError("in Triton's words\nout of registers")

    (failed,) = compiled("sm_90", rows[0].variant, refuse, "forward")
    assert (failed.kernel, failed.error) == ("forward", "RuntimeError: out of registers")
    assert asked(gives=[failed, *rows[1:]]) == 1
    assert "out of registers" in capsys.readouterr().out


def test_a_compiler_that_crashes_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLVM aborts where it could have raised, and takes its process along."""

    def crash(*_: object) -> list[Row]:
        raise BrokenProcessPool

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(processes, "in_processes", crash)
    assert main(["inspect"]) == 1
    assert "the compiler crashed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70"], "--arch must be of sm_80, "),
        (["--heads", "8", "--heads-kv", "3"], "heads of q (8) must be a multiple"),
        (["--head-dim", "300"], "no kernel takes the call: head_dim 300 is larger than 256"),
        (["--dtype", "float64"], "no kernel takes the call: dtype float64"),
        (["--seqlen", "0"], "--seqlen must be at least 1, got 0"),
        (["--mask", "3", "5"], "mask must broadcast"),
        (["--bias", "1", "-1"], "--bias must be sizes of at least 1"),
        (["--dropout-p", "2"], "dropout_p must lie in [0, 1]"),
        (["--kernel", "dbias"], "--kernel dbias needs a --bias"),
        (["--kernel", "backward"], "--kernel of triton must be of forward, dkdv, dq, dbias, got backward"),
        (["--impl", "gluon", "--kernel", "dq"], "--kernel of gluon must be of forward, backward, got dq"),
        (["--impl", "gluon", "--arch", "sm_80"], "--impl gluon is for sm_90, got --arch sm_80"),
        (["--impl", "gluon", "--softcap", "3"], "no kernel takes the call: softcap: not in these kernels"),
        (
            ["--impl", "gluon", "--head-dim", "256", "--kernel", "backward"],
            "no kernel takes the call: its backward is that of triton",
        ),
        (["--against", "nowhere"], "--against nowhere: no such file or folder"),
        (["--against", "."], "--against . holds no triton: pip install --target ."),
        (["--against", "empty.json"], "--against empty.json is no JSON of `undivided inspect`"),
        (["--json", "nowhere/figures.json"], "--json nowhere/figures.json: no such folder"),
    ],
)
def test_wrong_input_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is compiled."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    assert main(["inspect", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"undivided inspect: {message}")


def test_nothing_is_compiled_in_the_interpreter_or_without_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err.startswith("undivided inspect: TRITON_INTERPRET is set")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err == f"undivided inspect: {command.NO_TRITON}\n"


def test_without_rich_a_table_is_tabs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    tables.show(("a", "b"), [("1", "2")], title="t")
    assert capsys.readouterr().out == "t\na\tb\n1\t2\n"


def test_a_call_and_its_flags_are_the_same() -> None:
    """The process under another Triton must be asked for the same call, every option included."""
    call = call_flags.Call(
        batch=2, heads_kv=4, head_dim_v=32, causal=True, window=(None, 0), mask=(8, 8), key_lengths=True,
        bias=(1, 1, 1, 8), alibi=True, softcap=30.0, sinks=True, scale=-0.5, dropout_p=0.1, dtype="float16",
        deterministic="batch", precise=True,
    )  # fmt: skip
    parser = argparse.ArgumentParser()
    call_flags.add_arguments(parser)
    assert call_flags.Call.of(parser.parse_args(against.flags(asdict(call)))) == call
    assert call_flags.Call.of(parser.parse_args([])) == call_flags.Call()
    assert set(call.options.split()) == {*DEFAULTS, "alibi"} - {"seed", "check", "impl"}
    assert str(call_flags.Call()) == "bfloat16 d64 plain"
