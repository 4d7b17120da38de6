"""From a cubin to instructions: nvdisasm's text, parsed. Triton ships the disassembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$.]+),")
_LABEL = re.compile(r"^(\.[\w$.]+):\s*$")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.[\w.]+)?)\s*(.*?)\s*;"
)
_BRANCH_TARGET = re.compile(r"`\((\.[\w$.]+)\)")
_TABLE_OF_TARGETS = re.compile(r'"BRANCH_TARGETS ([\w$.,]+)"')
_SCHEDULING = re.compile(r"[&?]\w+(=\{[\d,]*\}|=\S+)?")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction: `@!P0 HGMMA.64x128x16.F32 R24, gdesc[UR12], ...`."""

    predicate: str  # "", "@P0", "@!UP1", ...
    op: str  # the mnemonic with its modifiers
    operands: str

    @property
    def base(self) -> str:
        return self.op.partition(".")[0]

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or bool(re.match(r"!?U?P\d", self.operands))

    @property
    def branch_targets(self) -> list[str]:
        """The labels a branch names: one, or a table of them for an indirect one (BRX)."""
        table = _TABLE_OF_TARGETS.search(self.operands)
        return table.group(1).split(",") if table else _BRANCH_TARGET.findall(self.operands)


@dataclass(frozen=True)
class Function:
    """One kernel's code."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # label -> index of the first instruction after it


def parse(text: str) -> list[Function]:
    """The functions in the output of `nvdisasm -c`."""
    functions: list[Function] = []
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    name = ""
    for line in text.splitlines():
        if found := _SECTION.match(line):
            if code:
                functions.append(Function(name, tuple(code), labels))
            name, code, labels = found.group(1), [], {}
        elif found := _LABEL.match(line):
            labels[found.group(1)] = len(code)
        elif found := _INSTRUCTION.match(line):
            predicate, op, operands = found.groups()
            code.append(Instruction(predicate or "", op, _SCHEDULING.sub("", operands).strip()))
    if code:
        functions.append(Function(name, tuple(code), labels))
    return functions


def disassemble(cubin: bytes) -> tuple[Function, int]:
    """A kernel's code and the registers a thread of it uses."""
    listing, usage = _on_cubin(cubin, ("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
    registers = re.search(r"\bREG:(\d+)", usage)
    if registers is None:
        raise ValueError(f"cuobjdump names no register count: {usage!r}")
    (function,) = parse(listing)
    return function, int(registers.group(1))


def _on_cubin(cubin: bytes, *commands: tuple[str, ...]) -> list[str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return [
            subprocess.run(
                [str(tools / tool), *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, *options in commands
        ]
