"""Whether a warp goes on while its matrix product is computed: exponentials issued under a wgmma.

On sm_90 an HGMMA returns at once; `gsb0` on the last of a group commits it, and `WARPGROUP.DEPBAR.LE gsb0, n`
waits until at most n groups are unfinished (PTX ISA, wgmma.commit_group and wgmma.wait_group). What other
warps do meanwhile no listing shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .instructions import classify
from .sass import Instruction


def exp2_under_product(path: Sequence[Instruction]) -> int | None:
    """How many exponentials of one iteration are issued while a wgmma of the same warp is unfinished.

    None without a wgmma: an HMMA is waited for by whoever reads its registers, a tcgen05 product is
    issued by another warp.
    """
    if not any(map(_is_wgmma, path)):
        return None
    under = groups = 0
    uncommitted = False
    for turn in range(2):  # the second as every later one: with what the one before left unfinished
        for instruction in path:
            if _is_wgmma(instruction):
                committed = "gsb0" in instruction.operands
                groups += committed
                uncommitted = not committed
            elif instruction.op.startswith("WARPGROUP.DEPBAR"):
                groups = min(groups, _groups_left(instruction))
            elif classify(instruction) == "exp2":
                under += turn == 1 and (uncommitted or groups > 0)
    return under


def _is_wgmma(instruction: Instruction) -> bool:
    return instruction.base.endswith("GMMA")


def _groups_left(instruction: Instruction) -> int:
    found = re.search(r"gsb0, *(0x[0-9a-f]+)", instruction.operands)
    if found is None:
        raise ValueError(f"a wait for products that says not for how many: {instruction}")
    return int(found.group(1), 16)
