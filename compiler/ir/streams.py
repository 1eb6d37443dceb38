"""Streams: what is computed from a matrix product alone, up to the last node that may become its epilogue.

From a product (or from a slice of one, where q, k and v are packed) the stream follows the users, in graph order, through
pointwise ops, casts, views and cats. Whatever else these read comes from outside: a residual, rotary's tables, a bias. A node
*closes* the stream when nothing but it is read outside; the last such node that computes something is the root.

The walk looks at structure alone; `signature` describes a stream without naming nodes, so that what was found out about the
first layer of a model (epilogue.py) holds for all others.
"""
from __future__ import annotations

import dataclasses
import heapq
import operator

import sympy
import torch
from torch.fx import Node

from .graph import argument, is_call, is_tensor, shape, size, value
from .lift import POINTWISE, ROWS
from .products import Product
from .views import VIEWS

aten = torch.ops.aten
MAX_NODES = 80
_PLACING = frozenset({aten.cat.default, aten.stack.default, aten.to.dtype, aten._to_copy.default})
_COMPUTING = frozenset({aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.silu.default, aten.gelu.default, aten.dropout.default, aten.cat.default, aten.stack.default})
_PIECES = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.tensor_split.sections, aten.unbind.int)


@dataclasses.dataclass(frozen=True)
class Stream:
    """root is computed by ``inside`` (in graph order, root last) from ``products`` and from ``border``, nodes outside in order of appearance."""

    root: Node
    products: tuple[Product, ...]
    inside: tuple[Node, ...]
    border: tuple[Node, ...]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """Every tensor that the op in its place reads."""
        own = [t for p in self.products for t in (p.x, p.weight, p.bias) if t is not None]
        return tuple(dict.fromkeys((*own, *self.border)))


def is_size(node: Node) -> bool:
    return is_call(node, aten.sym_size.int)


def joins(node: Node, dtype: torch.dtype) -> bool:
    """Can the node be part of a stream of values of ``dtype``? Its own values must be floats no narrower (a cast to a narrower dtype is
    meant to round), nor wider than what the op computes in, or conditions."""
    if node.op != "call_function":
        return False
    if node.target in _PIECES:
        return True
    if not is_tensor(node) or not (node.target in POINTWISE or node.target in VIEWS or node.target in _PLACING or node.target in _COMPUTING):
        return False
    known = value(node).dtype
    if node.target is aten.dropout.default and node.args[2] and node.args[1] != 0:
        return False
    return known == torch.bool or known == dtype or known == torch.float32 and dtype in (torch.float16, torch.bfloat16)


def computes(node: Node) -> bool:
    return node.target in POINTWISE or node.target in _COMPUTING


def piece_starts(product: Product) -> list[Node] | None:
    """The parts of a packed product, where it is read through slices of its columns alone: q, k and v of one weight; else None."""
    starts, width = [], product.width
    readers = [u for u in product.node.users if not is_size(u)]
    if len(readers) == 1 and is_call(readers[0], aten.reshape.default) and value(readers[0]).shape[-1] == width:  # GPT-2 flattens the rows first
        readers = [u for u in readers[0].users if not is_size(u)]
    for user in readers:
        rank = value(user.all_input_nodes[0]).dim() if user.all_input_nodes and is_tensor(user.all_input_nodes[0]) else 0
        if is_call(user, aten.slice.Tensor) and argument(user, 1, "dim", 0) % rank == rank - 1:
            starts.append(user)
        elif is_call(user, *_PIECES[:-1]) and argument(user, 2, "dim", 0) % rank == rank - 1:
            starts.extend(u for u in user.users if is_call(u, operator.getitem))
        else:
            return None
    return starts if len(starts) > 1 and sum(value(s).shape[-1] for s in starts) == width else None


def packed_starts(product: Product) -> list[Node] | None:
    """The parts of a product that is read through views, and behind them through slices of one dim alone that cover it: q, k and v of [heads, 3, dim]; else None."""
    node = product.node
    while len(readers := [u for u in node.users if not is_size(u)]) == 1 and is_call(readers[0], aten.reshape.default, aten.permute.default):
        node = readers[0]
    rank, parts, dims = value(node).dim(), [], set()
    for user in readers:
        if not is_call(user, aten.slice.Tensor, aten.select.int) or user.args[0] is not node:
            return None
        d = argument(user, 1, "dim", 0) % rank
        total, start = value(node).shape[d], argument(user, 2, "start" if is_call(user, aten.slice.Tensor) else "index", None) or 0
        if not isinstance(total, int) or not isinstance(start, int) or argument(user, 4, "step", 1) != 1:
            return None
        dims.add(d)
        start += total if start < 0 else 0
        parts.append((start, start + (value(user).shape[d] if is_call(user, aten.slice.Tensor) else 1), user))
    parts.sort(key=lambda part: part[:2])
    if len(dims) != 1 or len(parts) < 2 or not all(isinstance(end, int) for _, end, _ in parts):
        return None
    ends = [0, *(end for _, end, _ in parts)]
    return [user for _, _, user in parts] if [start for start, _, _ in parts] == ends[:-1] and ends[-1] == value(node).shape[dims.pop()] else None


def candidates(start: Node, product: Product, siblings: dict[Node, Product] | None = None) -> list[Stream]:
    """Streams from ``start`` (the product's node or a piece of it) that are closed, the longest first; [] where not even start is one.

    siblings: further products of the same rows that the stream may take in where they meet (the gate and up of an MLP).
    """
    dtype = value(product.node).dtype
    siblings = {} if siblings is None else siblings
    inside, own, found = {start}, {product.node: product}, []
    queue = [u for u in start.users if not is_size(u)]
    heapq.heapify(queue)
    found.append(_stream(start, own, {start}))
    while queue and len(inside) < MAX_NODES:
        node = heapq.heappop(queue)
        if node in inside:
            continue
        if not joins(node, dtype):
            break
        grown = {node}
        for a in node.all_input_nodes:
            if a not in inside and siblings:
                behind = _behind(a, siblings, inside, dtype)
                grown |= behind
                own.update((n, siblings[n]) for n in behind if n in siblings)
        inside |= grown
        for n in grown:
            for u in n.users:
                if u not in inside and not is_size(u):
                    heapq.heappush(queue, u)
        if not computes(node) or value(node).dtype != dtype:
            continue
        if not any(m is not node and _readers(m, inside) for m in inside) and _fits(node, own):
            found.append(_stream(node, own, inside))
    return found[::-1]


def _readers(node: Node, inside: set[Node]) -> list[Node]:
    return [u for u in node.users if u not in inside and not is_size(u)]


def _fits(node: Node, own: dict[Node, Product]) -> bool:
    """No more elements than a product has: an epilogue computes one value a column."""
    try:
        return bool(value(node).numel() <= min(value(n).numel() for n in own)) if not _symbolic(node) else _fits_symbolic(node, own)
    except (TypeError, torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
        return False


def _symbolic(node: Node) -> bool:
    return any(not isinstance(n, int) for n in value(node).shape)


def _fits_symbolic(node: Node, own) -> bool:
    total = sympy.Mul(*shape(node))
    ratios = [total / sympy.Mul(*shape(n)) for n in own]
    return all(r.is_number and r <= 1 for r in ratios)


def _behind(node: Node, siblings: dict[Node, Product], inside: set[Node], dtype) -> set[Node]:
    """What node is computed from back to a sibling product, if that lies behind it; {} otherwise."""
    seen: set[Node] = set()
    reaches = False
    stack = [node]
    while stack and len(seen) < MAX_NODES:
        n = stack.pop()
        if n in seen or n in inside:
            continue
        if n in siblings:
            seen.add(n)
            reaches = True
        elif joins(n, dtype) and not all(a.op in ("placeholder", "get_attr") for a in n.all_input_nodes):
            seen.add(n)
            stack.extend(n.all_input_nodes)
    if not reaches:
        return set()
    found: set[Node] = set()
    for n in sorted(seen):
        if n in siblings or any(a in found for a in n.all_input_nodes):
            found.add(n)
    return found


def _stream(root: Node, own: dict[Node, Product], inside: set[Node]) -> Stream:
    shared: set[Node] = set()  # between a packed product and this part of it: a split or views, of which others read the other parts
    for n in inside:
        while n not in own and not any(a in inside or a in own or a in shared for a in n.all_input_nodes):
            n = n.args[0]
            shared.add(n)
    order = sorted(n for n in inside | shared if n not in own)
    kept = set(order) | set(own)
    border: dict[Node, None] = {}
    for n in order:
        for a in n.all_input_nodes:
            if a not in kept:
                border.setdefault(a)
    used = sorted(own)
    return Stream(root, tuple(own[n] for n in used), tuple(order), tuple(border))


# ---------------------------------------------------------------- a stream without its names


def signature(stream: Stream) -> tuple:
    """Equal for streams that differ in names alone."""
    number = {p.node: ("product", k) for k, p in enumerate(stream.products)}
    number |= {n: ("border", k) for k, n in enumerate(stream.border)}
    number |= {n: ("node", k) for k, n in enumerate(stream.inside)}

    def key(x):
        if isinstance(x, Node):
            return number[x] if is_tensor(x) or x in number and number[x][0] == "node" else ("size", str(_number(x)), x.name if _number(x) is None else "")
        if isinstance(x, (list, tuple)):
            return tuple(map(key, x))
        return (type(x).__name__, str(x))

    def kind(node):
        known = value(node)
        if not isinstance(known, torch.Tensor):
            return (str(_number(node)),)
        constant = node.name if node.op == "get_attr" and known.dim() == 0 else ""
        return (known.dtype, tuple(map(_entry, known.shape)), tuple(map(_entry, known.stride())), constant)

    return (
        tuple((kind(p.node), kind(p.weight), p.bias is not None, p.transposed) for p in stream.products),
        tuple(map(kind, stream.border)),
        tuple((n.target, key(n.args), tuple((k, key(v)) for k, v in n.kwargs.items()), kind(n) if is_tensor(n) else ()) for n in stream.inside),
        number[stream.root],
    )


def _entry(n):
    return n if isinstance(n, int) else str(n.node.expr)


def _number(node: Node):
    known = value(node)
    return size(known) if isinstance(known, (int, torch.SymInt)) else known if isinstance(known, float) else None


assert all(t in ROWS for t in _COMPUTING), "every op of a stream has a lifting row"
