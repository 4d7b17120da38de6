"""`undivided explain`: its exit status, its flags, and what it says of GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

import undivided
from undivided import explain
from undivided.__main__ import main
from undivided.kernels import dispatch, evidence
from undivided.kernels.spec import DEFAULTS


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.fixture(autouse=True)
def _with_triton_and_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux without a GPU and without variables, wherever the tests run."""
    monkeypatch.setattr(dispatch, "DEFAULT_IMPL", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    no_kernel = ("device cpu runs no Triton kernel",)
    monkeypatch.setattr(
        dispatch, "_triton_is_missing", lambda device: no_kernel if device.type == "cpu" else ()
    )


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["explain", *arguments]) == status
    return capsys.readouterr().out


def test_an_order_that_cannot_be_followed_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a script that goes on because the command ended with 0."""
    out = said(capsys, "--impl", "triton", "--device", "cpu", status=1)
    assert "runs       nothing: the order cannot be followed" in out
    assert "not triton     device cpu runs no Triton kernel" in out


@pytest.mark.parametrize("device", ["meta", "cuda", "cuda:1"])
def test_without_a_gpu_it_says_what_a_gpu_would_run(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an answer about the CPU, or an error, for a question about a GPU."""
    out = said(capsys, "--device", device)
    assert "runs       triton\n  evidence   on a GPU, with the Triton that is here: " in out
    for name in {entry.architecture for entry in evidence.records() if entry.implementation == "triton"}:
        assert (f"{name} {evidence.state_of('triton', name)}" in out) == (name != "cpu")


def test_meta_tensors_are_a_gpus() -> None:
    """Catches a choice for meta tensors that is another than a GPU's, reasons and orders included."""
    q = meta(1, 2, 8, 64)
    explanation = explain(q, q, q)
    assert explanation.chosen == "triton"
    assert explanation.reasons["fallback"] == ["a kernel takes the call"]
    assert explain(q, q, q, impl="fallback").chosen == "fallback"
    wide = meta(1, 2, 8, 300)
    explanation = explain(wide, wide, wide)
    assert explanation.chosen == "fallback"
    assert "head_dim 300 is larger than 256" in explanation.reasons["triton"]
    assert explanation.evidence == "on a GPU, with the Triton that is here: no evidence"


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - {"seed", "check"}))  # those change no answer
def test_every_option_of_attention_is_a_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an option that attention has and the command line has not."""
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    assert f"--{name.replace('_', '-')}" in capsys.readouterr().out


def test_statistics_of_a_second_pass_are_said() -> None:
    """Catches a call that is taken for one kernel, and is a kernel and a pass of PyTorch's."""
    q = meta(1, 2, 8, 64)
    assert "second pass over the scores, in PyTorch: entropy" in str(
        explain(q, q, q, want=("lse", "entropy"))
    )
    assert "second pass" not in str(explain(q, q, q, want=("lse", "max_logit")))


def test_flags_reach_attention(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a flag that is accepted and dropped."""
    sizes = ("--batch", "2", "--heads", "4", "--heads-kv", "2", "--seqlen", "8", "--head-dim", "16")
    masks = ("--mask", "8", "8", "--bias", "4", "1", "8", "--key-lengths", "--window", "3", "none")
    rest = ("--softcap", "5", "--dropout-p", "0.1", "--scale", "-0.5", "--dtype", "float16")
    out = said(capsys, *sizes, *masks, *rest)
    for part in (
        "window (3, None)",
        "bias",
        "mask",
        "key_lengths",
        "softcap 5",
        "dropout_p 0.1",
        "scale -0.5",
    ):
        assert part in out.splitlines()[0]
    assert "mask" in said(capsys, "--seqlen", "10000000", "--mask", "10000000", "10000000")  # takes no memory
    assert main(["explain", *sizes, "--mask", "8", "9"]) == 2
    assert "mask must broadcast" in capsys.readouterr().err
    assert main(["explain", *sizes, "--window", "-1", "0"]) == 2
    assert "window left must be >= 0" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"undivided {undivided.__version__}\n"
