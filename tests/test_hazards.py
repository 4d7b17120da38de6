"""Is every known hazard covered? And the tests of those that belong nowhere else."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hazards import ELSEWHERE, HAZARDS
from torch import Tensor

from undivided import attention, scaled_dot_product_attention
from undivided.conformance.adapters import ARITHMETIC, ours
from undivided.conformance.budget import assert_within_budget
from undivided.conformance.cases import CASES, Case, Extra
from undivided.conformance.evaluation import evaluate, expected

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"\(hazard ([A-Z]\d+(?:, [A-Z]\d+)*)\)")
IMPLEMENTATIONS = ["fallback", "triton"]


def named_by_tests() -> set[str]:
    """The ids in the docstrings of tests."""
    found: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.lower().startswith("test"):
                for ids in NAMED.findall(ast.get_docstring(node) or ""):
                    found |= {*ids.split(", ")}
    return found


def test_every_hazard_is_covered_or_excused() -> None:
    """A hazard that is known and forgotten, and an excuse or a name that outlived its reason."""
    named = named_by_tests()
    assert named - set(HAZARDS) == set(), "unknown"
    assert set(HAZARDS) - set(ELSEWHERE) - named == set(), "without a test"
    assert set(ELSEWHERE) & named == set(), "excused, and tested"


def test_the_list_of_cases_asks_for_odd_shapes() -> None:
    """Heads, widths or strides taken out of the list that all implementations must answer."""
    assert {3, 5, 7} <= {case.heads_q // case.heads_kv for case in CASES if case.causal and case.heads_kv}
    assert {1, 3, 17, 40, 80, 128, 192, 256} <= {case.head_dim for case in CASES}
    assert {(64, 32), (32, 64), (192, 128)} <= {(c.head_dim, c.head_dim_v or c.head_dim) for c in CASES}
    assert {"last_stride_2", "head_dim_outermost", "interleaved"} <= {case.layout for case in CASES}


@pytest.mark.parametrize("impl", ["fallback", pytest.param("triton", marks=pytest.mark.full)])
def test_more_keys_than_16_bits_count(impl: str, device: torch.device) -> None:
    """Equal scores over 65539 keys, three hidden: the mean of what is 1 at the last one (hazard N13)."""
    n = 2**16 + 3
    q, k = torch.zeros(1, 1, 1, 16, device=device), torch.zeros(1, 1, n, 16, device=device)
    v, mask = torch.zeros(1, 1, n, 16, device=device), torch.ones(n, dtype=torch.bool, device=device)
    v[:, :, -1], mask[:3] = 1, False
    stats = attention(q, k, v, mask=mask, want=("lse",), impl=impl)
    torch.testing.assert_close(stats.out, torch.full_like(stats.out, 2.0**-16))
    torch.testing.assert_close(stats.lse.exp(), torch.full_like(stats.lse, 2.0**16))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("seqlen", [1, 2, 5, 17, 67])
def test_large_numbers_and_a_partial_tile(impl: str, seqlen: int, device: torch.device) -> None:
    """exp of a padded key's score is not 0: it must be masked again in backward (hazard N16)."""
    case = Case("partial", heads_q=1, heads_kv=1, seqlen_q=seqlen, seqlen_k=seqlen, causal=True)
    problem = case.build(torch.float16, device)
    problem = problem._replace(q=5 * problem.q, k=3 * problem.k)
    assert_within_budget(evaluate(ours(impl), problem), expected(problem), ARITHMETIC[impl])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("lengths", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_one_or_none(impl: str, lengths: tuple[int, int], device: torch.device) -> None:
    """A division by the number of blocks, or a softmax over nothing (hazard S1)."""
    case = Case("small", seqlen_q=lengths[0], seqlen_k=lengths[1], causal=True, sinks=True)
    problem = case.build(torch.float32, device)
    results = evaluate(ours(impl), problem)
    assert_within_budget(results, expected(problem), ARITHMETIC[impl])
    if 0 in lengths:
        assert not any(x.any() for x in (results.out, results.dq, results.dk, results.dv))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_change_from_call_to_call(impl: str, device: torch.device) -> None:
    """The same shapes with other strides, one after the other, and the first again (hazard L3, L10)."""
    case = Case("strides", batch=2, seqlen_q=9, seqlen_k=17)
    for layout in ("bhsd", "expanded_heads", "bshd", "sliced", "expanded_batch", "bhsd"):
        problem = replace(case, layout=layout).build(torch.float32, device)
        assert_within_budget(evaluate(ours(impl), problem), expected(problem), ARITHMETIC[impl])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_options_change_from_call_to_call(impl: str, device: torch.device) -> None:
    """The same shapes with another number: one that was baked into what is kept (hazard L9)."""
    case = Case("options", seqlen_q=9, seqlen_k=17)
    for change in (
        {"scale": 0.3},
        {"scale": 0.6},
        {"softcap": 1.0},
        {"softcap": 3.0},
        {"window": (3, 1)},
        {"window": (1, 4)},
        {"causal": True},
        {"dropout_p": 0.2},
        {"dropout_p": 0.6},
        {},
    ):
        problem = replace(case, **change).build(torch.float32, device)
        assert_within_budget(evaluate(ours(impl), problem), expected(problem), ARITHMETIC[impl])


ODD_BIASES = {
    "a slice of wider rows": lambda x: F.pad(x, (3, 2))[..., 3:-2],
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded rows": lambda x: x[..., :1, :].expand_as(x),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("view", ODD_BIASES)
def test_a_bias_and_a_mask_may_be_views(impl: str, view: str, device: torch.device) -> None:
    """Rows of 29 elements, which no vector load divides, and their gradient (hazard L6)."""
    case = Case("bias", seqlen_q=9, seqlen_k=29, bias=Extra(axes="hqk"), mask=Extra("random", "hqk"))
    problem = case.build(torch.float16, device)
    options = {**problem.options, "bias": ODD_BIASES[view](problem.options["bias"])}
    options["mask"] = ODD_BIASES[view](problem.options["mask"])
    problem = problem._replace(options=options)
    assert_within_budget(evaluate(ours(impl), problem), expected(problem), ARITHMETIC[impl])


class Recorder:
    """Stands for a kernel: what grids it was launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


def recorded() -> Any:
    launch = pytest.importorskip("undivided.kernels.triton.launch")
    config = pytest.importorskip("undivided.kernels.triton.config")
    return launch.Launch(Recorder(), 10**6 * 7, (), {}, config.TileConfig(16, 16, 4, 1))


def test_grids_have_one_axis() -> None:
    """A million heads on an axis that ends at 65535: no launch, and garbage as the result (hazard S11)."""
    launch = recorded()
    launch.run(torch.device("cpu"))
    assert launch.kernel.grids == [(7 * 10**6,)]


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers of one GPU on the stream of another (hazard D1)."""
    entered: list[Any] = []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    launch = recorded()
    launch.run(torch.device("cuda:1"))
    launch.run(torch.device("cuda:0"))
    assert entered == [torch.device("cuda:1")]
    assert len(launch.kernel.grids) == 2


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_each_call_drops_anew(impl: str, device: torch.device) -> None:
    """Without a seed: the same elements at every call, or others after manual_seed (hazard R6, R9)."""
    q = torch.randn(1, 2, 9, 16, device=device)

    def call() -> Tensor:
        return attention(q, q, q, dropout_p=0.5, impl=impl)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(first, call())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_is_saved_for_nobody(impl: str, device: torch.device) -> None:
    """Inside an autograd.Function grad mode is always off: asked there, all is kept (hazard A4, A5)."""
    q = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            assert attention(q, q, q, impl=impl).grad_fn is None
        attention(q.detach(), q.detach(), q.detach(), impl=impl)
        assert not saved
        assert attention(q, q.detach(), q.detach(), impl=impl).requires_grad
        assert saved


def test_a_mask_of_floats_has_its_gradient() -> None:
    """attn_mask treated as a constant, beside PyTorch's own answer (hazard A6)."""
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    masks = [torch.linspace(-1, 1, 49).view(7, 7).requires_grad_() for _ in range(2)]
    for mask, function in zip(masks, (scaled_dot_product_attention, F.scaled_dot_product_attention)):
        function(q, k, v, attn_mask=mask).sin().sum().backward()
    torch.testing.assert_close(masks[0].grad, masks[1].grad)


def test_no_file_is_executed_by_being_read() -> None:
    """pickle or torch.load, on a file that somebody else may have written (hazard P8)."""
    for folder in ("kernels", "layers", "interop", "conformance"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\b(import pickle|from pickle|torch\.load|marshal|shelve)\b", text), path
