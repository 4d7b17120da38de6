"""Does the check find what is wrong, say what it is, and survive whatever it is given?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from undivided import attention
from undivided.conformance import check, target
from undivided.conformance.adapters import resolve
from undivided.conformance.cases import Case
from undivided.conformance.check import PATIENCE
from undivided.conformance.page import Section, page
from undivided.conformance.probes import probe
from undivided.conformance.report import html, title
from undivided.conformance.verdict import Observation


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention as the smallest target."""
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def test_ours_passes_everything() -> None:
    """Claims of ours that the check refutes, errors that grow with the length among them (hazard N14)."""
    report = check(resolve("undivided-fallback", "cpu"), device="cpu")
    assert report.ok, str(report)
    assert len(report.verdicts) > 200
    assert not report.failures
    assert set(report.skipped) == set()


@pytest.mark.full
@pytest.mark.parametrize("impl", ["auto", "reference", "fallback"])
def test_ours_passes_everything_there_is(impl: str) -> None:
    check(resolve(f"undivided-{impl}", "cpu"), device="cpu", level="full").assert_ok()


def test_a_function_of_three_lines_passes() -> None:
    """A target that claims nothing but the default must not need more than that."""
    check(plain, device="cpu").assert_ok()


def test_what_disagrees_among_the_backends_of_pytorch_is_found() -> None:
    """math refuses a mask with is_causal, which flash on a CPU takes; NaN hidden by a mask leaks in both."""
    reports = {
        name: check(resolve(name, "cpu"), device="cpu", only="mask") for name in ("torch-math", "torch-flash")
    }
    causes = {name: {failure.cause for failure in report.failures} for name, report in reports.items()}
    leak = "NaN in out, dq, dk, dv"
    refused = (
        "raises RuntimeError: _scaled_dot_product_attention: "
        "Explicit attn_mask should not be set when is_causal=True"
    )
    assert causes["torch-math"] == {leak, refused}
    assert leak in causes["torch-flash"]
    assert refused not in causes["torch-flash"]


def mapped(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """torch.func's tensors have no memory of their own."""
    heads = torch.vmap(lambda *x: plain(*x, scale) + torch.zeros_like(x[0]) + torch.empty_like(x[0]).zero_())
    return torch.vmap(heads)(q, k, v)


def compiled(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(mapped, backend="aot_eager")(q, k, v, scale)


@pytest.mark.parametrize("function", [mapped, compiled])
def test_canaries_do_not_disturb_who_has_no_memory(function: Callable[..., Any]) -> None:
    mine = target(function, dtypes=(torch.float32,))
    report = check(mine, device="cpu", only="written")
    assert report.ok, str(report)
    assert len(report.verdicts) == 4


def raising(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    raise LookupError("not today")


def exiting(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    sys.exit(0)


def failing_by_assertion(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    assert q.shape[2] == 64, "33 is no multiple of 64"
    return q


def zero_behind(x: Tensor) -> None:
    end = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride())) + 1
    if end < x.untyped_storage().nbytes() // x.itemsize:
        x.detach().as_strided((1,), (1,), end).zero_()


def writing_behind_q(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    zero_behind(q)
    return plain(q, k, v)


def writing_behind_out(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    zero_behind(torch.zeros_like(q))
    return plain(q, k, v)


def scaling_in_place(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    with torch.no_grad():
        q *= 1.5
    return plain(q, k, v)


def drawing(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return plain(q, k, v) * (1 + 0.1 * torch.rand(()))


def endless(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    while True:
        pass


MISBEHAVIOUR: list[tuple[Callable[..., Any], str, str]] = [
    (raising, "square", "raises LookupError: not today"),
    (lambda q, k, v, **_: None, "1x1", "out is NoneType, not a tensor"),
    (lambda q, k, v, **_: plain(q, k, v).mT, "7x1", "out has shape (…), not (…)"),
    (lambda q, k, v, **_: plain(q, k, v).double(), "1x1", "out has dtype torch.float64, not torch.float"),
    (lambda q, k, v, **_: plain(q, k, v).detach(), "1x1", "out carries no gradient"),
    (lambda q, k, v, **_: plain(q, k, v) + torch.nan, "1x1", "NaN in out"),
    (lambda q, k, v, **_: (plain(q, k, v),) * 7, "1x1", "returns 7 things, not out or (out, lse, "),
    (lambda q, k, v, **_: plain(q, k.detach(), v), "7x1", "no gradient comes back to k"),
    (failing_by_assertion, "square", "raises AssertionError: 33 is no multiple of 64"),
    (exiting, "square", "raises SystemExit: 0"),
    (writing_behind_q, "outside is written", "writes outside a tensor that was given to it"),
    (writing_behind_out, "outside is written", "writes outside a tensor that it allocated"),
    (scaling_in_place, "inputs stay", "modifies q"),
    (drawing, "same bits", "other bits of out"),
]


@pytest.mark.parametrize(
    ("function", "only", "cause"), MISBEHAVIOUR, ids=[cause for *_, cause in MISBEHAVIOUR]
)
def test_misbehaviour_is_a_finding(function: Callable[..., Any], only: str, cause: str) -> None:
    """A crash of the check, or a failure that nobody can tell from another."""
    report = check(target(function, "mine"), device="cpu", only=only)
    assert not report.ok
    assert all(failure.cause.startswith(cause) for failure in report.failures), str(report)


def test_a_function_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undivided.conformance.guard.SECONDS", 0.2)
    report = check(target(endless), device="cpu")
    assert {verdict.detail for verdict in report.verdicts} == {"raises TimeoutError: no answer in 0.2 s"}
    assert len(report.verdicts) == PATIENCE  # then nothing more is asked, probed or shrunk
    assert report.skipped["given up: it hung 2 times"] > 20
    assert not report.observations
    assert len(probe(target(endless))) == 1


def wrong_past_20_keys(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **_: Any) -> Tensor:
    """The last key is forgotten where there are more than 20 of them and causal is asked for."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if causal:
        rows, cols = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        hidden = cols > rows + k.shape[2] - q.shape[2]
        hidden = hidden | (cols > 19) & (k.shape[2] > 20)
        scores = scores.masked_fill(hidden, -1e30)
    return scores.softmax(-1) @ v


def test_a_failure_is_shrunk_to_what_makes_it() -> None:
    """An option, a head or a row in the smallest case that has nothing to do with the failure."""
    mine = target(wrong_past_20_keys, causal=True, empty_rows=False, dtypes=(torch.float32,))
    report = check(mine, device="cpu", only="values, causal, float32")
    (failure,) = report.failures
    assert failure.case == Case(
        "smallest",
        heads_q=1,
        heads_kv=1,
        seqlen_q=1,
        seqlen_k=21,
        head_dim=1,
        causal=True,
    )


def test_the_code_of_a_failure_runs_and_fails_alike(tmp_path: Path) -> None:
    """Code with a name or a claim missing, which cannot be pasted."""
    report = check(resolve("torch-math", "cpu"), device="cpu", only="causal mask padding_left bk")
    (failure,) = report.failures
    done = subprocess.run(
        [sys.executable, "-c", failure.code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"values, smallest, bfloat16: {failure.detail}"


def test_what_is_not_claimed_may_be_anything() -> None:
    """Weights or another layout of lse beside out, held to the shape of an lse that nobody claimed."""

    def with_weights(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        return plain(q, k, v, scale), q @ k.mT

    check(with_weights, device="cpu", dtypes=(torch.float32,), only="1x7").assert_ok()


def test_inputs_that_are_modified_do_not_move_the_answer() -> None:
    """The oracle asked after q was scaled in place, for whom the result then is right."""
    mine = target(scaling_in_place, dtypes=(torch.float32,))
    report = check(mine, device="cpu", only="values, uniform")
    assert [failure.cause for failure in report.failures] == ["out, dq, dk, dv outside the error budget"]


class Method:
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v)


@pytest.mark.parametrize("function", [Method().attend, lambda q, k, v: q], ids=["method", "lambda"])
def test_code_names_no_function_that_another_process_lacks(function: Callable[..., Any]) -> None:
    assert target(function).origin == ""


def test_sums_over_many_queries_in_16_bits_are_found() -> None:
    """PyTorch's flash on a CPU, which adds up dv in the dtype of v."""
    report = check(resolve("torch-flash", "cpu", dtypes=(torch.bfloat16,)), device="cpu", only="long queries")
    assert [failure.cause for failure in report.failures] == ["dv outside the error budget"]


def test_a_report_can_be_stored_and_read() -> None:
    """Infinities, which JSON lacks; tensors or dtypes, which it cannot write."""
    report = check(lambda q, k, v: plain(q, k, v) + torch.nan, device="cpu", only="1x1")
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["ok"] is False
    assert stored["verdicts"][0]["constants"]["out"] == "inf"
    assert "NaN in out" in str(report)
    with pytest.raises(AssertionError, match="NaN in out"):
        report.assert_ok()


def test_a_report_says_how_to_claim_less() -> None:
    """Nobody knows what to do about a NaN that is meant to leak; a title that says all passed, and wrong."""
    mine = target(wrong_past_20_keys, causal=True, empty_rows=False, alignments=("top-left",))
    words = str(check(mine, device="cpu", only="after every query"))
    assert "To leave this out, claim nan_in_hidden_keys=false." in words
    observed = [Observation("lse is", "in base 2", "other", False), Observation("x", "y")]
    report = replace(check(plain, device="cpu", only="1x7"), observations=observed)
    assert "1 of 1 questions passed; it means 1 of 2 things otherwise than it claims" in title(report)


def test_a_page_needs_no_network_and_escapes() -> None:
    shown = page("<b>", [Section("&", "a\n\n    code\n\n    more", ("x",), [("✗ <i>",), (1.5,)], (b"png",))])
    assert "<b>" not in shown
    assert "<pre>    code\n\n    more</pre>" in shown
    assert '<td class="bad">✗ &lt;i&gt;</td>' in shown
    assert "data:image/png;base64,cG5n" in shown
    report = check(plain, device="cpu", only="1x1")
    for text in (shown, html(report)):
        assert not any(word in text for word in ("http", "//", "@import", "url("))


def test_wrong_use_is_an_error() -> None:
    with pytest.raises(TypeError, match="unknown capability 'casual'"):
        check(plain, casual=True)
    with pytest.raises(TypeError, match="brings its capabilities, got causal"):
        check(target(plain), causal=True)
    with pytest.raises(ValueError, match="level must be"):
        check(plain, level="slow")


def test_our_own_facade_is_a_target() -> None:
    """The function that users call, checked the way they would check theirs."""
    claims = {"causal": True, "gqa": True, "mask": True, "mask_and_causal": True, "window": True}
    check(attention, device="cpu", only="causal", **claims).assert_ok()


def of_the_wrong_head_and_place(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Query heads in the wrong groups, and causal aligned top-left."""
    k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    return scores.softmax(-1) @ v


def test_two_bugs_of_one_look_are_shown_apart() -> None:
    """Both leave the budget in every output; a case of the second among those of the first hides it."""
    mine = target(
        of_the_wrong_head_and_place,
        causal=True,
        gqa=True,
        scale=False,
        empty_rows=False,
        dtypes=(torch.float32,),
    )
    found = {
        frozenset(
            name
            for name, there in (("gqa", f.case.heads_q != f.case.heads_kv), ("causal", f.case.causal))
            if there
        )
        for f in check(mine, device="cpu", only="values").failures
    }
    assert {frozenset({"gqa"}), frozenset({"causal"})} <= found
