"""Options that are no tensors: checked, and turned into an `AttentionSpec`."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real

import torch

from .biases import Biases, RelativeBias
from .spec import STATISTICS, AttentionOptions, AttentionSpec

LARGEST = 2.0**60
"""Of |scale|, softcap and 1/softcap: products and quotients of two of them still fit into float32."""


def make_spec(
    head_dim: int,
    options: AttentionOptions,
    *,
    top_left: bool,
    tf32: bool,
    want_lse: bool = True,
    want_max: bool = False,
) -> AttentionSpec:
    """Check the options that are no tensors, and resolve their defaults.

    Raises:
        TypeError, ValueError: an option is not what it must be; the message names it.
    """
    left, right = _window(options["window"])
    if as_bool("causal", options["causal"]):
        right = 0 if right is None else min(right, 0)
    scale = _number("scale", options["scale"])
    softcap = _number("softcap", options["softcap"])
    dropout_p = _number("dropout_p", options["dropout_p"])
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    elif not -LARGEST <= scale <= LARGEST:
        raise ValueError(f"scale must be a finite number, at most 2**60 in magnitude, got {scale}")
    if softcap is not None and not 1 / LARGEST <= softcap <= LARGEST:
        raise ValueError(f"softcap must be a finite number > 0, from 2**-60 to 2**60, or None, got {softcap}")
    if dropout_p is None or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    return AttentionSpec(
        float(scale),
        left,
        right,
        top_left,
        None if softcap is None else float(softcap),
        float(dropout_p),
        tf32,
        want_lse,
        *_table_of(options["bias"]),
        as_bool("precise", options["precise"]),
        options["deterministic"] == "batch",
        want_max=want_max,
        deterministic=_is_deterministic(options["deterministic"]),
    )


def _is_deterministic(deterministic: bool | str | None) -> bool:
    """Whether the same bits are asked for on every run; None asks for what PyTorch's mode does."""
    if not (deterministic is None or isinstance(deterministic, bool) or deterministic == "batch"):
        raise ValueError(f'deterministic must be None, True, False or "batch", got {deterministic!r}')
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else bool(deterministic)


def _table_of(biases: Biases) -> tuple[bool, int]:
    """(bidirectional, max_distance) of the RelativeBias, if there is one."""
    for one in biases if isinstance(biases, tuple) else (biases,):
        if isinstance(one, RelativeBias):
            return bool(one.bidirectional), int(one.max_distance)
    return AttentionSpec._field_defaults["bidirectional"], AttentionSpec._field_defaults["max_distance"]


def check_want(want: Sequence[str] | None) -> None:
    """ValueError unless `want` is None or holds names of statistics."""
    if want is None:
        return
    if not isinstance(want, Collection) or isinstance(want, str) or any(x not in STATISTICS for x in want):
        raise ValueError(f"want must be a tuple of names out of {STATISTICS}, got {want!r}")


def _window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) or None, got {window!r}")
    return _side("left", window[0]), _side("right", window[1])


def _side(name: str, side: int | None) -> int | None:
    if side is None:
        return None
    if isinstance(side, bool) or not isinstance(side, (int, Integral)):
        raise TypeError(f"window {name} must be an int or None, got {side!r}")
    if side < 0:
        raise ValueError(f"window {name} must be >= 0, or None for unbounded, got {side}")
    return min(int(side), 2**31 - 1)  # operators take 64 bits, and no sequence is longer


def _number(name: str, number: float | None) -> float | None:
    if number is None or isinstance(number, (int, float)):
        return number
    if isinstance(number, Real):  # NumPy's among others
        return float(number)
    raise TypeError(f"{name} must be a number or None, got {type(number).__name__}")


def as_bool(name: str, flag: object) -> bool:
    """The value of a bool, Python's, NumPy's or a traced one; what else has a truth value may be a slip."""
    if isinstance(flag, (bool, torch.SymBool)):
        return bool(flag)
    if str(getattr(flag, "dtype", "")) == "bool" and getattr(flag, "shape", None) == ():
        return bool(flag)
    raise TypeError(f"{name} must be a bool, got {flag!r}")
