"""README's table of features: what each implementation takes, and what others say of theirs.

    python -m undivided.conformance.features

prints it, made of the claims that `undivided check` holds each to, and of calls where claims say nothing. A
test compares README with it. Needs Triton, whose interpreter it sets to work where there is no GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields

import torch

from ..kernels.spec import DTYPES, IMPLEMENTATIONS
from . import library_adapters, torch_adapters
from .adapters import ours
from .target import NEEDS, Capabilities
from .verdict import dtype_name

BACKENDS = ("math", "flash", "efficient", "cudnn")
"""Of scaled_dot_product_attention; what is shown of them holds on every GPU, and needs none."""

YES, REFUSED, NOT_ASKED = "yes", "–", ""


def markdown() -> str:
    """A row for each claim that must be made, a column for each implementation.

    Of others an empty cell says that their adapter claims nothing, not that they cannot.
    """
    own = [ours(impl, native=True).capabilities for impl in IMPLEMENTATIONS]
    gpu = torch.device("cuda")
    others = {f"torch-{name}": torch_adapters.claims(name, gpu.type) for name in BACKENDS}
    others["torch-flex-compiled"] = torch_adapters.flex_compiled(gpu).capabilities
    others |= library_adapters.CLAIMS
    rows: list[tuple[str, list[str]]] = [
        (name, [told(claims) for claims in (*own, *others.values())]) for name, told in SIZES.items()
    ]
    for field in fields(Capabilities):
        if field.default is False:
            mine = [YES if _claimed(claims, field.name) else REFUSED for claims in own]
            theirs = [YES if _claimed(claims, field.name) else NOT_ASKED for claims in others.values()]
            rows.append((f"`{field.name}`", mine + theirs))
    names = [*IMPLEMENTATIONS, *others]
    head = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    return "\n".join(head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows])


def _claimed(claims: Capabilities, name: str) -> bool:
    return getattr(claims, name) and all(getattr(claims, need) for need in NEEDS.get(name, ()))


def _dtypes(claims: Capabilities) -> str:
    return ", ".join(dtype_name(dtype) for dtype in DTYPES if dtype in claims.dtypes)


def _head_dims(claims: Capabilities) -> str:
    dims = claims.head_dims
    if dims is None:
        return "any" if claims.max_head_dim == sys.maxsize else f"to {claims.max_head_dim}"
    dims = tuple(dim for dim in dims if dim <= claims.max_head_dim)
    step = dims[0]
    return (
        f"{step}, {2 * step} … {dims[-1]}"
        if dims == (*range(step, dims[-1] + 1, step),)
        else ", ".join(map(str, dims))
    )


SIZES: dict[str, Callable[[Capabilities], str]] = {
    "dtypes": _dtypes,
    "head_dim": _head_dims,
    "aligned": lambda claims: ", ".join(claims.alignments),
}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    print(markdown())
