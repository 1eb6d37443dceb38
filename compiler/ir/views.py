"""Views as functions of indices: op -> (lift, node, index) -> (source node, index into the source).

Used to lift values through views, and to find the tensor behind q, k and v (a key expanded over a group is the key at h // G).
"""
from __future__ import annotations

import operator

import sympy
import torch
from sympy import Integer
from torch.fx import Node

from . import scalar as sc
from .graph import argument, shape, size
from .index import reindex, within
from .unliftable import Unliftable

aten = torch.ops.aten
VIEWS: dict = {}
#: views after which there are fewer elements, or a copy less: worth looking behind
COMPRESSING = {aten.expand.default, aten.expand_as.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.clone.default, aten.contiguous.default}


def view(*targets):
    def register(function):
        for target in targets:
            VIEWS[target] = function
        return function

    return register


def broadcast_index(source: Node, index, ranges=()) -> list:
    """The index of a tensor that broadcasts to where ``index`` points. A symbol of ``ranges`` that can only be 0 stays: it tells a single key's dim."""
    sizes = shape(source)
    offset = len(index) - len(sizes)
    single = [e for e in index if e in ranges and ranges[e][1] == 0]
    return [Integer(0) if n == 1 and index[offset + k] not in single else index[offset + k] for k, n in enumerate(sizes)]


@view(aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.expand.default, aten.expand_as.default)
def _broadcast(lift, node, index):
    return node.args[0], broadcast_index(node.args[0], index, lift.ranges)


@view(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def _reshape(lift, node, index):
    return node.args[0], reindex(index, shape(node.args[0]), shape(node), lift.ranges)


@view(aten.t.default, aten.numpy_T.default, aten.mT.default)
def _matrix_transpose(lift, node, index):
    order = list(range(len(index)))
    order[-2:] = reversed(order[-2:])
    return node.args[0], _permuted(index, order)


@view(aten.permute.default)
def _permute(lift, node, index):
    return node.args[0], _permuted(index, [d % len(index) for d in node.args[1]])


@view(aten.transpose.int, aten.swapaxes.default)
def _transpose(lift, node, index):
    order = list(range(len(index)))
    p, q = node.args[1] % len(index), node.args[2] % len(index)
    order[p], order[q] = order[q], order[p]
    return node.args[0], _permuted(index, order)


def _permuted(index, order):
    source = [None] * len(order)
    for k, d in enumerate(order):
        source[d] = index[k]
    return source


@view(aten.slice.Tensor)
def _slice(lift, node, index):
    dim = argument(node, 1, "dim", 0) % len(index)
    first = lift.at(argument(node, 2, "start", 0) or 0)
    if first.is_negative:
        first = sympy.Max(0, first + shape(node.args[0])[dim])  # x[-5:] of three elements starts at 0
    elif not first.is_nonnegative:
        raise Unliftable("a slice whose start has an unknown sign")
    source = list(index)
    source[dim] = first + index[dim] * lift.at(argument(node, 4, "step", 1))
    return node.args[0], source


@view(aten.select.int)
def _select(lift, node, index):
    sizes = shape(node.args[0])
    dim = node.args[1] % len(sizes)
    position = lift.at(node.args[2])
    if position.is_negative:
        position = position + sizes[dim]
    elif not position.is_nonnegative:
        raise Unliftable("a select whose index has an unknown sign")
    return node.args[0], [*index[:dim], position, *index[dim:]]


_PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.tensor_split.sections, aten.unbind.int)


@view(operator.getitem)
def _part(lift, node, index):
    """One of the tensors that a split gives: chunk(x, 2, dim)[1]."""
    split, k = node.args
    if not isinstance(split, Node) or split.target not in _PARTS or not isinstance(k, int):
        raise Unliftable("an element of a list")
    source, parts = split.args[0], split.meta["val"]
    unbinds = split.target is aten.unbind.int
    dim, k = argument(split, 1 if unbinds else 2, "dim", 0) % len(shape(source)), k % len(parts)
    if unbinds:
        return source, [*index[:dim], Integer(k), *index[dim:]]
    first = sympy.Add(*(size(p.shape[dim]) for p in parts[:k]))
    return source, [*index[:dim], first + index[dim], *index[dim + 1:]]


@view(aten.flip.default)
def _flip(lift, node, index):
    sizes = shape(node)
    dims = {d % len(sizes) for d in node.args[1]}
    return node.args[0], [n - 1 - e if k in dims else e for k, (e, n) in enumerate(zip(index, sizes))]


@view(aten.repeat.default)
def _repeat(lift, node, index):
    sizes, out = shape(node.args[0]), shape(node)
    offset = len(index) - len(sizes)
    source = []
    for k, n in enumerate(sizes):
        e = index[offset + k]
        whole = n == out[offset + k] or within(e, n, lift.ranges)
        source.append(Integer(0) if n == 1 else e if whole else sc.mod(e, n))
    return node.args[0], source


@view(aten.repeat_interleave.self_int)
def _repeat_interleave(lift, node, index):
    dim = argument(node, 2, "dim")
    if dim is None:
        raise Unliftable("a flattening repeat_interleave")
    source = list(index)
    source[dim % len(index)] = sc.floordiv(index[dim % len(index)], lift.at(node.args[1]))
    return node.args[0], source
