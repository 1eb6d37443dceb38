"""Building ``tileweld::linear`` from streams of one x: weights, captures and sizes shared, outputs shaped as the model has them."""
from __future__ import annotations

import dataclasses
import operator

import sympy
import torch
from torch.fx import Graph, Node

from . import linear as _linear_op  # noqa: F401 (registers the op)
from . import scalar as sc
from .columns import Accumulator
from .epilogue import Element, Epilogue, epilogue
from .graph import insert, is_call, is_tensor, shape, value
from .linear_packed import joined, widened
from .layout import size_node, sizes_of_nodes
from .parser import parse
from .printer import text
from .products import Product, Writes, late
from .rewrite import Match, Refused
from .streams import Stream, candidates
from .unliftable import Unliftable

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of the op to be: a stream and its epilogue."""

    stream: Stream
    epilogue: Epilogue


def longest(start: Node, product: Product, siblings=None, wanted=lambda found: True, reasons: list | None = None, packed: bool = False) -> Output | None:
    """The longest stream from ``start`` that has an epilogue for which ``wanted`` holds; why longer ones have none is added to ``reasons``.

    packed: it may be a part of every head's columns (linear_packed.py); all parts of the product have to be outputs then.
    """
    for stream in candidates(start, product, siblings):
        try:
            found = Output(stream, epilogue(stream))
        except Unliftable as error:
            if reasons is not None:
                reasons.append((str(error), stream.root))
            continue
        if wanted(found) and (packed or not found.epilogue.is_packed):
            return found
    return None


def match(outputs: list[Output], detail: str, writes: Writes, outside: set[Node]) -> Match:
    """The Match that puts one op in the place of these streams. ``outside``: nodes whose layout somebody outside sees. Raises Refused."""
    outputs = sorted(outputs, key=lambda o: o.stream.root)
    roots = [o.stream.root for o in outputs]
    products = {p.node: p for o in outputs for p in o.stream.products}
    x = next(iter(products.values())).x
    inputs = tuple(dict.fromkeys(n for o in outputs for n in o.stream.inputs))
    moved = late(roots[0], inputs, set(roots))
    if moved is None:
        raise Refused("an input of the fused matmul is computed from one of its results, or cannot be computed before it", roots[0])
    if (node := writes.between(min(products), roots[-1], (*inputs, *(n for o in outputs for n in o.stream.inside)))) is not None:
        raise Refused(f"{node.target} between the matmul and its epilogue writes to memory that they read, or changes the gradient or autocast mode", node)

    def build(graph: Graph):
        for node in moved:
            roots[0].prepend(node)
        made = tuple(_build(graph, x, sorted(outputs, key=_columns), outputs, outside))
        return made if len(made) > 1 else made[0]

    starts = [rows_of(n) if any(n is p.x for p in products.values()) else n for n in inputs if is_tensor(n)]
    return Match(roots[0], tuple(dict.fromkeys(starts)), build, detail, tuple(roots[1:]))


def sweep(graph: Graph, outputs: list[Output]) -> None:
    """Erase what a match that was made left without readers, so that it is no reader of others when the next place is looked at."""
    nodes = {n for o in outputs for n in (*o.stream.inside, *(p.node for p in o.stream.products))} - {o.stream.root for o in outputs}
    for node in sorted(nodes, reverse=True):
        if not node.users:
            graph.erase_node(node)


def _columns(output: Output):
    """Outputs stand in the order of their weights: q, k, v."""
    a = output.epilogue.accumulators[0]
    return output.stream.products[a.product].node, a.offset


def _build(graph: Graph, x: Node, outputs: list[Output], roots: list[Output], outside: set[Node]) -> list[Node]:
    products = {p.node: p for o in outputs for p in o.stream.products}
    sources = sizes_of_nodes([p.x for p in products.values()] + [n for o in outputs for n in o.stream.border if is_tensor(n)])
    rows = flattened(graph, x, sources)
    table = _Arguments(graph, sources)
    groups: dict = {}  # an output of the op: one stream, or all parts of a packed product
    for o in outputs:
        groups.setdefault(_columns(o)[0] if o.epilogue.is_packed else o, []).append(o)
    texts = [table.text(group) for group in groups.values()]
    pairs = [n for group in groups.values() for n in max(o.epilogue.pair for o in group)]
    op = call(graph, [_width(group[0]) for group in groups.values()], rows, table.weights, table.captures, table.sizes, "", 0.0, "x", texts, pairs)
    items = {id(o): insert(graph, operator.getitem, op, k) if o is group[0] else None for k, group in enumerate(groups.values()) for o in group}
    made = []
    for o in roots:
        group = next(group for group in groups.values() if any(o is other for other in group))
        made.append(_shaped(graph, _part(graph, items[id(group[0])], o, sources), o, sources, o.stream.root in outside))
    for o in outputs:
        _forget_sizes(graph, o.stream, sources)
    return made


def _width(output: Output) -> int:
    """Columns of the op's output: of all of a packed product."""
    return output.stream.products[output.epilogue.accumulators[0].product].width if output.epilogue.is_packed else output.epilogue.width


def _part(graph: Graph, item: Node, output: Output, sources) -> Node:
    """A part of a packed product's columns, a view [M, heads, dim]; any other output as it is."""
    a = output.epilogue.accumulators[0]
    if not a.block:
        return item
    item = insert(graph, aten.reshape.default, item, [size_node(graph, shape(item)[0], sources), _width(output) // a.period, a.period])
    return insert(graph, aten.slice.Tensor, item, 2, a.offset, a.offset + a.block)


def call(graph: Graph, widths: list[int], rows: Node, *args) -> Node:
    """The op's node with its fake values, [M, width] each. Made directly: the op's own fake costs 4 ms, most of it dispatch."""
    node = graph.call_function(torch.ops.tileweld.linear.default, (rows, *args))
    with torch.no_grad():
        node.meta["val"] = [value(rows).new_empty((value(rows).shape[0], n)) for n in widths]
    return node


def rows_of(x: Node) -> Node:
    """The tensor that x is a reshape of, as long as the rows stay whole: [M, K] where the model, or another op's result, has that."""
    while len(shape(x)) != 2 and is_call(x, aten.reshape.default) and shape(x.args[0])[-1:] == shape(x)[-1:]:
        x = x.args[0]
    return x


def flattened(graph: Graph, x: Node, sources) -> Node:
    """x [..., K] as [M, K]."""
    x = rows_of(x)
    sizes = shape(x)
    if len(sizes) == 2:
        return x
    return insert(graph, aten.reshape.default, x, [size_node(graph, sympy.Mul(*sizes[:-1]), sources), size_node(graph, sizes[-1], sources)])


class _Arguments:
    """Weights, captures and sizes of the op, each once, however many outputs use it."""

    def __init__(self, graph: Graph, sources):
        self.graph, self.sources = graph, sources
        self.weights: list[Node] = []
        self.captures: list[Node] = []
        self.sizes: list = []
        self._known: dict = {}

    def text(self, group: list[Output]) -> str:
        if not group[0].epilogue.is_packed:
            return _written(id(group[0].epilogue), group[0].epilogue, tuple(self._names(group[0]).items()))
        return text(joined([(o.epilogue.accumulators[0], widened(_renamed(o.epilogue.expr, self._names(o)), o.epilogue.accumulators[0])) for o in group]))

    def _names(self, output: Output) -> dict:
        """Symbol of an epilogue -> symbol of the op."""
        stream, found = output.stream, output.epilogue
        names = {}
        for k, a in enumerate(found.accumulators):
            number = self._weight(stream.products[a.product], a, _width(output))
            names |= {sc.accumulator_symbol(f"{letter}{k}"): sc.accumulator_symbol(f"{letter}{number}") for letter in "ap"}
        for element in found.elements:
            names[element.symbol] = sc.capture_symbol(self._capture(stream, element, _width(output)), bool(element.symbol.is_integer))
        for symbol, n in found.sizes:
            names[symbol] = sc.size_symbol(self._size(n))
        return names

    def _once(self, key, values: list, build) -> int:
        if key not in self._known:
            self._known[key] = len(values)
            values.append(build())
        return self._known[key]

    def _weight(self, p: Product, a: Accumulator, width: int) -> int:
        if a.block:
            a = Accumulator(a.product, 0, 1)

        def build():
            w = p.weight
            if (a.offset, a.step) != (0, 1) or width != p.width:
                w = insert(self.graph, aten.slice.Tensor, w, int(p.transposed), a.offset, a.offset + a.step * (width - 1) + 1, a.step)
            return insert(self.graph, aten.permute.default, w, [1, 0]) if p.transposed else w

        return self._once(("weight", p.node, a, width), self.weights, build)

    def _capture(self, stream: Stream, element: Element, width: int) -> int:
        if element.number >= 0:
            node = stream.border[element.number]
            return self._once(("capture", node, element.runs), self.captures, lambda: self._viewed(node, element.runs))
        p, a = stream.products[-1 - element.number], element.accumulator
        if a.block:
            a = Accumulator(a.product, 0, 1)

        def bias():
            whole = (a.offset, a.step) == (0, 1) and width == p.width
            return p.bias if whole else insert(self.graph, aten.slice.Tensor, p.bias, 0, a.offset, a.offset + a.step * (width - 1) + 1, a.step)

        return self._once(("bias", p.node, a, width), self.captures, bias)

    def _viewed(self, node: Node, runs):
        """The tensor without dims of size one, its runs merged: a view."""
        sizes = [n for n in shape(node) if n != 1]
        wanted = [sympy.Mul(*sizes[a:b]) for a, b in runs]
        if len(sizes) == len(shape(node)) and len(wanted) == len(sizes):
            return node
        return insert(self.graph, aten.reshape.default, node, [size_node(self.graph, n, self.sources) for n in wanted])

    def _size(self, n) -> int:
        return self._once(("size", n), self.sizes, lambda: size_node(self.graph, n, self.sources))


_WRITTEN: dict[tuple, tuple[Epilogue, str]] = {}


def _written(key: int, found: Epilogue, names: tuple) -> str:
    """The epilogue's text under the op's names, in the normal form. Layers share epilogues, so most texts are known (2 ms each)."""
    if (key, names) not in _WRITTEN:
        if len(_WRITTEN) > 4096:
            _WRITTEN.clear()
        e = _renamed(found.expr, dict(names))
        integers = frozenset(int(new.name[1:]) for _, new in names if new.name[0] == "c" and new.is_integer)
        _WRITTEN[key, names] = found, text(parse(text(e), integers))  # holds the epilogue, so that its id stays its own
    return _WRITTEN[key, names][1]


def _renamed(e, names: dict):
    """All at once: a0 may become a1, and a1 a0."""
    fresh = {old: sympy.Dummy(integer=old.is_integer, real=old.is_real) for old in names}
    return e.xreplace(fresh).xreplace({fresh[old]: new for old, new in names.items()})


def _shaped(graph: Graph, item: Node, output: Output, sources, is_seen: bool) -> Node:
    """[M, N] as the root has it: its dims are brought in row-major order of rows and columns, and permuted."""
    root, found = output.stream.root, output.epilogue
    dims = shape(root)
    order = [k for k, n in enumerate(dims) if n == 1]
    order = [*order, *found.rows, *found.columns]
    if sorted(order) != list(range(len(order))) or order != sorted(order):
        ones = iter(order[:len(order) - len(found.rows) - len(found.columns)])
        order = _with_ones(list(ones), [*found.rows, *found.columns])
    sizes = [dims[k] for k in order]
    if len(sizes) != 2 or sizes != shape(item):
        item = insert(graph, aten.reshape.default, item, [size_node(graph, n, sources) for n in sizes])
    back = [order.index(k) for k in range(len(order))]
    if back != list(range(len(back))):
        item = insert(graph, aten.permute.default, item, back)
    if is_seen and value(root).is_contiguous() and not value(item).is_contiguous():  # who sees it may view it; a part of a packed tensor only gets denser
        item = insert(graph, aten.contiguous.default, item)
    return item


def _with_ones(ones: list[int], order: list[int]) -> list[int]:
    """Dims of size one put where they stand in the root: before the next higher dim, so that [B, 1, N] needs no permutation."""
    for k in ones:
        position = next((p for p, d in enumerate(order) if d > k), len(order))
        order.insert(position, k)
    return order


def _forget_sizes(graph: Graph, stream: Stream, sources) -> None:
    """Sizes that were read from the stream's nodes are read elsewhere, or the matmul would be kept for its size."""
    for node in (*(p.node for p in stream.products), *stream.inside):
        for user in list(node.users):
            if is_call(user, aten.sym_size.int) and node is not stream.root:
                n = shape(node)[user.args[1]]
                with graph.inserting_before(user):
                    try:
                        new = size_node(graph, n, [s for s in sources if s[1] < user])
                    except Unliftable:
                        continue
                if isinstance(new, Node) and new is not user:
                    user.replace_all_uses_with(new)


def described(output: Output) -> str:
    """The epilogue with its columns left out, for a report: a0*sigmoid(a0)*a1."""
    return _short(text(output.epilogue.expr))


def _short(words: str) -> str:
    for k in range(99, -1, -1):
        words = words.replace(f"capture{k}[", f"c{k}[")
    return words if len(words) <= 90 else words[:87] + "..."


def weights_text(outputs: list[Output]) -> str:
    """"2x[2048, 768]", "[64, 64] + 2x[32, 64]": the weights of an op, equal neighbours counted."""
    found: list[list] = []
    for o in sorted(outputs, key=_columns):
        for a in o.epilogue.accumulators:
            k = value(o.stream.products[a.product].weight).shape[0 if o.stream.products[a.product].transposed else 1]
            size = f"[{o.epilogue.width}, {k}]"
            if found and found[-1][1] == size:
                found[-1][0] += 1
            else:
                found.append([1, size])
    return " + ".join(f"{n}x{size}" if n > 1 else size for n, size in found)
