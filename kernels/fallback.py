"""Attention in plain PyTorch, memory linear in the sequence: for CPUs and whatever no kernel takes.

`fallback_problems` says which blocks of the score matrix there are, `fallback_blocks` computes one; here
they are cut out of the inputs, merged by their lse, and their gradients summed. On a GPU too no operator is
called that adds up in any order; of cuBLAS that holds on one stream, or with CUBLAS_WORKSPACE_CONFIG set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import packed
from .biases import distances, looked_up, summed_up
from .fallback_blocks import Block, FlashEngine, MatmulEngine, RowGradients, scores
from .fallback_plan import Part, Strip
from .fallback_problems import Engine, Problem, problems
from .fallback_runs import forward_run, runs_of
from .merge import merged
from .philox import kept
from .sinks import gradient, join
from .spec import AttentionSpec, Gradients, Inputs, Needs, like, seq_major, wide_dtype
from .visibility import block_of, entries_of, visible


def attention_forward(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, max_logit) of validated inputs, as the reference defines them; None without `want_max`."""
    if inputs.spans_q is not None:
        return packed.forward(attention_forward, inputs, spec)
    out, lse = _out_and_lse(inputs, spec)
    return out, lse, _max_logit(inputs, spec) if spec.want_max else None


def _out_and_lse(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """By the engine that takes the call.

    16-bit inputs are computed in float32 and rounded once, except where `FlashEngine.stays_narrow`: there
    P is rounded too, and lse is good for a backward pass only.
    """
    q, v = inputs.q, inputs.v
    engine: Engine = FlashEngine if FlashEngine.takes(inputs, spec) else MatmulEngine
    block = _whole_block(inputs, spec, engine)
    if block is not None:
        out, lse = engine.forward(block, spec)
        if inputs.sinks is not None:
            out, lse = join(out, lse, inputs.sinks)
        return _in_layout_of(q, out), lse.contiguous()
    results: tuple[Tensor, Tensor] | None = None
    for problem in problems(inputs, spec, engine, poison=(inputs.k, v)):
        if problem.entries == slice(None) and [x.rows for x in problem.strips] == [slice(0, q.shape[2])]:
            out, lse = _forward_strip(problem, engine, problem.strips[0])
            return _in_layout_of(q, out), lse.contiguous()
        if results is None:
            results = like(q, v.shape[3]).zero_(), q.new_full(q.shape[:3], -torch.inf, dtype=wide_dtype(q))
        out, lse = results
        for run in runs_of(problem, engine):
            if run.times > 1:
                forward_run(problem, run, out, lse)
                continue
            here = (problem.entries, slice(None), run.strip.rows)
            out[here], lse[here] = _forward_strip(problem, engine, run.strip)
    assert results is not None, "there is at least one batch entry"
    return results


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Needs,
    dentropy: Tensor | None = None,
) -> Gradients:
    """Gradients of out and lse, as far as `needs` asks; deterministic.

    Each block gives its exact share, because lse and out are those of the whole row; the shares are
    summed in float32 or wider and rounded once. With `precise` they are those of one more forward pass where
    the saved ones are rounded: seven products instead of five. dentropy: see `entropy_backward`.
    """
    if inputs.spans_q is not None:

        def shares(piece: packed.Piece, own: Inputs, own_spec: AttentionSpec) -> Gradients:
            rows_of = piece.rows_of
            return attention_backward(
                rows_of(dout),
                None if dlse is None else rows_of(dlse),
                rows_of(out),
                rows_of(lse),
                own,
                own_spec,
                needs,
                None if dentropy is None else rows_of(dentropy),
            )

        return packed.gradients(shares, inputs, spec, needs)
    spec = spec._replace(want_lse=True)  # nothing is narrow in backward
    if spec.precise and inputs.q.element_size() == 2:
        out, lse = _unrounded(inputs, spec)
    q, k, v, bias = inputs[:4]
    dsinks = None
    if inputs.sinks is not None and needs.dsinks:
        dsinks = gradient(_delta(dout, dlse, out), lse, inputs.sinks)
    dscores = needs.dbias or needs.dslopes or needs.dtable
    formula = dscores or dentropy is not None
    engine: Engine = FlashEngine if FlashEngine.takes(inputs, spec) and not formula else MatmulEngine
    block = _whole_block(inputs, spec, engine)
    if block is not None:
        _, rows = _silence_empty_rows(q, RowGradients(dout, dlse, out, lse))
        share = engine.backward(block, rows, spec, False)
        return Gradients(
            _in_layout_of(q, share.dq) if needs.dq else None,
            _in_layout_of(k, share.dk) if needs.dk else None,
            _in_layout_of(v, share.dv) if needs.dv else None,
            None,
            dsinks,
            None,
            None,
        )
    dq, dk, dv, dbias = (
        None if x is None or not need else torch.zeros(x.shape, dtype=wide_dtype(q), device=q.device)
        for x, need in zip((q, k, v, bias), needs[:4], strict=True)
    )
    dslopes = None
    if inputs.slopes is not None and needs.dslopes:
        dslopes = torch.zeros(inputs.slopes.shape, dtype=wide_dtype(q), device=q.device)
    dtable = None
    if inputs.table is not None and needs.dtable:
        dtable = torch.zeros(inputs.table.shape, dtype=wide_dtype(q), device=q.device)
    for problem in problems(inputs, spec, engine, poison=(q, k, v, dout)):
        for strip in problem.strips:
            here = (problem.entries, slice(None), strip.rows)
            of_lse, of_entropy = (None if x is None else x[here] for x in (dlse, dentropy))
            rows = RowGradients(dout[here], of_lse, out[here], lse[here], of_entropy)
            q_rows, rows = _silence_empty_rows(problem.inputs.q[:, :, strip.rows], rows)
            for part in strip.parts:
                block = _block(problem, strip, part, q_rows, wide_dtype(q))
                share = engine.backward(block, rows, spec, dscores)
                there = (problem.entries, slice(None), part.cols)
                if dq is not None:
                    dq[here] += share.dq
                if dk is not None:
                    dk[there] += share.dk
                if dv is not None:
                    dv[there] += share.dv
                if dbias is not None and share.dscores is not None:
                    target = block_of(entries_of(dbias, problem.entries), strip.rows, part.cols)
                    target += share.dscores.sum_to_size(target.shape)
                if dtable is not None and share.dscores is not None:
                    dtable += summed_up(share.dscores, problem.inputs, spec, strip.rows, part.cols)
                if dslopes is not None and share.dscores is not None:
                    of_heads = entries_of(dslopes, problem.entries)
                    distance = distances(problem.inputs, spec, strip.rows, part.cols)
                    moved = (share.dscores * distance).sum((2, 3))
                    of_heads -= moved.sum_to_size(of_heads.shape)
        if problem.seen is not None:
            for g in (dk, dv):
                if g is not None:
                    g[problem.entries].masked_fill_(~problem.seen, 0.0)
    return Gradients(
        None if dq is None else _in_layout_of(q, dq),
        None if dk is None else _in_layout_of(k, dk),
        None if dv is None else _in_layout_of(v, dv),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        dsinks,
        None if dslopes is None or inputs.slopes is None else dslopes.to(inputs.slopes.dtype),
        None if dtable is None or inputs.table is None else dtable.to(inputs.table.dtype),
    )


def _unrounded(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """(out, lse) in float32 of 16-bit inputs.

    rowsum(dout·out) is Σ P·dP summed in another order, and as exact where out is. Summing P·dP itself would
    cost the same two products, and would hand the errors of an lse of few digits on to delta.
    """
    q, k, v = (x.float() for x in inputs[:3])
    return _out_and_lse(inputs._replace(q=q, k=k, v=v), spec)


def attention_statistics(
    lse: Tensor, inputs: Inputs, spec: AttentionSpec, entropy: bool, key_mass: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(entropy, key_mass), as the reference defines them, from the rows' lse and without dropout.

    No term p·(lse - s) of the entropy is negative: nothing cancels.
    """
    q, k = inputs.q, inputs.k
    if inputs.spans_q is not None:
        return packed.statistics(attention_statistics, lse, inputs, spec, entropy, key_mass)
    total = torch.zeros_like(lse) if entropy else None
    mass = lse.new_zeros(*q.shape[:2], k.shape[2]) if key_mass else None
    for problem in problems(inputs, spec, MatmulEngine, poison=(k,)):
        for strip in problem.strips:
            here = (problem.entries, slice(None), strip.rows)
            empty = lse[here] == -torch.inf
            q_rows = problem.inputs.q[:, :, strip.rows].masked_fill(empty[..., None], 0.0)
            lse_rows = lse[here].masked_fill(empty, torch.inf)[..., None]
            for part in strip.parts:
                surprise = lse_rows - scores(_block(problem, strip, part, q_rows, wide_dtype(q)), spec)[0]
                p = torch.exp(-surprise)
                if mass is not None:
                    mass[problem.entries, :, part.cols] += p.sum(2)
                if total is not None:
                    total[here] += (p * surprise.masked_fill(p == 0.0, 0.0)).sum(-1)
    return None if total is None else total.clamp_min(0.0), mass


def entropy_backward(
    dentropy: Tensor, entropy: Tensor, lse: Tensor, inputs: Inputs, spec: AttentionSpec, needs: Needs
) -> Gradients:
    """Gradients of entropy; dv is never needed.

    H = Σ p·(lse - s) over keys, P = Σ p: dS = dH·p·(lse - s - 1 - (H - P)). That is backward's p·(dP - delta)
    with dP = dH·(lse - s - 1) and delta = dH·(H - P), and so it is for a sink, whose dP is 0.
    """
    of_keys: Tensor | float = 1.0
    if inputs.sinks is not None:
        of_keys = -torch.expm1(inputs.sinks.to(lse.dtype)[:, None] - lse)
    nothing = lse.new_zeros(*lse.shape, inputs.v.shape[3])
    minus_delta = dentropy * (of_keys - entropy)
    return attention_backward(nothing, minus_delta, nothing, lse, inputs, spec, needs, dentropy)


def _max_logit(inputs: Inputs, spec: AttentionSpec) -> Tensor:
    """In a pass of its own: the fast engine does not say what its scores were."""
    q = inputs.q
    top = q.new_full(q.shape[:3], -torch.inf, dtype=wide_dtype(q))
    for problem in problems(inputs, spec._replace(dropout_p=0.0), MatmulEngine, poison=(inputs.k,)):
        for strip in problem.strips:
            here = top[problem.entries, :, strip.rows]
            for part in strip.parts:
                block = _block(problem, strip, part, problem.inputs.q[:, :, strip.rows], wide_dtype(q))
                torch.maximum(here, scores(block, problem.spec)[0].amax(-1), out=here)
    return top


def _whole_block(inputs: Inputs, spec: AttentionSpec, engine: Engine) -> Block | None:
    """The whole problem as a block, if the operator takes it as it is; small calls are in a hurry."""
    if engine is not FlashEngine or spec.batch_invariant or not FlashEngine.takes_whole(inputs, spec):
        return None
    q, k, v = inputs[:3]
    if q.element_size() == 2 and not FlashEngine.stays_narrow(inputs, spec):
        q, k, v = q.float(), k.float(), v.float()
    return Block(q, k, v, causal=FlashEngine.is_causal(inputs, spec))


def _forward_strip(problem: Problem, engine: Engine, strip: Strip) -> tuple[Tensor, Tensor]:
    """(out, lse) of the rows of a strip."""
    q = problem.inputs.q[:, :, strip.rows]
    first, *others = strip.parts
    narrow = not others and engine is FlashEngine and engine.stays_narrow(problem.inputs, problem.spec)
    out, lse = engine.forward(
        _block(problem, strip, first, q, q.dtype if narrow else wide_dtype(q)), problem.spec
    )
    for part in others:
        out, lse = merged(
            out, lse, *engine.forward(_block(problem, strip, part, q, wide_dtype(q)), problem.spec)
        )
    sinks = problem.inputs.sinks
    return (out, lse) if sinks is None else join(out, lse, sinks)


def _block(problem: Problem, strip: Strip, part: Part, q: Tensor, dtype: torch.dtype) -> Block:
    """Cut a block out of a problem, in dtype; q holds its rows already."""
    inputs, spec = problem.inputs, problem.spec
    rows, cols = strip.rows, part.cols
    k, v = (x[:, :, cols].to(dtype) for x in (inputs.k, inputs.v))
    if problem.seen is not None:
        k, v = (torch.where(problem.seen[:, :, cols], x, 0.0) for x in (k, v))
    bias = None if inputs.bias is None else block_of(inputs.bias, rows, cols)
    if inputs.slopes is not None:
        alibi = -inputs.slopes.to(wide_dtype(q))[..., None, None] * distances(inputs, spec, rows, cols)
        bias = alibi if bias is None else bias + alibi
    if inputs.table is not None:
        relative = looked_up(inputs, spec, rows, cols)[None].to(wide_dtype(q))
        bias = relative if bias is None else bias + relative
    shown = None
    if part.visible == "some":
        if problem.band is None:
            shown = visible(inputs, spec, rows, cols)
        else:
            bias = problem.band.of(rows, cols)
    return Block(
        q.to(dtype),
        k,
        v,
        shown,
        bias,
        kept(inputs, spec, rows, cols, problem.entries.start or 0),
        causal=part.visible == "causal",
        none_empty=problem.band is not None and len(strip.parts) == 1,
    )


def _delta(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """rowsum(dout·out) - dlse, in wide dtype."""
    delta = (dout.to(wide_dtype(out)) * out).sum(-1)
    return delta if dlse is None else delta - dlse


def _silence_empty_rows(q: Tensor, rows: RowGradients) -> tuple[Tensor, RowGradients]:
    """Make rows that see nothing harmless: zeros whatever they hold, and lse +inf, so that p = 0."""
    wide = wide_dtype(q)
    dout, out, lse = (x.to(wide) for x in (rows.dout, rows.out, rows.lse))
    dlse, dentropy = (None if x is None else x.to(wide) for x in (rows.dlse, rows.dentropy))
    empty = lse == -torch.inf
    if q.device.type != "cpu" or bool(empty.any()):
        q, dout, out = (x.masked_fill(empty[..., None], 0.0) for x in (q, dout, out))
        dlse, dentropy = (None if x is None else x.masked_fill(empty, 0.0) for x in (dlse, dentropy))
        lse = lse.masked_fill(empty, torch.inf)
    return q, RowGradients(dout, dlse, out, lse, dentropy)


def _in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """result with the dtype and the physical order that `like` gives it; a copy only if it differs."""
    dense = (result.transpose(1, 2) if seq_major(x) else result).is_contiguous()
    return result if dense and result.dtype == x.dtype else like(x, result.shape[3]).copy_(result)
