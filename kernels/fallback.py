"""Attention in plain PyTorch, memory linear in the sequence: for CPUs and whatever no kernel takes.

`fallback_plan` says which blocks of the score matrix there are, `fallback_blocks` computes one; here
they are cut out of the inputs, merged by their lse, and their gradients summed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .biases import distances, looked_up, summed_up
from .fallback_band import Band
from .fallback_blocks import Block, FlashEngine, MatmulEngine, RowGradients, operand
from .fallback_plan import Part, Run, Strip, plan, runs
from .merge import merged
from .philox import keep_mask
from .sinks import gradient, join
from .spec import AttentionSpec, Gradients, Inputs, Needs, like, seq_major
from .visibility import block_of, visible

Engine = type[FlashEngine] | type[MatmulEngine]


def attention_forward(inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """(out, lse) of validated inputs, as `reference.attention` defines them.

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
    for problem in _problems(inputs, spec, engine, poison=(inputs.k, v)):
        if problem.entries == slice(None) and [x.rows for x in problem.strips] == [slice(0, q.shape[2])]:
            out, lse = _forward_strip(problem, engine, problem.strips[0])
            return _in_layout_of(q, out), lse.contiguous()
        if results is None:
            results = like(q, v.shape[3]).zero_(), q.new_full(q.shape[:3], -torch.inf, dtype=_wide(q))
        out, lse = results
        for run in _runs(problem, engine):
            if run.times > 1:
                _forward_run(problem, run, out, lse)
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
) -> Gradients:
    """Gradients of out and lse, as far as `needs` asks; deterministic.

    Each block gives its exact share, because lse and out are those of the whole row; the shares are
    summed in float32 or wider and rounded once.
    """
    spec = spec._replace(want_lse=True)  # nothing is narrow in backward
    q, k, v, bias = inputs[:4]
    dsinks = None
    if inputs.sinks is not None and needs.dsinks:
        dsinks = gradient(_delta(dout, dlse, out), lse, inputs.sinks)
    dscores = needs.dbias or needs.dslopes or needs.dtable
    engine: Engine = FlashEngine if FlashEngine.takes(inputs, spec) and not dscores else MatmulEngine
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
        None if x is None or not need else torch.zeros(x.shape, dtype=_wide(q), device=q.device)
        for x, need in zip((q, k, v, bias), needs[:4], strict=True)
    )
    dslopes = None
    if inputs.slopes is not None and needs.dslopes:
        dslopes = torch.zeros(inputs.slopes.shape, dtype=_wide(q), device=q.device)
    dtable = None
    if inputs.table is not None and needs.dtable:
        dtable = torch.zeros(inputs.table.shape, dtype=_wide(q), device=q.device)
    for problem in _problems(inputs, spec, engine, poison=(q, k, v, dout)):
        for strip in problem.strips:
            here = (problem.entries, slice(None), strip.rows)
            rows = RowGradients(dout[here], None if dlse is None else dlse[here], out[here], lse[here])
            q_rows, rows = _silence_empty_rows(problem.inputs.q[:, :, strip.rows], rows)
            for part in strip.parts:
                block = _block(problem, strip, part, q_rows, _wide(q))
                share = engine.backward(block, rows, spec, dscores)
                there = (problem.entries, slice(None), part.cols)
                if dq is not None:
                    dq[here] += share.dq
                if dk is not None:
                    dk[there] += share.dk
                if dv is not None:
                    dv[there] += share.dv
                if dbias is not None and share.dscores is not None:
                    target = block_of(_entries_of(dbias, problem.entries), strip.rows, part.cols)
                    target += share.dscores.sum_to_size(target.shape)
                if dtable is not None and share.dscores is not None:
                    dtable += summed_up(share.dscores, problem.inputs, spec, strip.rows, part.cols)
                if dslopes is not None and share.dscores is not None:
                    of_heads = _entries_of(dslopes, problem.entries)
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


class _Problem(NamedTuple):
    """Batch entries with the same number of keys, and the blocks to compute for them, as strips and as runs.

    seen: (batch, 1, seqlen_k, 1), the keys that some row sees; None if the others need no care. band: the
    mask of blocks, where causal and window alone hide keys and the operator computes.
    """

    entries: slice
    inputs: Inputs
    spec: AttentionSpec
    strips: tuple[Strip, ...]
    runs: tuple[Run, ...]
    seen: Tensor | None
    band: Band | None


def _whole_block(inputs: Inputs, spec: AttentionSpec, engine: Engine) -> Block | None:
    """The whole problem as a block, if the operator takes it as it is; small calls are in a hurry."""
    if engine is not FlashEngine or not FlashEngine.takes_whole(inputs, spec):
        return None
    q, k, v = inputs[:3]
    if q.element_size() == 2 and not FlashEngine.stays_narrow(inputs, spec):
        q, k, v = q.float(), k.float(), v.float()
    return Block(q, k, v, causal=FlashEngine.is_causal(inputs, spec))


def _problems(
    inputs: Inputs, spec: AttentionSpec, engine: Engine, poison: tuple[Tensor, ...]
) -> Iterator[_Problem]:
    """Cut the batch; poison: tensors whose NaN or Inf hidden keys could carry on."""
    seqlen_q, seqlen_k = inputs.q.shape[2], inputs.k.shape[2]
    for entries, own, stop in _by_length(inputs):
        masked = any(x is not None for x in (own.mask, own.ranges, own.tiles, own.key_lengths))
        asked = spec, seqlen_q, seqlen_k, stop, masked, engine.limits(own, spec)
        strips = plan(*asked)
        seen = _seen(own, spec, strips) if masked and not _harmless(poison) else None
        nothing_added = all(x is None for x in (own.bias, own.slopes, own.table))
        is_band = engine is FlashEngine and not masked and nothing_added
        yield _Problem(
            entries, own, spec, strips, runs(*asked), seen, Band(own, spec, strips) if is_band else None
        )


def _harmless(tensors: tuple[Tensor, ...]) -> bool:
    """Whether all are finite, as far as that can be known without synchronising."""
    return tensors[0].device.type == "cpu" and all(bool(x.sum(dtype=_wide(x)).isfinite()) for x in tensors)


def _by_length(inputs: Inputs) -> Iterator[tuple[slice, Inputs, int]]:
    """Runs of batch entries with equal key_lengths, without them, and that length.

    Keys past the length are then never touched. Elsewhere than on a CPU reading lengths would
    synchronise: they stay a mask.
    """
    seqlen_k = inputs.k.shape[2]
    if inputs.key_lengths is None or inputs.q.device.type != "cpu":
        yield slice(None), inputs, seqlen_k
        return
    start = 0
    for length, run in itertools.groupby(inputs.key_lengths.clamp(0, seqlen_k).tolist()):
        entries = slice(start, start + len(list(run)))
        start = entries.stop
        own = inputs._replace(
            q=inputs.q[entries],
            k=inputs.k[entries],
            v=inputs.v[entries],
            bias=None if inputs.bias is None else _entries_of(inputs.bias, entries),
            slopes=None if inputs.slopes is None else _entries_of(inputs.slopes, entries),
            mask=None if inputs.mask is None else _entries_of(inputs.mask, entries),
            ranges=None if inputs.ranges is None else _entries_of(inputs.ranges, entries),
            tiles=None if inputs.tiles is None else _entries_of(inputs.tiles, entries),
            key_lengths=None,
        )
        yield entries, own, length


def _forward_strip(problem: _Problem, engine: Engine, strip: Strip) -> tuple[Tensor, Tensor]:
    """(out, lse) of the rows of a strip."""
    q = problem.inputs.q[:, :, strip.rows]
    first, *others = strip.parts
    narrow = not others and engine is FlashEngine and engine.stays_narrow(problem.inputs, problem.spec)
    out, lse = engine.forward(_block(problem, strip, first, q, q.dtype if narrow else _wide(q)), problem.spec)
    for part in others:
        out, lse = merged(out, lse, *engine.forward(_block(problem, strip, part, q, _wide(q)), problem.spec))
    sinks = problem.inputs.sinks
    return (out, lse) if sinks is None else join(out, lse, sinks)


def _runs(problem: _Problem, engine: Engine) -> tuple[Run, ...]:
    """The strips; as runs where few calls of the operator per batch entry do all strips of a run."""
    inputs, spec = problem.inputs, problem.spec
    as_it_is = inputs.q.element_size() > 2 or FlashEngine.stays_narrow(inputs, spec)
    fewer_calls = any(run.times > inputs.q.shape[0] for run in problem.runs)
    if problem.band is not None and inputs.sinks is None and as_it_is and fewer_calls:
        return problem.runs
    return tuple(Run(strip, 1) for strip in problem.strips)


def _forward_run(problem: _Problem, run: Run, out: Tensor, lse: Tensor) -> None:
    """Fill in what a run of strips with one part each gives: they share a mask, and become the batch.

    Their keys overlap, and the operator may copy what it reads: so many strips at a time that they read each
    key about twice.
    """
    (part,), rows = run.strip.parts, run.strip.rows
    n_rows, n_cols = rows.stop - rows.start, part.cols.stop - part.cols.start
    bias = problem.band.of(rows, part.cols) if problem.band is not None and part.visible == "some" else None
    batch, _, seqlen_k, head_dim_v = problem.inputs.v.shape
    width, at_once = max(problem.inputs.q.shape[3], head_dim_v), max(1, 2 * seqlen_k // n_cols)
    for entry in range(batch):
        q, k, v = (operand(x[entry], width) for x in problem.inputs[:3])
        for first in range(0, run.times, at_once):
            times, moved = min(at_once, run.times - first), first * n_rows
            of_rows = slice(rows.start + moved, rows.start + moved + times * n_rows)
            of_cols = slice(part.cols.start + moved, part.cols.stop + moved + (times - 1) * n_rows)
            strips = q[:, of_rows].unflatten(1, (times, n_rows)).transpose(0, 1)
            keys, values = (x[:, of_cols].unfold(1, n_cols, n_rows).permute(1, 0, 3, 2) for x in (k, v))
            block = Block(strips, keys, values, bias=bias, none_empty=True)
            part_of_out, part_of_lse = FlashEngine.forward(block, problem.spec)
            for target, x in ((out, part_of_out[..., :head_dim_v]), (lse, part_of_lse)):
                target = target[problem.entries][entry, :, of_rows]
                target.unflatten(1, (times, n_rows)).copy_(x.transpose(0, 1))


def _block(problem: _Problem, strip: Strip, part: Part, q: Tensor, dtype: torch.dtype) -> Block:
    """Cut a block out of a problem, in dtype; q holds its rows already."""
    inputs, spec = problem.inputs, problem.spec
    rows, cols = strip.rows, part.cols
    k, v = (x[:, :, cols].to(dtype) for x in (inputs.k, inputs.v))
    if problem.seen is not None:
        k, v = (torch.where(problem.seen[:, :, cols], x, 0.0) for x in (k, v))
    bias = None if inputs.bias is None else block_of(inputs.bias, rows, cols)
    if inputs.slopes is not None:
        alibi = -inputs.slopes.to(_wide(q))[..., None, None] * distances(inputs, spec, rows, cols)
        bias = alibi if bias is None else bias + alibi
    if inputs.table is not None:
        relative = looked_up(inputs, spec, rows, cols)[None].to(_wide(q))
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
        None if spec.dropout_p == 0.0 else _keep(problem, rows, cols),
        causal=part.visible == "causal",
        none_empty=problem.band is not None and len(strip.parts) == 1,
    )


def _keep(problem: _Problem, rows: slice, cols: slice) -> Tensor:
    inputs = problem.inputs
    batch, heads, _, _ = inputs.q.shape
    row, col = (range(x.start, x.stop) for x in (rows, cols))
    first_plane = (problem.spec.first_entry + (problem.entries.start or 0)) * heads
    assert inputs.seed is not None
    return keep_mask(inputs.seed, problem.spec.dropout_p, batch, heads, row, col, first_plane)


def _seen(inputs: Inputs, spec: AttentionSpec, strips: tuple[Strip, ...]) -> Tensor:
    """Which keys some row of the batch entry sees, [batch, 1, seqlen_k, 1]: the others may hold NaN."""
    k = inputs.k
    seen = torch.zeros(k.shape[0], 1, k.shape[2], 1, dtype=torch.bool, device=k.device)
    for strip in strips:
        for part in strip.parts:
            ok = visible(inputs, spec, strip.rows, part.cols)
            assert ok is not None
            ok = ok[(None,) * (4 - ok.ndim)]
            seen[:, 0, part.cols, 0] |= ok.flatten(1, 2).any(1)
    return seen


def _delta(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """rowsum(dout·out) - dlse, in wide dtype."""
    delta = (dout.to(_wide(out)) * out).sum(-1)
    return delta if dlse is None else delta - dlse


def _silence_empty_rows(q: Tensor, rows: RowGradients) -> tuple[Tensor, RowGradients]:
    """Make rows that see nothing harmless: zeros whatever they hold, and lse +inf, so that p = 0."""
    wide = _wide(q)
    dout, out, lse = (x.to(wide) for x in (rows.dout, rows.out, rows.lse))
    dlse = None if rows.dlse is None else rows.dlse.to(wide)
    empty = lse == -torch.inf
    if q.device.type != "cpu" or bool(empty.any()):
        q, dout, out = (x.masked_fill(empty[..., None], 0.0) for x in (q, dout, out))
        dlse = None if dlse is None else dlse.masked_fill(empty, 0.0)
        lse = lse.masked_fill(empty, torch.inf)
    return q, RowGradients(dout, dlse, out, lse)


def _entries_of(x: Tensor, entries: slice) -> Tensor:
    """Batch entries of a tensor whose batch axis may have size 1 and then stays so."""
    return x if x.shape[0] == 1 else x[entries]


def _in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """result with the dtype and the physical order that `like` gives it; a copy only if it differs."""
    dense = (result.transpose(1, 2) if seq_major(x) else result).is_contiguous()
    return result if dense and result.dtype == x.dtype else like(x, result.shape[3]).copy_(result)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
