"""From a node and the index at which it is read to a tensor in the fused op's layout.

A key read as k[b, h // 4, j, d] through expand and reshape is a [B, H/4, T, D] tensor and nobody needs the expanded copy; a key
of shape [B*H, D, T] read at [b*H + h, d, j] is the same tensor transposed. `Layout` writes each dim of a node as the *atoms*
it is made of (b, h, h // G, i, j, d), `arrange` turns atoms into views, permutes and reshapes.
"""
from __future__ import annotations

import dataclasses
import operator

import sympy
import torch
from sympy import Integer
from torch.fx import Graph, Node

from . import scalar as sc
from .graph import insert, is_tensor, shape, size, value
from .unliftable import Unliftable
from .views import COMPRESSING, VIEWS, broadcast_index

aten = torch.ops.aten
SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
SUMS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default)


@dataclasses.dataclass(frozen=True)
class Channel:
    """A number for every channel of the head dim, the same for every position: node[index], or one over it."""

    node: Node
    index: tuple
    divides: bool = False


@dataclasses.dataclass(frozen=True)
class Term:
    """What is added to an element of int8 keys or values: factor, times channels, times ``added`` (None: 1). ``factor`` is the same along the head dim."""

    factor: sympy.Expr
    channels: tuple[Channel, ...] = ()
    added: Channel | None = None


@dataclasses.dataclass
class Operand:
    """q, k or v: node[index], times factor (an expression pulled out of ``node * scale``). The node of k and v may be int8: its elements are the numbers, and
    then there may be channels, further factors, of k, and terms that are added; or for k a text ``key`` instead (key_text.py), and then ``atoms`` are the parts of its positions with their sizes.
    ``note``: what a reader should know of it."""

    node: Node
    index: tuple
    factor: sympy.Expr = Integer(1)
    channels: tuple[Channel, ...] = ()
    terms: tuple[Term, ...] = ()
    key: sympy.Expr | None = None
    atoms: dict | None = None
    note: str = ""


def atoms_of(e, n, sizes: dict) -> list | None:
    """The atoms of one dim, outermost first: b*H + h -> [b, h]; None when it is no such mixture. ``sizes``: atom -> size."""
    if e == 0 or n == 1:
        return []
    if e in sizes:
        return [e] if sympy.expand(sizes[e] - n) == 0 else None
    terms = sympy.Add.make_args(e)
    last = next((t for t in terms if t in sizes), None)
    if last is None or len(terms) < 2:
        return None
    rest, divisor = sympy.Add(*(t for t in terms if t != last)), sizes[last]
    quotient = sympy.expand(sympy.cancel(rest / divisor))
    outer = sympy.cancel(n / divisor)
    if quotient.as_numer_denom()[1] != 1 or outer.as_numer_denom()[1] != 1:
        return None
    head = atoms_of(quotient, outer, sizes)
    return None if head is None else [*head, last]


def layout(node, index, sizes) -> list[list] | None:
    """Atoms of every dim, or None."""
    dims = [atoms_of(e, n, sizes) for e, n in zip(index, shape(node))]
    if None in dims:
        return None
    flat = [a for dim in dims for a in dim]
    return dims if len(set(flat)) == len(flat) else None


def with_groups(index, sizes: dict) -> dict:
    """``sizes`` with the atoms h // G and h % G that occur in an index."""
    sizes = dict(sizes)
    heads = sizes[sc.H]
    for e in index:
        for part in e.atoms(sc.floordiv, sc.mod) if isinstance(e, sympy.Basic) else ():
            if part.args[0] == sc.H and part.args[1].is_Integer and heads.is_Integer and heads % part.args[1] == 0:
                sizes[part] = heads / part.args[1] if isinstance(part, sc.floordiv) else part.args[1]
    return sizes


def _heads_fit(dims, role) -> bool:
    """q has all of h or nothing of it; k and v may also have h // G alone (a group of query heads shares them)."""
    parts = [a for dim in dims for a in dim if a != sc.H and a.has(sc.H)]
    return len(parts) != 1 or (role != "q" and isinstance(parts[0], sc.floordiv))


def look_behind(lift, node, index, sizes, reduced, role, dequantises: bool = True) -> Operand | None:
    """Walk from a contraction's operand through views, copies, casts up and scalar factors to the tensor worth reading.

    Stops right behind the last step that saves something (an expand, a copy, a cast, a factor); plain views are left to the
    model. ``reduced`` is the index of the head dim: a factor may not depend on it, and v (``role`` "v") has one only where it dequantises
    int8, as a cast down is passed only on the way to int8, and scales of channels and zero points are (``dequantises``). None where no layout fits.
    """
    best, factor, channels, terms, useful, narrowed, steps = None, Integer(1), (), (), True, False, 0
    while steps < 64:
        steps += 1
        fits = value(node).dtype == torch.int8 or not narrowed and not channels and not terms and (role != "v" or factor == 1)
        if useful and fits and (dims := layout(node, index, with_groups(index, sizes))) is not None and _heads_fit(dims, role):
            best, useful = Operand(node, tuple(index), factor, channels, terms), False
        target = node.target if node.op == "call_function" else None
        try:
            if target in VIEWS and target not in (aten.slice.Tensor, aten.select.int, aten.flip.default):
                source, index = VIEWS[target](lift, node, index)
                useful |= target in COMPRESSING
            elif target in CASTS and _keeps_value(node, role):
                source, useful = node.args[0], True
            elif target in CASTS and role != "q" and value(node.args[0]).dtype.is_floating_point and value(node).dtype.is_floating_point:
                source, narrowed = node.args[0], True  # a dequantised element's rounding to a half type is not done, as everywhere in a fused kernel
            elif dequantises and role != "q" and target in (*SCALES, *SUMS) and _is_quantised(node):
                source, found = _apart(lift, node, index, reduced, sizes)
                if isinstance(found, Channel) and role == "v":
                    break
                if target in SUMS:
                    sign = sc.number(-1.0 if target in (aten.sub.Tensor, aten.sub.Scalar) else 1.0)
                    terms += (Term(sc.mul(factor, sign), channels, found) if isinstance(found, Channel) else Term(sc.mul(factor, sc.mul(sign, found)), channels),)
                elif isinstance(found, Channel):
                    channels += (found,)
                else:
                    factor = sc.mul(factor, found)
                index, useful = broadcast_index(source, index), True
            elif target in SCALES:
                source, index, scale = _scaled(lift, node, index, reduced)
                factor, useful = sc.mul(factor, scale), True
            else:
                break
        except Unliftable:
            break
        node = source
    return best


def _keeps_value(node, role) -> bool:
    before, after = value(node.args[0]), value(node)
    if before.dtype == torch.int8 and role != "q":  # 8 bits fit into the significand of any float
        return after.dtype.is_floating_point and before.device == after.device
    return before.dtype.is_floating_point and before.dtype.itemsize <= after.dtype.itemsize and before.device == after.device and torch.promote_types(before.dtype, after.dtype) == after.dtype


def _is_quantised(node, depth: int = 16) -> bool:
    """Is it int8, or made of an int8 tensor by views, casts, scales and zero points?"""
    if not is_tensor(node) or depth == 0:
        return False
    if value(node).dtype == torch.int8:
        return True
    if node.op != "call_function" or not (node.target in VIEWS or node.target in (*CASTS, *SCALES, *SUMS)):
        return False
    return any(isinstance(x, Node) and _is_quantised(x, depth - 1) for x in node.args[:2])


def _apart(lift, node, index, reduced, sizes):
    """(the int8 side of a product or sum, what it is multiplied or added with: an expression that is the same along the head dim, or a Channel)."""
    x, y = node.args[:2]
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    for tensor, other in [(x, y)] if divides or node.target in (aten.sub.Tensor, aten.sub.Scalar) else [(x, y), (y, x)]:
        if not _is_quantised(tensor) or [*shape(tensor)] != [*shape(node)] or value(tensor).dtype != value(node).dtype or node.kwargs:
            continue
        found = lift.broadcast(other, index)
        if sc.is_bool(found):
            continue
        if not found.has(reduced):
            return tensor, sc.div(Integer(1), found) if divides else found
        at = broadcast_index(other, index, lift.ranges)
        dims = None if any(e.has(sc.I, sc.J) for e in at) else layout(other, at, with_groups(at, sizes))
        if dims is not None and _heads_fit(dims, "k"):
            return tensor, Channel(other, tuple(at), divides)
    raise Unliftable("no scale or zero point")


def _scaled(lift, node, index, reduced):
    """(tensor, its index, factor) of tensor * factor, where the factor is the same along the head dim."""
    x, y = node.args[:2]
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    candidates = [(x, y)] if divides else [(x, y), (y, x)]
    for tensor, other in candidates:
        if not is_tensor(tensor) or [*shape(tensor)] != [*shape(node)] or value(tensor).dtype != value(node).dtype:
            continue
        scale = lift.broadcast(other, index)
        if not scale.has(reduced) and not sc.is_bool(scale):
            return tensor, broadcast_index(tensor, index), sc.div(Integer(1), scale) if divides else scale
    raise Unliftable("no factor")


def sizes_of_nodes(nodes) -> list[tuple[sympy.Expr, Node, int]]:
    """Where symbolic sizes can be read: (expression, tensor node, dim)."""
    return [(n, node, dim) for node in nodes for dim, n in enumerate(shape(node)) if not n.is_Integer]


def size_node(graph: Graph, n, sources):
    """A size as a graph value: an int, or aten.sym_size of a node that has it, or arithmetic on those."""
    n = sympy.sympify(n)
    if n.is_Integer:
        return int(n)
    for known, node, dim in sources:
        if sympy.expand(known - n) == 0:
            return insert(graph, aten.sym_size.int, node, dim)
    if isinstance(n, (sympy.Add, sympy.Mul)):
        parts = [size_node(graph, a, sources) for a in n.args]
        total = parts[0]
        for part in parts[1:]:
            total = insert(graph, operator.add if isinstance(n, sympy.Add) else operator.mul, total, part)
        return total
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(value(node), torch.SymInt) and size(value(node)) == n:
            return node
        if node.op == "placeholder" and is_tensor(node):
            for dim, known in enumerate(shape(node)):
                if known == n:
                    return insert(graph, aten.sym_size.int, node, dim)
    operands = {node for _, node, _ in sources}
    for node in graph.nodes:  # anything computed before the operands
        if node in operands and node.op != "placeholder":
            break
        if is_tensor(node) and n in (known := shape(node)):
            return insert(graph, aten.sym_size.int, node, known.index(n))
    raise Unliftable(f"the size {n} is not at hand")


def _as_permutation(dims, wanted) -> list[int] | None:
    """The order of dims that gives ``wanted`` where every dim is one atom, or of size 1; None where dims must be split or merged."""
    if len(dims) != len(wanted) or any(len(dim) > 1 for dim in (*dims, *wanted)):
        return None
    free = [k for k, dim in enumerate(dims) if not dim or dim not in wanted]
    order = [dims.index(dim) if dim and dim in dims else free.pop(0) if free else -1 for dim in wanted]
    return order if sorted(order) == list(range(len(dims))) else None


def arrange(graph: Graph, node: Node, dims: list[list], wanted: list[list], sizes: dict, sources) -> Node:
    """A view of node, whose dims are made of the atoms ``dims``, with the dims ``wanted``.

    An atom that node lacks leaves its dim with what is there (size 1 when it stands alone); an atom of node that is not wanted has size 1.
    """
    flat = [a for dim in dims for a in dim]
    if (order := _as_permutation(dims, wanted)) is not None:
        return node if order == list(range(len(order))) else insert(graph, aten.permute.default, node, order)
    target = [a for dim in wanted for a in dim if a in flat]
    kept = [a for a in flat if a in target]
    if [[a] for a in kept] != dims:
        node = insert(graph, aten.reshape.default, node, [size_node(graph, sizes[a], sources) for a in kept])
    order = [kept.index(a) for a in target]
    if order != list(range(len(order))):
        node = insert(graph, aten.permute.default, node, order)
    if [[a] for a in target] != wanted:
        sizes_wanted = [sympy.Mul(*(sizes[a] for a in dim if a in flat)) for dim in wanted]
        node = insert(graph, aten.reshape.default, node, [size_node(graph, n, sources) for n in sizes_wanted])
    return node
