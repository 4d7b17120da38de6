"""Who computes a call on a Hopper GPU, simulated; and that it is transformed and traced like any other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="the kernels are written in it")

from simulated_hopper import simulated_hopper
from undivided import attention, explain
from undivided.kernels import dispatch, hopper, ops
from undivided.kernels.functional import prepare
from undivided.kernels.spec import DEFAULTS, AttentionOptions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton does not interpret")

FORWARD, BACKWARD = "_forward_kernel", "_backward_kernel"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """CPU tensors are taken for those of a Hopper GPU; names of its kernels as they are launched."""
    monkeypatch.setattr(dispatch, "_is_on_gpu", lambda inputs: True)
    monkeypatch.setattr(dispatch, "_triton_is_missing", lambda device: ())
    monkeypatch.setattr(ops, "_say_if_untried", lambda kernels, device: None)
    monkeypatch.delenv("UNDIVIDED_HOPPER", raising=False)
    with simulated_hopper() as names:
        yield names


@pytest.fixture
def always(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Short sequences too, which are not worth it but quick to simulate."""
    monkeypatch.setenv("UNDIVIDED_HOPPER", "1")
    return launched


def half(*shape: int) -> Tensor:
    return torch.randn(shape).half()


def chosen(head_dim: int, seqlen: int = 512, options: AttentionOptions | None = None) -> str:
    q = half(1, 2, seqlen, head_dim)
    return dispatch.choose("auto", *prepare(q, q, q, {**DEFAULTS, **(options or {})}))


@pytest.mark.usefixtures("launched")
class TestChoice:
    def test_where_results_show_them_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A row of the table that nobody reads, or that is read for something that was not measured."""
        assert chosen(128) == chosen(80) == chosen(128, options={"causal": True}) == "auto on hopper"
        assert chosen(64) == chosen(256) == chosen(128, seqlen=100) == "auto"
        assert chosen(128, options={"window": (100, 0)}) == chosen(128, options={"softcap": 5.0}) == "auto"
        monkeypatch.setitem(hopper.FASTER, "backward", frozenset())
        assert chosen(128) == "auto on hopper, forward"

    def test_the_switch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UNDIVIDED_HOPPER", "1")
        assert chosen(64, seqlen=20) == "auto on hopper"
        assert chosen(64, options={"softcap": 5.0}) == "auto"  # they do not take it
        monkeypatch.setenv("UNDIVIDED_HOPPER", "0")
        assert chosen(128) == "auto"

    def test_explain_names_them(self) -> None:
        q = half(1, 2, 512, 128)
        explanation = explain(q, q, q)
        assert explanation.chosen == "gluon"
        assert explanation.reasons["triton"] == ["the kernels for Hopper go first"]


def test_only_forward(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass by kernels that are not shown to be faster."""
    monkeypatch.setitem(hopper.FASTER, "forward", frozenset({(64, False)}))
    monkeypatch.setattr(hopper, "SHORTEST", 1)
    q = half(1, 1, 20, 64).requires_grad_()
    attention(q, q, q).sum().backward()
    assert launched == [FORWARD]


@pytest.mark.parametrize(("wanted", "kernels"), [("qkv", 2), ("q", 1), ("kv", 1)])
def test_no_more_than_asked(wanted: str, kernels: int, always: list[str]) -> None:
    """One pass for all gradients where somebody wants one of them."""
    q, k, v = (half(1, 1, 20, 64).requires_grad_(name in wanted) for name in "qkv")
    attention(q, k, v).sum().backward()
    assert always == [FORWARD, BACKWARD][:kernels]


def test_a_kernel_that_does_not_build_leaves_others_alone(
    always: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that another variant of the kernel is compiled for, taken for the same."""
    from undivided.kernels.gluon.hopper_forward import forward_launch

    q = half(1, 1, 20, 64)
    lse = torch.empty(1, 1, 20)

    def variant(options: AttentionOptions, x: Tensor = q) -> object:
        inputs, spec = prepare(x, x, x, {**DEFAULTS, **options})
        return forward_launch(inputs, spec, torch.empty_like(x), lse)._variant(torch.device("cuda", 0))

    variants = {
        variant({}),
        variant({"causal": True}),
        variant({"window": (5, None)}),
        variant({}, q.bfloat16()),
    }
    assert len(variants) == 4
    assert variant({}) in variants


def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True)


class TestTransforms:
    """Addresses are asked for of tensors that have none: everything must still run, by the same kernels."""

    q, k, v = half(2, 1, 20, 128), half(2, 1, 20, 128), half(2, 1, 20, 128)

    def test_vmap(self, always: list[str]) -> None:
        found = torch.func.vmap(call)(*(x[:, None] for x in (self.q, self.k, self.v)))
        assert torch.equal(found[:, 0], call(self.q, self.k, self.v))
        shared = torch.func.vmap(call, in_dims=(0, None, None))(self.q[:, None], self.k[:1], self.v[:1])
        repeated = (x[:1].repeat(2, 1, 1, 1) for x in (self.k, self.v))
        assert torch.equal(shared[:, 0], call(self.q, *repeated))
        assert set(always) == {FORWARD}

    def test_grad(self, always: list[str]) -> None:
        found = torch.func.grad(lambda q: call(q, self.k, self.v).float().sum())(self.q)
        q = self.q.clone().requires_grad_()
        call(q, self.k, self.v).float().sum().backward()
        assert q.grad is not None
        torch.testing.assert_close(found, q.grad)

    def test_jvp(self, always: list[str]) -> None:
        out, tangent = torch.func.jvp(lambda q: call(q, self.k, self.v), (self.q,), (self.q,))
        assert torch.equal(out, call(self.q, self.k, self.v))
        assert torch.isfinite(tangent).all()

    def test_compile(self, always: list[str]) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(self.q, self.k, self.v), call(self.q, self.k, self.v))
        flat = torch.cat([self.q.new_zeros(1), self.q.flatten()])[1:].view(self.q.shape)
        assert torch.equal(compiled(flat, self.k, self.v), call(self.q, self.k, self.v))

    def test_export(self, always: list[str]) -> None:
        class Module(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return call(q, k, v)

        exported = torch.export.export(Module(), (self.q, self.k, self.v))
        assert torch.equal(exported.module()(self.q, self.k, self.v), call(self.q, self.k, self.v))
