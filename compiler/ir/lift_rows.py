"""Rows of the lifting table for ops that are not pointwise: constants, casts, views, gathers and contractions."""
from __future__ import annotations

import math

import sympy
import torch
from sympy import And, Integer

from . import scalar as sc
from .einsum import explicit
from .graph import argument, shape, value
from .index import clamp_index, wrap_index
from .lift import POINTWISE, Unliftable, aten, row
from .views import VIEWS

# ---------------------------------------------------------------- values that pass through


@row(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default)
def _cast(lift, node, index):
    return lift.cast(lift.at(node.args[0], index), value(node).dtype)


@row(aten.dropout.default)
def _dropout(lift, node, index):
    if node.args[2] and node.args[1] != 0:
        raise Unliftable("dropout")
    return lift.at(node.args[0], index)


@row(aten.silu.default)
def _silu(lift, node, index):
    x = lift.at(node.args[0], index)
    return sc.mul(x, sc.unary("sigmoid", x))


@row(aten.gelu.default)
def _gelu(lift, node, index):
    x = lift.at(node.args[0], index)
    if argument(node, 1, "approximate", "none") == "tanh":
        inner = sc.mul(sc.number(math.sqrt(2 / math.pi)), sc.add(x, sc.mul(sc.number(0.044715), sc.mul(x, sc.mul(x, x)))))
        return sc.mul(sc.mul(sc.number(0.5), x), sc.add(sc.unary("tanh", inner), Integer(1)))
    return sc.mul(sc.mul(sc.number(0.5), x), sc.add(sc.unary("erf", sc.mul(sc.number(math.sqrt(0.5)), x)), Integer(1)))


# ---------------------------------------------------------------- gradients of activations: (incoming gradient, what the activation saved)


@row(aten.silu_backward.default)
def _silu_backward(lift, node, index):
    g, x = (lift.at(a, index) for a in node.args)
    s = sc.unary("sigmoid", x)
    return sc.mul(g, sc.mul(s, sc.add(Integer(1), sc.mul(x, sc.sub(Integer(1), s)))))


@row(aten.gelu_backward.default)
def _gelu_backward(lift, node, index):
    g, x = (lift.at(a, index) for a in node.args[:2])
    half, one = sc.number(0.5), Integer(1)
    if argument(node, 2, "approximate", "none") == "tanh":
        c, a = sc.number(math.sqrt(2 / math.pi)), sc.number(0.044715)
        t = sc.unary("tanh", sc.mul(c, sc.add(x, sc.mul(a, sc.mul(x, sc.mul(x, x))))))
        slope = sc.mul(sc.sub(one, sc.mul(t, t)), sc.mul(c, sc.add(one, sc.mul(sc.number(3 * 0.044715), sc.mul(x, x)))))
        return sc.mul(g, sc.add(sc.mul(half, sc.add(one, t)), sc.mul(sc.mul(half, x), slope)))
    density = sc.mul(sc.number(1 / math.sqrt(2 * math.pi)), sc.unary("exp", sc.mul(sc.number(-0.5), sc.mul(x, x))))
    distribution = sc.mul(half, sc.add(one, sc.unary("erf", sc.mul(sc.number(math.sqrt(0.5)), x))))
    return sc.mul(g, sc.add(distribution, sc.mul(x, density)))


@row(aten.tanh_backward.default)
def _tanh_backward(lift, node, index):
    g, y = (lift.at(a, index) for a in node.args)
    return sc.mul(g, sc.sub(Integer(1), sc.mul(y, y)))


@row(aten.sigmoid_backward.default)
def _sigmoid_backward(lift, node, index):
    g, y = (lift.at(a, index) for a in node.args)
    return sc.mul(g, sc.mul(y, sc.sub(Integer(1), y)))


@row(aten.threshold_backward.default)
def _threshold_backward(lift, node, index):
    g, x = (lift.broadcast(a, index) for a in node.args[:2])
    return sc.select(sc.relation("<=", x, lift.at(node.args[2])), Integer(0), g)


# ---------------------------------------------------------------- constants and positions


@row(aten.arange.default)
def _arange(lift, node, index):
    return _position(node, index[0])


@row(aten.arange.start, aten.arange.start_step)
def _arange_start(lift, node, index):
    step = lift.at(node.args[2]) if len(node.args) > 2 else Integer(1)
    return _position(node, sc.add(lift.at(node.args[0]), sc.mul(step, index[0])))


def _position(node, e):
    if value(node).dtype in (torch.float16, torch.bfloat16):  # 257 is not a bfloat16: eager's positions are rounded
        raise Unliftable("positions in half precision")
    return e


def _constant(position):
    return lambda lift, node, index: lift.cast(lift.at(node.args[position]), value(node).dtype)


row(aten.full.default, aten.full_like.default)(_constant(1))
row(aten.new_full.default)(_constant(2))
row(aten.scalar_tensor.default)(_constant(0))


@row(aten.ones.default, aten.new_ones.default, aten.ones_like.default)
def _ones(lift, node, index):
    return lift.cast(Integer(1), value(node).dtype)


@row(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def _zeros(lift, node, index):
    return lift.cast(Integer(0), value(node).dtype)


@row(aten.tril.default, aten.triu.default)
def _triangle(lift, node, index):
    diagonal = lift.at(argument(node, 1, "diagonal", 0))
    op = "<=" if node.target is aten.tril.default else ">="
    kept = sc.relation(op, sc.sub(index[-1], index[-2]), diagonal)
    x = lift.at(node.args[0], index)
    return And(kept, x) if sc.is_bool(x) else lift.cast(sc.select(kept, x, Integer(0)), value(node).dtype)


@row(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(lift, node, index):
    x = lift.at(node.args[0], index)
    low = None if node.target is aten.clamp_max.default else argument(node, 1, "min")
    high = argument(node, 1, "max") if node.target is aten.clamp_max.default else argument(node, 2, "max")
    x = x if low is None else sc.maximum(x, lift.at(low))
    return x if high is None else sc.minimum(x, lift.at(high))


@row(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(lift, node, index):
    x, y = (lift.broadcast(a, index) for a in node.args[:2])
    mode = argument(node, 2, "rounding_mode")
    if mode is None:
        return sc.div(x, y)
    if mode == "floor":
        return POINTWISE[aten.floor_divide.default](x, y)
    raise Unliftable("division that rounds to zero")


# ---------------------------------------------------------------- views: see VIEWS in views.py


def _through(target):
    def through(lift, node, index):
        return lift.at(*VIEWS[target](lift, node, index))

    return through


for _target in VIEWS:
    row(_target)(_through(_target))


def _concatenated(lift, parts, dim, index):
    """The value at an index of parts joined along dim."""
    pieces, offset = [], Integer(0)
    for part in parts:
        if len(shape(part)) != len(index):
            raise Unliftable("cat of an empty legacy tensor")
        pieces.append((part, offset, offset + shape(part)[dim]))
        offset = pieces[-1][2]
    result = None
    for part, start, end in reversed(pieces):
        position = index[dim] - start
        x = lift.at(part, [*index[:dim], position, *index[dim + 1:]])
        if x.has(sc.load):  # a formula may be read outside its range, where it is not used; memory may not
            x = lift.at(part, [*index[:dim], clamp_index(position, shape(part)[dim], lift.ranges), *index[dim + 1:]])
        result = x if result is None else sc.select(sc.relation("<", index[dim], end), x, result)
    return result


@row(aten.cat.default)
def _cat(lift, node, index):
    return _concatenated(lift, node.args[0], argument(node, 1, "dim", 0) % len(index), index)


@row(aten.stack.default)
def _stack(lift, node, index):
    """The last part unless the index says another: parts differ in which one is read, not where."""
    dim = argument(node, 1, "dim", 0) % len(index)
    inner, result = [*index[:dim], *index[dim + 1:]], None
    for k, part in reversed(list(enumerate(node.args[0]))):
        x = lift.at(part, inner)
        result = x if result is None else sc.select(sc.relation("<=", index[dim], Integer(k)), x, result)
    return result


@row(aten.diff.default)
def _diff(lift, node, index):
    """x[k + 1] - x[k] along dim, after what is prepended and appended."""
    if argument(node, 1, "n", 1) != 1:
        raise Unliftable("a higher difference")
    dim = argument(node, 2, "dim", -1) % len(index)
    parts = [x for x in (argument(node, 3, "prepend"), node.args[0], argument(node, 4, "append")) if x is not None]
    after = [*index[:dim], index[dim] + 1, *index[dim + 1:]]
    return sc.sub(_concatenated(lift, parts, dim, after), _concatenated(lift, parts, dim, index))


@row(aten.cumsum.default)
def _cumsum(lift, node, index):
    """A running sum of a constant along dim; any other stays a tensor."""
    dim = node.args[1] % max(len(index), 1)
    x = lift.at(node.args[0], index)
    x = sc.select(x, Integer(1), Integer(0)) if sc.is_bool(x) else x
    if not index or not sc.is_int(x) or not isinstance(index[dim], sympy.Symbol) or x.has(index[dim]):
        raise Unliftable("a running sum of varying values")
    return x * (index[dim] + 1)


@row(aten.select_scatter.default)
def _select_scatter(lift, node, index):
    """x with src at one position of dim: what ``x[:, k] = src`` is once nothing is written in place."""
    x, src = node.args[:2]
    dim = argument(node, 2, "dim") % len(index)
    position = lift.at(argument(node, 3, "index"))
    position = position + shape(node)[dim] if position.is_negative else position
    if not position.is_nonnegative:
        raise Unliftable("a position of unknown sign")
    return sc.select(sc.relation("==", index[dim], position), lift.at(src, [*index[:dim], *index[dim + 1:]]), lift.at(x, index))


@row(aten.slice_scatter.default)
def _slice_scatter(lift, node, index):
    """x with src in a slice of dim: what ``x[a:b] = src`` is."""
    x, src = node.args[:2]
    dim = argument(node, 2, "dim", 0) % len(index)
    start, step = lift.at(argument(node, 3, "start") or 0), argument(node, 5, "step", 1)
    start = start + shape(node)[dim] if start.is_negative else start
    if not start.is_nonnegative or step != 1:
        raise Unliftable("a strided slice, or one whose start has an unknown sign")
    length = shape(src)[dim]
    inside = And(sc.relation(">=", index[dim], start), sc.relation("<", index[dim], start + length))
    value_ = lift.at(src, [*index[:dim], clamp_index(index[dim] - start, length, lift.ranges), *index[dim + 1:]])
    return sc.select(inside, value_, lift.at(x, index))


# ---------------------------------------------------------------- gathers


def _gather(lift, node, source, source_index_, dims, wraps=False):
    """An element at computed positions; wraps: negative ones count from the end. Positions that are data need a check: `Lift.data_index`."""
    sizes = shape(source)
    for d in dims:
        if source_index_[d].has(sc.load):
            source_index_[d] = lift.data_index(source_index_[d], sizes[d], wraps)
            continue
        if wraps:
            source_index_[d] = wrap_index(source_index_[d], sizes[d], lift.ranges)
        source_index_[d] = clamp_index(source_index_[d], sizes[d], lift.ranges)
    return lift.at(source, source_index_)


@row(aten.embedding.default)
def _embedding(lift, node, index):
    position = lift.at(node.args[1], index[:-1])
    return _gather(lift, node, node.args[0], [position, index[-1]], [0])


@row(aten.index_select.default)
def _index_select(lift, node, index):
    if not index:
        raise Unliftable("a selection from one number")
    dim = node.args[1] % len(index)
    source = list(index)
    source[dim] = lift.at(node.args[2], [index[dim]] if value(node.args[2]).dim() else [])
    return _gather(lift, node, node.args[0], source, [dim])


@row(aten.index.Tensor)
def _index(lift, node, index):
    source, indices = node.args[0], list(node.args[1])
    sizes = shape(source)
    indices += [None] * (len(sizes) - len(indices))
    advanced = [k for k, x in enumerate(indices) if x is not None]
    if any(value(indices[k]).dtype == torch.bool for k in advanced):
        raise Unliftable("a boolean index")
    if advanced[-1] - advanced[0] + 1 != len(advanced):
        raise Unliftable("advanced indices that are not next to each other")
    rank = max(value(indices[k]).dim() for k in advanced)
    block = index[advanced[0]:advanced[0] + rank]
    result, before = [], list(index[:advanced[0]])
    after = list(index[advanced[0] + rank:])
    for k in range(len(sizes)):
        if indices[k] is not None:
            position = lift.broadcast(indices[k], block)
            if sc.is_bool(position):
                position = sc.select(position, Integer(1), Integer(0))
            result.append(position)
        else:
            result.append(before.pop(0) if before else after.pop(0))
    return _gather(lift, node, source, result, advanced, wraps=True)


# ---------------------------------------------------------------- contractions


def _product_index(lift, node, lhs, rhs, index):
    """Indices of the operands of matmul at an index of its result, reduction index last and second to last."""
    a, b = shape(lhs), shape(rhs)
    d = lift.reduction_index(a[-1])
    index = list(index)
    column = index.pop() if len(b) > 1 else None
    i = index.pop() if len(a) > 1 else None

    def batch(sizes):
        offset = len(index) - len(sizes)
        return [Integer(0) if n == 1 else index[offset + k] for k, n in enumerate(sizes)]

    lhs_index = [*batch(a[:-2]), i, d] if i is not None else [d]
    rhs_index = [*batch(b[:-2]), d, column] if column is not None else [d]
    return lhs_index, rhs_index, d, a[-1]


@row(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(lift, node, index):
    lhs, rhs = node.args[:2]
    lhs_index, rhs_index, d, length = _product_index(lift, node, lhs, rhs, index)
    return lift.dot(node, index, lhs, lhs_index, rhs, rhs_index, d, length)


@row(aten.baddbmm.default, aten.addmm.default)
def _baddbmm(lift, node, index):
    bias, lhs, rhs = node.args[:3]
    beta, alpha = (lift.at(argument(node, k, name, 1)) for k, name in ((3, "beta"), (4, "alpha")))
    lhs_index, rhs_index, d, length = _product_index(lift, node, lhs, rhs, index)
    product = sc.mul(alpha, lift.dot(node, index, lhs, lhs_index, rhs, rhs_index, d, length))
    return product if sc.equals(beta, 0) else sc.add(product, sc.mul(beta, lift.broadcast(bias, index)))


@row(aten.einsum.default)
def _einsum(lift, node, index):
    operands = node.args[1]
    equation = explicit(node.args[0].replace(" ", ""), [len(shape(x)) for x in operands])
    if len(operands) != 2 or argument(node, 2, "path") is not None:
        raise Unliftable("an einsum that is no product of two tensors")
    inputs, output = equation.split("->")
    lhs, rhs = inputs.split(",")
    reduced = sorted((set(lhs) | set(rhs)) - set(output))
    if len(reduced) != 1 or len(set(lhs)) != len(lhs) or len(set(rhs)) != len(rhs) or reduced[0] not in lhs or reduced[0] not in rhs:
        raise Unliftable("an einsum that reduces other than one shared index")
    length = shape(operands[0])[lhs.index(reduced[0])]
    names = {**dict(zip(output, index)), reduced[0]: lift.reduction_index(length)}

    def of(letters, operand):
        single = [e for e in names.values() if e in lift.ranges and lift.ranges[e][1] == 0]
        return [Integer(0) if n == 1 and names[letter] not in single else names[letter] for letter, n in zip(letters, shape(operand))]

    return lift.dot(node, index, operands[0], of(lhs, operands[0]), operands[1], of(rhs, operands[1]), names[reduced[0]], length)
