"""What is known of a graph's kernels before AOT has seen it: their compilation begins while passes, AOT, lowering and the search for regions still run.

A guess, and never more: the graph behind AOT decides. Of T5, Llama, Gemma 2, BERT, GPT-2 and BLOOM every kernel of a fused op is guessed, and none in vain; regions are found later.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch.fx import GraphModule, Node

from ..runtime.build import CppUnit, building_ahead
from .errors import CompilerNotFound
from .ir.graph import value
from .lower import target_of
from .options import Options
from .select import SELECTORS


@contextlib.contextmanager
def kernels_ahead(options: Options) -> Iterator[Callable[..., None]]:
    """Yields ``begin(gm, ops=None)``: the C++ kernels that a graph's fused ops, or those of ``ops`` alone, will probably have are compiled in the background."""
    with contextlib.ExitStack() as stack:
        try:
            start = stack.enter_context(building_ahead())
        except CompilerNotFound:  # lowering reports it
            yield nothing_ahead
        else:
            yield lambda gm, ops=None: start(guessed(gm, options, ops))


def nothing_ahead(gm: GraphModule, ops: Collection | None = None) -> None:
    """``begin`` of a compilation that stops before kernels."""


def guessed(gm: GraphModule, options: Options, ops: Collection | None = None) -> list[CppUnit]:
    """Units of the fused ops whose sizes are known. Nothing for training: what its two graphs are is AOT's to say."""
    if torch.is_grad_enabled() and any(node.meta.get("requires_grad") for node in gm.graph.find_nodes(op="placeholder")):
        return []
    found = {}
    for node in gm.graph.nodes:
        selector = SELECTORS.get(node.target) if node.op == "call_function" and (ops is None or node.target in ops) else None
        if selector is not None and target_of(node, options) == "cpp" and all(map(_is_static, node.all_input_nodes)):
            kernel = selector(node, "cpp", options).kernel
            if kernel is not None and kernel.language == "cpp":
                found[CppUnit.of(kernel)] = None
    return list(found)


def _is_static(node: Node) -> bool:
    x = value(node)
    return isinstance(x, torch.Tensor) and all(isinstance(n, int) for n in (*x.shape, *x.stride()))
