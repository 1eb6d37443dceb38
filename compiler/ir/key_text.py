"""From the keys of an attention to the text ``key`` of ``tileweld::attention_keys``: int8 elements that are dequantised by more than factors of scores and queries.

    where(j < filled, k8[b, h, j, d] * scale[b, h, j // 64, d], recent[b, h, j % 64, d])   ->   k8, key="where(j < c1, k*c0[b, h, floordiv(j, 64), d], c2[b, h, mod(j, 64), d])"

The keys are lifted as a whole, at (b, h, j, d): whatever way the model dequantises them by (groups in a dim of their own, gathered scales, parts joined along the positions, the newest positions chosen by
``where``), the expression is the same. One int8 tensor of it, which has every element once, becomes k; everything else is a capture.

Asked after `layout.look_behind`, which folds scales of tokens and of channels into scores and queries: they cost nothing an element.
"""
from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy import Integer, Symbol
from torch.fx import Node

from . import scalar as sc
from .graph import is_tensor, shape, value
from .interval import tighten
from .layout import CASTS, Operand, layout, look_behind, with_groups
from .lift import POINTWISE, Lift, aten
from .unliftable import Unliftable
from .views import VIEWS
from .weights import why_trained

MAX_DEPTH = 24  # ops between the product and an int8 tensor
GATHERS = (aten.index_select.default, aten.index.Tensor, aten.embedding.default, aten.cat.default)
_READ_THROUGH = {*VIEWS, *POINTWISE, *CASTS, *GATHERS, aten.slice_scatter.default, aten.select_scatter.default}
_HEAD = Symbol("key_head", integer=True, nonnegative=True)


class _Stays(Exception):
    """Why the keys are dequantised by torch."""


class _KeyLift(Lift):
    """Lifts dequantised keys. What is not made of int8 is a number to read, behind views and gathers (scales, the newest positions): computing it, a rotary of new keys say, is not the attention's business."""

    def __init__(self, ranges):
        super().__init__(ranges)
        self.dequantised: dict[Node, bool] = {}

    def _lift(self, node, index):
        if value(node).dtype.is_floating_point and node.target not in VIEWS and node.target not in (*GATHERS, *CASTS) and not self.is_dequantised(node):
            if node.target not in POINTWISE or sum(is_tensor(a) and value(a).dim() > 0 for a in node.all_input_nodes) > 1:
                raise Unliftable("a tensor of its own")
        return super()._lift(node, index)

    def cast(self, e, dtype):
        """Integers of 8 bits, and the sum or difference of two, fit into the significand of a half type."""
        fits = dtype in (torch.float16, torch.bfloat16) and sc.is_int(e) and len(terms := sympy.Add.make_args(e)) <= 2 and all(self._is_byte(t) or self._is_byte(-t) for t in terms)
        return e if fits else super().cast(e, dtype)

    def _is_byte(self, e) -> bool:
        return isinstance(e, sc.load) and any(symbol == e.args[0] and value(node).dtype == torch.int8 for node, symbol in self.captures.items())

    def is_dequantised(self, node) -> bool:
        if node not in self.dequantised:
            self.dequantised[node] = _has_int8(node)
        return self.dequantised[node]


def keys_behind(lift, node: Node, index, sizes: dict, d, alone: bool = True, why_not: str = "") -> Operand | None:
    """k of a product: node[index], read behind views and scales (`look_behind`), and where it is made of int8 otherwise, by a text.

    ``note`` of the operand says why keys that are made of int8 stay torch's. alone: is this the only product of the scores? why_not: why the op could not take a text. None where no layout fits.
    """
    found = look_behind(lift, node, index, sizes, d, "k", dequantises=alone)
    if found is None or value(found.node).dtype == torch.int8 or not value(node).dtype.is_floating_point or not _has_int8(node):
        return found
    try:
        if reason := why_not or ("the scores are a sum of several products" if not alone else why_trained(node.graph, [node])):
            raise _Stays(reason)
        return _by_text(lift, node, index, sizes, d)
    except _Stays as reason:
        return dataclasses.replace(found, note=f"keys are dequantised by torch: {reason}")


def _has_int8(node: Node) -> bool:
    """Is an int8 tensor of several dims near, behind what can be lifted?"""
    seen, stack = {node}, [(node, 0)]
    while stack:
        node, depth = stack.pop()
        if value(node).dtype == torch.int8 and value(node).dim() > 1:
            return True
        if depth < MAX_DEPTH and node.op == "call_function" and node.target in _READ_THROUGH:
            for a in node.all_input_nodes:
                if is_tensor(a) and a not in seen:
                    seen.add(a)
                    stack.append((a, depth + 1))
    return False


def _by_text(lift, node, index, sizes, d) -> Operand:
    inner = _KeyLift(lift.ranges)
    e = tighten(inner.at(node, index), inner.ranges)
    tensor_of = {symbol: n for n, symbol in inner.captures.items()}
    if e.has(sc.I) or e.free_symbols & set(inner.dots):
        raise _Stays("they differ from query to query" if e.has(sc.I) else "a product of matrices is among them")
    found = [(x, place) for x in sc.loads(e) if value(tensor_of[x.args[0]]).dtype == torch.int8 and (place := _place(x, tensor_of[x.args[0]], sizes, d)) is not None]
    if len(found) != 1:
        raise _Stays("no int8 tensor has every position and channel once" if not found else "they are made of several int8 tensors")
    (element, (full, atoms, clamped)), = found
    for x in sc.loads(e):
        if x != element and x.has(d) and any(a in (sc.J, clamped) for a in x.args[1:]):
            raise _Stays(f"{tensor_of[x.args[0]]} has a number for every position and channel, which is no less to read than floats")
    if clamped is not None and not _read_only_below(e, element, sc.relation("<", sc.J, clamped.args[0] + 1 if clamped.args[0] != sc.J else clamped.args[1] + 1)):
        raise _Stays(f"{tensor_of[element.args[0]]} ends before the values do, and is read behind its end")
    key = _of_key_heads(e.xreplace({element: sc.K, d: sc.D}), full)
    lift.captures |= {n: symbol for n, symbol in inner.captures.items() if n not in lift.captures}
    return Operand(tensor_of[element.args[0]], tuple(full), key=key, atoms=atoms)


def _place(element, tensor, sizes, d):
    """(index of the tensor, its atoms of positions and their sizes, the clamped position or None) where ``element`` is every head, position and channel once, else None."""
    rest = iter(element.args[1:])
    full = [Integer(0) if n == 1 else next(rest) for n in shape(tensor)]
    clamped = {a for e in full for a in (e.atoms(sympy.Min) if isinstance(e, sympy.Basic) else ()) if len(a.args) == 2 and sc.J in a.args}
    if len(clamped) > 1:
        return None
    bound, positions = next(iter(clamped), None), sizes[sc.J]
    if bound is not None:  # a part of keys that are joined along the positions
        full, positions = [e.xreplace({bound: sc.J}) for e in full], sympy.Add(*(a for a in bound.args if a != sc.J)) + 1
    split = {a for e in full for a in e.atoms(sc.floordiv, sc.mod) if a.args[0] == sc.J and a.args[1].is_Integer}
    atoms = {sc.J: positions}
    for a in split:
        atoms[a] = sympy.cancel(positions / a.args[1]) if isinstance(a, sc.floordiv) else a.args[1]
    dims = layout(tensor, full, with_groups(full, sizes) | atoms)
    if dims is None:
        return None
    flat = {a for dim in dims for a in dim}
    whole = sc.J in flat if not split else len(split) == 2 and split <= flat and len({a.args[1] for a in split}) == 1
    return (full, atoms, bound) if whole and d in flat else None


def _read_only_below(e, element, condition) -> bool:
    """Is the element read where the condition holds, and nowhere else?"""
    if e == element:
        return False
    if isinstance(e, sc.where) and e.args[0] == condition:
        return not e.args[2].has(element)
    return all(_read_only_below(a, element, condition) for a in e.args if a.has(element))


def _of_key_heads(e, full):
    """e with h for the heads of k, whose index is ``full``."""
    heads = {a for part in full for a in part.atoms(sc.floordiv, sc.mod) if a.args[0] == sc.H}
    if len(heads) == 1:
        e = e.xreplace({heads.pop(): _HEAD})
    elif heads or any(part.has(sc.H) for part in full):  # as many as q has
        return e
    if e.has(sc.H):
        raise _Stays("what dequantises them differs among the query heads of a key head")
    return e.xreplace({_HEAD: sc.H})
