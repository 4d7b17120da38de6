"""The loops of a disassembled kernel: basic blocks, dominators, natural loops, and which of them are hot.

Natural loops as in Aho, Lam, Sethi, Ullman, "Compilers", 2nd edition, section 9.6.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .instructions import MATRIX, classify
from .sass import Function, Instruction

_LEAVES = ("BRA", "JMP", "EXIT", "RET", "BRX")
# A back edge out of a block this short is a slow path placed after the loop, a retried barrier wait say.
_SLOW_PATH = 6


@dataclass
class _Block:
    start: int
    end: int  # inclusive
    successors: list[int] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)


def hot_loops(function: Function) -> list[tuple[Instruction, ...]]:
    """One iteration of each innermost loop that holds matrix instructions.

    Loops without any (waits on barriers) neither count nor make the loop around them an outer one. Without
    a matrix instruction in the whole kernel (float32 products), the innermost loops with FFMAs are taken.
    """
    blocks = _blocks(function)
    code = function.instructions

    def weighty(block: _Block, matrix: bool) -> bool:
        of_block = code[block.start : block.end + 1]
        return any((i.base in MATRIX) if matrix else classify(i) == "ffma" for i in of_block)

    loops = _natural_loops(blocks)
    for matrix in (True, False):
        working = {k for k, block in enumerate(blocks) if weighty(block, matrix)}
        found = [(header, body) for header, body in loops.items() if body & working]
        inner = [(header, body) for header, body in found if not any(other < body for _, other in found)]
        if inner:
            return [_iteration(code, blocks, header, body, working) for header, body in inner]
    return []


def _blocks(function: Function) -> list[_Block]:
    code = function.instructions
    leaders = {0} | {i for i in function.labels.values() if i < len(code)}
    leaders |= {i + 1 for i, ins in enumerate(code[:-1]) if ins.base in _LEAVES}
    starts = sorted(leaders)
    blocks = [_Block(a, b - 1) for a, b in zip(starts, [*starts[1:], len(code)])]
    at = {block.start: k for k, block in enumerate(blocks)}
    for k, block in enumerate(blocks):
        last = code[block.end]
        if last.base in ("BRA", "JMP", "BRX"):
            starts_of = (at.get(function.labels.get(target, -1)) for target in last.branch_targets)
            block.successors += [target for target in starts_of if target is not None]
        if (last.base not in _LEAVES or last.conditional) and k + 1 < len(blocks):
            block.successors.append(k + 1)
    for k, block in enumerate(blocks):
        for successor in block.successors:
            blocks[successor].predecessors.append(k)
    return blocks


def _dominators(blocks: list[_Block]) -> list[set[int]]:
    """Per block, the blocks on every way to it. What nothing branches to (indirect targets) is a root."""
    roots = {k for k, block in enumerate(blocks) if not block.predecessors or k == 0}
    dominators = [{k} if k in roots else set(range(len(blocks))) for k in range(len(blocks))]
    changed = True
    while changed:
        changed = False
        for k, block in enumerate(blocks):
            if k in roots:
                continue
            smaller = set.intersection(*(dominators[p] for p in block.predecessors)) | {k}
            if smaller != dominators[k]:
                dominators[k], changed = smaller, True
    return dominators


def _natural_loops(blocks: list[_Block]) -> dict[int, frozenset[int]]:
    """Header -> blocks of each natural loop, loops that share a header merged."""
    dominators = _dominators(blocks)
    loops: dict[int, set[int]] = {}
    for latch, block in enumerate(blocks):
        for header in block.successors:
            if header not in dominators[latch]:
                continue
            body = loops.setdefault(header, {header})
            todo = [latch]
            while todo:
                k = todo.pop()
                if k not in body:
                    body.add(k)
                    todo.extend(blocks[k].predecessors)
    return {header: frozenset(body) for header, body in sorted(loops.items())}


def _iteration(
    code: tuple[Instruction, ...], blocks: list[_Block], header: int, body: frozenset[int], working: set[int]
) -> tuple[Instruction, ...]:
    """The instructions of one iteration, without the slow paths that stand behind the loop."""
    latches = [k for k in body if header in blocks[k].successors]
    ends = [k for k in latches if k in working or blocks[k].end - blocks[k].start > _SLOW_PATH]
    last = max([*(body & working), *ends])
    if all(k > last for k in latches):
        last = min(latches)
    return tuple(
        ins for k in sorted(body) if header <= k <= last for ins in code[blocks[k].start : blocks[k].end + 1]
    )
