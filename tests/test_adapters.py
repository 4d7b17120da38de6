"""Do the adapters say what they mean? PyTorch's and transformers' are run; the others meet stand-ins.

A stand-in is a module with the exact signatures and conventions of a package that is not installed,
computed by `undivided.attention`. It shows that an adapter calls the package rightly, no more.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from undivided import attention
from undivided.conformance import torch_adapters
from undivided.conformance.adapters import ADAPTERS, UnknownTargetError, resolve
from undivided.conformance.cases import CASES, Case
from undivided.conformance.check import Question, ask, check
from undivided.conformance.probes import probe

RUN_HERE = ["undivided-auto", "undivided-reference", "undivided-fallback"]
RUN_HERE += ["torch-sdpa", "torch-math", "torch-flash", "torch-flex", "transformers-eager"]
MULTIHEAD = ["torch-mha", "torch-mha-weights"]


@pytest.mark.parametrize("name", RUN_HERE)
@pytest.mark.parametrize("only", ["causal, ", "gqa", "33x65", "uniform"])
def test_what_runs_here_is_right_where_nothing_is_special(name: str, only: str) -> None:
    """Transposed axes, an option that is dropped, heads repeated in the wrong order."""
    found = resolve(name, "cpu", dtypes=(torch.float32,))
    report = check(found, device="cpu", only=f"values, {only}")
    assert report.ok, str(report)
    assert report.verdicts


def _assert_seqlen_first(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The layout that flash-attn and xFormers have: (batch, seqlen, heads, head_dim)."""
    assert q.shape[0] == k.shape[0] == v.shape[0]
    assert k.shape[1] == v.shape[1]
    assert q.shape[2] % k.shape[2] == 0


def _flash(q: Tensor, k: Tensor, v: Tensor, unbounded: int | None, **given: Any) -> tuple[Tensor, Tensor]:
    """What the three generations compute, from (batch, seqlen, heads, head_dim)."""
    _assert_seqlen_first(q, k, v)
    window = tuple(None if side == unbounded else side for side in given["window_size"])
    stats = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=given["causal"],
        window=window,
        softcap=given["softcap"] or None,
        scale=given["softmax_scale"],
        want=("lse",),
    )
    return stats.out.transpose(1, 2), stats.lse


def flash_attn2() -> dict[str, ModuleType]:
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        given = {"causal": causal, "window_size": window_size, "softcap": softcap}
        out, lse = _flash(q, k, v, -1, softmax_scale=softmax_scale, **given)
        return (out, lse.detach(), None) if return_attn_probs else out

    return _package("flash_attn", flash_attn_func=flash_attn_func)


def flash_attn3() -> dict[str, ModuleType]:
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        qv: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> Any:
        given = {"causal": causal, "window_size": window_size, "softcap": softcap}
        out, lse = _flash(q, k, v, -1, softmax_scale=softmax_scale, **given)
        return (out, lse.detach()) if return_attn_probs else out

    return _package("flash_attn_interface", flash_attn_func=flash_attn_func)


def flash_attn4() -> dict[str, ModuleType]:
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        score_mod: Any = None,
        score_mod_bwd: Any = None,
        mask_mod: Any = None,
        aux_tensors: Any = None,
        aux_scalars: Any = None,
        block_sparse_tensors: Any = None,
        block_sparse_tensors_bwd: Any = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        given = {"causal": causal, "window_size": window_size, "softcap": softcap}
        out, lse = _flash(q, k, v, None, softmax_scale=softmax_scale, **given)
        return out, lse if return_lse else None

    return _package("flash_attn") | _package("flash_attn.cute", flash_attn_func=flash_attn_func)


def xformers() -> dict[str, ModuleType]:
    class LowerTriangularFromBottomRightMask:
        def __init__(self) -> None:
            self.options = {"causal": True}

    class LocalAttentionFromBottomRightMask:
        def __init__(self, window_left: int, window_right: int) -> None:
            self.options = {"window": (window_left, window_right)}

    def memory_efficient_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        _assert_seqlen_first(query, key, value)
        options = getattr(attn_bias, "options", {})
        if isinstance(attn_bias, Tensor):
            assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            assert attn_bias.dtype == query.dtype
            options = {"bias": attn_bias}
        out = attention(*(x.transpose(1, 2) for x in (query, key, value)), scale=scale, **options)
        return out.transpose(1, 2)

    masks = (LowerTriangularFromBottomRightMask, LocalAttentionFromBottomRightMask)
    return (
        _package("xformers")
        | _package("xformers.ops", memory_efficient_attention=memory_efficient_attention)
        | _package("xformers.ops.fmha")
        | _package("xformers.ops.fmha.attn_bias", **{mask.__name__: mask for mask in masks})
    )


def _package(name: str, **content: Any) -> dict[str, ModuleType]:
    module = ModuleType(name)
    module.__dict__.update(content, __path__=[])
    return {name: module}


STAND_INS = {
    "flash-attn2": flash_attn2,
    "flash-attn3": flash_attn3,
    "flash-attn4": flash_attn4,
    "xformers": xformers,
}


@pytest.mark.parametrize("name", STAND_INS)
def test_the_others_are_called_rightly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: sides of a window, who is transposed, which of the results is lse."""
    for module, content in STAND_INS[name]().items():
        monkeypatch.setitem(sys.modules, module, content)
    report = check(resolve(name, "cpu"), device="cpu", only="values")
    assert report.ok, str(report)
    asked = {verdict.case.name for verdict in report.verdicts}
    assert {"causal", "window", "window (3, None)", "scale", "causal layout bshd", "causal 17x16"} <= asked
    assert ("bias" if name == "xformers" else "gqa") in asked


@pytest.mark.parametrize("name", STAND_INS)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in STAND_INS[name]():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{name} needs .* which cannot be imported"):
        resolve(name, "cpu")


def test_claims_can_be_changed() -> None:
    made = resolve("torch-math", "cpu", causal=False, head_dims=(64,))
    assert not made.capabilities.causal
    assert made.capabilities.head_dims == (64,)
    assert made.capabilities.mask
    assert made.origin == "'torch-math', causal=False, head_dims=(64,)"
    with pytest.raises(TypeError, match="unknown capability 'casual'"):
        resolve("torch-math", "cpu", casual=True)


def test_a_function_is_found_by_name() -> None:
    made = resolve("undivided:attention", "cpu", causal=True)
    assert made.capabilities.causal
    with pytest.raises(UnknownTargetError, match="neither an adapter"):
        resolve("attention")


@pytest.mark.parametrize("name", ["torch-efficient", "torch-cudnn"])
def test_a_device_that_cannot_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} runs on a CUDA device only, not on cpu"):
        resolve(name, "cpu")


@pytest.mark.parametrize(("taken", "largest"), [(256, 256), (128, 128)], ids=["Hopper", "others"])
def test_cudnn_is_asked_what_pytorch_lets_it_take(
    taken: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's fastest peer left out at head_dim 256, or one that is asked for what raises."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_adapters, "can_use_cudnn_attention", lambda x: x[0].shape[-1] <= taken)
    monkeypatch.setattr(torch_adapters, "SDPAParams", lambda *x: x)
    empty = torch.empty
    with monkeypatch.context() as patches:
        patches.setattr(torch, "empty", lambda *size, device, **given: asked.append(device) or empty(*size))
        found = resolve("torch-cudnn", "cuda:1")
    assert found.capabilities.max_head_dim == largest
    assert asked == [torch.device("cuda:1")]
    wide = Case("wide", head_dim=256)
    assert (found.refusal(wide, torch.float16) is None) == (largest == 256)


def test_what_readme_shows_of_cudnn_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that would be another one on every machine."""
    monkeypatch.setattr(torch_adapters, "_cudnn_takes", lambda head_dim, device: True)
    assert torch_adapters.claims("cudnn", "cuda").max_head_dim == 128
    assert resolve("torch-cudnn", "cuda").capabilities.max_head_dim == 256


def test_every_adapter_is_tested_here() -> None:
    """A name added to the list that no test has ever called."""
    elsewhere = {"undivided-triton", "undivided-gluon"}
    elsewhere |= {"torch-efficient", "torch-cudnn", "torch-flex-compiled"}
    assert {*RUN_HERE, *MULTIHEAD, *STAND_INS} | elsewhere == set(ADAPTERS)


@pytest.mark.parametrize(
    "name", ["bias qk", "bias bqk", "bias float32", "bias float64", "mask bhk", "mask q"]
)
def test_flex_attention_looks_up_the_right_element(name: str) -> None:
    """A mask or a bias with axes missing, read at the wrong index; a wide bias rounded to q's dtype."""
    case = next(case for case in CASES if case.name == name)
    verdict = ask(resolve("torch-flex", "cpu"), Question("values", case, torch.float16), torch.device("cpu"))
    assert verdict.ok, str(verdict)


def test_the_mask_of_transformers_hides_nothing_from_an_empty_row() -> None:
    """A row that sees nothing attends to everything, evenly: the minimum is added to every score."""
    report = check(
        resolve("transformers-eager", "cpu", dtypes=(torch.float32,)), device="cpu", only="values, mask"
    )
    assert "mask nothing qk" in {name for failure in report.failures for name in failure.names}


def test_multihead_attention_disagrees_with_itself_about_empty_rows() -> None:
    """Who asks it for weights gets NaN where a row sees nothing, who does not gets none."""
    question, words = "a row that sees nothing, by mask", []
    for name in MULTIHEAD:
        assert check(resolve(name, "cpu", dtypes=(torch.float32,)), device="cpu", only="values, bias bq").ok
        found = {o.question: o for o in probe(resolve(name, "cpu", dtypes=(torch.float32,)))}
        assert found["a boolean mask"].ok, found["a boolean mask"].found
        words.append(found[question].found)
    assert words == ["out 0, gradients 0", "out NaN, gradients NaN"]


def test_dropout_follows_the_seed_and_leaves_the_generator() -> None:
    made = resolve("torch-math", "cpu")
    problem = Case("dropout", dropout_p=0.5).build(torch.float32)
    before = torch.get_rng_state()
    first, second = made.attend(problem)[0], made.attend(problem)[0]
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    other = made.attend(problem._replace(options={**problem.options, "seed": 5}))[0]
    assert not torch.equal(first, other)
