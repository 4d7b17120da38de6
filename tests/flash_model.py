"""A correct fused kernel's arithmetic in plain PyTorch, in steps that can be replaced one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from undivided.conformance.cases import Problem
from undivided.kernels.biases import _buckets
from undivided.kernels.philox import keep_mask
from undivided.kernels.sinks import lse_of_empty_rows
from undivided.kernels.spec import N_GRADIENTS, AttentionSpec, AttentionStats, Gradients, Inputs
from undivided.kernels.visibility import visible


class Flash:
    """What a correct kernel computes: float32 sums of 16-bit products, P and dS rounded once.

    Every step is a method, so a bug is one step done wrong.
    """

    tile = 16

    def __call__(self, problem: Problem) -> AttentionStats:
        if problem.options.get("deterministic") == "batch":
            alone = (problem.of_entries([entry]) for entry in range(problem.q.shape[0]))
            return AttentionStats(*(torch.cat(x) for x in zip(*map(self._attend, alone))))
        return self._attend(problem)

    def _attend(self, problem: Problem) -> AttentionStats:
        inputs, spec = problem.prepared()
        stats = AttentionStats(*_Call.apply(self, inputs, self.read(spec), *inputs[:N_GRADIENTS]))
        if inputs.sinks is None:
            return stats
        return stats._replace(lse=lse_of_empty_rows(stats.lse, inputs.sinks))

    def read(self, spec: AttentionSpec) -> AttentionSpec:
        return spec

    def forward(self, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """(out, lse), one tile of keys after the other."""
        q, k, v, seen = self.operands(inputs, spec)
        scores = self.scores(q, k, inputs, spec)[0].masked_fill(~seen, -torch.inf)
        survives = self.survives(inputs, spec, seen.shape)
        peak = scores.new_full((*scores.shape[:3], 1), -torch.inf)
        total, out = torch.zeros_like(peak), q.new_zeros(*q.shape[:3], v.shape[3])
        for cols in self.tiles(inputs):
            s, last_peak = scores[..., cols], peak
            peak = torch.maximum(peak, s.amax(-1, keepdim=True))
            level = peak.masked_fill(peak == -torch.inf, 0.0)
            weights, shrink = torch.exp(s - level), self.shrink(last_peak, level)
            total = total * shrink + weights.sum(-1, keepdim=True)
            out = out * shrink + rounded(weights * survives[..., cols], inputs) @ v[..., cols, :]
        out, lse = self.normalised(out, total, peak)
        if inputs.sinks is not None:
            sinks = inputs.sinks.float()[:, None, None]
            alone, total = lse == -torch.inf, torch.logaddexp(lse, sinks)
            out, lse = out * torch.exp(lse - total), torch.where(alone, lse, self.lse_with_sinks(lse, total))
        return out.to(inputs.q.dtype), lse.squeeze(-1)

    def statistics(self, lse: Tensor, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
        """(max_logit, entropy, key_mass), from lse."""
        q, k, _, seen = self.operands(inputs, spec)
        scores = self.scores(q, k, inputs, spec)[0].masked_fill(~seen, -torch.inf)
        lse = self.lse_of_entropy(lse[..., None], scores)
        surprise = torch.where(lse == -torch.inf, torch.inf, lse - scores)
        p = torch.exp(-surprise)
        entropy = (p * surprise.masked_fill(p == 0, 0.0)).sum(-1)
        mass = self.mass(p, self.survives(inputs, spec, seen.shape)).sum(2)
        nobody = scores.new_full((*scores.shape[:3], 1), -torch.inf)
        top = torch.cat([nobody, self.scores_of_max(scores, q, k, spec)], -1).amax(-1)
        return top, self.returned_entropy(entropy), mass

    def lse_of_entropy(self, lse: Tensor, scores: Tensor) -> Tensor:
        """The denominator's logarithm, in which a sink is."""
        return lse

    def mass(self, p: Tensor, survives: Tensor) -> Tensor:
        """What the rows give each key, before dropout."""
        return p

    def scores_of_max(self, scores: Tensor, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        return scores

    def returned_entropy(self, entropy: Tensor) -> Tensor:
        return entropy

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor,
        dentropy: Tensor,
        out: Tensor,
        lse: Tensor,
        inputs: Inputs,
        spec: AttentionSpec,
    ) -> Gradients:
        """Probabilities rebuilt from lse."""
        q, k, v, seen = self.operands(inputs, spec)
        dead = (lse == -torch.inf)[..., None]
        dout, dlse = dout.float().masked_fill(dead, 0.0), dlse[..., None].masked_fill(dead, 0.0)
        scores, slope = self.scores(q, k, inputs, spec)
        hidden = ~self.seen_by_backward(seen) | dead
        p = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0.0)
        survives = self.survives(inputs, spec, seen.shape, backward=True)
        dp = self.dropped(dout @ v.mT, survives)
        delta = self.delta(p, dp, out.float(), dout, spec) - self.gradient_of_lse(dlse)
        surprise = (lse[..., None] - scores).masked_fill(p == 0, 0.0)
        dentropy = self.gradient_of_entropy(dentropy)[..., None].masked_fill(dead, 0.0)
        delta = delta + dentropy * (p * (surprise - 1)).sum(-1, keepdim=True)
        ds = p * (dp + dentropy * (surprise - 1) - delta)
        narrow = rounded(ds * slope, inputs)
        dq = spec.scale * (narrow @ k)
        dk = self.over_group(self.scale_of_dk(spec) * (narrow.mT @ q), inputs)
        dv = self.over_group(rounded(p * survives, inputs).mT @ dout, inputs)
        dbias = None if inputs.bias is None else self.over_broadcast(ds, inputs.bias)
        dsinks = None
        if inputs.sinks is not None:
            sinks = inputs.sinks.float()[:, None, None]
            shares = torch.exp(sinks - lse[..., None]).masked_fill(dead, 0.0)
            dsinks = self.gradient_of_sinks(shares, delta)
        dslopes = None
        if inputs.slopes is not None:
            moved = self.gradient_of_distances(ds, self.distances(inputs, spec))
            dslopes = moved.sum((2, 3)).sum_to_size(inputs.slopes.shape)
        dtable = None if inputs.table is None else self.gradient_of_table(ds, inputs, spec)
        return Gradients(dq, dk, dv, dbias, dsinks, dslopes, dtable)

    def operands(self, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v in float32, with what nobody sees cleared, and who sees whom; all per query head."""
        seen = self.visible(inputs, spec)
        rows, cols = seen.any(-1)[..., None], seen.flatten(1, 2).any(1)[:, None, :, None]
        q, k, v = (self.load(x) for x in inputs[:3])
        k, v = (self.per_query_head(torch.where(cols, x, 0.0), inputs) for x in (k, v))
        return torch.where(rows, q, 0.0), k, v, seen

    def visible(self, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        shape = (*inputs.q.shape[:3], inputs.k.shape[2])
        seen = visible(inputs, spec)
        seen = torch.ones((), dtype=torch.bool) if seen is None else seen
        return seen.to(inputs.q.device).expand(shape)

    def load(self, x: Tensor) -> Tensor:
        return x.float()

    def per_query_head(self, x: Tensor, inputs: Inputs) -> Tensor:
        return x.repeat_interleave(inputs.q.shape[1] // max(x.shape[1], 1), 1)

    def scores(
        self, q: Tensor, k: Tensor, inputs: Inputs, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | float]:
        """Scores before they are masked, and softcap's derivative."""
        scores, slope = spec.scale * (q @ k.mT), 1.0
        if spec.softcap is not None:
            t = torch.tanh(scores / spec.softcap)
            scores, slope = spec.softcap * t, 1 - t * t
        if inputs.bias is not None:
            scores = scores + inputs.bias.float()
        if inputs.slopes is not None:
            scores = scores - inputs.slopes.float()[..., None, None] * self.distances(inputs, spec)
        if inputs.table is not None:
            scores = scores + self.read_table(inputs.table.float())[:, self.buckets(inputs, spec)]
        return scores, slope

    def distances(self, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        """|position - key|, [rows, keys]."""
        rows, cols = inputs.q.shape[2], inputs.k.shape[2]
        shift = 0 if spec.top_left else cols - rows
        return (torch.arange(rows)[:, None] + shift - torch.arange(cols)).abs().to(inputs.q.device)

    def read_table(self, table: Tensor) -> Tensor:
        """[heads, buckets]."""
        return table.T

    def buckets(self, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        """Row of the table for each score, [rows, keys]."""
        rows, cols = inputs.q.shape[2], inputs.k.shape[2]
        ahead = torch.arange(cols) - torch.arange(rows)[:, None] - spec.shift(rows, cols)
        return _buckets(ahead.to(inputs.q.device), inputs.table.shape[0], spec)

    def survives(
        self, inputs: Inputs, spec: AttentionSpec, shape: torch.Size, backward: bool = False
    ) -> Tensor:
        """What dropout multiplies each probability with."""
        if spec.dropout_p == 0.0:
            return torch.ones(shape, device=inputs.q.device)
        return self.kept(inputs.seed, spec.dropout_p, shape) * (1 / (1 - min(spec.dropout_p, 0.999)))

    def kept(self, seed: Tensor, dropout_p: float, shape: torch.Size) -> Tensor:
        batch, heads, rows, cols = shape
        return keep_mask(seed, dropout_p, batch, heads, range(rows), range(cols))

    def dropped(self, dp: Tensor, survives: Tensor) -> Tensor:
        """The gradient of each probability, before that of the softmax."""
        return dp * survives

    def delta(self, p: Tensor, dp: Tensor, out: Tensor, dout: Tensor, spec: AttentionSpec) -> Tensor:
        """The mean of dP: from the rounded out, or in float32 throughout."""
        return (p * dp if spec.precise else out * dout).sum(-1, keepdim=True)

    def tiles(self, inputs: Inputs) -> list[slice]:
        seqlen_k = inputs.k.shape[2]
        return [slice(start, start + self.tile) for start in range(0, seqlen_k, self.tile)]

    def shrink(self, last_peak: Tensor, peak: Tensor) -> Tensor:
        """What sums up to here are multiplied with when the maximum grows."""
        return torch.exp(last_peak - peak)

    def normalised(self, out: Tensor, total: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        """A row that saw nothing: out 0, lse -inf."""
        return out / torch.where(total > 0, total, 1.0), peak + total.log()

    def returned(self, lse: Tensor, spec: AttentionSpec) -> Tensor:
        return lse

    def lse_with_sinks(self, lse: Tensor, total: Tensor) -> Tensor:
        return total

    def gradient_of_distances(self, ds: Tensor, distances: Tensor) -> Tensor:
        return -ds * distances

    def gradient_of_table(self, ds: Tensor, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        rows = self.buckets(inputs, spec).flatten()
        return torch.zeros_like(inputs.table, dtype=torch.float32).index_add(0, rows, ds.sum(0).flatten(1).T)

    def gradient_of_sinks(self, shares: Tensor, delta: Tensor) -> Tensor:
        return -(shares * delta).sum((0, 2, 3))

    def seen_by_backward(self, seen: Tensor) -> Tensor:
        return seen

    def gradient_of_entropy(self, dentropy: Tensor) -> Tensor:
        return dentropy

    def gradient_of_lse(self, dlse: Tensor) -> Tensor:
        return dlse

    def scale_of_dk(self, spec: AttentionSpec) -> float:
        return spec.scale

    def over_group(self, x: Tensor, inputs: Inputs) -> Tensor:
        return x.unflatten(1, (inputs.k.shape[1], -1)).sum(2)

    def over_broadcast(self, ds: Tensor, bias: Tensor) -> Tensor:
        return ds.sum_to_size(bias.shape)


class _Call(torch.autograd.Function):
    """q, k, v and bias once more, so that autograd knows of them."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Flash, inputs: Inputs, spec: AttentionSpec, *_: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        out, lse = kernel.forward(inputs, spec)
        max_logit, entropy, key_mass = kernel.statistics(lse, inputs, spec)
        ctx.kernel, ctx.inputs, ctx.spec = kernel, inputs, spec
        ctx.save_for_backward(out, lse)
        ctx.mark_non_differentiable(max_logit, key_mass)
        return out, kernel.returned(lse.clone(), spec), max_logit, entropy, key_mass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dout: Tensor, dlse: Tensor, _: Tensor, dentropy: Tensor, __: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = ctx.kernel.backward(dout, dlse, dentropy, *ctx.saved_tensors, ctx.inputs, ctx.spec)
        leaves = ctx.inputs[:N_GRADIENTS]
        return (None, None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(grads, leaves)))


def rounded(x: Tensor, inputs: Inputs) -> Tensor:
    """As the operand of a product: in q's dtype."""
    return x.to(inputs.q.dtype).float()
