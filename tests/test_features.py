"""Does README say what is claimed, and refused?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from undivided.conformance import features
from undivided.conformance.adapters import ours
from undivided.conformance.cases import OPTIONS, Case
from undivided.kernels import dispatch

README = Path(__file__).parent.parent / "README.md"


def test_readme_shows_what_is_claimed() -> None:
    """A table that somebody wrote by hand, once."""
    shown = README.read_text(encoding="utf-8").partition("<!-- features:begin -->")[2]
    shown = shown.partition("<!-- features:end -->")[0].strip()
    assert shown == features.markdown(), "python -m undivided.conformance.features prints what belongs there"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("impl", ["reference", "fallback", "triton"])
def test_ours_claim_what_is_not_refused(impl: str, option: str, device: torch.device) -> None:
    """An option that a kernel has learnt and nobody asks it for; one that it is asked for and refuses."""
    case = Case(option, **OPTIONS[option])
    reasons = dispatch.unsupported_reasons(impl, *case.build(torch.float32, device).prepared())
    assert (ours(impl).refusal(case, torch.float32) is None) == (not reasons)
