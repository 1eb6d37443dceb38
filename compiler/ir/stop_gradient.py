"""``tileweld::stop_gradient(x)``: x, through which no gradient passes; torch's detach, in a name that no rewrite looks through.

A captured graph has this op wherever a gradient would have passed otherwise. Behind AOT, where gradients are already ops of the
graph, there is only aten.detach, which is a view like any other.
"""
from __future__ import annotations

import torch

_library = torch.library.Library("tileweld", "FRAGMENT")
_library.define("stop_gradient(Tensor(a) x) -> Tensor(a)")
_library.impl("stop_gradient", torch.Tensor.detach, "CompositeImplicitAutograd")
