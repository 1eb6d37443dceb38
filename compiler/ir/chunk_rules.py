"""The rows of chunks.py: op -> (chunks, node) -> Tensor. A row raises Unknown where the result is no function of the chunks' sums."""
from __future__ import annotations

import torch
from torch.fx import Node

from .chunks import CASTS, KEY, RULES, STACK, WIDTH, Chunks, Tensor, Term, Unknown
from .graph import argument, is_tensor, shape, value

aten = torch.ops.aten


def row(*targets):
    def register(function):
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def pointwise(count: int, *targets):
    """The function gives the term of one element from those of the operands."""
    def register(function):
        @row(*targets)
        def rule(chunks: Chunks, node: Node) -> Tensor:
            if len(node.args) > count or any(name != "alpha" or x != 1 for name, x in node.kwargs.items()):  # a rounding mode, an out dtype
                raise Unknown
            labels, elements = chunks.operands(node, count)
            return Tensor(labels, tuple(function(chunks, *terms) for terms in elements))

        return function

    return register


@row(*CASTS)
def cast(chunks, node):
    if not value(node).dtype.is_floating_point:
        raise Unknown
    return chunks.tensors[node.args[0]]


# ---------------------------------------------------------------- arithmetic


@pointwise(2, aten.add)
def add(chunks, x, y):
    if x.kind == y.kind == "plain":
        return Term("plain", x.f + y.f)
    return _shifted(chunks, x, y, 1)


@pointwise(2, aten.sub)
def subtract(chunks, x, y):
    if x.kind == y.kind == "plain":
        return Term("plain", x.f - y.f)
    return _shifted(chunks, x, y, -1)


def _shifted(chunks, x, y, sign):
    if y.kind == "scores":
        x, y = (y, x) if sign > 0 else (None, None)
    if x is None:
        raise Unknown
    by = chunks.as_log(y)
    if x.kind == "scores":  # f is what the exponentials are multiplied with
        return Term("scores", x.f * by**sign, x.chunk)
    return Term("log", chunks.as_log(x) * by**sign)


@pointwise(1, aten.neg)
def negate(chunks, x):
    return Term("plain", -x.f) if x.kind == "plain" else Term("log", 1 / chunks.as_log(x))


@pointwise(2, aten.mul)
def multiply(chunks, x, y):
    if y.kind == "weights":
        x, y = y, x
    if y.kind != "plain" or x.kind not in ("plain", "weights"):
        raise Unknown
    return Term(x.kind, x.f * y.f, x.chunk)


@pointwise(2, aten.div)
def divide(chunks, x, y):
    if y.kind != "plain" or x.kind not in ("plain", "weights"):
        raise Unknown
    return Term(x.kind, x.f / y.f, x.chunk)


@pointwise(1, aten.reciprocal)
def reciprocal(chunks, x):
    return Term("plain", 1 / _plain(x))


def _plain(x):
    if x.kind != "plain":
        raise Unknown
    return x.f


# ---------------------------------------------------------------- logarithms and exponentials


@pointwise(1, aten.exp)
def exponential(chunks, x):
    if x.kind == "scores":
        if x.f != 1 / chunks.sums[x.chunk] and x.f != 1 / chunks.tops.get(("own", x.chunk), chunks.field.one):
            chunks.chunks[x.chunk].shifted = True
        return Term("weights", x.f, x.chunk)
    if x.kind != "log":
        raise Unknown
    return Term("plain", x.f)


@pointwise(1, aten.log)
def logarithm(chunks, x):
    return Term("log", _plain(x))


@pointwise(1, aten.log1p)
def logarithm_of_more(chunks, x):
    return Term("log", 1 + _plain(x))


@pointwise(2, aten.logaddexp)
def logarithm_of_sum(chunks, x, y):
    return Term("log", chunks.as_log(x) + chunks.as_log(y))


@pointwise(1, aten.sigmoid)
def sigmoid(chunks, x):
    a = chunks.as_log(x)
    return Term("plain", a / (1 + a))


@pointwise(1, aten.log_sigmoid)
def log_sigmoid(chunks, x):
    a = chunks.as_log(x)
    return Term("log", a / (1 + a))


@row(aten.softplus)
def softplus(chunks, node):
    if argument(node, 1, "beta", 1) != 1:
        raise Unknown
    labels, elements = chunks.operands(node, 1)
    return Tensor(labels, tuple(Term("log", 1 + chunks.as_log(x)) for x, in elements))


@pointwise(2, aten.maximum, aten.max.other)
def maximum(chunks, x, y):
    return Term("log", chunks.top(chunks.as_log(x), chunks.as_log(y)))


# ---------------------------------------------------------------- reductions


def _along(chunks, node, dims, keepdim, of_stack, of_keys) -> Tensor:
    tensor = chunks.tensors[node.args[0]]
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if len(dims) != 1:
        raise Unknown
    dim = dims[0] % len(tensor.labels)
    labels = tensor.labels[:dim] + ((None,) if keepdim else ()) + tensor.labels[dim + 1:]
    if tensor.labels[dim] == STACK:
        return Tensor(labels, (of_stack(tensor.terms),))
    if tensor.labels[dim] == KEY and len(tensor.terms) == 1:
        return Tensor(labels, (of_keys(tensor.terms[0]),))
    raise Unknown


@row(aten.sum.dim_IntList)
def total(chunks, node):
    def of_stack(terms):
        return Term("plain", sum((_plain(t) for t in terms[1:]), _plain(terms[0])))

    def of_keys(t):
        if t.kind != "weights":
            raise Unknown
        return Term("plain", chunks.sums[t.chunk] * t.f)

    return _along(chunks, node, argument(node, 1, "dim"), argument(node, 2, "keepdim", False), of_stack, of_keys)


@row(aten.logsumexp)
def log_of_sum(chunks, node):
    def of_stack(terms):
        return Term("log", sum((chunks.as_log(t) for t in terms[1:]), chunks.as_log(terms[0])))

    def of_keys(t):
        if t.kind != "scores":
            raise Unknown
        return Term("log", chunks.sums[t.chunk] * t.f)

    return _along(chunks, node, argument(node, 1, "dim"), argument(node, 2, "keepdim", False), of_stack, of_keys)


@row(aten.amax, aten.max.dim)
def largest(chunks, node):
    def of_stack(terms):
        return Term("log", chunks.top(*map(chunks.as_log, terms)))

    def of_keys(t):
        if t.kind != "scores":
            raise Unknown
        key = ("own", t.chunk)
        if key not in chunks.tops:
            chunks.tops[key] = next(chunks.free)
        return Term("log", chunks.tops[key] * t.f)

    return _along(chunks, node, argument(node, 1, "dim"), argument(node, 2, "keepdim", False), of_stack, of_keys)


@row(aten.softmax.int, aten._softmax)
def softmax(chunks, node):
    tensor = chunks.tensors[node.args[0]]
    dim = node.args[1] % len(tensor.labels)
    if tensor.labels[dim] == KEY and tensor.terms[0].kind == "scores":
        (t,) = tensor.terms
        return Tensor(tensor.labels, (Term("weights", 1 / chunks.sums[t.chunk], t.chunk),))
    if tensor.labels[dim] == STACK:
        logs = [chunks.as_log(t) for t in tensor.terms]
        whole = sum(logs[1:], logs[0])
        return Tensor(tensor.labels, tuple(Term("plain", a / whole) for a in logs))
    raise Unknown


# ---------------------------------------------------------------- products with the values


def factors(node: Node) -> tuple:
    """The two tensors that a product multiplies."""
    return tuple(node.args[1] if node.target is aten.einsum.default else node.args[:2])


def _times_values(chunks, node, position: int, labels: tuple) -> Tensor:
    """The product of weights with what they sum over the keys; it is the chunk's only one."""
    weights = factors(node)[position]
    (t,) = chunks.tensors[weights].terms
    chunk = chunks.chunks[t.chunk]
    if t.kind != "weights" or chunks.tensors[weights].labels != chunks.tensors[chunk.scores].labels or chunk.product not in (None, node) or labels.count(WIDTH) != 1:
        raise Unknown
    chunk.product, chunk.position, chunk.labels, chunk.is_plain = node, position, labels, t.f == 1 / chunks.sums[t.chunk]
    return Tensor(labels, (Term("plain", chunks.sums[t.chunk] * chunks.means[t.chunk] * t.f),))


@row(aten.matmul, aten.bmm)
def matmul(chunks, node):
    weights, values = node.args[:2]
    if weights not in chunks.tensors or values in chunks.tensors or not is_tensor(values):
        raise Unknown
    labels = chunks.tensors[weights].labels
    if labels[-1] != KEY or value(values).dim() < 2 or shape(weights)[:-1] != shape(node)[:-1]:
        raise Unknown
    return _times_values(chunks, node, 0, (*labels[:-1], WIDTH))


@row(aten.einsum)
def einsum(chunks, node):
    text, tensors = node.args[:2]
    known = [n for n, x in enumerate(tensors) if x in chunks.tensors]
    if len(tensors) != 2 or len(known) != 1 or "." in text or "->" not in text:
        raise Unknown
    before, after = text.replace(" ", "").split("->")
    letters = before.split(",")
    own, other = letters[known[0]], letters[1 - known[0]]
    labels = dict(zip(own, chunks.tensors[tensors[known[0]]].labels, strict=True))
    key = next((k for k, x in labels.items() if x == KEY), None)
    if key is None or key in after or key not in other or len(set(own)) != len(own) or any(k not in after for k in own if k != key):
        raise Unknown
    if any(n != shape(node)[after.index(k)] for n, k in zip(shape(tensors[known[0]]), own) if k != key):  # einsum broadcasts a dim of one element
        raise Unknown
    return _times_values(chunks, node, known[0], tuple(labels.get(k, WIDTH) for k in after))


# ---------------------------------------------------------------- views, and stacks of chunks


@row(aten.unsqueeze)
def unsqueeze(chunks, node):
    tensor = chunks.tensors[node.args[0]]
    dim = node.args[1] % (len(tensor.labels) + 1)
    return Tensor((*tensor.labels[:dim], None, *tensor.labels[dim:]), tensor.terms)


@row(aten.squeeze.dim)
def squeeze(chunks, node):
    tensor = chunks.tensors[node.args[0]]
    dim = node.args[1] % len(tensor.labels)
    if shape(node.args[0])[dim] != 1 or tensor.labels[dim] is not None:
        raise Unknown
    return Tensor(tensor.labels[:dim] + tensor.labels[dim + 1:], tensor.terms)


@row(aten.permute, aten.transpose.int)
def permute(chunks, node):
    tensor = chunks.tensors[node.args[0]]
    order = list(range(len(tensor.labels)))
    if node.target is aten.permute.default:
        order = [d % len(order) for d in node.args[1]]
    else:
        a, b = (d % len(order) for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    return Tensor(tuple(tensor.labels[d] for d in order), tensor.terms)


@row(aten.expand)
def expand(chunks, node):
    tensor = chunks.tensors[node.args[0]]
    return Tensor((None,) * (len(shape(node)) - len(tensor.labels)) + tensor.labels, tensor.terms)


@row(aten.reshape, aten.view)
def reshape(chunks, node):
    """Dims of size one come or go."""
    tensor, before, after = chunks.tensors[node.args[0]], shape(node.args[0]), shape(node)
    if [n for n in before if n != 1] != [n for n in after if n != 1] or any(n == 1 and x is not None for n, x in zip(before, tensor.labels)):
        raise Unknown
    kept = iter([x for n, x in zip(before, tensor.labels) if n != 1])
    return Tensor(tuple(None if n == 1 else next(kept) for n in after), tensor.terms)


@row(aten.stack)
def stack(chunks, node):
    tensors = [chunks.tensors[x] for x in node.args[0] if x in chunks.tensors]
    dim = argument(node, 1, "dim", 0) % len(shape(node))
    return _side_by_side(tensors, node.args[0], lambda labels: (*labels[:dim], STACK, *labels[dim:]))


@row(aten.cat)
def cat(chunks, node):
    tensors = [chunks.tensors[x] for x in node.args[0] if x in chunks.tensors]
    dim = argument(node, 1, "dim", 0) % len(shape(node))
    if any(shape(x)[dim] != 1 for x in node.args[0]) or any(t.labels[dim] is not None for t in tensors):
        raise Unknown
    return _side_by_side(tensors, node.args[0], lambda labels: (*labels[:dim], STACK, *labels[dim + 1:]))


def _side_by_side(tensors, nodes, labelled) -> Tensor:
    if len(tensors) != len(nodes) or len({t.labels for t in tensors}) != 1 or any(len(t.terms) != 1 or t.terms[0].kind not in ("plain", "log") for t in tensors):
        raise Unknown
    return Tensor(labelled(tensors[0].labels), tuple(t.terms[0] for t in tensors))


@row(aten.select.int)
def select(chunks, node):
    tensor = chunks.tensors[node.args[0]]
    return chunks.selected(tensor, node.args[1] % len(tensor.labels), node.args[2])


@row(aten.unbind.int)
def unbind(chunks, node):
    return chunks.tensors[node.args[0]]
