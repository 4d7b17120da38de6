"""Operators of torch.library that take a whole call: how they are defined and what their schemas say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .spec import AttentionSpec, Inputs

NAMESPACE = "undivided"
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "float | None": "float?",
    "int": "SymInt",
    "int | None": "SymInt?",
    "bool": "bool",
}
_library = torch.library.Library(NAMESPACE, "DEF")

# As PyTorch's own kernels: above it, a result that is a transposed view refuses to be edited in place.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView


def define(
    name: str,
    signature: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    vmap_rule: Callable[..., Any],
) -> Any:
    """The operator `undivided::name`, opaque to whoever traces."""
    _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_vmap(qualified, vmap_rule, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def schema(types: type[Inputs] | type[AttentionSpec]) -> str:
    """Every field as an argument."""
    annotations = {name: str(getattr(t, "__forward_arg__", t)) for name, t in types.__annotations__.items()}
    return ", ".join(f"{_SCHEMA_TYPES[t]} {name}" for name, t in annotations.items())


CALL = f"{schema(Inputs)}, {schema(AttentionSpec)}"
