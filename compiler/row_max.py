"""Pairs of products of which the first takes the row maxima that the second rounds by (passes/row_max.py), only where that is not slower; and how they are parted.

Both kernels of a pair can do either: a float tells them whether maxima are taken and read in this call (codegen/cpp/linear_parts.py), so that nothing is built to compare the two forms.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence

import torch
from torch.fx import GraphModule, Node

from . import pays
from .ir.graph import is_call, value
from .ir.int8_linear import arguments
from .select import Choice

tileweld = torch.ops.tileweld
MARGIN = 1.03  # what the clock gives for two calls of one kernel


def producer_of(node: Node) -> Node | None:
    """The product that gives an int8_linear its row_max; None for one that finds them itself."""
    row_max = arguments(node.args)[13] if is_call(node, tileweld.int8_linear.default) else None
    return row_max.args[0] if row_max is not None else None


def part(gm: GraphModule, names: Collection[str]) -> None:
    """The int8_linear of these names find their row maxima themselves again; who took maxima that nobody reads any more takes none."""
    for node in gm.graph.nodes:
        if node.name in names and producer_of(node) is not None:
            maxima = arguments(node.args)[14]
            node.args = (*node.args[:13], *((None, maxima) if maxima else ()))
    take_none_unread(gm)


def take_none_unread(gm: GraphModule) -> None:
    """Leave out `maxima` where none of them is read."""
    for node in gm.graph.nodes:
        at = {tileweld.linear.default: 9, tileweld.int8_linear.default: 14}.get(node.target, 99) if node.op == "call_function" else 99
        if len(node.args) <= at or not node.args[at]:
            continue
        outputs = len(value(node)) - len(node.args[at])
        items = [u for u in node.users if is_call(u, operator.getitem) and u.args[1] >= outputs]
        if not any(item.users for item in items):
            for item in items:
                gm.graph.erase_node(item)
            node.args = node.args[:at] if at == 9 or node.args[13] is not None else node.args[:13]
            node.meta = {**node.meta, "val": value(node)[:outputs]}
    gm.recompile()


def slower(choices: Sequence[Choice], launchers: dict[str, Callable]) -> dict[str, str]:
    """Name of the second of a pair -> why it is better parted, on CPUs. Timed once for both kernels, the shapes and the thread count, as in pays.py; small products are not timed."""
    chosen, found = {c.node: c for c in choices if c.node is not None}, {}
    for second in choices:
        first = chosen.get(producer_of(second.node)) if second.op == "int8_linear" and second.kernel is not None else None
        if first is None or any(c.kernel is None or c.kernel.language != "cpp" or c.kernel.source not in launchers for c in (first, second)):
            continue
        if sum(pays.flops(c) for c in (first, second)) < pays.WORTH_TIMING:
            continue
        pair, parted = pays.known("row_max 1", [first, second], lambda: _measured(first, second, launchers))
        if pair > MARGIN * parted:
            found[second.node.name] = f"rows {[*map(pays.hint, value(second.inputs[0]).shape)]} find their maxima themselves: {parted * 1e3:.2f} ms for both products, {pair * 1e3:.2f} where the first takes them"
    return found


def _measured(first: Choice, second: Choice, launchers: dict[str, Callable]) -> tuple[float, float]:
    """(seconds of both with maxima, without)."""
    with pays.real_tensors():
        return _measured_on_tensors(first, second, launchers)


def _measured_on_tensors(first: Choice, second: Choice, launchers: dict[str, Callable]) -> tuple[float, float]:
    calls = []
    for choice in (first, second):
        weights = len(choice.node.args[1])
        ins = [pays.like(value(n)) for n in choice.inputs]
        for n in range(weights):  # sums of 1: results stay finite, also as float16
            scaled = ins[1 + weights + n] if choice.op == "int8_linear" else ins[1 + n]
            scaled.fill_(1 / max(1, ins[1 + n].shape[1]))
        ints = [*map(pays.hint, choice.ints)]
        calls.append((launchers[choice.kernel.source], [pays.like(value(o)) for o in choice.outputs], ins, ints, choice.floats[:-1]))
    item = next(u for u in first.node.users if u.args[1] < len(calls[0][1]) and calls[0][1][u.args[1]].shape == calls[1][2][0].shape and calls[0][1][u.args[1]].dtype == calls[1][2][0].dtype)
    calls[1][2][0] = calls[0][1][item.args[1]]  # as it lies in the caches when the second begins

    def run(flag):
        for launch, outs, ins, ints, floats in calls:
            launch([*outs, *ins], ints, (*floats, flag))

    return pays.timed(lambda: run(1.0), lambda: run(0.0), MARGIN)
