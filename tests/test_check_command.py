"""Do the command, its page and the pytest plugin say what the check found, and what was asked wrongly?"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from undivided.conformance import command

CPU = torch.device("cpu")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(arguments))


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "report.json", tmp_path / "report.html"
    outputs = (f"--json={files[0]}", f"--html={files[1]}")
    assert run("--impl", "fallback", "--device", "cpu", "--only", "square", *outputs) == 0
    assert json.loads(files[0].read_text())["ok"] is True
    assert "undivided fallback: right" in files[1].read_text()
    assert "undivided fallback: right" in capsys.readouterr().out
    assert run("torch-math", "--device", "cpu", "--only", "padding of one") == 1
    assert "NaN in out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name one target"),
        (("torch-math", "--impl", "triton"), "name one target"),
        (("nosuch",), "'nosuch' is neither an adapter (undivided-auto,"),
        (("no_such_module:f",), "cannot load no_such_module:f: ModuleNotFoundError"),
        (("math:nosuch",), "'math:nosuch': there is no nosuch in math"),
        (("math:pi",), "'math:pi' is no function but float"),
        (("torch-cudnn", "--device", "cpu"), "torch-cudnn runs on a CUDA device only, not on cpu"),
        (("torch-math", "--device", "cpu", "--only", "xyzzy"), "no question has 'xyzzy' in its name"),
        (("torch-math", "--device", "nosuch"), "--device nosuch does not work here"),
        (("transformers-eager", "--dtype", "float64"), "claims float16, bfloat16, float32, not float64"),
        (("torch-math", "--json", "/no/such/folder/x.json"), "there is no folder /no/such/folder"),
        (("torch-math", "--html", "/"), "cannot write /: it is a folder"),
        (("torch-math", "--device", "cpu", "--only", "1x7", "--json", "/dev/full"), "cannot write /dev/full"),
        (("torch-math", "--device", "cpu", "--claim", "head_dims=0"), "head dims must be positive"),
        (("quitting:f",), "cannot load quitting:f: SystemExit: 0"),
    ],
)
def test_a_wrong_command_ends_with_2(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "quitting.py").write_text("import sys; sys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_claims_are_read() -> None:
    words = {
        "causal": ("causal", True),
        "backward=false": ("backward", False),
        "max_head_dim=64": ("max_head_dim", 64),
        "head_dims=64,128": ("head_dims", (64, 128)),
        "dtypes=float16": ("dtypes", (torch.float16,)),
        "alignments=top-left,bottom-right": ("alignments", ("top-left", "bottom-right")),
        "arithmetic=wide": ("arithmetic", "wide"),
    }
    assert {word: command._claim(word) for word in words} == words
    for word in ("casual", "causal=perhaps", "head_dims=big", "arithmetic=exact", "dtypes=int8"):
        with pytest.raises(argparse.ArgumentTypeError, match=word.split("=")[0]):
            command._claim(word)


def test_only_a_whole_pass_on_a_gpu_is_evidence() -> None:
    """A sample, or a run in the interpreter, that `explain` would call native."""
    whole = {"impl": "triton", "level": "full", "only": "", "dtype": None, "claim": []}
    passed, gpu = SimpleNamespace(ok=True), torch.device("cuda")
    assert command._is_evidence(SimpleNamespace(**whole), passed, gpu)
    assert not command._is_evidence(SimpleNamespace(**whole), passed, CPU)
    assert not command._is_evidence(SimpleNamespace(**whole), SimpleNamespace(ok=False), gpu)
    for part in ({"impl": "auto"}, {"level": "quick"}, {"only": "x"}, {"dtype": ["float16"]}):
        assert not command._is_evidence(SimpleNamespace(**{**whole, **part}), passed, gpu)


PLUGIN_TEST = """
import pytest
from torch import Tensor

def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q.float() @ k.float().mT * scale).softmax(-1) @ v.float()).to(q.dtype)

@pytest.mark.attention(plain, device="cpu")
def test_right(attention_check):
    attention_check()

@pytest.mark.attention(lambda q, k, v: plain(q, k, v), scale=False, lse=True, device="cpu")
def test_wrong(attention_check):
    attention_check()

def test_unmarked():
    import sys
    assert "undivided.kernels.triton" not in sys.modules
"""


def test_the_pytest_plugin(tmp_path: Path) -> None:
    """Three lines give a test a question; our kernels stay out; a wrong function fails by name."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["undivided.conformance.pytest_plugin"]\n')
    (tmp_path / "test_it.py").write_text(PLUGIN_TEST)
    words = ["-q", "--strict-markers", "-p", "no:cacheprovider", "-k", "values-1x1 or probes or unmarked"]
    command = [sys.executable, "-m", "pytest", *words]
    unasked = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=unasked)
    assert "test_it.py::test_right" not in done.stdout, done.stdout
    assert "FAILED test_it.py::test_wrong[probes]" in done.stdout, done.stdout
    assert "lse is: not returned" in done.stdout
    assert "lse is claimed, and not returned" in done.stdout
    assert "2 failed, 3 passed" in done.stdout
