"""Commands whose optional packages are missing say so in one line, and how to get them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from undivided.extras import missing


def test_names_what_is_missing_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a complaint about what is there, and one that does not help."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "not_there" else object())
    assert missing("bench", "torch") is None
    assert missing("bench", "torch", "not_there") == (
        "not installed: not-there; get it with: pip install 'undivided[bench]'"
    )


def test_the_cpu_benchmark_says_that_it_needs_an_extra(tmp_path: Path) -> None:
    """Catches an optional package that is imported before anybody looks whether it is there."""
    code = """
import sys
sys.modules["rich"] = None
from undivided.bench.cpu_ratios import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "not installed: rich; get it with: pip install 'undivided[bench]'" in done.stderr.splitlines()[-1]
