"""What ptxas says of a kernel while it assembles it: bytes spilled, and products that it had to serialise."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

_SPILLS = re.compile(
    r"Function properties for (\S+)\s+\d+ bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads"
)
# "(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient
# register resources for the function 'f'"; C7510 and others say the same for other reasons.
_SERIALISED = re.compile(r"\((C75\d\d)\).*'(\S+)'")


class Assembly(NamedTuple):
    """One kernel, in the assembler's words."""

    assembler: str  # "ptxas 12.8"
    spilled: int  # bytes that are stored or that are loaded, whichever are more
    serialised: tuple[str, ...]  # ptxas' numbers for wgmmas that each wait for the one before


@contextmanager
def listening(capability: int) -> Iterator[dict[str, Assembly]]:
    """Have everything compiled anew by Triton's choice of assembler; afterwards what that said, by kernel."""
    said: dict[str, Assembly] = {}
    log = io.StringIO()  # Triton prints the log
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        yield said
    said |= understood(log.getvalue(), f"ptxas {get_ptxas(capability).version}")


def understood(log: str, assembler: str) -> dict[str, Assembly]:
    """What a log says, by kernel."""
    serialised = _SERIALISED.findall(log)
    return {
        kernel: Assembly(
            assembler,
            max(int(stored), int(loaded)),
            tuple(sorted({number for number, of in serialised if of == kernel})),
        )
        for kernel, stored, loaded in _SPILLS.findall(log)
    }
