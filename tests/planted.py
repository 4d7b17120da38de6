"""The classic bugs of attention kernels, each planted in one step of the flash model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flash_model import Flash, rounded
from undivided.conformance.cases import Case, Extra, Problem
from undivided.conformance.evaluation import evaluate
from undivided.conformance.oracle import Results
from undivided.conformance.target import EVERYTHING, Target
from undivided.kernels.spec import AttentionSpec, Inputs


class AlignedTopLeft(Flash):
    def read(self, spec: AttentionSpec) -> AttentionSpec:
        return spec._replace(top_left=True)


class WindowOffByOne(Flash):
    def read(self, spec: AttentionSpec) -> AttentionSpec:
        return spec if spec.left is None else spec._replace(left=spec.left + 1)


class ScaleForgotten(Flash):
    def read(self, spec: AttentionSpec) -> AttentionSpec:
        return spec._replace(scale=1.0)


class DropsTooFew(Flash):
    def read(self, spec: AttentionSpec) -> AttentionSpec:
        return spec._replace(dropout_p=spec.dropout_p * 0.9)


class MissingRescale(Flash):
    def shrink(self, last_peak: Tensor, peak: Tensor) -> Tensor:
        return torch.ones_like(peak)


class LastTileDropped(Flash):
    def tiles(self, inputs: Inputs) -> list[slice]:
        whole = [cols for cols in super().tiles(inputs) if cols.stop <= inputs.k.shape[2]]
        return whole or super().tiles(inputs)


class PaddingCounted(Flash):
    def normalised(self, out: Tensor, total: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        return super().normalised(out, total + 1, peak)


class SumsInAnyOrder(Flash):
    def tiles(self, inputs: Inputs) -> list[slice]:
        tiles = super().tiles(inputs)
        return [tiles[i] for i in torch.randperm(len(tiles))]


class TileFromBatch(Flash):
    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        self.tile = 16 // problem.q.shape[0]
        return super().__call__(problem)


class ScoresRounded(Flash):
    def scores(
        self, q: Tensor, k: Tensor, inputs: Inputs, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | float]:
        scores, slope = super().scores(q, k, inputs, spec)
        return rounded(scores, inputs), slope


class ProductsInTf32(Flash):
    def scores(
        self, q: Tensor, k: Tensor, inputs: Inputs, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | float]:
        return super().scores(to_tf32(q), to_tf32(k), inputs, spec)


class SoftcapAfterBias(Flash):
    def scores(
        self, q: Tensor, k: Tensor, inputs: Inputs, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | float]:
        if spec.softcap is None or inputs.bias is None:
            return super().scores(q, k, inputs, spec)
        t = torch.tanh((spec.scale * (q @ k.mT) + inputs.bias.float()) / spec.softcap)
        return spec.softcap * t, 1 - t * t


class SoftcapNotDifferentiated(Flash):
    def scores(
        self, q: Tensor, k: Tensor, inputs: Inputs, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | float]:
        return super().scores(q, k, inputs, spec)[0], 1.0


class LseUnscaled(Flash):
    def returned(self, lse: Tensor, spec: AttentionSpec) -> Tensor:
        return lse / spec.scale


class LseInBase2(Flash):
    def returned(self, lse: Tensor, spec: AttentionSpec) -> Tensor:
        return lse / math.log(2)


class LseGradientIgnored(Flash):
    def gradient_of_lse(self, dlse: Tensor) -> Tensor:
        return torch.zeros_like(dlse)


class MaxBeforeBias(Flash):
    def scores_of_max(self, scores: Tensor, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        return torch.where(scores == -torch.inf, scores, spec.scale * (q @ k.mT))


class EntropyInBits(Flash):
    def returned_entropy(self, entropy: Tensor) -> Tensor:
        return entropy / math.log(2)


class EntropyWithoutSink(Flash):
    def lse_of_entropy(self, lse: Tensor, scores: Tensor) -> Tensor:
        return torch.logsumexp(scores, -1, keepdim=True)


class EntropyGradientIgnored(Flash):
    def gradient_of_entropy(self, dentropy: Tensor) -> Tensor:
        return torch.zeros_like(dentropy)


class MassAfterDropout(Flash):
    def mass(self, p: Tensor, survives: Tensor) -> Tensor:
        return p * survives


class NanOnEmptyRows(Flash):
    def normalised(self, out: Tensor, total: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        return out / total, peak + total.log()


class EmptyRowsPlusInfinity(Flash):
    def returned(self, lse: Tensor, spec: AttentionSpec) -> Tensor:
        return lse.masked_fill(lse == -torch.inf, torch.inf)


class HiddenValuesTimesZero(Flash):
    def operands(self, inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, _, seen = super().operands(inputs, spec)
        return q, k, self.per_query_head(self.load(inputs.v), inputs), seen


class PreciseIgnored(Flash):
    def delta(self, p: Tensor, dp: Tensor, out: Tensor, dout: Tensor, spec: AttentionSpec) -> Tensor:
        return super().delta(p, dp, out, dout, spec._replace(precise=False))


class MaskMissingInBackward(Flash):
    def seen_by_backward(self, seen: Tensor) -> Tensor:
        return torch.ones_like(seen)


class ScaleForgottenInDk(Flash):
    def scale_of_dk(self, spec: AttentionSpec) -> float:
        return 1.0


class HeadsInterleaved(Flash):
    def per_query_head(self, x: Tensor, inputs: Inputs) -> Tensor:
        return x.repeat(1, inputs.q.shape[1] // max(x.shape[1], 1), 1, 1)

    def over_group(self, x: Tensor, inputs: Inputs) -> Tensor:
        return x.unflatten(1, (-1, inputs.k.shape[1])).sum(1)


class GroupNotReduced(Flash):
    def over_group(self, x: Tensor, inputs: Inputs) -> Tensor:
        return x.unflatten(1, (inputs.k.shape[1], -1))[:, :, 0]


class DbiasAveraged(Flash):
    def over_broadcast(self, ds: Tensor, bias: Tensor) -> Tensor:
        return super().over_broadcast(ds, bias) * (bias.numel() / max(ds.numel(), 1))


class AlibiFromTopLeft(Flash):
    def distances(self, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        return super().distances(inputs, spec._replace(top_left=True))


class SlopeGradientNegated(Flash):
    def gradient_of_distances(self, ds: Tensor, distances: Tensor) -> Tensor:
        return ds * distances


class RelativePositionsNegated(Flash):
    def buckets(self, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        before, after = super().buckets(inputs, spec), inputs.table.shape[0] // 2
        return torch.where(before == 0, 0, (before + after) % inputs.table.shape[0])


class RelativeBiasOneSided(Flash):
    def buckets(self, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        return super().buckets(inputs, spec._replace(bidirectional=False))


class BucketOffByOne(Flash):
    def buckets(self, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        return (super().buckets(inputs, spec) + 1).clamp_max(inputs.table.shape[0] - 1)


class TableTransposed(Flash):
    def read_table(self, table: Tensor) -> Tensor:
        return table.reshape(table.shape[::-1])


class TableGradientOverwritten(Flash):
    def gradient_of_table(self, ds: Tensor, inputs: Inputs, spec: AttentionSpec) -> Tensor:
        rows = self.buckets(inputs, spec).flatten().tolist()
        dtable = torch.zeros_like(inputs.table, dtype=torch.float32)
        for row, of_score in zip(rows, ds[-1].flatten(1).T):
            dtable[row] = of_score
        return dtable


class SinkMissingFromLse(Flash):
    def lse_with_sinks(self, lse: Tensor, total: Tensor) -> Tensor:
        return lse


class SinkGradientIgnored(Flash):
    def gradient_of_sinks(self, shares: Tensor, delta: Tensor) -> Tensor:
        return torch.zeros_like(super().gradient_of_sinks(shares, delta))


class DropoutNotReplayed(Flash):
    def survives(
        self, inputs: Inputs, spec: AttentionSpec, shape: torch.Size, backward: bool = False
    ) -> Tensor:
        survives = super().survives(inputs, spec, shape)
        return survives.flip(-1) if backward else survives


class DropoutRepeatedPerHead(Flash):
    def kept(self, seed: Tensor, dropout_p: float, shape: torch.Size) -> Tensor:
        batch, _, rows, cols = shape
        return super().kept(seed, dropout_p, torch.Size((batch, 1, rows, cols))).expand(shape)


class DropoutRepeatedPerTile(Flash):
    def kept(self, seed: Tensor, dropout_p: float, shape: torch.Size) -> Tensor:
        first = super().kept(seed, dropout_p, torch.Size((*shape[:3], self.tile)))
        return first.repeat(1, 1, 1, -(-shape[3] // self.tile))[..., : shape[3]]


class DropoutForgottenInScores(Flash):
    def dropped(self, dp: Tensor, survives: Tensor) -> Tensor:
        return dp


class OffsetsIn32Bits(Flash):
    def load(self, x: Tensor) -> Tensor:
        batch, heads, seqlen, head_dim = x.shape
        steps = (x.stride(0), x.stride(2), x.stride(3))
        offsets = ((head * x.stride(1) + 2**31) % 2**32 - 2**31 for head in range(heads))
        read = [x.as_strided((batch, seqlen, head_dim), steps, x.storage_offset() + at) for at in offsets]
        return torch.stack(read, 1).float() if read else x.float()


class ReadsPastTheEnd(Flash):
    """Every row comes with the one behind it, which then counts nothing: 0·NaN."""

    def load(self, x: Tensor) -> Tensor:
        used = sum((size - 1) * step for size, step in zip(x.shape, x.stride())) + 1
        room = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset() - used
        behind = x.as_strided(x.shape, x.stride(), x.storage_offset() + max(0, min(x.stride(2), room)))
        return x.float() + 0 * behind


class WritesPastTheEnd(Flash):
    """out is stored with one element too many."""

    def normalised(self, out: Tensor, total: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().normalised(out, total, peak)
        stored = torch.empty_like(out).copy_(out)
        end = stored.storage_offset() + stored.numel()
        if end < stored.untyped_storage().nbytes() // stored.itemsize:
            stored.as_strided((1,), (1,), end).zero_()
        return stored, lse


def to_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, rounded."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Bug(NamedTuple):
    """A kernel with one step wrong, a case in which it shows if values can show it, and what names it.

    named: a phrase of the observation that is not what was promised. check: instead, the check that fails.
    """

    kernel: Flash
    case: Case
    named: str
    check: str = ""
    dtype: torch.dtype = torch.bfloat16


PLAIN = Case("plain", batch=2, seqlen_q=50, seqlen_k=65, head_dim=64)
CAUSAL = Case("causal", causal=True, seqlen_k=40)
MASK = Case("mask", mask=Extra("random", "qk"))
GROUPED = Case("grouped", heads_q=4)
SOFTCAP = Case("softcap", softcap=2.0)
DROPOUT = Case("dropout", dropout_p=0.3)
SINKS = Case("sinks", sinks=True)
PRECISE = Case("precise", distribution="mean_v", head_dim=64, precise=True)
ALIBI = Case("alibi", alibi="h")
RELATIVE = Case("relative", relative=(8, True))
EMPTY_ROWS = Case("empty rows", mask=Extra("empty_rows", "qk"))
LENGTHS = Case("lengths", batch=2, key_lengths=(21, 4))

BUGS = {
    "causal aligned top-left": Bug(AlignedTopLeft(), CAUSAL, "top-left: query 0 stands at key 0"),
    "window off by one": Bug(WindowOffByOne(), Case("window", window=(3, 1)), "one key too many on the left"),
    "mask missing in backward": Bug(
        MaskMissingInBackward(), MASK, "in backward ignored: every query sees every key"
    ),
    "last partial tile dropped": Bug(LastTileDropped(), PLAIN, "all but keys 64, 65, 66 of 67"),
    "padded keys counted": Bug(PaddingCounted(), PLAIN, "more is counted than the 67 keys"),
    "missing rescale": Bug(MissingRescale(), PLAIN, "sums are not rescaled when the maximum grows"),
    "scale forgotten": Bug(ScaleForgotten(), PLAIN, "1: scores are not scaled"),
    "scale forgotten in dk": Bug(ScaleForgottenInDk(), PLAIN, "dk is: lacking the scale"),
    "scores rounded to 16 bits": Bug(ScoresRounded(), PLAIN, "rounded to 16 bits before the softmax"),
    "products in tf32": Bug(ProductsInTf32(), PLAIN, "products rounded to tf32", dtype=torch.float32),
    "softcap after bias": Bug(
        SoftcapAfterBias(), replace(SOFTCAP, bias=Extra(axes="hqk")), "bias first: softcap squashes it"
    ),
    "softcap not differentiated": Bug(
        SoftcapNotDifferentiated(), SOFTCAP, "softcap in backward: not differentiated"
    ),
    "bias gradient averaged": Bug(
        DbiasAveraged(), Case("bias", bias=Extra(axes="bhk")), "averaged over the axes it lacks"
    ),
    "GQA heads interleaved": Bug(
        HeadsInterleaved(), GROUPED, "interleaved: query heads 0, 2 share key head 0"
    ),
    "GQA gradient not reduced": Bug(GroupNotReduced(), GROUPED, "of only the first query head of its group"),
    "precise ignored": Bug(PreciseIgnored(), PRECISE, "delta with precise is: made from the rounded out"),
    "lse unscaled": Bug(LseUnscaled(), PLAIN, "lse is: divided by the scale"),
    "lse in base 2": Bug(LseInBase2(), PLAIN, "lse is: in base 2"),
    "lse +inf on empty rows": Bug(EmptyRowsPlusInfinity(), EMPTY_ROWS, "out 0, lse +inf, gradients 0"),
    "lse gradient ignored": Bug(LseGradientIgnored(), PLAIN, "the gradient of lse: ignored"),
    "max_logit before the bias": Bug(
        MaxBeforeBias(),
        Case("bias", bias=Extra(axes="hqk")),
        "max_logit is: the largest score before the bias",
    ),
    "entropy in bits": Bug(EntropyInBits(), PLAIN, "entropy is: in bits"),
    "entropy without the sink": Bug(EntropyWithoutSink(), SINKS, "as if there were no sink"),
    "entropy gradient ignored": Bug(
        EntropyGradientIgnored(), replace(PLAIN, entropy=True), "the gradient of entropy: ignored"
    ),
    "key_mass after dropout": Bug(MassAfterDropout(), DROPOUT, "key_mass with dropout is: what was kept"),
    "ALiBi from the top-left": Bug(
        AlibiFromTopLeft(), replace(ALIBI, seqlen_k=50), "query 0 standing at key 0"
    ),
    "ALiBi's gradient negated": Bug(
        SlopeGradientNegated(), ALIBI, "the gradient of ALiBi's slopes: of the wrong sign"
    ),
    "relative positions negated": Bug(
        RelativePositionsNegated(), RELATIVE, "the bucket of p - key: before and after are swapped"
    ),
    "relative bias of one side": Bug(RelativeBiasOneSided(), RELATIVE, "bidirectional is ignored"),
    "bucket off by one": Bug(BucketOffByOne(), RELATIVE, "the next bucket: one too high"),
    "table of buckets transposed": Bug(
        TableTransposed(), RELATIVE, "a table read with heads and buckets mixed"
    ),
    "table's gradient overwritten": Bug(
        TableGradientOverwritten(), RELATIVE, "of one score in each bucket: the others are overwritten"
    ),
    "sink missing from lse": Bug(SinkMissingFromLse(), SINKS, "lse with a sink: does not include it"),
    "sink gradient ignored": Bug(SinkGradientIgnored(), SINKS, "the gradient of a sink: zero"),
    "NaN on empty rows": Bug(NanOnEmptyRows(), EMPTY_ROWS, "out NaN"),
    "hidden values multiplied by 0": Bug(
        HiddenValuesTimesZero(), LENGTHS, "NaN in values hidden by key_lengths: reaches out"
    ),
    "dropout rate not exact": Bug(DropsTooFew(), DROPOUT, "it drops: 0.271 of the weights"),
    "dropout not replayed in backward": Bug(DropoutNotReplayed(), DROPOUT, "other elements than forward"),
    "dropout forgotten in dq and dk": Bug(
        DropoutForgottenInScores(), DROPOUT, "those of all weights but in delta: dropout is forgotten there"
    ),
    "dropout repeated per head": Bug(DropoutRepeatedPerHead(), DROPOUT, "the same elements in every head"),
    "dropout repeated per tile": Bug(DropoutRepeatedPerTile(), DROPOUT, "a pattern repeated every 16 keys"),
    "32-bit offsets": Bug(OffsetsIn32Bits(), PLAIN, "", check="64-bit offsets"),
    "reads past the end": Bug(ReadsPastTheEnd(), PLAIN, "", check="nothing outside is read"),
    "writes past the end": Bug(
        WritesPastTheEnd(),
        PLAIN,
        "writes outside a tensor that it allocated",
        check="nothing outside is written",
    ),
    "sums in any order": Bug(SumsInAnyOrder(), PLAIN, "other bits", check="the same bits again"),
    "tile size from the batch": Bug(
        TileFromBatch(), PLAIN, "alone than in a batch", check="the same bits in any batch"
    ),
}

UNSEEN = (
    "hidden values multiplied by 0",
    "32-bit offsets",
    "reads past the end",
    "writes past the end",
    "sums in any order",
    "tile size from the batch",
)
"""Bugs that change no value of an ordinary call."""


def planted(bug: str | None = None) -> Target:
    """The kernel as a target that claims everything but to be differentiated twice; without a bug the correct
    one."""
    kernel = BUGS[bug].kernel if bug else Flash()
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return Target(
        bug or "flash model", kernel, replace(EVERYTHING, dtypes=dtypes, double_backward=False, jvp=False)
    )


def flash_model(problem: Problem, bug: str | None = None) -> Results:
    """Everything it computes for one problem."""
    return evaluate(planted(bug), problem)
