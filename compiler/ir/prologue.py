"""Moving a norm into the prologue of the ``tileweld::linear`` ops that read it: what rms_norm_linear and layer_norm_linear share."""
from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import sympy
import torch
from torch.fx import Graph, Node

from . import linear as _linear_op  # noqa: F401 (registers the op)
from . import scalar as sc
from .linear_build import call, flattened, rows_of
from .graph import insert, is_call, is_tensor, op_name, shape, source_of, value
from .layout import sizes_of_nodes
from .parser import parse
from .printer import text
from .products import Writes, late
from .rewrite import Match, Refused

aten = torch.ops.aten
MAX_OPS = 3  # a norm that more ops read at different places of the graph is computed once


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm over the rows of x: kind "rms" or "layer", tensors of [K], and the prologue given the names of those tensors."""

    node: Node
    x: Node
    kind: str
    eps: object
    tensors: tuple[Node, ...]
    prologue: Callable[..., str]
    problem: str = ""


def fold(norm: Norm, writes: Writes) -> Match | None:
    """The Match that puts the norm into its consumers; None where no fused matmul reads it. Raises Refused.

    A norm whose result is the residual stream too (post-norm models: BERT) is no prologue by design; others' passes take it.
    """
    ops, others = consumers(norm.node)
    if not ops or any(is_call(n, aten.add.Tensor) or is_call(n, torch.ops.tileweld.linear.default) for n in others):
        return None
    if norm.problem:
        raise Refused(norm.problem, norm.node, "flatten the dims first")
    if others:
        where = source_of(others[0])
        raise Refused(f"the norm's result is also needed elsewhere, by {op_name(others[0])}" + (f" ({where})" if where else ""), norm.node)
    if len(ops) > MAX_OPS:
        raise Refused(f"{len(ops)} matmuls at different places read the norm's result; computing it once is cheaper", norm.node)
    if not isinstance(norm.eps, (int, float)) and not isinstance(value(norm.eps), torch.SymFloat):  # a symbolic one is specialised, with a guard, as by the norm
        raise Refused("eps is a tensor, expected a number", norm.node, "make eps a Python float")
    dtype = value(ops[0].args[1][0]).dtype
    wrong = next((t for t in (norm.x, *norm.tensors) if value(t).dtype != dtype), None)
    if wrong is not None:
        raise Refused(f"the norm reads {value(wrong).dtype}, the matmul {dtype}", norm.node, "keep the residual stream and the norm's weight in the dtype of the matmul")
    width = shape(norm.x)[-1]
    if any(shape(t) != [width] for t in norm.tensors):
        raise Refused(f"the norm's weight or bias is no vector of {width}", norm.node)
    if any(op.args[4] != "" or op.args[6] != "x" for op in ops):
        raise Refused("the matmul has a prologue already", norm.node)
    items = sorted(u for op in ops for u in op.users)
    if not items or any(not is_call(i, operator.getitem) for i in items):
        return None
    inputs = [*norm.tensors, norm.x, *([norm.eps] if isinstance(norm.eps, Node) else []), *(n for op in ops for n in op.all_input_nodes if n is not op.args[0])]
    moved = late(items[0], inputs, set(items))
    if moved is None:
        raise Refused("the matmuls that read the norm's result depend on each other, so they cannot be one", norm.node)
    if (node := writes.between(norm.node, items[-1], inputs)) is not None:
        raise Refused(f"{node.target} after the norm writes to memory that the matmul reads, or changes the gradient or autocast mode", node)

    def build(graph: Graph):
        for node in moved:
            items[0].prepend(node)
        made = tuple(_build(graph, norm, ops, items))
        return made if len(made) > 1 else made[0]

    return Match(items[0], tuple(n for n in dict.fromkeys(rows_of(n) if n is norm.x else n for n in inputs) if is_tensor(n)), build, _detail(norm, ops), tuple(items[1:]))


def consumers(node: Node) -> tuple[list[Node], list[Node]]:
    """(the fused matmuls whose rows are the node's, in order; all other readers). A symbolic size that is read is no use."""
    ops, others, stack = [], [], [(node, u) for u in node.users]
    while stack:
        source, user = stack.pop()
        if is_call(user, torch.ops.tileweld.linear.default) and user.args[0] is source and not any(source in a for a in (user.args[1], user.args[2])):
            ops.append(user)
        elif is_call(user, aten.reshape.default) and len(shape(user)) == 2 and shape(user)[-1] == shape(node)[-1]:
            stack.extend((user, u) for u in user.users)
        elif not is_call(user, aten.sym_size.int):
            others.append(user)
    return sorted(set(ops)), sorted(others)


def _build(graph: Graph, norm: Norm, ops: list[Node], items: list[Node]) -> list[Node]:
    rows = flattened(graph, norm.x, sizes_of_nodes([norm.x]))
    weights, captures, sizes, epilogues, pairs, first = [], [], [], [], [], {}
    for op in ops:
        _, own_weights, own_captures, own_sizes, _, _, _, texts, own_pairs = op.args
        names = {}
        for k, w in enumerate(own_weights):
            number = _number(weights, w)
            names |= {sc.accumulator_symbol(f"{letter}{k}"): sc.accumulator_symbol(f"{letter}{number}") for letter in "ap"}
        integers = frozenset(k for k, c in enumerate(own_captures) if not value(c).dtype.is_floating_point)
        names |= {sc.capture_symbol(k, k in integers): sc.capture_symbol(_number(captures, c), k in integers) for k, c in enumerate(own_captures)}
        names |= {sc.size_symbol(k): sc.size_symbol(_number(sizes, n)) for k, n in enumerate(own_sizes)}
        first[op] = len(epilogues)
        epilogues += texts if all(old == new for old, new in names.items()) else [renamed(t, names, integers) for t in texts]
        pairs += own_pairs
    vectors = [f"c{_number(captures, t)}[j]" for t in norm.tensors]
    widths = [known.shape[1] for op in ops for known in value(op)]
    op = call(graph, widths, rows, weights, captures, sizes, norm.kind, norm.eps if isinstance(norm.eps, Node) else float(norm.eps), norm.prologue(*vectors), epilogues, pairs)
    return [insert(graph, operator.getitem, op, first[item.args[0]] + item.args[1]) for item in items]


def _number(values: list, x) -> int:
    """The place of x in a list of nodes and numbers, to which it is added where it is new."""
    place = next((k for k, known in enumerate(values) if known is x or not isinstance(x, Node) and not isinstance(known, Node) and known == x), None)
    if place is None:
        values.append(x)
    return len(values) - 1 if place is None else place


def renamed(words: str, names: dict, integers) -> str:
    """A text of the scalar language with its symbols replaced all at once; integers: numbers of the captures that hold integers."""
    fresh = {old: sympy.Dummy(integer=old.is_integer, real=old.is_real) for old in names}
    return text(parse(words, integers).xreplace(fresh).xreplace({fresh[old]: new for old, new in names.items()}))


def _detail(norm: Norm, ops: list[Node]) -> str:
    shapes: list[str] = []
    for op in ops:
        shapes += [str([*value(w).shape]) for w in op.args[1]]
    counted = " + ".join(f"{shapes.count(s)}x{s}" if shapes.count(s) > 1 else s for s in dict.fromkeys(shapes))
    epilogues = "; ".join(dict.fromkeys(t for op in ops for t in op.args[7]))
    words = f"{norm.kind} norm, {counted}, {epilogues}"
    return words if len(words) <= 140 else words[:137] + "..."
