"""reassociate: the cheapest order of the products in and around attention; absorbed multi-head latent attention is one of its results

    q . (W_UK c),  P (c W_UV)     ->     (q W_UK) . c,  (P c) W_UV           keys and values are then the latent itself, one KV head for all query heads
    q . (m_h k)                   ->     (q m_h) . k                         "collaborative" heads, Cordonnier et al., 2006.16362
    (x W_UQ) W_UK                 ->     x (W_UQ W_UK)                       where the matrix is folded, if it is smaller than the two

Nothing above is written down here: q, k and v are traced back (compiler/ir/association_trace.py) to activations and constants, every part of the scores and the values becomes a product of
named indices, and the engine (compiler/ir/association.py) weighs all orders at this graph's sizes: FLOPs and bytes as polynomials in the batch, the queries Sq and the keys Tk. For DeepSeek-V3 (2412.19437) it finds
that absorbing does less work for Sq < 512/3 with a long prefix, and never without one. Where the sizes are symbols, the choice becomes a guard on them, and Dynamo compiles the other side when it is called.

Exact in real numbers, whatever the score and the mask: q' . k' = q . k. Considered are keys and values that a constant makes larger than what they are made of. Legality, each with a test that must be refused:
- no norm, rotary or other nonlinearity between the latent and the keys but on a part that all heads share;
- the expanded keys and values have no other use;
- a key bias adds the same to all scores of a row: it is dropped where the score is linear in s alike for all keys, without a sink. A value bias is added behind, where every row's weights add up to 1;
- no gradient is wanted: the order that is best for a forward need not be for its backward.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import sympy
import torch
from torch.fx import Graph, Node

from ..compiler.ir import association_chunks as chunks
from ..compiler.ir import scalar as sc
from ..compiler.ir.association import CPU, Machine, Operand, Plan, Product, Tree, equation, order, plans, together
from ..compiler.ir.association_choice import SQ, TK, B, Chosen, choose, guard, hints_of, in_words, promised
from ..compiler.ir.association_rest import Rest, barrier, rest
from ..compiler.ir.association_rest import build as rest_of_rows
from ..compiler.ir.association_trace import E, Piece, bias_view, diagonal_view, tensor_view, trace, weight_view
from ..compiler.ir.attention import variant_of
from ..compiler.ir.attention_bias import why_key_bias_counts, why_value_bias_counts
from ..compiler.ir.graph import insert, is_call, op_name, shape, value
from ..compiler.ir.layout import arrange, layout, size_node, sizes_of_nodes
from ..compiler.ir.rewrite import Kept, Match, NotThePattern, Refusal, Refused
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.weights import is_int8, why_trained

NAME = "reassociate"
OPTIONS = ("fold_weights", "expanded_kv")
aten = torch.ops.aten
MAX_WIDTH = 1024  # of a head: what attention kernels take
GPU = {torch.float16: Machine(200, 1), torch.bfloat16: Machine(200, 1)}  # FLOPs a byte, see association.CPU


def find(graph: Graph, fold: bool = True, limit: int = 1 << 30) -> Iterator[Match | Refusal | Kept]:
    """Every attention whose keys or values are a constant times something smaller: a Match, a Refusal, or Kept where the order is the best as it is.

    fold: will products of constants be kept between calls (the option fold_weights)? limit: bytes that expanded keys and values of one attention may have (the option expanded_kv).
    """
    for node in list(graph.nodes):
        if is_call(node, torch.ops.tileweld.attention.default):
            try:
                yield _at(graph, node, fold, limit)
            except Refused as refused:
                yield refused.refusal
            except (NotThePattern, Unliftable):
                continue


@dataclasses.dataclass
class _Region:
    """One attention: its operands in pieces, and for every free piece of the keys the product it gives."""

    node: Node
    q: list[Piece]
    k: list[Piece]
    v: list[Piece]
    heads: int
    sizes: dict  # B, SQ, TK -> the graph's
    queries: dict  # piece of k -> the piece of q that is a constant times something smaller

    def free(self, piece: Piece) -> bool:
        """May its constant be moved? What it multiplies is the same for all heads, and smaller than what it gives."""
        return piece.factor is not None and not piece.by_head() and not piece.zero and piece.width < self.heads * piece.length and value(piece.node).dtype == value(self.node).dtype

    @property
    def factors(self):
        return [p.factor for p in (*self.k, *self.v) if self.free(p)]

    def moved(self, plan: Plan) -> list[Piece]:
        """The pieces whose constant the plan moves: the latent itself is key or value."""
        return [p for p, m in zip([*self.k, *(p for p in self.v if self.free(p))], _moves(self, plan)) if m]


def _at(graph: Graph, node: Node, fold: bool, limit: int) -> Match | Kept:
    q, k, v = node.args[:3]
    sizes, heads = shape(q), shape(q)[1]
    if not heads.is_Integer or len({value(x).dtype for x in (q, k, v)}) > 1 or any(shape(x)[1] not in (heads, 1) for x in (k, v)):
        raise NotThePattern
    region = _Region(node, [], trace(k, sc.J), trace(v, sc.J), int(heads), {B: sizes[0], SQ: sizes[2], TK: shape(k)[2]}, {})
    if not region.factors:
        raise NotThePattern
    region.q = trace(q, sc.I)
    region.queries = {p: x for p in region.k if region.free(p) for x in region.q if (x.start, x.stop) == (p.start, p.stop) and x.factor is not None and x.factor.row is not None and x.factor.bias is None
                      and not x.by_head() and not is_int8(x.factor.weight) and _rests(region, x) is not None}  # else the product with Wq is computed anyway, for who else reads it
    machine = GPU.get(value(q).dtype, CPU) if value(q).device.type == "cuda" else CPU
    symbols = {s for e in region.sizes.values() for s in e.free_symbols}
    hints = hints_of((q, k, v), graph, symbols)
    if len(hints) < len(symbols):  # a size that the data decide
        raise NotThePattern
    products = _products(region, fold)
    naive = together([order(p, _written(p)) for p in products])
    candidates = [naive, *_buildable(region, plans(products))]
    if why := barrier(region.k, region.v, region.free):  # then the keys cannot move, and the question is whether anything is lost by it
        alone = [p for p in plans(products) if all(_moves(region, p)[len(region.k):])]
        if alone and choose([naive, *alone], machine, region.sizes, hints).plan is not naive:
            raise Refused(*why)
    chosen = choose(candidates, machine, region.sizes, hints)
    if chosen.plan is naive:
        guard(graph, (q, k, v), chosen, candidates, machine, region.sizes)
        return _in_chunks(graph, region, _words(graph, chosen, naive), hints, limit) or Kept(node, _words(graph, chosen, naive))
    if reason := why_trained(graph, [p.factor.weight for p in region.moved(chosen.plan)]):  # nothing that who trains should act on
        return Kept(node, f"{in_words(naive, naive)}; in inference {chosen.plan} is cheaper, but {reason}")
    _check(graph, region, chosen.plan)
    guard(graph, (q, k, v), chosen, candidates, machine, region.sizes)
    inputs = tuple(dict.fromkeys([p.node for p in (*region.q, *region.k, *region.v) if not p.zero] + list(node.args[3])))
    return _replaced(region, chosen.plan, inputs, _words(graph, chosen, naive))


def _replaced(region: _Region, plan: Plan, inputs: tuple[Node, ...], detail: str) -> Match:
    """The Match of a plan: the attention, and the other rows of a projection of the queries that is not made as a whole any more."""
    alone = [x for p, tree in zip(region.k, plan.trees) if (x := region.queries.get(p)) is not None and _takes_x(tree)]
    others = {r.node: r for x in alone for r in _rests(region, x)}
    roots = [*sorted(others), region.node]

    def build(graph: Graph):
        made = []
        for root in roots:
            with graph.inserting_before(root):
                made.append(rest_of_rows(graph, others[root]) if root in others else _build(graph, region, plan))
        return tuple(made) if others else made[0]

    return Match(roots[0], inputs, build, detail, tuple(roots[1:]))


def _takes_x(tree: Tree) -> bool:
    """Does it multiply x by something else than Wq alone?"""
    return "x" in tree.names() and not any(t.names() == {"x", "Wq"} for t in tree.nodes())


def _rests(region: _Region, x: Piece) -> list[Rest] | None:
    """Who else reads the projection of a piece of the queries, as rows of it that are not this piece's; None where one reads more, or the attention could not be given its parts one by one."""
    users = list(dict.fromkeys(user for user, _ in _all_outside(region, x)))
    if not users:
        return []
    found = [rest(user, x.factor) if user.op == "call_function" else None for user in users]
    rows = shape(x.factor.node)[-1]
    if any(r is None for r in found) or region.heads * x.length + sum(r.heads * r.length for r in found) > rows:
        return None
    known = {(y.start, y.stop): y for y in region.q}
    fits = all(p.zero or region.free(p) or (y := known.get((p.start, p.stop))) is not None and y.factor is None and not y.zero for p in region.k)
    return found if fits else None


def _in_chunks(graph: Graph, region: _Region, words: str, hints: dict, limit: int) -> Match | None:
    """The order as written, the keys in chunks where their expansion would not fit into the limit; None where it does, or is needed as a whole."""
    free, node = [p for p in (*region.k, *region.v) if region.free(p)], region.node
    wide = sum(shape(x)[3] for x, pieces in ((node.args[1], region.k), (node.args[2], region.v)) if any(map(region.free, pieces)))
    total = B * TK * value(node).dtype.itemsize * region.heads * wide
    batch, keys = (int(region.sizes[s].subs(hints)) for s in (B, TK))
    length = chunks.length_of(keys, batch * int(total.subs({B: 1, TK: 1})), limit)
    if length is None or not chunks.is_chunkable(region.k, region.v, region.free) or any(_outside(region, p) for p in free) or why_trained(graph, [p.factor.weight for p in free]):
        return None
    count = -(-keys // length)
    if region.sizes[TK].free_symbols and not promised(graph):
        symbolic = value(node.args[1]).shape[2]
        bool(symbolic > (count - 1) * length), bool(symbolic <= count * length)  # guards
    inputs = tuple(dict.fromkeys([node.args[0], *(p.node for p in (*region.k, *region.v) if not p.zero), *node.args[3]]))
    sources = sizes_of_nodes(list(node.args[:3]))
    return Match(node, inputs, lambda graph: chunks.build(graph, node, region.k, region.v, region.free, region.heads, region.sizes[B], region.sizes[TK], length, count, sources),
                 f"{count} chunks of {length} keys, merged by log-sum-exp: expanded keys and values have {total} bytes, {int(total.subs({B: batch, TK: keys}))} here, more than expanded_kv={limit}; {words}")


def _words(graph: Graph, chosen: Chosen, naive: Plan) -> str:
    text = in_words(chosen.plan, naive)
    if promised(graph) & set(chosen.symbols):
        return text + "; not guarded: mark_dynamic promises a range"
    if chosen.bounds is None:
        return text
    symbol, low, high = chosen.bounds
    return text + (f"; guarded: {low} <= {symbol}" if low > 1 else "") + (f"; guarded: {symbol} <= {high}" if high < 1 << 24 else "")


# ---------------------------------------------------------------- the region as products


def _products(region: _Region, fold: bool) -> tuple[Product, ...]:
    """One product for every piece of the keys (the scores are their sum) and one for every piece of the values."""
    item = value(region.node).dtype.itemsize
    how = {"together": frozenset("ij"), "itemsize": item, "fold": fold}
    products = []
    for n, p in enumerate(region.k):
        sizes = {"b": B, "h": region.heads, "i": SQ, "j": TK, "d": p.length}
        query = (Operand("q", ("b", "h", "i", "d"), "activation"),)
        if region.free(p):
            if (x := region.queries.get(p)) is not None:
                sizes["m"] = x.width
                query = (Operand("x", ("b", "i", "m"), "activation"), Operand("Wq", ("h", "d", "m") if x.factor.row.has(sc.H) else ("d", "m"), "constant"))
            key = (*_constant("Wk", p, sizes), Operand("c", ("b", "j", "l") if p.factor.row is not None else ("b", "j", "d"), "cached"))
        else:
            key = (Operand("k", ("b", "j", "d") if not p.by_head() else ("b", "h", "j", "d"), "cached"),)
        products.append(Product((*query, *key), ("b", "h", "i", "j"), tuple(sizes.items()), output_on_chip=True, **how))
    for p in region.v:
        if region.free(p):
            sizes = {"b": B, "h": region.heads, "i": SQ, "j": TK, "d": p.length}
            constant = _constant("Wv", p, sizes)
            latent = Operand("c", ("b", "j", "l") if p.factor.row is not None else ("b", "j", "d"), "cached")
            products.append(Product((Operand("P", ("b", "h", "i", "j"), "activation", True), latent, *constant), ("b", "h", "i", "d"), tuple(sizes.items()), **how))
    return tuple(products)


def _constant(name: str, piece: Piece, sizes: dict) -> tuple[Operand, ...]:
    if piece.factor.row is not None:
        sizes["l"] = piece.width
        return (Operand(name, ("h", "d", "l") if piece.factor.row.has(sc.H) else ("d", "l"), "constant"),)
    has_head = any(isinstance(e, sympy.Basic) and e.has(sc.H) for e in piece.factor.index)
    return (Operand(name, ("h", "d") if has_head else ("d",), "constant"),)


def _moves(region: _Region, plan: Plan) -> tuple:
    """For every product: True where the latent itself is key or value, False where it is expanded first, None for other orders and for pieces without a choice."""
    result = []
    for tree in plan.trees:
        names = tree.names()
        if "c" not in names:
            result.append(None)
            continue
        side = next((x for x in (tree.left, tree.right) if x.names() & {"c"}), tree)
        if "P" in names:
            meeting = next(x for x in tree.nodes() if x.operand is None and {"i", "j"} <= {*x.left.indices, *x.right.indices})
            side = meeting.left if "P" not in meeting.left.names() else meeting.right
        result.append({frozenset({"c"}): True}.get(side.names(), False if side.names() == names - {"q", "x", "Wq", "P"} else None))
    return tuple(result)


def _written(product: Product):
    """The order in which the model multiplies: queries and keys first, each by its constant."""
    names = [x.name for x in product.operands]
    if names[0] == "P":
        return "P", ("c", "Wv")
    query, key = (("x", "Wq") if "x" in names else "q"), (("Wk", "c") if "c" in names else "k")
    return query, key


def _buildable(region: _Region, everything: tuple[Plan, ...]) -> list[Plan]:
    """Other orders that can be built. Keys and values of one product with a constant move together: its other half would still be computed."""
    found = []
    for plan in everything:
        moves = _moves(region, plan)
        groups: dict = {}
        ok = True
        for p, move, tree in zip([*region.k, *(p for p in region.v if region.free(p))], moves, plan.trees):
            if region.free(p):
                ok &= move is not None
                groups.setdefault(p.factor.node, set()).add(move)
                if move is False and any(x.folded for x in tree.nodes()):
                    ok = False
        if not ok or any(len(g) > 1 for g in groups.values()):
            continue
        keys = [m for p, m in zip(region.k, moves) if region.free(p)]
        if not any(moves):
            continue
        if any(keys) and (not all(keys) or any(p.by_head() and not region.free(p) and not p.zero for p in region.k) or sum(p.width for p in region.k) > MAX_WIDTH):
            continue
        if any(moves[len(region.k):]) and (sum(not p.zero for p in region.v) != 1 or region.v[0].zero or region.v[0].width > MAX_WIDTH):
            continue
        found.append(plan)
    return found


# ---------------------------------------------------------------- legality


def _outside(region: _Region, piece: Piece) -> tuple[Node, Node] | None:
    """(a use of what lies between a piece and the attention that is not this attention, what it uses)"""
    return next(_all_outside(region, piece), None)


def _all_outside(region: _Region, piece: Piece) -> Iterator[tuple[Node, Node]]:
    """All of them."""
    inside = {region.node, *region.node.args[:3], *(n for p in (*region.q, *region.k, *region.v) for n in p.inside)}

    def is_outside(user):
        if is_call(user, aten.new_empty, aten.new_zeros, aten.empty_like):  # reads no element; Hugging Face's DeepSeek writes its keys into one
            return any(u not in inside for u in user.users)
        return user not in inside and not is_call(user, aten.sym_size.int)

    return ((user, n) for n in piece.inside for user in n.users if is_outside(user))


def _check(graph: Graph, region: _Region, plan: Plan) -> None:
    """Raise Refused where the chosen order may not be taken."""
    node, moved = region.node, region.moved(plan)
    for user, n in filter(None, (_outside(region, p) for p in moved)):
        raise Refused(f"the expanded keys and values are also used by {op_name(user)}, so that they are needed anyway", user if user.op != "output" else n, "cache the latent, and return nothing that is expanded")
    variant = variant_of([value(c) for c in node.args[3]], *node.args[5:])
    for p in moved:
        if p.factor.bias is None:
            continue
        if p in region.k and (reason := why_key_bias_counts(variant)):
            raise Refused(f"a bias of the keys adds to the scores of a row, and {reason}", p.factor.node, "a key bias changes nothing in a plain softmax: leave it out")
        if p not in region.k and (reason := why_value_bias_counts(variant)):
            raise Refused(f"a bias of the values counts once for every row, and {reason}", p.factor.node, "leave the bias of the values out, or add it behind the attention")


# ---------------------------------------------------------------- building


def _build(graph: Graph, region: _Region, plan: Plan) -> Node:
    node, moves = region.node, _moves(region, plan)
    q, k, v, *rest = node.args
    batch, tokens, keys = (region.sizes[s] for s in (B, SQ, TK))
    sources = sizes_of_nodes([q, k, v])
    if any(moves[: len(region.k)]):
        queries, parts = [], []
        alone = any(_takes_x(tree) for tree in plan.trees[: len(region.k)])
        for p, tree in zip(region.k, plan.trees):
            if p.zero:
                continue
            parts.append(tensor_view(graph, p, batch, region.heads, keys, sc.J, sources))
            own = next((x for x in region.q if (x.start, x.stop) == (p.start, p.stop)), None)
            if alone and not region.free(p) and own is not None and own.factor is None and not own.zero:  # q as a whole would need the projection as a whole
                whole = _own_part(graph, own, region, sources)
            else:
                whole = insert(graph, aten.slice.Tensor, q, 3, p.start, p.stop) if len(region.k) > 1 and not _takes_x(tree) else q
            queries.append(_emit(graph, _without(tree, "c"), {"q": whole, frozenset({"x", "Wq"}): whole}, p, region, sources, ("b", "h", "i", "l" if p.factor.row is not None else "d")) if region.free(p) else whole)
        q, k = (x[0] if len(x) == 1 else insert(graph, aten.cat.default, x, -1) for x in (queries, parts))
    if not any(moves[len(region.k):]):
        return insert(graph, torch.ops.tileweld.attention.default, q, k, v, *rest)
    piece, tree = region.v[0], plan.trees[len(region.k)]
    out = insert(graph, torch.ops.tileweld.attention.default, q, k, tensor_view(graph, piece, batch, region.heads, keys, sc.J, sources), *rest)
    known = {frozenset({"P", "c"}): out}
    out = _emit(graph, tree, known, piece, region, sources, ("b", "h", "i", "d"))
    if piece.factor.bias is not None:
        bias = bias_view(graph, piece.factor, region.heads if piece.factor.row.has(sc.H) else 1, piece.length)
        out = insert(graph, aten.add.Tensor, out, insert(graph, aten.unsqueeze.default, bias, 1))
    if len(region.v) > 1:
        out = insert(graph, aten.constant_pad_nd.default, out, [0, region.v[-1].stop - piece.stop], 0.0)
    return out


def _own_part(graph: Graph, piece: Piece, region: _Region, sources) -> Node:
    """A piece of the queries [B, H, Sq, length] from where it enters them."""
    sizes = {sc.B: region.sizes[B], sc.H: sympy.Integer(region.heads), sc.I: region.sizes[SQ], E: sympy.Integer(piece.length)}
    for node, index in piece.places:
        if (dims := layout(node, index, sizes)) is not None:
            return arrange(graph, node, dims, [[sc.B], [sc.H], [sc.I], [E]], sizes, sources)
    raise Unliftable(f"the layout of {piece.node}, shape {[*shape(piece.node)]}, mixes batch, heads and positions")


def _without(tree: Tree, name: str) -> Tree:
    """The other side of the contraction that takes ``name``."""
    return tree.right if name in tree.left.names() else tree.left


def _emit(graph: Graph, tree: Tree, known: dict, piece: Piece, region: _Region, sources, wanted: tuple[str, ...]) -> Node:
    """A tree as einsums, its dims ordered as wanted; known: operands, and sets of operands whose product is at hand."""
    def emit(t: Tree):
        if t.names() in known:
            return known[t.names()], ("b", "h", "i", *(("d",) if "P" not in t.names() else ("l",) if piece.factor.row is not None else ("d",)))
        if t.operand is not None:
            return (known[t.operand.name] if t.operand.name in known else _leaf(graph, t.operand, piece, region, sources)), t.indices
        if (made := _projected(graph, t, piece, region, sources)) is not None:
            return made
        (left, a), (right, b) = emit(t.left), emit(t.right)
        return insert(graph, aten.einsum.default, equation(dataclasses.replace(t, left=dataclasses.replace(t.left, indices=a), right=dataclasses.replace(t.right, indices=b))), [left, right]), t.indices

    out, indices = emit(tree)
    order = [indices.index(k) for k in wanted]
    return out if order == list(range(len(order))) else insert(graph, aten.permute.default, out, order)


def _projected(graph: Graph, t: Tree, piece: Piece, region: _Region, sources) -> tuple[Node, tuple[str, ...]] | None:
    """x times a kept product of constants as a linear layer, which norms and epilogues fuse with; None for any other contraction."""
    sides = sorted((t.left, t.right), key=lambda side: side.names() != {"x"})
    if sides[0].names() != {"x"} or not sides[1].folded or set(sides[1].indices) != {"h", "m", "l"}:
        return None
    matrix = _emit(graph, sides[1], {}, piece, region, sources, ("h", "l", "m"))
    heads, width, depth = (int(n) for n in shape(matrix))
    x = _leaf(graph, sides[0].operand, piece, region, sources)
    y = insert(graph, aten.linear.default, x, insert(graph, aten.reshape.default, matrix, [heads * width, depth]))
    lead = [size_node(graph, n, sizes_of_nodes([x])) for n in shape(x)[:-1]]
    return insert(graph, aten.reshape.default, y, [*lead, heads, width]), ("b", "i", "h", "l")


def _leaf(graph: Graph, operand: Operand, piece: Piece, region: _Region, sources) -> Node:
    if operand.name == "x":
        x = tensor_view(graph, region.queries[piece], region.sizes[B], region.heads, region.sizes[SQ], sc.I, sources)
        return insert(graph, aten.squeeze.dim, x, 1)
    factor = region.queries[piece].factor if operand.name == "Wq" else piece.factor
    if factor.row is None:
        return diagonal_view(graph, factor, "h" in operand.indices, region.heads, piece.length)
    length = piece.length
    found = weight_view(graph, factor, region.heads if "h" in operand.indices else 1, length)
    return found if "h" in operand.indices else insert(graph, aten.squeeze.dim, found, 0)
