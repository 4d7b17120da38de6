"""Which calls make sense: tensors in, `Inputs` out, or an error that names one. (`options`: the others.)

Nothing here looks at values on a device, unless `check` asks for it.
"""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .biases import ALiBi, Biases, RelativeBias
from .options import as_bool
from .spec import DTYPES, AttentionOptions, Inputs


class Target(NamedTuple):
    """What masks and biases broadcast to."""

    sizes: tuple[int, int, int, int]
    names: tuple[str, str, str, str] = ("batch", "heads_q", "seqlen_q", "seqlen_k")

    def __str__(self) -> str:
        return f"({', '.join(self.names)}) = {tuple(self.sizes)}"


class Spans(NamedTuple):
    """Where packed sequences lie, as in `Inputs`, and what the host was told of their lengths."""

    q: Tensor
    k: Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    def target(self, heads_q: int) -> Target:
        """An axis nobody told the size of has to be broadcast."""
        max_q, max_k = self.max_seqlen_q, self.max_seqlen_k
        return Target(
            (self.q.shape[0], heads_q, 1 if max_q is None else max_q, 1 if max_k is None else max_k),
            (
                "sequences",
                "heads_q",
                "1 without max_seqlen_q" if max_q is None else "max_seqlen_q",
                "1 without max_seqlen_k" if max_k is None else "max_seqlen_k",
            ),
        )


def make_inputs(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, spans: Spans | None = None
) -> Inputs:
    """Check the tensors of a call; broadcast batch-1 inputs by stride; give mask and bias four axes.

    Raises:
        TypeError: an argument is not a tensor of a dtype it may have.
        ValueError: shapes or devices do not fit together.
    """
    (batch, heads_q, seqlen_q, _), (batch_k, _, seqlen_k, _), (batch_v, _, _, _) = _checked_shapes(q, k, v)
    if batch_k != batch or batch_v != batch:
        batch = max(batch, batch_k, batch_v) if 0 not in (batch, batch_k, batch_v) else 0
        q, k, v = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (q, k, v))
    target = Target((batch, heads_q, seqlen_q, seqlen_k)) if spans is None else spans.target(heads_q)
    mask, key_lengths = options["mask"], options["key_lengths"]
    bias, slopes, table = _split_biases(options["bias"], q, target)
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(
                "mask must be a bool tensor or a mask object, such as Causal() or Documents(ids); "
                "from_predicate makes one of a function, Mask.from_block_mask of a BlockMask; "
                f"got {mask if isinstance(mask, type) else type(mask)}"
            )
        check_tensor("mask", mask, q.device)
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be a bool tensor (True = may attend), got {mask.dtype}; "
                "numbers that are added to the scores go into bias="
            )
        mask = _four_axes("mask", mask, target)
    sinks = options["sinks"]
    if sinks is not None:
        check_tensor("sinks", sinks, q.device)
        if sinks.dtype not in DTYPES:
            raise TypeError(f"sinks must be a float tensor, got {sinks.dtype}")
        if sinks.shape != (heads_q,):
            raise ValueError(f"sinks must have shape (heads_q,) = ({heads_q},), got {tuple(sinks.shape)}")
    if key_lengths is not None:
        stop = seqlen_k if spans is None else spans.k[:, 1] - spans.k[:, 0]
        key_lengths = _checked_lengths(key_lengths, q.device, target.sizes[0], stop, options["check"])
    return Inputs(
        *(q, k, v, bias, sinks, slopes, table, mask),
        key_lengths=key_lengths,
        spans_q=None if spans is None else spans.q,
        spans_k=None if spans is None else spans.k,
        seed=_make_seed(q, options),
    )


def check_tensor(name: str, x: object, device: torch.device | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {x.device}")


def _checked_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.Size, torch.Size, torch.Size]:
    shapes = q.shape, k.shape, v.shape
    for name, shape in zip("qkv", shapes):
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 axes (batch, heads, seqlen, head_dim), got shape {tuple(shape)}"
            )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "q, k and v must share one dtype out of float16, bfloat16, float32, float64, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    (bq, hq, _, dq), (bk, hk, sk, dk), (bv, hv, sv, dv) = shapes
    if dq != dk:
        raise ValueError(f"k must have q's head_dim {dq}, got {dk}")
    if dq == 0 or dv == 0:
        raise ValueError(f"head_dim must be at least 1, got {dq} (q, k) and {dv} (v)")
    if hk != hv:
        raise ValueError(f"v must have k's number of heads {hk}, got {hv}")
    if sk != sv:
        raise ValueError(f"v must have k's seqlen {sk}, got {sv}")
    if hq != hk and (hk == 0 or hq % hk != 0):
        raise ValueError(
            f"heads of q ({hq}) must be a multiple of heads of k and v ({hk}): grouped-query attention"
        )
    if bq != bk or bq != bv:
        batch = next((b for b in (bq, bk, bv) if b != 1), 1)
        if any(b not in (1, batch) for b in (bq, bk, bv)):
            raise ValueError(f"batch sizes of q, k, v must be equal or 1, got {bq}, {bk}, {bv}")
    return shapes


def _four_axes(name: str, x: Tensor, target: Target) -> Tensor:
    """View x with four axes, right-aligned, each 1 or the target's."""
    shape = x.shape
    if len(shape) > 4 or any(a != 1 and a != b for a, b in zip(reversed(shape), reversed(target.sizes))):
        raise ValueError(f"{name} must broadcast, right-aligned, to {target}, got shape {tuple(shape)}")
    return x if len(shape) == 4 else x[(None,) * (4 - len(shape))]


def _split_biases(
    given: Biases, q: Tensor, target: Target
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(the sum of the tensors with four axes, ALiBi's slopes, RelativeBias's table) of a bias or several."""
    if given is None:
        return None, None, None
    bias = slopes = table = None
    for one in given if isinstance(given, tuple) else (given,):
        if isinstance(one, ALiBi):
            if slopes is not None:
                raise ValueError("bias may hold one ALiBi, got several")
            slopes = _checked_slopes(one.slopes, q, target)
            continue
        if isinstance(one, RelativeBias):
            if table is not None:
                raise ValueError("bias may hold one RelativeBias, got several")
            table = _checked_table(one, q, target)
            continue
        if not isinstance(one, Tensor):
            raise TypeError(
                f"bias must be a tensor, ALiBi, RelativeBias, or a tuple of them, got {type(one).__name__}"
            )
        check_tensor("bias", one, q.device)
        if one.dtype not in DTYPES:
            raise TypeError(
                f"bias must be a float tensor, got {one.dtype}; "
                "a bool tensor that says who may attend goes into mask="
            )
        one = _four_axes("bias", one, target)
        bias = one if bias is None else bias.to(_wide(bias, one)) + one
    return bias, slopes, table


def _checked_table(bias: RelativeBias, q: Tensor, target: Target) -> Tensor:
    table, heads_q, bidirectional = bias.table, target.sizes[1], as_bool("bidirectional", bias.bidirectional)
    check_tensor("the table of RelativeBias", table, q.device)
    if table.dtype not in DTYPES:
        raise TypeError(f"the table of RelativeBias must be a float tensor, got {table.dtype}")
    n_buckets = table.shape[0] if table.ndim else 0
    of_a_side = n_buckets // 2 if bidirectional else n_buckets
    if table.shape != (n_buckets, heads_q) or of_a_side < 2 or (bidirectional and n_buckets % 2):
        least = "an even number of buckets from 4 on" if bidirectional else "2 buckets or more"
        raise ValueError(
            f"the table of RelativeBias must have shape (buckets, heads_q) = (buckets, {heads_q}), with "
            f"{least}, got {tuple(table.shape)}"
        )
    distance = bias.max_distance
    if isinstance(distance, bool) or not isinstance(distance, Integral) or distance <= of_a_side // 2:
        raise ValueError(
            f"max_distance of RelativeBias must be an int above {of_a_side // 2}, the distances that have a "
            f"bucket of their own, got {distance!r}"
        )
    return table


def _wide(a: Tensor, b: Tensor) -> torch.dtype:
    """Sums are made in float32 or wider, as scores are."""
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _checked_slopes(slopes: Tensor, q: Tensor, target: Target) -> Tensor:
    """With two axes, (1 or batch, heads_q)."""
    check_tensor("the slopes of ALiBi", slopes, q.device)
    batch, heads_q = target.sizes[:2]
    if slopes.dtype not in DTYPES:
        raise TypeError(f"the slopes of ALiBi must be a float tensor, got {slopes.dtype}")
    if slopes.shape not in ((heads_q,), (1, heads_q), (batch, heads_q)):
        raise ValueError(
            f"the slopes of ALiBi must have shape (heads_q,) or (batch, heads_q) = ({batch}, {heads_q}), "
            f"got {tuple(slopes.shape)}"
        )
    return slopes if slopes.ndim == 2 else slopes[None]


def _checked_lengths(
    key_lengths: Tensor, device: torch.device, batch: int, stop: int | Tensor, check: bool
) -> Tensor:
    """Clamped to [0, stop], the number of keys; a tensor where each sequence has its own."""
    check_tensor("key_lengths", key_lengths, device)
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths must be int32 or int64, got {key_lengths.dtype}")
    if key_lengths.ndim != 1 or key_lengths.shape[0] not in (1, batch):
        raise ValueError(f"key_lengths must have shape (batch,) = ({batch},), got {tuple(key_lengths.shape)}")
    if isinstance(stop, Tensor):
        clamped = torch.minimum(key_lengths.clamp_min(0), stop)
        limit = "[0, the sequence's number of keys]"
    else:
        clamped = key_lengths.clamp(0, stop)
        limit = f"[0, seqlen_k] = [0, {stop}]"
    if check and bool((clamped != key_lengths).any()):
        low, high = int(key_lengths.min()), int(key_lengths.max())
        raise ValueError(f"key_lengths must lie in {limit}, got values from {low} to {high}")
    return clamped.to(torch.int32).expand(batch).contiguous()


def _make_seed(q: Tensor, options: AttentionOptions) -> Tensor | None:
    seed = options["seed"]
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, q.device)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or an int64 tensor with one element, "
                f"got {seed.dtype} with shape {tuple(seed.shape)}"
            )
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, Integral))):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if options["dropout_p"] == 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed.reshape(())
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=q.device)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    seed = int(seed)
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=q.device)
