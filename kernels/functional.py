"""The public calls: options in, tensors out.

Each one validates, turns its arguments into `Inputs` and `AttentionSpec`, and hands them to
`dispatch`. The options are typed once, in `spec.AttentionOptions`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from . import dispatch, nested
from .mask_algebra import Mask
from .masks import compiled
from .options import as_bool, check_want, make_spec
from .sequences import Sequences, unpacked
from .spec import DEFAULTS, DTYPES, AttentionOptions, AttentionSpec, AttentionStats, Inputs
from .tracing import constant_when_traced
from .validation import check_tensor, make_inputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

_F = TypeVar("_F", bound=Callable[..., Any])


def with_options(call: _F) -> _F:
    """Show `**options` as what they are in help() and in editors."""
    signature = inspect.signature(call)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for (name, default), annotation in zip(
            DEFAULTS.items(), AttentionOptions.__annotations__.values(), strict=True
        )
    ]
    vars(call)["__signature__"] = signature.replace(parameters=[*named, *options])
    return call


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, want: None = None, **options: Unpack[AttentionOptions]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, want: Sequence[str], **options: Unpack[AttentionOptions]
) -> AttentionStats: ...
@with_options
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    want: Sequence[str] | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor | AttentionStats:
    """Softmax attention: softmax(scale·q·kᵀ + bias over the keys a query may see) · v.

    Shapes: q (batch, heads_q, seqlen_q, head_dim), k (batch, heads_kv, seqlen_k, head_dim),
    v (batch, heads_kv, seqlen_k, head_dim_v), any strides; float16, bfloat16, float32, float64.
    heads_q is a multiple of heads_kv: query heads 0 ... g-1 share key head 0. A batch of 1 broadcasts.
    Returns out (batch, heads_q, seqlen_q, head_dim_v) in q's dtype and physical order.

    Query i stands at position i + (seqlen_k - seqlen_q): the last query sees the last key.

    Options:
        want: names of statistics to return as well, out of ("lse", "max_logit", "entropy", "key_mass"): then
            an `AttentionStats` is returned, which says what they are. lse and entropy are differentiable, the
            others not. entropy and key_mass cost one more pass over the scores, in PyTorch, whoever made out.
        causal: a query sees no key after its position.
        window: (left, right): the query at p sees keys p - left ... p + right, both ends included;
            None is unbounded. causal means right = 0.
        mask: bool, True = may attend; broadcasts, right-aligned, to (batch, heads_q, seqlen_q, seqlen_k). Or
            a mask object: `Causal`, `Window`, `PrefixLM`, `Documents`, `FirstKeys`, `Dense`,
            `from_predicate`, combined with & and |; most of them cost O(seqlen).
        key_lengths: int (batch,): keys at or past it are hidden; moves no position.
        bias: float, added to the scores in float32; broadcasts like mask; differentiable. Or `ALiBi(slopes)`,
            which adds -slope·|position - key|, or `RelativeBias(table)`, T5's, which no kernel takes yet;
            neither stores scores. Or a tuple of such, added up: tensors in float32, to one of the shape that
            they broadcast to.
        softcap: scores become softcap·tanh(scores / softcap) before the bias (Gemma 2 report, section 2);
            from 2**-60 to 2**60.
        sinks: float (heads_q,), finite or -inf: a logit per query head that joins the softmax's denominator
            and has no value; differentiable.
        scale: any number up to 2**60 in magnitude; 1/sqrt(head_dim) by default.
        dropout_p: probability of dropping a weight, in [0, 1]; the others grow by 1/(1 - dropout_p).
        seed: int or int64 tensor that decides which are dropped; drawn from PyTorch's generator if None.
        deterministic: True: the same call gives the same bits (of the reference on a GPU, as far as PyTorch's
            operators do); None: if PyTorch's mode is on. It is so without asking, but for dq of the Hopper
            kernels. "batch": nor does what an entry gives (out, statistics, dq, dk, dv) depend on which
            other entries there are or on its place, but for what dropout keeps; on a CPU entries are then
            computed one by one.
        precise: for 16-bit inputs, no rounding of out reaches backward's delta, rowsum(dout·out) = Σ P·dP:
            dq and dk keep their digits where values share a mean, for seven products instead of five.
        check: also check values that live on the device (key_lengths, what masks hold); synchronises.
        impl: "auto", "reference", "fallback", "triton" or "gluon". None: the variable UNDIVIDED_IMPL, else
            "auto", which never raises for valid input; an order that cannot be followed raises.

    out and lse are differentiable twice in q, k, v and all that is called differentiable here, by reverse and
    forward mode, but for forward mode of forward mode; entropy once, by reverse mode.

    mask, causal, window and key_lengths are ANDed. A row that sees nothing gives out 0, lse -inf (its sink,
    if there are any) and zero gradients. Keys that no query of a batch entry may see can hold NaN: it reaches
    nothing.

    Raises:
        ValueError, TypeError: an argument is not what it must be; the message names it.
        NotImplementedError: impl= names an implementation that cannot take the call; lists every reason.
    """
    if any(getattr(x, "is_nested", False) for x in (q, k, v)):
        return _attention_jagged(q, k, v, want, options)
    check_want(want)
    inputs, spec = prepare(q, k, v, options, want=want or ())
    stats = _run(inputs, spec, options.get("impl"), want or ())
    if want is None:
        return stats.out
    return stats if "lse" in want else stats._replace(lse=None)


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    want: None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    want: Sequence[str],
    **options: Unpack[AttentionOptions],
) -> AttentionStats: ...
@with_options
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    want: Sequence[str] | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor | AttentionStats:
    """`attention` of sequences that lie one behind the other: no padding, and nobody sees another sequence.

    Shapes: q (total_q, heads_q, head_dim), k (total_k, heads_kv, head_dim), v (total_k, heads_kv,
    head_dim_v), any strides. cu_seqlens_q, cu_seqlens_k: int32 or int64 (sequences + 1,), on q's device;
    sequence i is rows cu_seqlens_q[i] ... cu_seqlens_q[i + 1] - 1 of q, and so with k and v. Without
    cu_seqlens_k it is cu_seqlens_q. A sequence may have no rows, no keys, or neither.
    Returns out (total_q, heads_q, head_dim_v); what `want` asks for is
    (total_q, heads_q), key_mass (total_k, heads_q).

    Options are those of `attention`, with a sequence for a batch entry: positions, rows and keys count from
    its start, the last query of each stands at its last key; key_lengths is (sequences,), ALiBi's slopes
    (heads_q,) or (sequences, heads_q); dropout drops what it drops in the same sequences padded. mask and
    bias broadcast to (sequences, heads_q, max_seqlen_q, max_seqlen_k). Mask objects that are no intervals
    of keys (`from_predicate`, `Dense`, some unions) become tiles of the longest sequence, for each sequence:
    then lengths are read on the host, in every call: a GPU is waited for, and torch.compile breaks its graph.

    max_seqlen_q, max_seqlen_k are needed only where mask or bias have that axis; max_seqlen_k is
    max_seqlen_q unless one of it or cu_seqlens_k is given. What a sequence has past them belongs to no
    sequence. Nothing is read outside q, k, v whatever cu_seqlens hold: an entry is taken as at least the one
    before it, and at most the total; check=True raises instead. Tokens of no sequence give out 0, lse -inf
    and zero gradients, and can hold NaN: it reaches nothing. Differentiable once, in reverse mode; with
    impl="reference" as often as PyTorch is.

    Raises:
        ValueError, TypeError, NotImplementedError: as `attention`.
    """
    check_want(want)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs, spec = prepare(q, k, v, options, want=want or (), sequences=sequences)
    stats = _run(inputs, spec, options.get("impl"), want or ())
    if want is None:
        return stats.out[0].transpose(0, 1)
    stats = stats if "lse" in want else stats._replace(lse=None)
    return AttentionStats(
        **{name: x[0].transpose(0, 1) for name, x in stats._asdict().items() if x is not None}
    )


def _attention_jagged(
    q: Tensor, k: Tensor, v: Tensor, want: Sequence[str] | None, options: AttentionOptions
) -> Tensor | AttentionStats:
    """`attention` of nested tensors: of their values, packed."""
    packed = nested.packed(q, k, v, bool(options.get("check")))
    if want is None:
        return nested.unpacked(attention_varlen(*packed, **options), q)
    stats = attention_varlen(*packed, want=want, **options)
    given = {name: x for name, x in stats._asdict().items() if x is not None}
    return AttentionStats(
        **{name: nested.unpacked(x, k if name == "key_mass" else q) for name, x in given.items()}
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, same signature and conventions.

    query (..., heads_q, seqlen_q, head_dim), key (..., heads_kv, seqlen_k, head_dim), value
    (..., heads_kv, seqlen_k, head_dim_v); leading axes broadcast. attn_mask: bool (True = may attend)
    or float (added). is_causal is aligned top-left and excludes attn_mask. Heads may differ only with
    enable_gqa. A row that may attend nothing gives 0.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.ndim < 2:
            raise ValueError(f"{name} must have at least 2 axes (seqlen, head_dim), got {tuple(x.shape)}")
    if as_bool("is_causal", is_causal) and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal is True, as in PyTorch")
    lead = _leading_axes(query, key, value, enable_gqa)
    q, k, v = (_to_four_axes(x, lead, enable_gqa) for x in (query, key, value))
    if attn_mask is not None:
        _check_attn_mask(attn_mask, query.device, (*lead, query.shape[-2], key.shape[-2]))
        if attn_mask.ndim > 3 and len(lead) > 2:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-2:])
            attn_mask = attn_mask.reshape(-1, *attn_mask.shape[-3:])
    options: AttentionOptions = {"causal": is_causal, "dropout_p": dropout_p, "scale": scale}
    if attn_mask is not None:
        options["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    inputs, spec = prepare(q, k, v, options, top_left=True, want=())
    out = _run(inputs, spec, None, ()).out
    return out if query.ndim == 4 and len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _check_attn_mask(attn_mask: Tensor, device: torch.device, scores: tuple[int, ...]) -> None:
    """What `prepare` checks of a mask and of a bias, in the words of who passed attn_mask."""
    check_tensor("attn_mask", attn_mask, device)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in DTYPES:
        raise TypeError(f"attn_mask must be a bool or a float tensor, got {attn_mask.dtype}")
    padded = (1,) * (4 - len(scores)) + scores
    shape = attn_mask.shape
    if len(shape) > len(padded) or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(padded))):
        raise ValueError(f"attn_mask must broadcast, right-aligned, to {scores}, got shape {tuple(shape)}")


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    *,
    top_left: bool = False,
    want: Collection[str] = ("lse",),
    sequences: Sequences | None = None,
) -> tuple[Inputs, AttentionSpec]:
    """Validate a call and turn it into what implementations see; q, k, v as autocast wants them."""
    filled: AttentionOptions = {**DEFAULTS, **options} if options else DEFAULTS
    if len(filled) != len(DEFAULTS):
        unknown = next(name for name in options if name not in DEFAULTS)
        raise TypeError(f"unknown option {unknown!r}; the options are want, {', '.join(DEFAULTS)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    dtype = _autocast_dtype(q)
    if dtype is not None:
        q, k, v = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)
        )
    spans = None
    if sequences is not None:
        q, k, v, spans = unpacked(q, k, v, sequences, filled["check"])
    mask = filled["mask"]
    inputs = make_inputs(q, k, v, {**filled, "mask": None} if isinstance(mask, Mask) else filled, spans)
    tf32 = q.is_cuda and q.dtype == torch.float32 and _tf32_allowed()
    spec = make_spec(
        q.shape[-1],
        filled,
        top_left=top_left,
        tf32=tf32,
        want_lse=not {"max_logit"}.issuperset(want),  # entropy and key_mass are made from it
        want_max="max_logit" in want,
    )
    return compiled(mask, inputs, spec, check=filled["check"]) if isinstance(mask, Mask) else (inputs, spec)


def _run(inputs: Inputs, spec: AttentionSpec, impl: str | None, want: Collection[str]) -> AttentionStats:
    impl = dispatch.choose(impl, inputs, spec)
    if _autocast_dtype(inputs.q) is None:
        return dispatch.run(inputs, spec, impl, want)
    with torch.autocast(inputs.q.device.type, enabled=False):
        return dispatch.run(inputs, spec, impl, want)


def _autocast_dtype(q: Tensor) -> torch.dtype | None:
    """What autocast casts q, k, v to on q's device, as for PyTorch's own attention; None if off."""
    if not torch._C._is_any_autocast_enabled():  # a device and its name cost more than the rest of this
        return None
    device_type = q.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@constant_when_traced
def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _leading_axes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """Axes of the result before (seqlen, head_dim)."""
    try:
        if enable_gqa:
            batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
            return (*batch, *query.shape[-3:-2])
        return tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]))
    except RuntimeError as error:
        raise ValueError(
            f"leading axes of query {tuple(query.shape)}, key {tuple(key.shape)} and value "
            f"{tuple(value.shape)} must broadcast; different numbers of heads need enable_gqa=True"
        ) from error


def _to_four_axes(x: Tensor, lead: tuple[int, ...], enable_gqa: bool) -> Tensor:
    """Broadcast the leading axes of x to `lead`, but for its own number of heads with enable_gqa."""
    heads = x.shape[-3] if enable_gqa and x.ndim > 2 else lead[-1] if lead else 1
    x = x.expand(*lead[:-1], heads, *x.shape[-2:])
    return x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:])
