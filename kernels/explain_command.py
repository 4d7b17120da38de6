"""`undivided explain`: the arguments of a call as flags, the answer of `explain` as text."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from . import call_flags
from .explain import Explanation, explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.description = (
        "Say which implementation a call of undivided.attention takes, why not each other one, and what it "
        "costs; nothing is computed. Exit status: 0, 1 if --impl cannot be followed, 2 for wrong input."
    )
    sizes = call_flags.add_arguments(parser)
    sizes.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; cuda on a machine without a GPU: what one would run",
    )
    parser.add_argument("--impl", help="auto, reference, fallback or triton (UNDIVIDED_IMPL, or auto)")


def main(given: argparse.Namespace) -> int:
    """Explain one call: 0, 1 if the order cannot be followed, 2 for wrong input."""
    try:
        explanation = _explain(given)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:  # the last: no such device
        print(f"undivided explain: {error}", file=sys.stderr)
        return 2
    print(explanation)
    return 1 if explanation.chosen is None else 0


def _explain(given: argparse.Namespace) -> Explanation:
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("meta")

    def of_one_element(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, (0,) * len(shape), dtype=dtype, device=device)

    q, k, v, options = call_flags.Call.of(given).tensors(of_one_element)
    return explain(q, k, v, **{**options, "impl": given.impl})
