"""What would run, and why nothing else: `explain` takes the arguments of a call and computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import dispatch, evidence, nested
from .flops import backward_flops, forward_flops, lengths
from .functional import prepare, with_options
from .mask_work import left_by_mask
from .options import check_want
from .sequences import Sequences
from .spec import IMPLEMENTATIONS, AttentionOptions, AttentionSpec, Inputs
from .visibility import key_bounds

if TYPE_CHECKING:
    from typing_extensions import Unpack

TILE = 128
_IN_WORDS = {
    "ranges": "mask as intervals of keys",
    "tiles": "mask as tiles",
    "slopes": "ALiBi",
    "table": "RelativeBias",
}


@dataclass(frozen=True)
class Explanation:
    """Printable answer of `explain`.

    chosen: implementation that would run; None where an order cannot be followed.
    reasons: for each implementation, why it cannot or does not run; empty for the chosen one.
    evidence: what is known of the chosen implementation on this kind of device.
    flops_forward, flops_backward: useful operations, counted from the scores that causal, window and a mask
    object leave, whose values are read where there are any.
    bytes_forward: size of the tensors a forward must read and write once.
    second_pass: statistics that PyTorch makes after the chosen implementation, from its lse.
    tiles, tiles_visited: tiles of 128 x 128 scores per batch entry and head, of all packed sequences and per
    head, and how many these leave to visit.
    """

    call: str
    chosen: str | None
    reasons: dict[str, list[str]]
    evidence: str
    flops_forward: int
    flops_backward: int
    bytes_forward: int
    tiles: int
    tiles_visited: int
    second_pass: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.call, f"  runs       {self.chosen or 'nothing: the order cannot be followed'}"]
        lines.append(f"  evidence   {self.evidence}")
        for name, reasons in self.reasons.items():
            lines += [f"  not {name:<11}{reason}" for reason in reasons]
        if self.second_pass:
            lines.append(
                f"  then       a second pass over the scores, in PyTorch: {', '.join(self.second_pass)}"
            )
        skipped = self.tiles - self.tiles_visited
        lines += [
            f"  work       {_si(self.flops_forward)}FLOP forward, {_si(self.flops_backward)}FLOP backward",
            f"  memory     {_si(self.bytes_forward)}B to read and write once, forward",
            f"  tiles      {self.tiles_visited} of {self.tiles} visited, {skipped} skipped ({TILE} x {TILE}, "
            "per batch entry and head)",
        ]
        return "\n".join(lines)


@with_options
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    want: Sequence[str] | None = None,
    **options: Unpack[AttentionOptions],
) -> Explanation:
    """Which implementation `attention` would run for these arguments, and why each other one would not.

    Takes what `attention` takes, with cu_seqlens_q what `attention_varlen` takes; meta tensors stand for a
    GPU's, on machines that have none. Raises what these raise for wrong input; an impl= that cannot take the
    call is explained, not raised.
    """
    check_want(want)
    if options.get("seed") is None:
        options["seed"] = 0  # drawing one would move PyTorch's generator
    sequences = None
    if any(getattr(x, "is_nested", False) for x in (q, k, v)):
        q, k, v, *cu = nested.packed(q, k, v, bool(options.get("check")))
        sequences = Sequences(cu[0], cu[1])
    elif cu_seqlens_q is not None:
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs, spec = prepare(q, k, v, options, sequences=sequences)
    order = options.get("impl") or dispatch.DEFAULT_IMPL
    reasons = {name: dispatch.unsupported_reasons(name, inputs, spec) for name in IMPLEMENTATIONS}
    chosen = _chosen(order, inputs, spec)
    left = left_by_mask(inputs)
    sizes = lengths(inputs) if sequences is not None else lengths(inputs)[:1]
    return Explanation(
        call=_describe(inputs, spec),
        chosen=chosen,
        reasons={
            name: found or [_passed_over(name, order, chosen)]
            for name, found in reasons.items()
            if name != chosen
        },
        evidence=_evidence(chosen, inputs.q.device),
        flops_forward=round(forward_flops(inputs, spec) * (1.0 if left is None else left.share)),
        flops_backward=round(backward_flops(inputs, spec) * (1.0 if left is None else left.share)),
        bytes_forward=_bytes(inputs),
        tiles=sum(-(-seqlen_q // TILE) * -(-seqlen_k // TILE) for seqlen_q, seqlen_k in sizes),
        tiles_visited=sum(_tiles_visited(spec, *both) for both in sizes) if left is None else left.tiles,
        second_pass=tuple(name for name in want or () if name in ("entropy", "key_mass")),
    )


def _chosen(order: str, inputs: Inputs, spec: AttentionSpec) -> str | None:
    try:
        chosen = dispatch.choose(order, inputs, spec)
    except NotImplementedError:
        return None
    if order == "auto" and inputs.q.is_meta and not dispatch.unsupported_reasons("triton", inputs, spec):
        return "triton"
    return dispatch.first_of(chosen)


def _evidence(chosen: str | None, device: torch.device) -> str:
    """The state on this machine; for meta tensors, on every kind of GPU that it was tried for."""
    if chosen is None:
        return "none"
    if device.type != "meta":
        return evidence.state_of(chosen, evidence.architecture(device))
    tried = {entry.architecture for entry in evidence.records() if entry.implementation == chosen} - {"cpu"}
    states = (f"{name} {evidence.state_of(chosen, name)}" for name in sorted(tried))
    return f"on a GPU, with the Triton that is here: {', '.join(states) or evidence.NO_EVIDENCE}"


def _passed_over(name: str, order: str, chosen: str | None) -> str:
    if order != "auto":
        return f"impl={order!r} was asked for"
    if name == "reference":
        return "the reference keeps seqlen_q x seqlen_k tensors and runs only when asked for"
    if name == "triton":
        if chosen == "gluon":
            return "the kernels for Hopper go first"
        return "on CPU the interpreter runs only when asked for"
    if name == "gluon":
        return "not shown to be faster here; UNDIVIDED_HOPPER=1 takes it"
    return "a kernel takes the call"


def _describe(inputs: Inputs, spec: AttentionSpec) -> str:
    q, k, v = inputs.q, inputs.k, inputs.v
    parts = [
        f"attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {q.dtype}, {q.device}"
    ]
    if inputs.spans_q is not None:
        parts.append(f"{inputs.spans_q.shape[0]} packed sequences")
    if spec.left is not None or spec.right is not None:
        parts.append(f"window ({spec.left}, {spec.right}), {'top-left' if spec.top_left else 'bottom-right'}")
    given = [
        x
        for x in ("mask", "ranges", "tiles", "key_lengths", "bias", "slopes", "table", "sinks")
        if getattr(inputs, x) is not None
    ]
    parts += [_IN_WORDS.get(name, name) for name in given]
    parts += [
        f"{name} {getattr(spec, name)}"
        for name in ("softcap", "dropout_p", "precise", "batch_invariant")
        if getattr(spec, name)
    ]
    return "; ".join([*parts, f"scale {spec.scale:g}"])


def _bytes(inputs: Inputs) -> int:
    q, v = inputs.q, inputs.v
    tensors = [x for x in inputs if x is not None]
    read = sum(x.numel() * x.element_size() for x in tensors)
    rows = q.numel() // q.shape[-1]
    return read + rows * (v.shape[-1] * q.element_size() + 4)


def _tiles_visited(spec: AttentionSpec, seqlen_q: int, seqlen_k: int) -> int:
    visited = 0
    for first in range(0, seqlen_q, TILE):
        lo, hi = key_bounds(first, min(first + TILE, seqlen_q) - 1, spec, seqlen_q, seqlen_k)
        visited += -(-hi // TILE) - lo // TILE if hi > lo else 0
    return visited


def _si(value: float) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
