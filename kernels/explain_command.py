"""`undivided explain`: the arguments of a call as flags, the answer of `explain` as text."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from .explain import Explanation, explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of the command."""
    parser.description = (
        "Say which implementation a call of undivided.attention takes, why not each other one, and what it "
        "costs; nothing is computed. Exit status: 0, 1 if --impl cannot be followed, 2 for wrong input."
    )
    sizes = parser.add_argument_group("tensors")
    sizes.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (1)")
    sizes.add_argument("--heads", type=int, default=8, metavar="N", help="heads of q (8)")
    sizes.add_argument("--heads-kv", type=int, metavar="N", help="heads of k and v (as q)")
    sizes.add_argument("--seqlen", type=int, default=4096, metavar="N", help="length of q (4096)")
    sizes.add_argument("--seqlen-k", type=int, metavar="N", help="length of k and v (as q)")
    sizes.add_argument("--head-dim", type=int, default=64, metavar="N", help="head_dim of q and k (64)")
    sizes.add_argument("--head-dim-v", type=int, metavar="N", help="head_dim of v (as q)")
    sizes.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32", "float64"])
    sizes.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; cuda on a machine without a GPU: what one would run",
    )
    group = parser.add_argument_group("options, those of undivided.attention")
    group.add_argument("--causal", action="store_true", help="no key after a query's position")
    group.add_argument(
        "--window",
        nargs=2,
        type=_int_or_none,
        metavar=("LEFT", "RIGHT"),
        help="keys seen before and after a query's position; none is unbounded",
    )
    group.add_argument("--mask", nargs="+", type=int, metavar="N", help="shape of a bool mask")
    group.add_argument("--key-lengths", action="store_true", help="keys of each batch entry are counted")
    group.add_argument("--bias", nargs="+", type=int, metavar="N", help="shape of a bias, in --dtype")
    group.add_argument("--softcap", type=float, metavar="X")
    group.add_argument("--scale", type=float, metavar="X", help="factor of the scores (1/sqrt(head_dim))")
    group.add_argument("--dropout-p", type=float, default=0.0, metavar="P", help="probability (0)")
    group.add_argument("--impl", help="auto, reference, fallback or triton (UNDIVIDED_IMPL, or auto)")


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
    heads_kv = given.heads if given.heads_kv is None else given.heads_kv
    seqlen_k = given.seqlen if given.seqlen_k is None else given.seqlen_k
    head_dim_v = given.head_dim if given.head_dim_v is None else given.head_dim_v
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("meta")

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty_strided(shape, (0,) * len(shape), dtype=dtype, device=device)  # of one element

    return explain(
        tensor(given.batch, given.heads, given.seqlen, given.head_dim),
        tensor(given.batch, heads_kv, seqlen_k, given.head_dim),
        tensor(given.batch, heads_kv, seqlen_k, head_dim_v),
        causal=given.causal,
        window=given.window,
        mask=None if given.mask is None else tensor(*given.mask, dtype=torch.bool),
        key_lengths=tensor(given.batch, dtype=torch.int32) if given.key_lengths else None,
        bias=None if given.bias is None else tensor(*given.bias),
        softcap=given.softcap,
        scale=given.scale,
        dropout_p=given.dropout_p,
        impl=given.impl,
    )


def _int_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)
