"""row_max: x of an int8 product whose rows another product makes  ->  their largest magnitudes come with them, and x is rounded without being looked through first

    h, = linear(x, ...);       int8_linear(h, ..., "int8")            ->  h, m = linear(x, ..., maxima=[0]);  int8_linear(h, ..., "int8", row_max=m)
    h, = int8_linear(x, ...);  int8_linear(h, ..., "int8")            ->  the same: gate and up to down, fc1 to fc2

A token's scale is max_k |h[i, k]| / 127, so that no element of h can be rounded before all of its row is there. The producer's epilogue takes the maximum where the results are in
the cache; the consumer then makes its bytes in one pass. The number is the one that it would have found, so that results are the same bits. Norms and whatever is pointwise need no
such pair: they are in the consumer's prologue, and computed as its bytes are made.

Legality, each with a test that must be refused or left alone:
- the consumer rounds all columns of x alike (dynamic): not llm_int8, whose maximum leaves out columns that other rows choose, nor weight_only, which rounds none;
- x is an output of the producer itself, or a view of it with the same rows: a norm or prologue in between changes the maximum.
h may have other readers: it is an output still.

Cost: M numbers written and read; a read of M N less. Where the clock finds the pair slower the two are parted again (compiler/row_max.py).
"""
from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compiler.ir.graph import insert, is_call, value
from ..compiler.ir.int8_linear import arguments
from ..compiler.ir.rewrite import Kept, Match

NAME = "row_max"
aten, tileweld = torch.ops.aten, torch.ops.tileweld
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int)


def find(graph: Graph) -> Iterator[Match | Kept]:
    """Every int8_linear without norm and prologue whose x is a product's output."""
    for node in list(graph.nodes):
        if not is_call(node, tileweld.int8_linear.default) or not node.users:
            continue
        x, _, _, _, _, norm, _, prologue, _, _, activation, _, _, row_max, _ = arguments(node.args)
        item, between = _made_by(x)
        if activation == "float" or norm or prologue != "x" or row_max is not None or item is None:
            continue
        if activation == "mixed":
            yield Kept(node, "the largest magnitude of a row leaves out the columns that hold outliers, which are known when all rows are: the product takes it itself")
        elif tuple(value(item).shape) != tuple(value(x).shape):
            yield Kept(node, f"rows of {[*value(x).shape]} are not those of the product that makes them, {[*value(item).shape]}: the product takes their maxima itself")
        elif (match := _match(node, item, between)) is not None:
            yield match


def _made_by(x: Node) -> tuple[Node | None, set[Node]]:
    """(the output of a product that x is or views, x and the views in between); None for what no product makes."""
    between = {x}
    while is_call(x, *VIEWS):
        x = x.args[0]
        between.add(x)
    made = is_call(x, operator.getitem) and is_call(x.args[0], tileweld.linear.default, tileweld.int8_linear.default) and x.args[1] < _outputs(x.args[0])
    return (x if made else None), between


def _first(producer: Node) -> int:
    """How many arguments come before `maxima`."""
    return 14 if producer.target is tileweld.int8_linear.default else 9


def _outputs(producer: Node) -> int:
    return len(producer.args[_first(producer) - (6 if producer.target is tileweld.int8_linear.default else 2)])


def _items(node: Node) -> list[Node] | None:
    """The node's outputs in the order of the graph; None if something else reads it."""
    items = sorted(node.users)
    return items if items and all(is_call(u, operator.getitem) for u in items) else None


def _match(node: Node, item: Node, between: set[Node]) -> Match | None:
    producer, items = item.args[0], _items(node)
    made = _items(producer)
    if items is None or made is None:
        return None
    maxima = list(producer.args[_first(producer)]) if len(producer.args) > _first(producer) else []
    number = item.args[1]
    known = number in maxima  # another product that reads the same output has asked for it

    def build(graph: Graph):
        new, replaced = producer, []
        if not known:
            given = arguments(producer.args)[:14] if _first(producer) == 14 else list(producer.args[:9])
            with graph.inserting_before(producer):
                new = insert(graph, producer.target, *given, [*maxima, number])
                replaced = [insert(graph, operator.getitem, new, old.args[1]) for old in made]
        at = _outputs(producer) + (maxima.index(number) if known else len(maxima))
        with graph.inserting_before(node):
            row_max = insert(graph, operator.getitem, new, at)
            given = arguments(node.args)
            consumer = insert(graph, node.target, *given[:13], row_max, *([given[14]] if given[14] else []))
            replaced += [insert(graph, operator.getitem, consumer, old.args[1]) for old in items]
        return tuple(replaced) if len(replaced) > 1 else replaced[0]

    roots = items if known else [*made, *items]
    inputs = dict.fromkeys(n for n in (*producer.all_input_nodes, *node.all_input_nodes) if isinstance(value(n), Tensor) and n not in between)
    detail = f"{[*value(item).shape]}: the row maxima come from {'int8_linear' if _first(producer) == 14 else 'linear'}, output {number}"
    return Match(roots[0], tuple(inputs), build, detail, tuple(roots[1:]))
