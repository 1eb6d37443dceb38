"""Softmax in a graph: its spellings, the shift by the maximum, a sink column, and the way from its weights to the contraction with v."""
from __future__ import annotations

import dataclasses

import torch
from sympy import Integer, Symbol
from torch.fx import Node

from . import scalar as sc
from .graph import argument, is_call, is_tensor, op_name, shape, source_of, value
from .index import reindex
from .rewrite import Refused
from .views import VIEWS

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
CONTRACTIONS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default, aten.einsum.default)


@dataclasses.dataclass
class Softmax:
    """node = softmax(scores) over dim; ``inner`` are the nodes between scores and node."""

    node: Node
    scores: Node
    dim: int
    inner: list[Node]
    empty: str = "nan"
    spelling: str = "softmax"  # or "unshifted", exp(x) / sum(exp(x)), or "logsumexp", exp(x - logsumexp(x))


def softmax_at(node) -> Softmax | None:
    """Does this node compute a softmax? softmax, _softmax, _safe_softmax, exp(x - m)/sum(exp(x - m)), exp(x - logsumexp(x))."""
    if not is_tensor(node) or not shape(node):
        return None  # of one number: 1
    if is_call(node, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
        dim = node.args[1] % len(shape(node))
        empty = "zero" if node.target is aten._safe_softmax.default else "nan"
        return _without_shift(Softmax(node, node.args[0], dim, [], empty))
    if is_call(node, aten.div.Tensor) and is_call(node.args[0], aten.exp.default) and is_call(node.args[1], aten.sum.dim_IntList):
        exp, total = node.args
        dims = argument(total, 1, "dim")
        if total.args[0] is exp and argument(total, 2, "keepdim", False) and dims and len(dims) == 1:
            found = _without_shift(Softmax(node, exp.args[0], dims[0] % len(shape(node)), [exp, total]))
            return dataclasses.replace(found, spelling="unshifted") if found.scores is exp.args[0] else found
    if is_call(node, aten.exp.default) and is_call(node.args[0], aten.sub.Tensor) and is_call(node.args[0].args[1], aten.logsumexp.default):
        shifted = node.args[0]
        x, total = shifted.args[:2]
        if total.args[0] is x and argument(total, 2, "keepdim", False) and len(total.args[1]) == 1:
            # fill - logsumexp(fill, ..., fill) rounds to 0: each of n masked keys would weigh 1, not 1/n
            return Softmax(node, x, total.args[1][0] % len(shape(node)), [shifted, total], spelling="logsumexp")
    return None


def _without_shift(softmax: Softmax) -> Softmax:
    """softmax(x - max(x)) is softmax(x)."""
    x = softmax.scores
    if is_call(x, aten.sub.Tensor) and argument(x, 2, "alpha", 1) == 1 and isinstance(x.args[1], Node):
        top = x.args[1]
        top = top.args[0] if is_call(top, torch.ops.tileweld.stop_gradient.default) else top  # the shift has no gradient anyway
        taken = top.args[0] if top.op == "call_function" and "getitem" in str(top.target) and top.args[1] == 0 else top
        if is_call(taken, aten.amax.default, aten.max.dim):
            dims = taken.args[1] if isinstance(taken.args[1], (list, tuple)) else [taken.args[1]]
            if taken.args[0] is x.args[0] and argument(taken, 2, "keepdim", False) and [d % len(shape(x)) for d in dims] == [softmax.dim]:
                return dataclasses.replace(softmax, scores=x.args[0], inner=[*softmax.inner, x, x.args[1], top, taken])
    return softmax


def log_sums(softmax: Softmax) -> list[Node]:
    """The log-sum-exps of the same scores over the same dim that somebody reads besides this softmax."""
    found = [u for u in softmax.scores.users if is_call(u, aten.logsumexp.default) and [d % len(shape(softmax.scores)) for d in u.args[1]] == [softmax.dim]]
    return [n for n in found if n not in softmax.inner or any(u not in softmax.inner and u is not softmax.node for u in n.users)]


@dataclasses.dataclass
class Sink:
    """A column concatenated to the scores and dropped after the softmax."""

    node: Node
    dim: int
    between: list[Node]

    def index(self, roles):
        return [Integer(0) if k == self.dim else e for k, e in enumerate(roles.index)]


def without_sink(softmax):
    """(scores, their dims, Sink or None)."""
    node, between = softmax.scores, []
    while is_call(node, *CASTS):
        between.append(node)
        node = node.args[0]
    if is_call(node, aten.cat.default) and len(node.args[0]) == 2:
        dim = argument(node, 1, "dim", 0) % len(shape(node))
        scores, extra = node.args[0]
        if dim == softmax.dim and shape(extra)[dim] == 1:
            shifted = _without_shift(Softmax(softmax.node, softmax.scores, softmax.dim, []))
            return scores, shape(scores), Sink(extra, dim, [*between, node, *shifted.inner])
    return softmax.scores, shape(softmax.scores), None


# ---------------------------------------------------------------- from the weights to v


@dataclasses.dataclass
class Forward:
    """The way from the softmax to the contraction: the nodes on it, and the first problem met."""

    chain: list[Node]
    contraction: Node | None
    problem: tuple[str, Node, str] | None = None


def follow(softmax: Softmax) -> Forward | None:
    """Forward from the weights to their contraction with v; None when no contraction is near."""
    chain, node = [softmax.node], softmax.node
    while True:
        users = [u for u in node.users if not is_call(u, aten.sym_size.int)]
        contracting = [u for u in users if is_call(u, *CONTRACTIONS)]
        if contracting:
            others = [u for u in users if u is not contracting[0]]
            problem = None
            if others:
                where = f" ({source_of(others[0])})" if source_of(others[0]) else ""
                problem = (f"the attention weights are also used outside the core, by {op_name(others[0])}{where}", others[0] if others[0].op != "output" else softmax.node, "do not return or reuse the weights (output_attentions=False)")
            return Forward(chain, contracting[0], problem)
        if len(users) != 1:
            return _escaped(chain, users, softmax) if users else None
        node = users[0]
        if is_call(node, aten.dropout.default) and node.args[2] and node.args[1] != 0:
            return Forward(chain, None, (f"dropout of {node.args[1]} on the attention weights in training", node, "set the attention dropout to 0; it is not supported yet")) if _reaches(node) else None
        passes = node.target in VIEWS or is_call(node, aten.dropout.default) or is_call(node, *CASTS) and value(node).dtype.is_floating_point
        if not passes:
            return Forward(chain, None, (f"{op_name(node)} stands between the softmax and v", node, "multiply each of the two weights with v, and combine the products" if _combines(node) else "apply it to the scores or to the output instead")) if _reaches(node) else None
        chain.append(node)


def _combines(node) -> bool:
    """A sum or difference, or what scales one of its operands: of two softmaxes (differential attention), or a softmax and another map."""
    return any(is_call(x, aten.add.Tensor, aten.sub.Tensor) and len({a for a in x.all_input_nodes if is_tensor(a) and shape(a) == shape(x)}) == 2 for x in (node, *node.users))


def _escaped(chain, users, softmax) -> Forward | None:
    reaching = [u for u in users if _reaches(u)]
    if not reaching or all(u.op == "output" for u in users):
        return None
    other = next((u for u in users if u is not reaching[0]), users[0])
    where = f" ({source_of(other)})" if source_of(other) else ""
    return Forward(chain, None, (f"the attention weights are also used outside the core, by {op_name(other)}{where}", other, "do not return or reuse the weights (output_attentions=False)"))


def _reaches(node, depth=6) -> bool:
    """Is a contraction within a few steps? Tells an attention core from any other softmax."""
    if is_call(node, *CONTRACTIONS):
        return True
    return depth > 0 and node.op == "call_function" and any(_reaches(u, depth - 1) for u in node.users)


def forward_index(lift, softmax, forward, roles, sink):
    """Where the weights' element (b, h, i, j) is at the contraction: views on the way are undone by trying to reach them backwards."""
    index = list(roles.index)
    dropped = sink is None
    for node in forward.chain[1:]:
        if is_call(node, *CASTS, aten.dropout.default):
            continue
        if is_call(node, aten.slice.Tensor):
            dim = argument(node, 1, "dim", 0) % len(index)
            keeps_all = shape(node)[dim] == roles.sizes[sc.J] and (argument(node, 2, "start", 0) or 0) == 0
            if shape(node) == shape(node.args[0]):
                continue
            if dropped or dim != softmax.dim or not keeps_all or argument(node, 4, "step", 1) != 1:
                raise Refused("the attention weights are sliced before v", node)
            dropped = True
            continue
        if node.target in VIEWS:
            index = _undo(lift, node, index)
            continue
        raise Refused(f"{op_name(node)} stands between the softmax and v", node)
    if not dropped:
        raise Refused("a column is concatenated to the scores and not dropped before v", softmax.node)
    return index


def _undo(lift, node, index):
    """The index behind a view for the index before it: the inverse of VIEWS, found on fresh symbols."""
    before, after = shape(node.args[0]), shape(node)
    if is_call(node, aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze):
        return reindex(index, after, before, lift.ranges)
    fresh = [Symbol(f"z{k}", integer=True, nonnegative=True) for k in range(len(after))]
    _, source = VIEWS[node.target](lift, node, fresh)
    if before != after and sorted(map(str, before)) != sorted(map(str, after)):
        raise Refused(f"{op_name(node)} changes the size of the attention weights", node)
    position = {e: k for k, e in enumerate(source)}
    return [index[position[z]] if z in position else Integer(0) for z in fresh]


_ENDS = (aten.linear, aten.layer_norm, aten.embedding, aten.softmax, aten._softmax)


def between_products(softmax: Softmax, is_parameter) -> bool:
    """Does a product of two activations lie behind the softmax and one ahead of it, with no linear layer or norm between? Then it is
    attention, in a layout that nothing here can read; a router's softmax has a linear layer behind it."""
    return _meets_product(softmax.node, lambda n: list(n.all_input_nodes), is_parameter) and _meets_product(softmax.node, lambda n: list(n.users), is_parameter)


def is_made_of_a_product(node: Node, is_parameter) -> bool:
    """Is it computed from a product of two activations, with no linear layer or norm between? node: what is read of a linear."""
    return _meets_product(None, lambda n: [node] if n is None else list(n.all_input_nodes), is_parameter)


def _meets_product(node: Node | None, step, is_parameter) -> bool:
    seen, front = set(), list(step(node))
    while front and len(seen) < 200:
        node = front.pop(0)
        if node in seen or node.op != "call_function" or is_call(node, *_ENDS):
            continue
        seen.add(node)
        if is_call(node, *CONTRACTIONS):
            tensors = [a for a in node.all_input_nodes if value(a) is not None]
            if sum(not is_parameter(a) for a in tensors) >= 2:
                return True
            continue
        front += step(node)
    return False
