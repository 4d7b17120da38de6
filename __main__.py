"""The command line: undivided demo | explain."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from .kernels.explain import explain


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status says whether it succeeded."""
    parser = argparse.ArgumentParser(prog="undivided", description="Fused attention you can trust.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_explain(commands.add_parser("explain", help="which implementation would run, and why"))
    demo = commands.add_parser("demo", help="a real trained model, stock attention against ours")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "demo" in arguments[:1]:
        from .interop import demo as demo_module

        demo_module.add_arguments(demo)
        return demo_module.main(parser.parse_args(arguments))
    options = parser.parse_args(arguments)
    try:
        print(_explain(options))
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:  # the last: no such device
        print(f"undivided explain: {error}", file=sys.stderr)
        return 2
    return 0


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8, help="heads of q")
    parser.add_argument("--heads-kv", type=int, help="heads of k and v (default: as q)")
    parser.add_argument("--seqlen", type=int, default=4096, help="length of q")
    parser.add_argument("--seqlen-k", type=int, help="length of k and v (default: as q)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--head-dim-v", type=int, help="head_dim of v (default: as q)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--impl", help="auto, reference, fallback or triton")


def _explain(options: argparse.Namespace) -> str:
    heads_kv = options.heads if options.heads_kv is None else options.heads_kv
    seqlen_k = options.seqlen if options.seqlen_k is None else options.seqlen_k
    head_dim_v = options.head_dim if options.head_dim_v is None else options.head_dim_v
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    q = torch.empty(
        options.batch, options.heads, options.seqlen, options.head_dim, dtype=dtype, device=device
    )
    k = torch.empty(options.batch, heads_kv, seqlen_k, options.head_dim, dtype=dtype, device=device)
    v = torch.empty(options.batch, heads_kv, seqlen_k, head_dim_v, dtype=dtype, device=device)
    return str(
        explain(
            q,
            k,
            v,
            causal=options.causal,
            window=tuple(options.window) if options.window else None,
            softcap=options.softcap,
            dropout_p=options.dropout,
            impl=options.impl,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
