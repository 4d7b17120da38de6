"""Dropout by what anybody can see from outside: the bits of every implementation, and their statistics.

With q = 0 all probabilities are equal, and with v an identity the output *is* the mask of what is
kept; with dout an identity dv is backward's. No debug output of a kernel is needed. The limits are
Bonferroni's for a false alarm in 10^7, so there are no retries and no rates like 0.01.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from undivided.conformance.adapters import ours
from undivided.conformance.cases import Case, Problem
from undivided.conformance.evaluation import evaluate
from undivided.kernels.philox import keep_mask, philox

IMPLEMENTATIONS = ["reference", "fallback", "triton"]


def mask_reader(
    dropout_p: float, seed: int = 7, batch: int = 2, heads: int = 2, rows: int = 24, cols: int = 40
) -> Problem:
    """A problem whose out and dv show the mask that forward and backward used."""
    zeros = torch.zeros(batch, heads, rows, 16)
    values = torch.eye(cols).expand(batch, heads, cols, cols)
    dout = torch.eye(rows, cols).expand(batch, heads, rows, cols)
    options = {"dropout_p": dropout_p, "seed": seed, "scale": 1.0}
    nothing = torch.zeros(zeros.shape[:3])
    return Problem(zeros, zeros.new_zeros(batch, heads, cols, 16), values, options, dout, nothing, nothing)


def masks(impl: str, problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """What forward kept, [batch, heads, rows, cols], and backward's, [batch, heads, cols, rows]."""
    moved = problem._replace(
        **{n: getattr(problem, n).to(device) for n in ("q", "k", "v", "dout", "dlse", "dentropy")}
    )
    results = evaluate(ours(impl), moved)
    return results.out.cpu(), results.dv[..., : problem.q.shape[2]].cpu()


def true_mask(problem: Problem) -> Tensor:
    batch, heads, rows, _ = problem.q.shape
    seed = torch.tensor(problem.options["seed"])
    cols = range(problem.k.shape[2])
    return keep_mask(seed, problem.options["dropout_p"], batch, heads, range(rows), cols)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", [0, 7, 2**63 + 12345])
def test_the_same_elements_are_dropped_by_everyone(impl: str, seed: int, device: torch.device) -> None:
    """Bits that depend on the tile size, the pass, or half of the seed; a forgotten 1/(1 - p) (hazard R7)."""
    problem = mask_reader(0.3, seed - 2**64 if seed >= 2**63 else seed)
    forward, backward = masks(impl, problem, device)
    keep = true_mask(problem)
    torch.testing.assert_close(forward, keep / (40 * 0.7))
    assert torch.equal(forward > 0, keep)
    assert torch.equal(backward > 0, keep.mT)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_row_column_head_and_entry_has_its_own_bits(impl: str, device: torch.device) -> None:
    """The same randomness for all heads, batch entries or tiles (hazard R10)."""
    keep = masks(impl, mask_reader(0.5, cols=72, rows=70), device)[0] > 0
    planes = keep.flatten(0, 1)
    for a in range(len(planes)):
        for b in range(a):
            assert_independent(planes[a], planes[b], 0.5)
    for lag in (1, 2, 4, 8, 16, 32, 64):
        assert_independent(keep[..., lag:], keep[..., :-lag], 0.5)
        assert_independent(keep[..., lag:, :], keep[..., :-lag, :], 0.5)


def assert_independent(a: Tensor, b: Tensor, keep: float) -> None:
    """Two masks agree where two independent ones would, within six standard deviations."""
    want = keep**2 + (1 - keep) ** 2
    deviation = math.sqrt(want * (1 - want) / a.numel())
    assert abs(float((a == b).double().mean()) - want) < 6 * deviation


def assert_binomial(kept: Tensor, trials: int, keep: float, tests: int) -> None:
    """Counts of `trials` each, `tests` of them in all: Bonferroni's limit for 10^-7."""
    limit = math.sqrt(2 * math.log(2 * tests / 1e-7))
    z = (kept.double() - trials * keep) / math.sqrt(trials * keep * (1 - keep))
    assert float(z.abs().max()) < limit


def test_counts_are_binomial() -> None:
    """A biased generator, in total or in some head, row or column."""
    for dropout_p in (0.1, 0.5, 0.9):
        keep = keep_mask(torch.tensor(3), dropout_p, 4, 4, range(256), range(256))
        tests = 1 + 16 + 2 * 256
        assert_binomial(keep.sum(), keep.numel(), 1 - dropout_p, tests)
        assert_binomial(keep.sum((2, 3)), 256 * 256, 1 - dropout_p, tests)
        assert_binomial(keep.sum((0, 1, 3)), 16 * 256, 1 - dropout_p, tests)
        assert_binomial(keep.sum((0, 1, 2)), 16 * 256, 1 - dropout_p, tests)


def test_small_probabilities_are_not_quantised() -> None:
    """A threshold of 8 bits: p = 0.002 would drop 0.0039 (hazard R8)."""
    keep = keep_mask(torch.tensor(3), 0.002, 4, 4, range(512), range(512))
    assert_binomial(keep.sum(), keep.numel(), 0.998, 1)


def test_seeds_and_their_halves_are_independent() -> None:
    """A seed cut to 32 bits, or consecutive seeds that give shifted masks."""
    rows, cols = range(128), range(128)
    seeds = [0, 1, 2, 1 << 32, (1 << 32) + 1, -1]
    drawn = [keep_mask(torch.tensor(seed), 0.3, 1, 2, rows, cols) for seed in seeds]
    for a in range(len(drawn)):
        for b in range(a):
            assert_independent(drawn[a], drawn[b], 0.7)
    assert torch.equal(drawn[0], keep_mask(torch.tensor(0), 0.3, 1, 2, rows, cols))


def test_the_mean_over_seeds_is_no_dropout() -> None:
    """A rescaling that is not 1/(1 - p): the expectation of out would move."""
    outs = torch.stack([evaluate(ours("fallback"), mask_reader(0.25, seed)).out for seed in range(200)])
    kept = (outs > 0).sum()
    assert_binomial(kept, outs.numel(), 0.75, 1)
    assert float(outs.mean()) == pytest.approx(float(kept) / outs.numel() / 0.75 / 40, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_probability_zero_is_no_dropout(impl: str, device: torch.device) -> None:
    """A rescaling or a threshold that changes the last bit."""
    problem = Case("plain").build(torch.float32, device)
    options = {**problem.options, "dropout_p": 0.0}
    without = {name: x for name, x in options.items() if name not in ("dropout_p", "seed")}
    for a, b in zip(*(evaluate(ours(impl), problem._replace(options=o)) for o in (options, without))):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_probability_one_is_zero(impl: str, device: torch.device) -> None:
    """0/0 in the rescaling. Only lse, which knows no dropout, still has a value and a gradient."""
    problem = Case("all dropped", dropout_p=1.0).build(torch.float32, device)
    problem = problem._replace(dlse=torch.zeros_like(problem.dlse))
    results = evaluate(ours(impl), problem)
    for x in (results.out, results.dq, results.dk, results.dv):
        assert torch.equal(x, torch.zeros_like(x))
    assert results.lse.isfinite().all()


def test_philox_known_answers() -> None:
    """The reference vectors of Random123 (Salmon et al. 2011): constants, rounds or lanes that are off."""

    def words(seed: int, *counter: int) -> list[int]:
        return [int(w) for w in philox(torch.tensor(seed), *(torch.tensor(c) for c in counter))]

    ones = 0xFFFFFFFF
    assert words(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(-1, ones, ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_blocks_of_the_mask_fit_together() -> None:
    """Columns counted from the start of a block, which need not be a multiple of four."""
    seed = torch.tensor(11)
    whole = keep_mask(seed, 0.4, 2, 3, range(9), range(30))
    block = keep_mask(seed, 0.4, 1, 3, range(4, 9), range(7, 22), first_plane=3)
    assert torch.equal(block, whole[1:, :, 4:9, 7:22])
