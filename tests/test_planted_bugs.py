"""Are the classic bugs caught, and called by their names? And which of them would the field's rule catch?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from flash_model import Flash
from planted import BUGS, Bug, flash_model, planted
from undivided.conformance.budget import measure
from undivided.conformance.check import check
from undivided.conformance.evaluation import expected
from undivided.conformance.probes import probe
from undivided.conformance.verdict import Observation, Verdict
from undivided.conformance.yardstick import PASSES, two_times_rule

README = Path(__file__).parent.parent / "README.md"
PROBED = [name for name, bug in BUGS.items() if not bug.check]
CHECKED = [name for name, bug in BUGS.items() if bug.check]


def said(verdicts: Iterable[Verdict], observations: Iterable[Observation]) -> str:
    """Everything that is not as it should be, in words."""
    lines = [str(verdict) for verdict in verdicts if not verdict.ok]
    return "\n".join(lines + [f"{o.question}: {o.found}" for o in observations if o.ok is False])


@pytest.mark.parametrize("bug", PROBED)
def test_a_probe_names_the_bug(bug: str) -> None:
    """A report that only says that numbers are wrong."""
    assert BUGS[bug].named in said((), probe(planted(bug)))


@pytest.mark.parametrize("bug", CHECKED)
def test_a_check_names_the_bug(bug: str) -> None:
    """Bugs that leave every ordinary value as it should be."""
    _, _, named, failing, _ = BUGS[bug]
    words = said(check(planted(bug), device="cpu", only=failing).verdicts, ())
    assert failing in words
    assert named in words


def test_without_a_bug_there_is_nothing_to_say() -> None:
    """A probe that finds what is not there."""
    observations = probe(planted())
    assert len(observations) > 40
    assert said((), observations) == ""
    assert all(observation.ok for observation in observations if observation.promised is not None)


@pytest.mark.full
@pytest.mark.parametrize("bug", BUGS)
def test_the_whole_check_catches_the_bug(bug: str) -> None:
    """What the probes see lost on the way to the report, or cases that miss what they should show."""
    report = check(planted(bug), device="cpu")
    assert not report.ok
    assert BUGS[bug].named in said(report.verdicts, report.observations)


def row(name: str, bug: Bug) -> str:
    """What the budget and the 2x rule say of the bug's case, and who names it."""
    problem = bug.case.build(bug.dtype)
    results, oracle = flash_model(problem, name), expected(problem)
    out_of_budget = any(not finding.ok for finding in measure(results, oracle, "kernel"))
    ratios = two_times_rule(problem, results, oracle)
    beyond_rule = any(ratio > PASSES[output] for output, ratio in ratios.items())
    words = f"check “{bug.check}”" if bug.check else f"probe: “{bug.named}”"
    return f"| {name} | {'yes' if out_of_budget else '–'} | {'yes' if beyond_rule else '–'} | {words} |"


def table() -> str:
    head = ["| bug | error budget | 2× rule | named by |", "|---|---|---|---|"]
    return "\n".join(head + [row(name, bug) for name, bug in BUGS.items()])


def test_readme_tells_which_bugs_are_caught() -> None:
    """A table that promises more than the tests hold. `print(table())` is what belongs there."""
    text = README.read_text(encoding="utf-8")
    block = text.split("<!-- bugs:begin -->")[1].split("<!-- bugs:end -->")[0].strip()
    assert block == table()


def test_every_step_has_a_bug() -> None:
    """A step of the kernel that nobody tries to break."""
    steps = {name for name in vars(Flash) if not name.startswith("_")}
    broken = {name for bug in BUGS.values() for name in vars(type(bug.kernel))}
    assert steps - broken == {"forward", "statistics", "backward", "tile", "visible"}
