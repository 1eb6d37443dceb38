"""The noun of a lowered graph: a launch, a call that computes a list of tensors from others.

    launch = Launch("cpp_attention_1a2b")([q, k, v], [], [], [s0])      # tensors, integers, floats, values of the shape symbols
    attention = launch[0]

As a value it is like any other call, so that order and dead code are what the arguments say; codegen/executable.py gives it its
buffers. Called as it stands it allocates them itself: a lowered graph runs without an executable.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import sympy
import torch
from torch.fx import Node

from .graph import size
from .kernel import Kernel


class Buffer:
    """What a kernel writes into: sizes and strides (sympy, in elements), dtype and device, those of a fake tensor."""

    def __init__(self, like: torch.Tensor):
        self.sizes, self.strides = tuple(size(s) for s in like.shape), tuple(size(s) for s in like.stride())
        self.dtype, self.device = like.dtype, like.device

    @property
    def symbols(self) -> set[sympy.Symbol]:
        return set().union(*(e.free_symbols for e in (*self.sizes, *self.strides)))

    def allocate(self, known: dict[sympy.Symbol, int]) -> torch.Tensor:
        sizes, strides = ([int(e.subs(known)) for e in row] for row in (self.sizes, self.strides))
        return torch.empty_strided(sizes, strides, dtype=self.dtype, device=self.device)


class Launch:
    """One kernel at one place.

    outs: the fake tensors of its outputs. launcher(tensors, ints, floats): the built kernel, None in a graph that is only shown.
    run: ``run(launcher)`` is a function (outs, *ins); without it the kernel takes [*outs, *ins], ints, floats. layouts: sizes and strides
    of the inputs that the kernel holds, and for which no others will do; None if it takes any. inplace: (output, input) that may be one memory, because the kernel reads each
    element of that input once, before it writes the same element of the output.
    """

    def __init__(self, name: str, outs: Sequence[torch.Tensor], kernel: Kernel | None = None, launcher: Callable | None = None, run: Callable | None = None, layouts: Sequence[tuple] | None = None,
                 inplace: Sequence[tuple[int, int]] = ()):
        self.name, self.kernel, self.launcher, self.layouts, self.run, self.inplace = name, kernel, launcher, layouts, run, tuple(inplace)
        self.__name__ = self.__qualname__ = name.replace(":", "_").replace(".", "_")
        self.buffers = [Buffer(x) for x in outs]
        self.symbols = sorted(set().union(*(b.symbols for b in self.buffers)), key=str)
        self.function = run(launcher) if run is not None and launcher is not None else None

    def __call__(self, ins, ints, floats, values) -> list[torch.Tensor]:
        known = dict(zip(self.symbols, values))
        outs = [b.allocate(known) for b in self.buffers]
        if self.layouts is not None:
            ins = [restride(x, *expected) for x, expected in zip(ins, self.layouts)]
        if self.function is not None:
            self.function(outs, *ins)
        else:
            self.launcher([*outs, *ins], ints, floats)
        return outs


def restride(x: torch.Tensor, sizes: tuple, strides: tuple) -> torch.Tensor:
    """x, or a copy of it, with these strides; those of dims of length 1 say nothing and may differ without a copy."""
    if x.stride() == strides:
        return x
    if all(a == b or n == 1 for a, b, n in zip(x.stride(), strides, sizes)):
        return x.as_strided(sizes, strides)
    return torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device).copy_(x)


def is_launch(node) -> bool:
    return isinstance(node, Node) and isinstance(node.target, Launch)


def is_getitem(node) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is operator.getitem
