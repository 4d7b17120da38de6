"""Derivatives of attention along a direction, and of its gradients: closed forms, block by block.

Of one row, with r = scale·q·k, s = softcap(r) + bias, p = softmax(s), m = 1, or dropout's 0 or 1/(1 - p):
out = Σ p·m·v and lse. Along tangents of the inputs

    tr = scale·(tq·k + q·tk);  ts = s'·tr + tbias;  tlse = Σ p·ts;  tout = Σ p·m·(ts·v + tv) - tlse·out.

Second derivatives are gradients of one number, φ = <dout, tout> + <dlse, tlse>, by the inputs. With
dp = m·dout·v, ds = p·(dp - dout·out + dlse) as in backward and u = p·(ts - tlse),

    dφ/ds = u·(dp - dout·out + dlse) + p·(m·dout·tv - dout·tout);  dφ/dts = ds;
    dφ/dr = s'·dφ/ds + s''·tr·ds;  dφ/dtr = s'·ds;  dφ/dv = Σ m·u·dout,

and the product rule for q and k. The Hessian is symmetric: dφ is also how (dq, dk, ...) move along the
tangents. Each strip of rows is gone through twice: for its lse, out, tlse and tout, then for dφ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .biases import distances, looked_up, summed_up
from .fallback_blocks import MatmulEngine, dropped, group, ungroup
from .fallback_plan import Limits, Part, Strip
from .fallback_problems import alike, blocks_to_visit
from .philox import kept
from .sinks import join
from .spec import AttentionSpec, Gradients, Inputs, Needs, empty_gradients, like, of_entries, wide_dtype
from .visibility import block_of, visible


class Tangents(NamedTuple):
    """Tangents of the inputs that can have gradients, in their shapes and dtypes; None is 0."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None
    table: Tensor | None


def jvp(tangents: Tangents, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """(tout, tlse): how out and lse move along the tangents; 0 in rows that see nothing."""
    tout, tlse = _zeros_of_rows(inputs)
    for entries, direction in _directions(tangents, inputs, spec):
        for strip in direction.strips():
            rows, here = direction.rows(strip), (entries, slice(None), strip.rows)
            tout[here], tlse[here] = rows.tout, rows.tlse.squeeze(-1)
    return tout, tlse


def hvp(
    dout: Tensor,
    dlse: Tensor | None,
    tangents: Tangents,
    inputs: Inputs,
    spec: AttentionSpec,
    needs: Needs,
) -> tuple[Tensor, Tensor, Gradients]:
    """(tout, tlse) of `jvp`, and the gradients of <dout, tout> + <dlse, tlse> as far as `needs` asks."""
    tout, tlse = _zeros_of_rows(inputs)
    totals = Gradients(
        *(
            None if x is None or not need else torch.zeros(x.shape, dtype=tlse.dtype, device=x.device)
            for x, need in zip(inputs, needs, strict=False)
        )
    )
    for entries, direction in _directions(tangents, inputs, spec):
        own = Gradients(*_of_entries(totals, inputs, entries))
        for strip in direction.strips():
            rows, here = direction.rows(strip), (entries, slice(None), strip.rows)
            tout[here], tlse[here] = rows.tout, rows.tlse.squeeze(-1)
            direction.add_gradients(own, strip, rows, dout[here], None if dlse is None else dlse[here])
    room = empty_gradients(inputs, needs, dout)
    moved = (None if total is None else x.copy_(total) for total, x in zip(totals, room, strict=True))
    return tout, tlse, Gradients(*moved)


def _directions(
    tangents: Tangents, inputs: Inputs, spec: AttentionSpec
) -> Iterator[tuple[slice, _Direction]]:
    """Batch entries that visit the same blocks; with `batch_invariant`, each alone."""
    for entries, own, stop in alike(inputs, spec):
        first_entry = spec.first_entry + (entries.start or 0)
        moving = Tangents(*_of_entries(tangents, inputs, entries))
        yield entries, _Direction(moving, own, spec._replace(first_entry=first_entry), stop)


def _of_entries(given: Tangents | Gradients, inputs: Inputs, entries: slice) -> Iterator[Tensor | None]:
    """Batch entries, as views, of what stands for the first of the inputs."""
    there = {name: x for name, x in zip(Inputs._fields, given, strict=False) if x is not None}
    own = of_entries(inputs._replace(**there), entries)
    return (None if x is None else y for x, y in zip(given, own, strict=False))


class _Rows(NamedTuple):
    """A strip of rows after all its keys, in wide dtype: [batch, heads_q, rows, ...]; lse, tlse: [..., 1]."""

    q: Tensor
    tq: Tensor | None
    out: Tensor
    lse: Tensor
    tout: Tensor
    tlse: Tensor


class _Block(NamedTuple):
    """Rows and keys that meet, in wide dtype.

    s: scores, -inf where hidden; ts: their tangents, 0 there, or a single 0. slope, bend: s' and s''·tr,
    None where they are 1 and 0. keep: dropout's, or None.
    """

    k: Tensor
    v: Tensor
    tk: Tensor | None
    tv: Tensor | None
    s: Tensor
    ts: Tensor
    slope: Tensor | None
    bend: Tensor | None
    keep: Tensor | None


class _Direction(NamedTuple):
    """A call, and the direction in which its inputs move. stop: keys from here on are hidden."""

    tangents: Tangents
    inputs: Inputs
    spec: AttentionSpec
    stop: int

    def strips(self) -> tuple[Strip, ...]:
        rows, cols, _ = MatmulEngine.limits(self.inputs, self.spec)
        limits = Limits(max(16, rows // 4), cols, False)  # there are more temporaries than in backward
        return blocks_to_visit(self.inputs, self.spec, self.stop, limits)

    def blocks(self, strip: Strip, q: Tensor, tq: Tensor | None) -> Iterator[tuple[Part, _Block]]:
        return ((part, self._block(strip.rows, part, q, tq)) for part in strip.parts)

    def rows(self, strip: Strip) -> _Rows:
        """All of `_Rows`, with the softmax computed online; tangents of empty rows are 0."""
        q, tq = self._of_rows(self.inputs.q, strip), self._of_rows(self.tangents.q, strip)
        assert q is not None
        peak = q.new_full((*q.shape[:3], 1), -torch.inf)
        total = tlse = torch.zeros_like(peak)
        out = moved = q.new_zeros(*q.shape[:3], self.inputs.v.shape[3])
        for _, block in self.blocks(strip, q, tq):
            before, peak = peak, torch.maximum(peak, block.s.amax(-1, keepdim=True))
            level = peak.masked_fill(peak == -torch.inf, 0.0)
            p, fade = torch.exp(block.s - level), torch.exp(before - level)
            p_ts = p * block.ts
            total, tlse = total * fade + p.sum(-1, True), tlse * fade + p_ts.sum(-1, True)
            p = dropped(p, block.keep, self.spec)
            out = out * fade + _times(p, block.v)
            moved = moved * fade + _times(dropped(p_ts, block.keep, self.spec), block.v)
            if block.tv is not None:
                moved = moved + _times(p, block.tv)
        lse, total = peak + total.log(), total.masked_fill(total == 0.0, 1.0)
        out, moved, tlse = out / total, moved / total, tlse / total
        if self.inputs.sinks is not None:
            means, with_sinks = join(torch.cat([out, moved, tlse], -1), lse.squeeze(-1), self.inputs.sinks)
            lse = with_sinks[..., None]
            out, moved, tlse = means.split([out.shape[3], moved.shape[3], 1], -1)
            if self.tangents.sinks is not None:
                tlse = tlse + self._share_of_sinks(lse) * _per_head(self.tangents.sinks, lse)
        return _Rows(q, tq, out, lse, moved - tlse * out, tlse)

    def add_gradients(
        self, totals: Gradients, strip: Strip, rows: _Rows, dout: Tensor, dlse: Tensor | None
    ) -> None:
        """Add what the rows contribute to the gradients that are asked for."""
        inputs, spec = self.inputs, self.spec
        empty = rows.lse == -torch.inf
        q, dout = rows.q.masked_fill(empty, 0.0), dout.to(rows.q.dtype).masked_fill(empty, 0.0)
        tq = None if rows.tq is None else rows.tq.masked_fill(empty, 0.0)
        lse = rows.lse.masked_fill(empty, torch.inf)  # then p = 0
        delta = (dout * rows.out).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse.to(q.dtype)[..., None].masked_fill(empty, 0.0)
        moved = (dout * rows.tout).sum(-1, keepdim=True)
        if totals.dsinks is not None and inputs.sinks is not None:
            away = -rows.tlse
            if self.tangents.sinks is not None:
                away = away + _per_head(self.tangents.sinks, lse)
            totals.dsinks.sub_((self._share_of_sinks(rows.lse) * (away * delta + moved)).sum((0, 2, 3)))
        for part, block in self.blocks(strip, q, tq):
            here, there = (..., strip.rows, slice(None)), (..., part.cols, slice(None))
            p = torch.exp(block.s - lse)
            dp = dropped(_meets(dout, block.v), block.keep, self.spec) - delta
            ds, u = p * dp, p * (block.ts - rows.tlse)
            if totals.dv is not None:
                totals.dv[there] += _transposed_times(dropped(u, block.keep, self.spec), dout, block.k)
            change = -moved
            if block.tv is not None:
                change = change + dropped(_meets(dout, block.tv), block.keep, self.spec)
            w = u * dp + p * change
            self._add_of_biases(totals, w, strip.rows, part.cols)
            if block.slope is not None:
                w = block.slope * w
                if block.bend is not None:
                    w = w + block.bend * ds
                ds = block.slope * ds
            if totals.dq is not None:
                totals.dq[here] += spec.scale * _times(w, block.k)
                if block.tk is not None:
                    totals.dq[here] += spec.scale * _times(ds, block.tk)
            if totals.dk is not None:
                totals.dk[there] += spec.scale * _transposed_times(w, q, block.k)
                if tq is not None:
                    totals.dk[there] += spec.scale * _transposed_times(ds, tq, block.k)

    def _add_of_biases(self, totals: Gradients, w: Tensor, rows: slice, cols: slice) -> None:
        if totals.dbias is not None:
            target = block_of(totals.dbias, rows, cols)
            target += w.sum_to_size(target.shape)
        if totals.dslopes is not None:
            moved = (w * distances(self.inputs, self.spec, rows, cols)).sum((2, 3))
            totals.dslopes.sub_(moved.sum_to_size(totals.dslopes.shape))
        if totals.dtable is not None:
            totals.dtable.add_(summed_up(w, self.inputs, self.spec, rows, cols))

    def _block(self, rows: slice, part: Part, q: Tensor, tq: Tensor | None) -> _Block:
        """Hidden places cannot carry a NaN on: keys that none of these rows sees are 0."""
        inputs, tangents, spec = self.inputs, self.tangents, self.spec
        operands = [inputs.k, inputs.v, tangents.k, tangents.v]
        k, v, tk, tv = (None if x is None else x[:, :, part.cols].to(q.dtype) for x in operands)
        shown = visible(inputs, spec, rows, part.cols) if part.visible == "some" else None
        if shown is not None:
            shown = shown[(None,) * (4 - shown.ndim)]
            seen = shown.flatten(1, 2).any(1)[:, None, :, None]
            k, v, tk, tv = (None if x is None else torch.where(seen, x, 0.0) for x in (k, v, tk, tv))
        assert k is not None
        assert v is not None
        s = spec.scale * _meets(q, k)
        tr = _sum(None if tq is None else _meets(tq, k), None if tk is None else _meets(q, tk))
        ts = tr = None if tr is None else spec.scale * tr
        slope = bend = None
        if spec.softcap is not None:
            t = torch.tanh(s / spec.softcap)
            s, slope = spec.softcap * t, 1.0 - t * t
            if tr is not None:
                ts, bend = slope * tr, (-2.0 / spec.softcap) * t * slope * tr
        moving = inputs._replace(bias=tangents.bias, slopes=tangents.slopes, table=tangents.table)
        s = s if (bias := self._bias(inputs, rows, part.cols, s)) is None else s + bias
        ts = _sum(ts, self._bias(moving, rows, part.cols, s))
        if shown is not None:
            s = s.masked_fill(~shown, -torch.inf)
            ts = None if ts is None else torch.where(shown, ts, 0.0)
        ts = s.new_zeros(()) if ts is None else ts
        return _Block(k, v, tk, tv, s, ts, slope, bend, kept(inputs, spec, rows, part.cols))

    def _bias(self, of: Inputs, rows: slice, cols: slice, s: Tensor) -> Tensor | None:
        """What is added to the scores s: by the inputs, or, of tangents in their place, to their tangents."""
        bias = None if of.bias is None else block_of(of.bias, rows, cols).to(s.dtype)
        if of.slopes is not None:
            slopes = of.slopes.to(s.dtype)[..., None, None]
            bias = _sum(bias, -slopes * distances(of, self.spec, rows, cols))
        if of.table is not None:
            bias = _sum(bias, looked_up(of, self.spec, rows, cols)[None].to(s.dtype))
        return bias

    def _share_of_sinks(self, lse: Tensor) -> Tensor:
        """The weight of each row's sink, 0 where lse is -inf: [batch, heads_q, rows, 1]."""
        assert self.inputs.sinks is not None
        share = torch.exp(_per_head(self.inputs.sinks, lse) - lse)
        return share.masked_fill(lse == -torch.inf, 0.0)

    def _of_rows(self, x: Tensor | None, strip: Strip) -> Tensor | None:
        wide = wide_dtype(self.inputs.q)
        return None if x is None else x[:, :, strip.rows].to(wide)


def _zeros_of_rows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Room for tout and tlse."""
    q = inputs.q
    wide = wide_dtype(q)
    return like(q, inputs.v.shape[3]).zero_(), torch.zeros(q.shape[:3], dtype=wide, device=q.device)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


def _per_head(sinks: Tensor, x: Tensor) -> Tensor:
    return sinks.to(x.dtype)[:, None, None]


def _meets(x: Tensor, k: Tensor) -> Tensor:
    """x·kᵀ, with heads in groups: [batch, heads_q, rows, cols]."""
    return ungroup(group(x, k) @ k.mT, x)


def _times(p: Tensor, v: Tensor) -> Tensor:
    """p·v, with heads in groups: [batch, heads_q, rows, head_dim]."""
    return ungroup(group(p, v) @ v, p)


def _transposed_times(p: Tensor, x: Tensor, k: Tensor) -> Tensor:
    """pᵀ·x, summed over the heads of a group: [batch, heads_kv, cols, head_dim]."""
    return group(p, k).mT @ group(x, k)
