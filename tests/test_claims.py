"""Is a target asked what it claims, all of that, and nothing else?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from undivided.conformance import Target, target
from undivided.conformance.patterns import BIASES, LAYOUTS, MASKS
from undivided.conformance.questions import questions
from undivided.conformance.target import EVERYTHING, ClaimError


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Never called here."""
    raise NotImplementedError


@pytest.mark.parametrize(
    "claims",
    [{"head_dims": (64,), "rectangular": False}, {"any_strides": False, "batch": False, "max_head_dim": 8}],
    ids=str,
)
def test_a_small_claim_is_asked_every_option_too(claims: dict[str, Any]) -> None:
    """One head_dim, and hardly a case has it: a function that ignores causal passes."""
    options = {"causal": True, "mask": True, "mask_and_causal": True, "window": True, "bias": True}
    asked = list(questions(target(plain, **claims, **options), "quick", Counter()))
    cases = [q.case for q in asked if q.check == "values"]
    assert len({(c.causal, c.window, c.mask, c.bias, c.scale) for c in cases}) > 40
    assert {q.check for q in asked} >= {
        "nothing outside is read",
        "long sequences",
        "hidden keys reach nothing",
    }
    unnamed = [(q.check, replace(q.case, name=""), q.dtype) for q in asked]
    assert len(unnamed) == len(set(unnamed))


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"dtypes": ()}, "dtypes is empty"),
        ({"head_dims": (0,)}, "head dims must be positive"),
        ({"max_head_dim": 0}, "head dims must be positive"),
        ({"lse_gradient": True}, "lse_gradient is claimed without lse"),
        ({"bias_gradient": True, "backward": False}, "bias_gradient is claimed without bias and backward"),
    ],
)
def test_claims_that_nothing_can_hold_are_refused(claims: dict[str, Any], message: str) -> None:
    with pytest.raises(ClaimError, match=message):
        target(plain, **claims)


def test_claims_of_another_type_are_refused() -> None:
    for claims in ({"dtypes": torch.float16}, {"causal": "yes"}, {"head_dims": 64}):
        with pytest.raises(TypeError, match=f"{next(iter(claims))} must be"):
            target(plain, **claims)
    assert target(plain, head_dims=[16, 32]).capabilities.head_dims == (16, 32)


def test_a_target_claims_the_same_again() -> None:
    """Claims that the code of a failure forgets: it would ask another target."""
    (claims,) = (target(plain, causal=True, head_dims=(16, 32)).origin,)
    assert claims == f"'{__name__}:plain', causal=True, head_dims=(16, 32)"


def test_quick_leaves_nothing_out() -> None:
    """A dtype, an option, a layout or a pattern that only the level full would ask."""
    everything = Target("everything", lambda problem: (problem.q, None), EVERYTHING)
    asked = list(questions(everything, "quick", Counter()))
    cases = [question.case for question in asked if question.check == "values"]
    assert {question.dtype for question in asked} == set(EVERYTHING.dtypes)
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert {case.mask.pattern for case in cases if case.mask} == set(MASKS)
    assert {case.bias.pattern for case in cases if case.bias} == set(BIASES)
    full = list(questions(everything, "full", Counter()))
    assert set(asked) < set(full)
    assert len(full) == len(set(full))
    for option in ("causal", "window", "key_lengths", "mask", "bias", "softcap", "dropout", "gqa"):
        dtypes = {q.dtype for q in asked if q.check == "values" and q.case.name == option}
        assert dtypes == set(EVERYTHING.dtypes), option


def test_nothing_unclaimed_is_asked() -> None:
    skipped: Counter[str] = Counter()
    asked = list(questions(target(plain), "full", skipped))
    assert not any(q.case.causal or q.case.mask or q.case.heads_q != q.case.heads_kv for q in asked)
    assert {"causal", "mask", "gqa", "compiles"} <= set(skipped)
