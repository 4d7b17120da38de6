"""The right answer, and how hard each of its elements is to compute.

The answer is the reference in float64 on the same quantised inputs, its gradients by autograd. The
hardness is a condition number per element: the sum that makes the element, on absolute values, so
that an allowed error can scale with what rounding must do to it (Higham 2002, chapter 3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch, reference
from ..kernels.biases import distances, looked_up, summed_up
from ..kernels.packed import Piece, one_by_one
from ..kernels.spec import N_GRADIENTS, STATISTICS, AttentionSpec, AttentionStats, Gradients, Inputs

ACCUMULATION_ROUNDOFF = {
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-24,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
ROUNDOFF = ACCUMULATION_ROUNDOFF | {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Results(NamedTuple):
    """Everything attention computes for one problem; None = was not asked. Shapes as in `spec`."""

    out: Tensor | None = None
    lse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None
    dsinks: Tensor | None = None
    dslopes: Tensor | None = None
    dtable: Tensor | None = None
    max_logit: Tensor | None = None
    entropy: Tensor | None = None
    key_mass: Tensor | None = None


class Oracle(NamedTuple):
    """The float64 answer and what a rounding error is measured against, element by element.

    value: the answer. cond: sums of absolute values. score_cond: the same sums with each query row
    weighted by the size of its exponents: what an error of the scores is multiplied by. underflow:
    sums of the operand that meets a probability or a score gradient in a product: what a subnormal
    one costs. dtype: of q, k and v.
    """

    value: Results
    cond: Results
    score_cond: Results
    underflow: Results
    dtype: torch.dtype


def solve(
    inputs: Inputs,
    spec: AttentionSpec,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    dentropy: Tensor | None = None,
) -> Oracle:
    """The oracle of one problem; dout, dlse and dentropy, shaped like their outputs, are zeros if not given.

    With p the probabilities, D = keep/(1 - dropout_p) (1 without dropout), P = D·p:

        cond(out) = Σ_j P|v|                     cond(dv) = Σ_i P|dout|
        A_i = Σ_d |dout| cond(out)               T = p·(|D·dp - delta + dlse| + A + |dlse|)
        cond(dq) = |scale|·Σ_j c·T|k|            cond(dk) = |scale|·Σ_i c·T|q|        cond(dbias) = T

    dk and dv are summed over the query heads of a group, dbias over the axes that bias broadcasts. A sink is
    a score with a probability of its own and dp = 0: cond(dsinks) = Σ T over batch and rows. ALiBi's slopes
    move scores by the distance: cond(dslopes) = Σ T·|p - j|. Of a table's entry: Σ T over its bucket.
    dlse is subtracted from delta, hence its place beside A. Dropout only rescales: its bits are
    exact. c is softcap's derivative 1 - t² with t = tanh; scores are never rounded to 16 bits, so it
    enters as it is, except that the subtraction leaves an error of the accumulation's roundoff
    however small the difference: c = 1 - t² + t²·u(accumulation)/u.

    In 16 bits A and |dlse| stand for a delta made from a rounded out. With `precise` no rounding to 16 bits
    reaches delta, only errors of the accumulation do: both leave T in cond, and in score_cond, which keeps
    them, a row weighs 1 more.

    A row's weight in score_cond is |lse| + max_j c·|scale|·Σ|q||k| + |softcap·t| + |bias| over the
    keys that have p > 0: times the accumulation's roundoff, what the exponent of p = exp(s - lse) may
    be wrong by.

    Statistics are never rounded to 16 bits. max_logit is as wrong as a score: cond 0, score_cond the weight
    without |lse|. A probability off by the factor 1 + e moves -p·ln p by at most e·p·(1 + |ln p|): with H the
    entropy and P = Σ p, cond(entropy) = P + H, and cond(key_mass) = Σ_i p; score_cond has the row's weight.
    dentropy adds p·|dH|·(|ln p| + 1 + H + P) to T, its own sum on absolute values, and at a sink dH·(H + P).

    Of packed sequences, each by itself: its rows and keys, and its share of what all have in common.
    """
    if inputs.spans_q is not None:
        return _solve_packed(inputs, spec, dout, dlse, dentropy)
    dtype = inputs.q.dtype
    exact = _double(inputs)
    rows, heads_kv = exact.q.shape[:3], exact.k.shape[1]
    dout = exact.q.new_zeros(*rows, exact.v.shape[3]) if dout is None else dout.double()
    dlse = exact.q.new_zeros(rows) if dlse is None else dlse.double()
    dentropy = exact.q.new_zeros(rows) if dentropy is None else dentropy.double()
    value = _answer(exact, spec, dout, dlse, dentropy)
    assert value.out is not None
    assert value.lse is not None
    assert value.entropy is not None
    ds = _score_gradient(exact, spec, dout, dlse, dentropy)
    p, kept = _probabilities(exact, spec)

    lse, dlse = value.lse[..., None], dlse[..., None]
    alive = reference.attention(exact, spec)[1][..., None] > -torch.inf
    q, dout, exponent = (torch.where(alive, x, 0.0) for x in (exact.q, dout, lse.abs()))
    of_keys = p.sum(-1, keepdim=True)
    certain = of_keys + value.entropy[..., None]  # P + H
    dentropy = torch.where(alive, dentropy[..., None].abs(), 0.0)
    surprise = torch.where(p > 0, -p.log(), 0.0)
    at_sinks = None
    if exact.sinks is not None:
        share = torch.exp(exact.sinks[:, None, None] - lse)  # 1 in a row without keys
        at_sinks = share * ((dout * value.out).sum(-1, keepdim=True) - dlse).abs()
        at_sinks = at_sinks + share * dentropy * certain
    group = rows[1] // max(heads_kv, 1)
    seen = p.reshape(rows[0], heads_kv, group * rows[2], p.shape[-1]).gt(0).any(2)[..., None]
    k, v = (torch.where(seen, x, 0.0).repeat_interleave(group, 1) for x in (exact.k, exact.v))

    slope, level = _scores(q, k, exact.bias, spec, dtype)
    distance = distances(exact, spec)
    if exact.slopes is not None:
        level = level + exact.slopes.abs()[..., None, None] * distance
    if exact.table is not None:
        level = level + looked_up(exact, spec).abs()
    level = torch.where(p > 0, level, 0.0)
    highest = level.amax(-1, keepdim=True) if level.shape[-1] else torch.zeros_like(exponent)
    weight = exponent + highest
    q, k, v, dout = q.abs(), k.abs(), v.abs(), dout.abs()

    def sums(kept: Tensor, scaled: Tensor, terms: Tensor, at_sinks: Tensor | None) -> Results:
        """All but lse, given what stands for P, dS·scale and dS in them, and for the sinks' dS."""
        return Results(
            out=kept @ v,
            dq=scaled @ k,
            dk=_over_group(scaled.mT @ q, heads_kv),
            dv=_over_group(kept.mT @ dout, heads_kv),
            dbias=None if exact.bias is None else terms.sum_to_size(exact.bias.shape),
            dsinks=None if at_sinks is None else at_sinks.sum((0, 2, 3)),
            dslopes=None
            if exact.slopes is None
            else (terms * distance).sum((2, 3)).sum_to_size(exact.slopes.shape),
            dtable=None
            if exact.table is None
            else summed_up(terms, exact, spec, slice(0, rows[2]), slice(0, exact.k.shape[2])),
        )

    loose = (dout * (kept @ v)).sum(-1, keepdim=True) + dlse.abs()
    tight, tight_at_sinks = ds.abs() + p * dentropy * (surprise + 1 + certain), at_sinks
    terms = tight + p * torch.where(alive, loose, 0.0)
    weight_of_sinks = weight
    if exact.sinks is not None:
        assert at_sinks is not None
        at_sinks = at_sinks + share * loose
        weight_of_sinks = weight + exact.sinks.abs()[:, None, None]
    scale_of = abs(spec.scale) * slope
    nothing = torch.zeros_like(weight[..., 0])
    visited, survived = (p > 0).double(), torch.where(p > 0, kept / p, 0.0)
    is_precise = spec.precise and ROUNDOFF[dtype] > ACCUMULATION_ROUNDOFF[dtype]
    of_delta = float(is_precise)
    cond = sums(kept, scale_of * terms, terms, at_sinks)
    if is_precise:
        cond = sums(kept, scale_of * tight, tight, tight_at_sinks)
    return Oracle(
        value,
        cond=cond._replace(
            lse=torch.ones_like(weight[..., 0]),
            max_logit=torch.zeros_like(weight[..., 0]),
            entropy=certain[..., 0],
            key_mass=p.sum(2),
        ),
        score_cond=sums(
            weight * kept,
            (weight + of_delta) * scale_of * terms,
            (weight + of_delta) * terms,
            None if at_sinks is None else (weight_of_sinks + of_delta) * at_sinks,
        )._replace(
            lse=weight_of_sinks[..., 0],
            max_logit=highest[..., 0],
            entropy=(weight_of_sinks * certain)[..., 0],
            key_mass=(weight_of_sinks * p).sum(2),
        ),
        # whether the scale comes before or after the rounding of dS is the implementation's business
        underflow=sums(
            survived,
            max(abs(spec.scale), 1.0) * visited,
            0 * terms,
            None if at_sinks is None else 0 * at_sinks,
        )._replace(lse=nothing, max_logit=nothing, entropy=nothing, key_mass=0 * p.sum(2)),
        dtype=dtype,
    )


def _solve_packed(
    inputs: Inputs, spec: AttentionSpec, dout: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
) -> Oracle:
    """`solve` for packed sequences: every one as a dense problem."""
    exact = _double(inputs)
    q, k, v = exact[:3]
    rows = q.new_zeros(q.shape[:3])
    others = (None if x is None else torch.zeros_like(x) for x in exact[3:N_GRADIENTS])
    stats = AttentionStats(
        q.new_zeros(*rows.shape, v.shape[3]), rows, rows, rows, q.new_zeros(*q.shape[:2], k.shape[2])
    )
    grads = Gradients(*map(torch.zeros_like, (q, k, v)), *others)
    zeros = Results(**stats._asdict(), **grads._asdict())
    value, cond, score_cond, underflow = parts = [
        Results(*(None if x is None else x.clone() for x in zeros)) for _ in range(4)
    ]
    assert value.lse is not None
    assert value.max_logit is not None
    value.lse.fill_(-torch.inf)
    value.max_logit.fill_(-torch.inf)
    for piece, own, own_spec in one_by_one(inputs, spec):
        of_rows = (None if x is None else piece.rows_of(x) for x in (dout, dlse, dentropy))
        found = solve(own, own_spec, *of_rows)
        for total, part in zip(parts, found[:4]):
            _add(total, part, piece, inputs)
    return Oracle(value, cond, score_cond, underflow, inputs.q.dtype)


def _add(total: Results, part: Results, piece: Piece, inputs: Inputs) -> None:
    """Put rows and keys in their places and add what is shared: gradients are cut as what they belong to."""
    for name in AttentionStats._fields:
        places = piece.keys_of if name == "key_mass" else piece.rows_of
        places(getattr(total, name)).copy_(getattr(part, name))
    gradients = {name: getattr(total, f"d{name}") for name in Inputs._fields[:N_GRADIENTS]}
    for name, x in piece.cut(inputs._replace(**gradients))._asdict().items():
        if gradients.get(name) is not None:
            x += getattr(part, f"d{name}")


def _double(inputs: Inputs) -> Inputs:
    given = (None if x is None else x.detach().double() for x in inputs[:N_GRADIENTS])
    return Inputs._make([*given, *inputs[N_GRADIENTS:]])


def _answer(inputs: Inputs, spec: AttentionSpec, dout: Tensor, dlse: Tensor, dentropy: Tensor) -> Results:
    """The reference and its gradients."""
    leaves = {name: x.requires_grad_() for name, x in zip(Gradients._fields, inputs) if x is not None}
    with torch.enable_grad():
        stats = dispatch.run(inputs, spec, "reference", STATISTICS)
    assert stats.lse is not None
    assert stats.entropy is not None
    grads = torch.autograd.grad(
        (stats.out, stats.lse, stats.entropy), [*leaves.values()], (dout, dlse, dentropy)
    )
    for x in leaves.values():
        x.requires_grad_(False)
    values = {name: x.detach() for name, x in stats._asdict().items()}
    return Results(**values, **dict(zip(leaves, grads)))


def _probabilities(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """The softmax before and after dropout: what the reference does to an identity."""
    batch, heads_kv, seqlen_k, _ = inputs.k.shape
    eye = torch.eye(seqlen_k, dtype=torch.float64, device=inputs.k.device)
    reader = inputs._replace(v=eye.expand(batch, heads_kv, -1, -1))
    before, _ = reference.attention(reader, spec._replace(dropout_p=0.0))
    return before, reference.attention(reader, spec)[0]


def _score_gradient(
    inputs: Inputs, spec: AttentionSpec, dout: Tensor, dlse: Tensor, dentropy: Tensor
) -> Tensor:
    """p·(D·dp - delta + dlse) and entropy's: the gradient of a bias with an element for every score."""
    shape = (*inputs.q.shape[:3], inputs.k.shape[2])
    bias = dout.new_zeros(shape) if inputs.bias is None else inputs.bias.expand(shape).clone()
    dbias = _answer(inputs._replace(bias=bias), spec, dout, dlse, dentropy).dbias
    assert dbias is not None
    return dbias


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, spec: AttentionSpec, dtype: torch.dtype
) -> tuple[Tensor | float, Tensor]:
    """Softcap's derivative as it can be computed, and each score's sum of absolute values."""
    slope: Tensor | float = 1.0
    level = abs(spec.scale) * (q.abs() @ k.abs().mT)
    if spec.softcap is not None:
        t2 = torch.tanh(spec.scale * (q @ k.mT) / spec.softcap).square()
        slope = 1 - t2 + t2 * (ACCUMULATION_ROUNDOFF[dtype] / ROUNDOFF[dtype])
        level = (1 - t2) * level + spec.softcap * t2.sqrt()
    return slope, level if bias is None else level + bias.abs()


def _over_group(x: Tensor, heads_kv: int) -> Tensor:
    return x if x.shape[1] == heads_kv else x.unflatten(1, (heads_kv, x.shape[1] // heads_kv)).sum(2)
