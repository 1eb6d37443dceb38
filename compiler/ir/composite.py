"""Ops that are their parts: one plain function gives definition, fake and gradient.

    OP = define("twice(Tensor x) -> Tensor", lambda x: x + x)

In inference the op stays whole, so that a kernel can take its place; under autograd it is its parts, so that the partitioner
chooses what is kept for the backward, and region codegen fuses them in both directions.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

_library = torch.library.Library("tileweld", "FRAGMENT")


def define(schema: str, definition: Callable, differentiable: Callable | None = None):
    """Register ``tileweld::{schema}``; returns the overload.

    definition: the op in plain torch operations; its results are new tensors. differentiable: what runs under autograd in its
    place, where an op with a gradient of its own saves less.
    """
    _library.define(schema)
    name = "tileweld::" + schema.partition("(")[0]
    torch.library.impl(name, "CompositeExplicitAutograd", lib=_library)(definition)
    torch.library.register_fake(name, definition, lib=_library)
    overload = getattr(torch.ops.tileweld, schema.partition("(")[0]).default

    def autograd(*args, **kwargs):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves((args, kwargs))):
            return (differentiable or definition)(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():  # the way that torch's own documentation of autograd kernels goes on
            return overload(*args, **kwargs)

    torch.library.impl(name, "Autograd", lib=_library)(autograd)
    return overload
