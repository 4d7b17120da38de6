"""`undivided inspect`: what the compiler made of the kernels of a call, for GPUs that need not be there."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import call_flags, dispatch
from ...kernels.call_flags import Call
from ...kernels.functional import prepare
from ...kernels.spec import Needs

if TYPE_CHECKING:  # what imports triton is imported once it is known to be there
    from .report import Row

KERNELS = {"triton": ("forward", "dkdv", "dq", "dbias"), "gluon": ("forward", "backward")}
NO_TRITON = "triton is not installed: it compiles the kernels; on Linux, pip install triton"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.description = (
        "Compile the kernels of a call of undivided.attention for GPUs that need not be there, and "
        "say what the compiler made of them: registers, spills, what the hot loop issues, and what bounds "
        "it by a simple model. Compiler output and a model, not a speed. Takes 5 to 10 seconds a kernel. "
        "Exit status: 0, 1 if a kernel does not compile, 2 for wrong input."
    )
    parser.add_argument(
        "--arch", nargs="+", default=["sm_90"], metavar="ARCH", help="sm_80 ... sm_120, gfx942 (sm_90)"
    )
    parser.add_argument(
        "--impl", choices=KERNELS, default="triton", help="gluon: the Hopper kernels, for sm_90 (triton)"
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=[*dict.fromkeys(itertools.chain(*KERNELS.values()))],
        help="(triton: forward dkdv dq, and dbias where there is a --bias; gluon: forward backward)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="also show what differs under another Triton: a folder made by `pip install --target PATH "
        "--no-deps triton==X`, or what --json wrote",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (2)")
    call_flags.add_arguments(parser)


def main(given: argparse.Namespace) -> int:
    """Compile, show, compare, write: 0, 1 if a kernel does not compile, 2 for wrong input."""
    if importlib.util.find_spec("triton") is None:
        print(f"undivided inspect: {NO_TRITON}", file=sys.stderr)
        return 2
    try:
        return _inspect(given)
    except (ValueError, TypeError, OSError) as error:
        print(f"undivided inspect: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("undivided inspect: the compiler crashed; --jobs 1 shows at which kernel", file=sys.stderr)
        return 1


def _inspect(given: argparse.Namespace) -> int:
    from . import against, document
    from .processes import in_processes
    from .tables import differences, show, side_by_side

    call = Call.of(given)
    _check(given, call)
    before = {path: against.earlier(path, call) for path in given.against if path.is_file()}
    kernels = given.kernel or [x for x in KERNELS[given.impl] if x != "dbias" or call.bias is not None]
    cases = [(architecture, kernel, call, given.impl) for architecture in given.arch for kernel in kernels]
    print(f"compiling, 5 to 10 s a kernel: {len(cases)} to go", file=sys.stderr)
    found = in_processes(compile_kernel, cases, given.jobs, lambda row: [row.error] if row.error else [])
    # Every kernel of a backward brings along the one that prepares it.
    rows = list({(row.architecture, row.kernel): row for row in found}.values())

    for architecture in dict.fromkeys(given.arch):
        of_it = [row for row in rows if row.architecture == architecture]
        show(*side_by_side(of_it), title=f"{architecture}, triton {of_it[0].triton}: {of_it[0].variant}")
    versions = [rows]
    if given.against:
        asked = {name: getattr(given, name) for name in ("arch", "impl", "kernel", "jobs")}
        for path in given.against:
            versions.append(before[path] if path in before else against.under(path, asked, call))
        names = [f"{version[0].triton} ({path.name})" for version, path in zip(versions[1:], given.against)]
        columns = ("architecture", "kernel", "figure", rows[0].triton, *names)
        lines = differences(versions)
        show(columns, lines, title=f"differences: {len(lines)}")
    print(document.NOTE)
    if given.json:
        given.json.write_text(document.written(rows, call=asdict(call)))
    return 1 if any(row.figures is None for version in versions for row in version) else 0


def compile_kernel(architecture: str, kernel: str, call: Call, impl: str) -> list[Row]:
    """The rows of one kernel of a call, and of what is launched before it."""
    from ...kernels.triton import attention_backward, attention_forward
    from . import hopper
    from .report import Variant, name_of
    from .variants import compiled

    q, k, v, options = call.tensors(_meta)
    inputs, spec = prepare(q, k, v, options)
    variant = Variant(call.head_dim, call.dtype, call.options, impl)
    if impl == "gluon":
        asked = [launch for launch in hopper.launches_of(inputs, spec) if name_of(launch.kernel) == kernel]
        return [hopper.compile_launch(launch, variant) for launch in asked]

    def run() -> None:
        if kernel == "forward":
            attention_forward(inputs, spec)
            return
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        of_keys = kernel == "dkdv"
        needs = Needs(kernel == "dq", of_keys, of_keys, kernel == "dbias")
        attention_backward(torch.empty_like(out), None, out, lse, inputs, spec, needs)

    return compiled(architecture, variant, run, kernel)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _check(given: argparse.Namespace, call: Call) -> None:
    """Everything that can be wrong, before anything is compiled."""
    from triton import knobs

    from . import against, hopper
    from .targets import TARGETS

    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels do not compile")
    for name in given.arch:
        if name not in TARGETS:
            raise ValueError(f"--arch must be of {', '.join(TARGETS)}, got {name!r}")
        if given.impl == "gluon" and name != hopper.ARCHITECTURE:
            raise ValueError(f"--impl gluon is for {hopper.ARCHITECTURE}, got --arch {name}")
    for name in given.kernel or ():
        if name not in KERNELS[given.impl]:
            raise ValueError(
                f"--kernel of {given.impl} must be of {', '.join(KERNELS[given.impl])}, got {name}"
            )
    for name in ("batch", "heads", "heads_kv", "seqlen", "seqlen_k", "head_dim", "head_dim_v", "jobs"):
        size = getattr(given, name)
        if size is not None and size < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {size}")
    for name in ("mask", "bias"):
        if any(size < 1 for size in getattr(call, name) or ()):
            raise ValueError(f"--{name} must be sizes of at least 1, got {getattr(call, name)}")
    if "dbias" in (given.kernel or ()) and call.bias is None:
        raise ValueError("--kernel dbias needs a --bias")
    q, k, v, options = call.tensors(_meta)
    inputs, spec = prepare(q, k, v, options)
    if given.impl == "gluon":
        reasons = hopper.unsupported_reasons(inputs, spec)
        if "backward" in (given.kernel or ()) and len(hopper.launches_of(inputs, spec)) == 1:
            reasons.append("its backward is that of triton")
    else:
        reasons = dispatch.unsupported_reasons("triton", inputs, spec)
    if reasons:
        raise ValueError(f"no kernel takes the call: {'; '.join(reasons)}")
    for path in given.against:
        against.check(path)
    if given.json and not given.json.parent.is_dir():
        raise ValueError(f"--json {given.json}: no such folder")
