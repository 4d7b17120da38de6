"""Does every pair of options stand in some case, and can it be seen there? Counted anew, from the cases."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from undivided.conformance import Target, survey, target
from undivided.conformance.adapters import ours
from undivided.conformance.cases import Case
from undivided.conformance.combinations import CLASHES, FACTORS, combinations
from undivided.conformance.covering import Level, covering
from undivided.conformance.evaluation import expected
from undivided.conformance.target import EVERYTHING

TARGETS = {
    "everything": Target("everything", lambda problem: (problem.q, None), EVERYTHING),
    "triton": ours("triton"),
    "little": target(torch.nn.functional.scaled_dot_product_attention, causal=True, gqa=True),
    "mask without causal": target(torch.nn.functional.scaled_dot_product_attention, causal=True, mask=True),
    "square": target(
        torch.nn.functional.scaled_dot_product_attention,
        rectangular=False,
        window=True,
        batch=False,
        softcap=True,
        head_dims=(64,),
    ),
}


def has(case: Case, level: Level) -> bool:
    """Whether a case shows a level: of all fields that its factor sets, nothing but what the level says."""
    factor, name = level
    plain: dict[str, Any] = {
        key: getattr(Case("plain"), key) for fields in FACTORS[factor].values() for key in fields
    }
    return all(getattr(case, key) == x for key, x in (plain | FACTORS[factor][name]).items())


@pytest.mark.parametrize("asked", [TARGETS["everything"], TARGETS["triton"]], ids=lambda asked: asked.name)
def test_every_pair_of_levels_stands_in_some_case(asked: Target) -> None:
    """A pair that the generator forgets, or believes to have covered."""
    levels = [(factor, name) for factor, names in FACTORS.items() for name in names]
    cases = combinations(asked)
    shown = {
        frozenset(two)
        for case in cases
        for two in itertools.combinations([x for x in levels if has(case, x)], 2)
    }
    possible = {x for x in levels if _claimed(asked, x)}
    wanted = {
        frozenset((a, b))
        for a, b in itertools.combinations(levels, 2)
        if a[0] != b[0] and a in possible and b in possible and frozenset((a, b)) not in CLASHES
    }
    assert len(wanted) > 1000
    assert not wanted - shown
    assert not shown & CLASHES


def _claimed(asked: Target, level: Level) -> bool:
    case = Case("", **FACTORS[level[0]][level[1]])
    return any(asked.refusal(case, dtype) is None for dtype in asked.capabilities.dtypes)


@pytest.mark.parametrize("asked", TARGETS.values(), ids=TARGETS)
def test_combinations_are_within_the_claims(asked: Target) -> None:
    """A small claim that is asked nothing, or what it does not claim."""
    cases = combinations(asked)
    assert len(cases) > 5
    assert all(
        any(asked.refusal(case, dtype) is None for dtype in asked.capabilities.dtypes) for case in cases
    )
    assert len({case.name for case in cases}) == len(cases)


def test_something_is_seen_in_every_combination() -> None:
    """Masks that leave nothing together: out is 0 whatever else is wrong."""
    for case in combinations(TARGETS["everything"]):
        out = expected(case.build(torch.float32)).value.out
        assert out is not None
        assert float((out != 0).float().mean()) > 0.05, case.name


def test_the_first_level_has_nothing() -> None:
    """A factor that cannot be left out, or fields that two factors set: the later one would win."""
    owners: dict[str, str] = {}
    for factor, levels in FACTORS.items():
        assert next(iter(levels.values())) == {}
        for field in {field for fields in levels.values() for field in fields}:
            assert owners.setdefault(field, factor) == factor
    assert len({name for levels in FACTORS.values() for name in levels}) == sum(map(len, FACTORS.values()))


@pytest.mark.parametrize("hashes", ["1", "2"])
def test_cases_are_the_same_in_every_process(hashes: str) -> None:
    """An order taken from a set: a failure that nobody else can find again."""
    program = (
        "from undivided.conformance.adapters import ours\n"
        "from undivided.conformance.combinations import combinations\n"
        "print(*(case.name for case in combinations(ours('fallback'))), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": hashes},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [case.name for case in combinations(ours("fallback"))]


def test_the_generator_makes_few_rows() -> None:
    """Hundreds of rows where dozens do."""
    factors = {
        name: [name + str(i) for i in range(size)] for name, size in zip("abcdefgh", (6, 5, 4, 3, 3, 2, 2, 2))
    }

    def allowed(a: Level, b: Level) -> bool:
        return {a[1], b[1]} != {"a1", "b1"}

    rows = covering(factors, allowed, seed=3)
    assert 29 <= len(rows) <= 36  # 6·5 - 1 pairs of the two largest factors
    assert not any(row["a"] == "a1" and row["b"] == "b1" for row in rows)
    assert [*covering({"a": ["a0"], "b": ["b0"]}, allowed)] == [{"a": "a0", "b": "b0"}]
    assert covering({"a": ["a0", "a1"]}, allowed) == []


def test_the_survey_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A summary that counts what fails among what passes, or ends with 0 all the same."""
    asked = ["--impl", "reference", "--most", "3", "--json", str(tmp_path / "found.json")]
    assert survey.main(asked) == 0
    found = json.loads((tmp_path / "found.json").read_text())["implementations"]["reference"]
    assert (found["cases"], found["passed"], found["failed"]) == (3, 3, [])
    monkeypatch.setattr(survey, "ask", lambda target, question, device: f"no: {question.case.name}")
    assert survey.main(asked) == 1
    assert f"no: {combinations(ours('reference'))[0].name}" in capsys.readouterr().out
