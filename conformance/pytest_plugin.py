"""The check as pytest tests, one for each question. In a conftest.py:

    pytest_plugins = ["undivided.conformance.pytest_plugin"]

and in a test file:

    @pytest.mark.attention(my_attention, causal=True, gqa=True)
    def test_attention(attention_check):
        attention_check()

The marker takes what `check` takes: a function and its capabilities, or a Target, or a text for
`adapters.resolve`; and level= and device=.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from .adapters import resolve
from .check import ask, default_device
from .probes import probe
from .questions import Question, questions
from .target import Target, target
from .verdict import Verdict

FIXTURE = "attention_check"
PROBES = "probes"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "attention(function, level='quick', device=None, **capabilities): what to check"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if FIXTURE not in metafunc.fixturenames:
        return
    asked, level, _ = _marked(metafunc.definition)
    params = [*questions(asked, level, Counter()), PROBES]
    metafunc.parametrize(FIXTURE, params, ids=[str(x).replace(", ", "-") for x in params], indirect=True)


@pytest.fixture
def attention_check(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Call it to ask this test's question; it raises AssertionError with the answer if that is wrong."""
    asked, _, device = _marked(request.node)
    question: Question | str = request.param

    def run() -> None:
        if isinstance(question, str):
            wrong = [o for o in probe(asked, device) if o.ok is False]
            assert not wrong, "\n".join(f"{o.question}: {o.found}, promised: {o.promised}" for o in wrong)
            return
        verdict = ask(asked, question, device)
        if not isinstance(verdict, Verdict):
            pytest.skip(verdict)  # this machine cannot ask it
        assert verdict.ok, str(verdict)

    return run


def _marked(node: Any) -> tuple[Target, Any, Any]:
    """The target, level and device that a test's marker names."""
    marker = node.get_closest_marker("attention")
    if marker is None or len(marker.args) != 1:
        raise pytest.UsageError(
            f"{node.nodeid} uses {FIXTURE}: mark it with @pytest.mark.attention(function, **capabilities)"
        )
    claims = dict(marker.kwargs)
    level, device = claims.pop("level", "quick"), default_device(claims.pop("device", None))
    (what,) = marker.args
    if isinstance(what, str):
        return resolve(what, device, **claims), level, device
    return what if isinstance(what, Target) else target(what, **claims), level, device
