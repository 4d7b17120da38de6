"""A call of `attention` without its data, and the flags of a command line that say which one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .biases import ALiBi
from .spec import DEFAULTS, AttentionOptions

DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Call:
    """Sizes and options; None for a size is that of q, and for a tensor that there is none."""

    batch: int = 1
    heads: int = 8
    heads_kv: int | None = None
    seqlen: int = 4096
    seqlen_k: int | None = None
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: str = "bfloat16"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: tuple[int, ...] | None = None
    key_lengths: bool = False
    bias: tuple[int, ...] | None = None
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    deterministic: str | None = None
    precise: bool = False

    @classmethod
    def of(cls, given: argparse.Namespace) -> Call:
        """What the flags say."""
        values: dict[str, Any] = {field.name: getattr(given, field.name) for field in fields(cls)}
        values |= {name: tuple(x) for name, x in values.items() if isinstance(x, list)}
        return cls(**values)

    @property
    def options(self) -> str:
        """The names of those that are given; "plain" without any."""
        options = (x for x in fields(self) if x.name in DEFAULTS or x.name == "alibi")
        return " ".join(x.name for x in options if getattr(self, x.name) != x.default) or "plain"

    def __str__(self) -> str:
        return f"{self.dtype} d{self.head_dim} {self.options}"

    def tensors(
        self, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, AttentionOptions]:
        """(q, k, v, options), every tensor made by `empty`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        heads_kv = self.heads if self.heads_kv is None else self.heads_kv
        seqlen_k = self.seqlen if self.seqlen_k is None else self.seqlen_k
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        bias = [] if self.bias is None else [empty(self.bias, dtype)]
        alibi = [ALiBi(empty((self.heads,), torch.float32))] if self.alibi else []
        options: AttentionOptions = {
            "causal": self.causal,
            "window": self.window,
            "mask": None if self.mask is None else empty(self.mask, torch.bool),
            "key_lengths": empty((self.batch,), torch.int32) if self.key_lengths else None,
            "bias": (*bias, *alibi) or None,
            "softcap": self.softcap,
            "sinks": empty((self.heads,), dtype) if self.sinks else None,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            "deterministic": self.deterministic,
            "precise": self.precise,
        }
        return (
            empty((self.batch, self.heads, self.seqlen, self.head_dim), dtype),
            empty((self.batch, heads_kv, seqlen_k, self.head_dim), dtype),
            empty((self.batch, heads_kv, seqlen_k, head_dim_v), dtype),
            options,
        )


def add_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Give a parser a flag for each field of Call; returns the group of the sizes."""
    sizes = parser.add_argument_group("tensors")
    sizes.add_argument("--batch", type=int, default=Call.batch, metavar="N", help="batch size (1)")
    sizes.add_argument("--heads", type=int, default=Call.heads, metavar="N", help="heads of q (8)")
    sizes.add_argument("--heads-kv", type=int, metavar="N", help="heads of k and v (as q)")
    sizes.add_argument("--seqlen", type=int, default=Call.seqlen, metavar="N", help="length of q (4096)")
    sizes.add_argument("--seqlen-k", type=int, metavar="N", help="length of k and v (as q)")
    sizes.add_argument("--head-dim", type=int, default=Call.head_dim, metavar="N", help="of q and k (64)")
    sizes.add_argument("--head-dim-v", type=int, metavar="N", help="head_dim of v (as q)")
    sizes.add_argument("--dtype", default=Call.dtype, choices=DTYPES, help="(bfloat16)")
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
    group.add_argument("--alibi", action="store_true", help="-slope·|position - key| is added")
    group.add_argument("--softcap", type=float, metavar="X")
    group.add_argument("--sinks", action="store_true", help="a logit per head joins the denominator")
    group.add_argument("--scale", type=float, metavar="X", help="factor of the scores (1/sqrt(head_dim))")
    group.add_argument("--dropout-p", type=float, default=0.0, metavar="P", help="probability (0)")
    group.add_argument("--deterministic", choices=("batch",), help="entries do not depend on each other")
    group.add_argument("--precise", action="store_true", help="backward's delta is not made of a rounded out")
    return sizes


def _int_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)
