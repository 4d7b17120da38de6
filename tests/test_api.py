"""What the public calls accept, refuse, and say."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import undivided
from undivided import attention, explain, scaled_dot_product_attention
from undivided.__main__ import main
from undivided.kernels import dispatch, evidence, functional, ops, spec, visibility
from undivided.kernels.spec import AttentionSpec, Inputs

NAN, INF = float("nan"), float("inf")


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **kwargs)


def nested(layout: str) -> Tensor:
    """Of (4, 5, 8) and (4, 3, 8)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their interface may change, says PyTorch
        parts = [zeros(4, 5, 8), zeros(4, 3, 8)]
        parts = parts if layout == "strided" else [x.transpose(0, 1) for x in parts]
        return torch.nested.nested_tensor(parts, layout=getattr(torch, layout))


Q = zeros(2, 4, 5, 8)
K = zeros(2, 2, 7, 8)

WRONG = [
    # q, k, v, options, error, what the message says
    ("q", K, K, {}, TypeError, "q must be a torch.Tensor, got str"),
    (Q[0], K, K, {}, ValueError, "q must have 4 axes"),
    (Q, K.double(), K, {}, TypeError, "one dtype .* got torch.float32, torch.float64, torch.float32"),
    (Q.int(), K.int(), K.int(), {}, TypeError, "got torch.int32, torch.int32, torch.int32"),
    (Q.to(torch.complex64), K, K, {}, TypeError, "one dtype"),
    (Q, K.to("meta"), K, {}, ValueError, "one device, got cpu, meta, cpu"),
    (Q, K, zeros(2, 2, 8, 8), {}, ValueError, "v must have k's seqlen 7, got 8"),
    (Q, K, zeros(2, 2, 6, 8), {}, ValueError, "v must have k's seqlen 7, got 6"),
    (Q, K, zeros(2, 4, 7, 8), {}, ValueError, "v must have k's number of heads 2, got 4"),
    (Q, zeros(2, 2, 7, 9), K, {}, ValueError, "k must have q's head_dim 8, got 9"),
    (Q, K, K[..., :0], {}, ValueError, "head_dim must be at least 1"),
    (
        zeros(2, 3, 5, 8),
        K,
        K,
        {},
        ValueError,
        r"heads of q \(3\) must be a multiple of heads of k and v \(2\)",
    ),
    (zeros(2, 2, 5, 8), zeros(2, 4, 7, 8), zeros(2, 4, 7, 8), {}, ValueError, "must be a multiple"),
    (Q, zeros(3, 2, 7, 8), zeros(3, 2, 7, 8), {}, ValueError, "batch sizes .* got 2, 3, 3"),
    (Q.to_sparse(), K, K, {}, TypeError, "q must be a dense tensor, got a torch.sparse_coo one"),
    (Q, K, K.to_sparse(), {}, TypeError, "v must be a dense tensor, got a torch.sparse_coo one"),
    (nested("jagged"), K, K, {}, TypeError, "all jagged nested tensors, got a dense k"),
    (nested("strided"), K, K, {}, TypeError, "all jagged nested tensors, got a nested, strided q"),
    (Q, torch.quantize_per_tensor(K, 0.1, 0, torch.qint8), K, {}, TypeError, "one dtype .* torch.qint8"),
    (Q, K, K, {"mask": zeros(5, 7).bool().to_sparse()}, TypeError, "mask must be a dense tensor"),
    (Q, K, K, {"key_lengths": zeros(2).int().to_sparse()}, TypeError, "key_lengths must be a dense tensor"),
    (
        Q,
        K,
        K,
        {"dropout_p": 0.1, "seed": zeros(1).long().to_sparse()},
        TypeError,
        "seed must be a dense tensor",
    ),
    (Q, K, K, {"mask": zeros(5, 7)}, TypeError, "mask must be a bool tensor .* bias="),
    (Q, K, K, {"mask": zeros(5, 7, dtype=torch.uint8)}, TypeError, "mask must be a bool tensor"),
    (
        Q,
        K,
        K,
        {"mask": zeros(5, 6).bool()},
        ValueError,
        r"mask must broadcast.*\(2, 4, 5, 7\), got shape \(5, 6\)",
    ),
    (Q, K, K, {"mask": zeros(1, 2, 4, 5, 7).bool()}, ValueError, "mask must broadcast"),
    (Q, K, K, {"bias": zeros(5, 7).bool()}, TypeError, "bias must be a float tensor.* mask="),
    (Q, K, K, {"bias": zeros(3, 5, 7)}, ValueError, "bias must broadcast"),
    (Q, K, K, {"bias": zeros(5, 7, device="meta")}, ValueError, "bias must be on cpu like q, got meta"),
    (Q, K, K, {"key_lengths": [3, 4]}, TypeError, "key_lengths must be a torch.Tensor, got list"),
    (Q, K, K, {"key_lengths": zeros(2)}, TypeError, "key_lengths must be int32 or int64"),
    (
        Q,
        K,
        K,
        {"key_lengths": zeros(3).int()},
        ValueError,
        r"key_lengths must have shape \(batch,\) = \(2,\)",
    ),
    (
        Q,
        K,
        K,
        {"key_lengths": torch.tensor([3, 9]), "check": True},
        ValueError,
        r"\[0, 7\], got values from 3 to 9",
    ),
    (Q, K, K, {"key_lengths": torch.tensor([-1, 2]), "check": True}, ValueError, "got values from -1 to 2"),
    (Q, K, K, {"window": 3}, TypeError, "window must be a pair"),
    (Q, K, K, {"window": (-1, 0)}, ValueError, "window left must be >= 0, or None for unbounded, got -1"),
    (Q, K, K, {"window": (0, 1.5)}, TypeError, "window right must be an int or None, got 1.5"),
    (Q, K, K, {"scale": NAN}, ValueError, "scale must be a finite number.* got nan"),
    (Q, K, K, {"scale": INF}, ValueError, "scale must be a finite number.* got inf"),
    (Q, K, K, {"scale": 1e300}, ValueError, r"scale must be .* at most 2\*\*60 in magnitude, got 1e\+300"),
    (Q, K, K, {"scale": -1e38}, ValueError, r"scale must be .* at most 2\*\*60 in magnitude, got -1e\+38"),
    (
        Q,
        K,
        K,
        {"softcap": 1e300},
        ValueError,
        r"softcap must be .* 2\*\*-60 to 2\*\*60, or None, got 1e\+300",
    ),
    (
        Q,
        K,
        K,
        {"softcap": 1e-300},
        ValueError,
        r"softcap must be .* 2\*\*-60 to 2\*\*60, or None, got 1e-300",
    ),
    (Q, K, K, {"causal": 1}, TypeError, "causal must be a bool, got 1"),
    (Q, K, K, {"causal": "no"}, TypeError, "causal must be a bool, got 'no'"),
    (Q, K, K, {"causal": torch.tensor(True)}, TypeError, "causal must be a bool, got tensor"),
    (Q, K, K, {"scale": torch.tensor(1.0)}, TypeError, "scale must be a number or None, got Tensor"),
    (Q, K, K, {"scale": "1"}, TypeError, "scale must be a number or None, got str"),
    (Q, K, K, {"softcap": 0.0}, ValueError, "softcap must be a finite number > 0.* got 0.0"),
    (Q, K, K, {"softcap": NAN}, ValueError, "softcap must be a finite number > 0"),
    (Q, K, K, {"dropout_p": None}, ValueError, r"dropout_p must lie in \[0, 1\], got None"),
    (Q, K, K, {"dropout_p": 1.5}, ValueError, r"dropout_p must lie in \[0, 1\], got 1.5"),
    (Q, K, K, {"dropout_p": -0.1}, ValueError, "dropout_p must lie in"),
    (Q, K, K, {"dropout_p": NAN}, ValueError, "dropout_p must lie in"),
    (Q, K, K, {"dropout_p": 0.1, "seed": 2**64}, ValueError, "seed must fit into 64 bits"),
    (
        Q,
        K,
        K,
        {"dropout_p": 0.1, "seed": 0.5},
        TypeError,
        "seed must be an int or an int64 tensor, got float",
    ),
    (Q, K, K, {"dropout_p": 0.1, "seed": zeros(2).long()}, TypeError, "seed must be .* one element"),
    (Q, K, K, {"want": ("entropyy",)}, ValueError, "want must be a tuple of names"),
    (Q, K, K, {"want": "lse"}, ValueError, "want must be a tuple of names"),
    (Q, K, K, {"want": True}, ValueError, "want must be a tuple of names"),
    (Q, K, K, {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of reference, fallback, triton"),
    (Q, K, K, {"is_causal": True}, TypeError, "unknown option 'is_causal'; the options are want, causal"),
]


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "error", "text"), WRONG, ids=[f"{i}-{w[5][:30]}" for i, w in enumerate(WRONG)]
)
def test_wrong_input_is_named(
    q: Any, k: Any, v: Any, options: dict[str, Any], error: type[Exception], text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing may run before the arguments are known to fit; explain refuses with the same words.

    (hazard S8, D2, L13, P6)
    """
    monkeypatch.setattr(ops, "attention", lambda *_: pytest.fail("computed before validation"))
    with pytest.raises(error, match=text):
        attention(q, k, v, **options)
    with pytest.raises(error, match=text):
        explain(q, k, v, **options)


def test_an_order_that_cannot_be_followed_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_is_missing", lambda device: ("triton is not installed",))
    wide = torch.zeros(1, 1, 2, 300, dtype=torch.float64)
    with pytest.raises(NotImplementedError) as info:
        attention(wide, wide, wide, impl="triton")
    for reason in ("triton is not installed", "float64", "head_dim 300 is larger than 256"):
        assert reason in str(info.value)
    explanation = explain(wide, wide, wide, impl="triton")
    assert explanation.chosen is None
    assert "triton is not installed" in str(explanation)
    assert attention(wide, wide, wide).shape == wide.shape, "auto must find somebody"


@pytest.mark.parametrize("impl", ["reference", "fallback", "triton"])
@pytest.mark.parametrize("softcap", [None, 2.0**-60, 2.0**60])
@pytest.mark.parametrize("scale", [2.0**60, -(2.0**60), 2.0**-60, 1e-300, -1e-300, 0.0])
def test_extreme_scales(scale: float, softcap: float | None, impl: str, device: torch.device) -> None:
    """A scale that overflows on its way into the scores gives NaN, one that vanishes must act like 0.

    (hazard N7)
    """
    q = torch.eye(6, 16, device=device)[None, None].requires_grad_()  # scores are scale or 0
    v = torch.randn(1, 1, 6, 16, device=device)
    stats = attention(q, q, v, scale=scale, softcap=softcap, want=("lse",), impl=impl)
    score = scale if softcap is None else softcap * math.tanh(scale / softcap)
    scores = score * torch.eye(6, dtype=torch.float64, device=device)
    torch.testing.assert_close(stats.out.double(), scores.softmax(-1) @ v.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.lse.double(), scores.logsumexp(-1)[None, None], atol=1e-5, rtol=1e-5)
    (dq,) = torch.autograd.grad(stats.out.sum(), q)
    assert dq.isfinite().all()


def test_numbers_of_numpy_are_numbers() -> None:
    """Configurations hold np.float32(0.5): refused as no number, or passed on to a kernel as it is."""
    numpy = pytest.importorskip("numpy", reason="numpy is optional")
    plain = {"scale": 0.5, "softcap": 2.0, "dropout_p": 0.25, "window": (3, 1), "seed": 5, "causal": True}
    theirs = {
        "scale": numpy.float32(0.5),
        "softcap": numpy.float16(2),
        "dropout_p": numpy.float64(0.25),
        "window": (numpy.int64(3), numpy.int32(1)),
        "seed": numpy.uint64(5),
        "causal": numpy.bool_(True),
    }
    inputs, spec = functional.prepare(Q, K, K, theirs)
    expected, expected_spec = functional.prepare(Q, K, K, plain)
    assert spec == expected_spec
    assert [type(x) for x in spec] == [type(x) for x in expected_spec]
    assert torch.equal(inputs.seed, expected.seed)


def test_interpreter_refuses_bfloat16() -> None:
    """It would return numbers, all of them wrong (hazard T3)."""
    q = torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="interpreter multiplies bfloat16 wrongly"):
        attention(q, q, q, impl="triton")


@pytest.mark.parametrize("how", ["allow_tf32", "fp32_precision", "set_float32_matmul_precision"])
def test_tf32_follows_every_way_of_asking(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of PyTorch's getters raise once another of its setters was used (hazard N12)."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert not functional._tf32_allowed()
        if how == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("high")
        else:
            setattr(matmul, how, True if how == "allow_tf32" else "tf32")
        assert functional._tf32_allowed()
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_auto_never_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.reference, "attention", lambda *_: pytest.fail("S x S by accident"))
    assert attention(Q, K, K).shape == (2, 4, 5, 8)


def test_environment_variable_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "DEFAULT_IMPL", "reference")
    assert explain(Q, K, K).chosen == "reference"
    assert explain(Q, K, K, impl="fallback").chosen == "fallback"


def test_signature_is_written_out() -> None:
    """**options alone would hide the options from help() and editors."""
    parameters = inspect.signature(attention).parameters
    assert list(parameters)[:3] == ["q", "k", "v"]
    assert list(parameters)[3:] == ["want", *spec.DEFAULTS]
    assert all(name in attention.__doc__ for name in parameters)


def test_kernel_that_does_not_build_falls_back_once_and_only_under_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class BuildError(Exception):
        pass

    class Broken:
        BUILD_ERRORS = (BuildError,)

        @staticmethod
        def attention_forward(*_: Any) -> None:
            raise BuildError("out of resources: shared memory")

    find = ops._implementation
    monkeypatch.setattr(ops, "_implementation", lambda name: Broken if name == "triton" else find(name))
    inputs, options = Inputs(Q, K, K), AttentionSpec(0.3)
    with pytest.warns(RuntimeWarning, match="fallback runs instead.*shared memory"):
        out, _, _ = ops.attention(inputs, options, "auto")
    assert out.shape == (2, 4, 5, 8)
    with pytest.raises(BuildError):
        ops.attention(inputs, options, "triton")


def test_tiles_and_evidence_name_a_gpu_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence recorded for one name, tiles looked up by another."""
    config = pytest.importorskip("undivided.kernels.triton.config", reason="triton is not installed")
    monkeypatch.setattr(evidence, "architecture", lambda device: f"that of {device}")
    assert config.architecture(torch.device("cuda:3")) == "that of cuda:3"


def test_untried_hardware_is_mentioned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody has checked, silence would read as a promise."""
    monkeypatch.setattr(ops.evidence, "architecture", lambda device: "sm_1")
    ops._say_if_untried.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"not been checked on sm_1 \(evidence: no evidence\).*gpu.sh"):
        ops._say_if_untried(("triton",), torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops._say_if_untried(("triton",), torch.device("cpu"))


@pytest.mark.parametrize("axis", range(6))
def test_empty_problems(axis: int, device: torch.device) -> None:
    """batch, heads_q, heads_kv, seqlen_q or seqlen_k is 0: zeros, lse -inf, zero gradients.

    (hazard S1, S2)
    """
    batch, heads_q, heads_kv, seqlen_q, seqlen_k = (
        0 if i == axis else n for i, n in enumerate((2, 4, 2, 5, 7))
    )
    if heads_kv == 0:
        heads_q = 0
    for impl in ("reference", "fallback", "triton"):
        q = torch.randn(batch, heads_q, seqlen_q, 16, requires_grad=True, device=device)
        k = torch.randn(batch, heads_kv, seqlen_k, 16, requires_grad=True, device=device)
        v = torch.randn(batch, heads_kv, seqlen_k, 8, requires_grad=True, device=device)
        stats = attention(q, k, v, want=("lse",), impl=impl)
        assert stats.out.shape == (batch, heads_q, seqlen_q, 8)
        stats.out.sum().backward()
        for x in (q, k, v):
            assert x.grad.shape == x.shape
        if axis == 4:
            assert torch.count_nonzero(stats.out) == 0
            assert (stats.lse == -INF).all()


def test_batch_of_one_broadcasts_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys repeated for each entry, or read with strides of others (hazard L3)."""
    seen = []
    forward = ops._implementation("fallback").attention_forward
    monkeypatch.setattr(
        ops._implementation("fallback"), "attention_forward", lambda i, s: seen.append(i) or forward(i, s)
    )
    q, k = torch.randn(3, 4, 5, 8), torch.randn(1, 4, 5, 8, requires_grad=True)
    out = attention(q, k, k)
    torch.testing.assert_close(out, attention(q, k.repeat(3, 1, 1, 1), k.repeat(3, 1, 1, 1)))
    assert seen[0].k.stride(0) == 0
    out.sum().backward()
    assert k.grad.shape == k.shape


@pytest.mark.parametrize("impl", ["fallback", "triton"])
def test_one_length_for_the_whole_batch(impl: str, device: torch.device) -> None:
    """Expanded with stride 0 and read as if dense, the second entry's length would lie outside."""
    q, k = torch.randn(3, 4, 5, 16, device=device), torch.randn(3, 2, 40, 16, device=device)
    lengths = torch.tensor([21, 21, 21], device=device)
    one = attention(q, k, k, key_lengths=lengths[:1], impl=impl)
    each = attention(q, k, k, key_lengths=lengths, impl=impl)
    assert torch.equal(one, each)
    inputs, _ = functional.prepare(q, k, k, {"key_lengths": lengths[:1]})
    assert inputs.key_lengths is not None
    assert inputs.key_lengths.is_contiguous()


def test_visible_scores_counts_what_the_element_mask_shows() -> None:
    for seqlen_q, seqlen_k in ((1, 1), (5, 7), (7, 5), (9, 3)):
        for left in (None, 0, 1, 20):
            for right in (None, 0, 2, 20):
                for top_left in (False, True):
                    s = AttentionSpec(1.0, left, right, top_left)
                    q, k = zeros(1, 1, seqlen_q, 1), zeros(1, 1, seqlen_k, 1)
                    ok = visibility.visible(Inputs(q, k, k), s)
                    count = seqlen_q * seqlen_k if ok is None else int(ok.sum())
                    assert visibility.visible_scores(s, seqlen_q, seqlen_k) == count


class TestScaledDotProductAttention:
    """PyTorch's signature and conventions."""

    def test_signature(self) -> None:
        ours = inspect.signature(scaled_dot_product_attention).parameters
        names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
        assert list(ours) == names
        assert [p.default for p in ours.values()][3:] == [None, 0.0, False, None, False]

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize(
        ("query", "key"),
        [
            ((6, 8), (9, 8)),
            ((3, 6, 8), (3, 9, 8)),
            ((2, 3, 6, 8), (2, 3, 9, 8)),
            ((2, 1, 3, 9, 8), (2, 4, 3, 6, 8)),
            ((2, 3, 6, 8), (1, 1, 9, 8)),
            ((1, 1, 6, 8), (2, 3, 9, 8)),
        ],
    )
    def test_leading_axes(self, query: tuple[int, ...], key: tuple[int, ...], is_causal: bool) -> None:
        """Causal is top-left here; leading axes are any number and broadcast."""
        q, k, v = torch.randn(query), torch.randn(key), torch.randn(*key[:-1], 5)
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, v, is_causal=is_causal),
            F.scaled_dot_product_attention(q, k, v, is_causal=is_causal),
        )

    @pytest.mark.parametrize("shape", [(6, 9), (1, 9), (2, 1, 6, 9), (3, 6, 9), (2, 3, 6, 9)])
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks(self, shape: tuple[int, ...], kind: str) -> None:
        q, k = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 9, 8)
        mask = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape)
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=0.2),
            F.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=0.2),
        )

    @pytest.mark.parametrize("shape", [(2, 1, 3, 6, 6), (4, 3, 6, 6), (4, 1, 6, 6), (3, 6, 6), (6, 6)])
    def test_five_axes_with_mask(self, shape: tuple[int, ...]) -> None:
        q, mask = torch.randn(2, 4, 3, 6, 8), torch.rand(shape) > 0.3
        torch.testing.assert_close(
            scaled_dot_product_attention(q, q, q, attn_mask=mask),
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask),
        )

    @pytest.mark.parametrize(
        ("attn_mask", "error", "text"),
        [
            ([[True]], TypeError, "attn_mask must be a torch.Tensor, got list"),
            (zeros(5, 5).int(), TypeError, "attn_mask must be a bool or a float tensor, got torch.int32"),
            (zeros(5, 5, device="meta"), ValueError, "attn_mask must be on cpu like q, got meta"),
            (zeros(5, 5).to_sparse(), TypeError, "attn_mask must be a dense tensor"),
            (zeros(6, 5), ValueError, r"attn_mask must broadcast, .* \(2, 4, 5, 5\), got shape \(6, 5\)"),
            (zeros(3, 1, 5, 5).bool(), ValueError, r"attn_mask must broadcast.*got shape \(3, 1, 5, 5\)"),
            (zeros(1, 2, 4, 5, 5), ValueError, "attn_mask must broadcast"),
        ],
    )
    def test_wrong_masks_are_named_as_they_were_passed(
        self, attn_mask: Any, error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            scaled_dot_product_attention(Q, Q, Q, attn_mask=attn_mask)

    def test_wrong_masks_for_five_axes(self) -> None:
        """PyTorch's expand would complain in its own words."""
        q = Q.expand(3, 2, 4, 5, 8)
        with pytest.raises(ValueError, match=r"attn_mask must broadcast, .* \(3, 2, 4, 5, 5\), got shape"):
            scaled_dot_product_attention(q, q, q, attn_mask=zeros(2, 2, 4, 5, 5))

    def test_is_causal_is_a_bool(self) -> None:
        with pytest.raises(TypeError, match="is_causal must be a bool, got 1"):
            scaled_dot_product_attention(Q, Q, Q, is_causal=1)

    def test_gqa_needs_the_flag(self) -> None:
        q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, k, enable_gqa=True),
            F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        )
        with pytest.raises(ValueError, match="enable_gqa=True"):
            scaled_dot_product_attention(q, k, k)

    def test_mask_and_is_causal_exclude_each_other(self) -> None:
        q = torch.randn(2, 4, 6, 8)
        with pytest.raises(ValueError, match="attn_mask must be None when is_causal is True"):
            scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(6, 6).bool(), is_causal=True)


class TestExplain:
    def test_names_the_choice_the_work_and_the_skipped_tiles(self) -> None:
        q, k = torch.empty(1, 8, 4096, 64), torch.empty(1, 2, 8192, 64)
        explanation = explain(q, k, k, causal=True, window=(1023, 0))
        assert explanation.chosen == "fallback"
        assert set(explanation.reasons) == {"reference", "triton", "gluon"}
        assert explanation.flops_forward == 4 * 8 * 4096 * 1024 * 64
        assert (explanation.tiles, explanation.tiles_visited) == (32 * 64, 32 * 9)
        assert "window (1023, 0)" in str(explanation)

    def test_computes_nothing(self) -> None:
        before = torch.random.get_rng_state()
        explain(Q, K, K, dropout_p=0.5)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_meta_tensors(self) -> None:
        q = torch.empty(1, 8, 2**20, 64, device="meta", dtype=torch.bfloat16)
        assert "on a GPU" in str(explain(q, q, q, causal=True))

    def test_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", "--seqlen", "256", "--causal", "--device", "meta"]) == 0
        assert "3 of 4 visited, 1 skipped" in capsys.readouterr().out
        assert main(["explain", "--heads", "3", "--heads-kv", "2", "--device", "meta"]) == 2
        assert "must be a multiple" in capsys.readouterr().err


def test_public_names_have_docstrings() -> None:
    for name in undivided.__all__:
        assert getattr(undivided, name).__doc__, name
