"""lora: a linear and the low-rank adapters beside it become one linear, of the merged weight

    x W^T + b + s (x A^T + a) B^T + s c     ->     x (W + s B A)^T + (b + s B a + s c)
    (x A^T) B^T, of rank r > N K / (N + K)  ->     x (B A)^T                              and a lower rank stays as it is

Any number of adapters of one x, each with a scale (alpha / r, rank-stabilised alpha / sqrt(r)), biases, and casts between; a scale may also be a vector over
the outputs that depends on weights alone, so that DoRA, m / |W + s B A| (W + s B A), is an instance. Written as peft writes it, or by hand.

The merged weight is an expression of weights alone: float32 inside (float64 for float64) and rounded once. compiler/folded.py keeps it, and makes it again when one of
its sources changes; W, A and B are not touched, so that unmerging is to compile without this pass. It is left out where nothing is kept (fold_weights=False).

Legality, each with a test that must be refused:
- no gradient is wanted of the graph: adapters that are trained stay apart;      - no dropout in training on the way to an adapter;
- all of them read the same x;                                                   - what is added up is read by the sum alone;
- the sum has the dtype of W: rounding its result to W's would lose the adapter's digits.

Cost: 2 M r (N + K) FLOPs less for each adapter, two kernels and a pass over the result; a copy of W more, in the report. A special case of association
(passes/reassociate.py): of one product of two constants the choice needs no search. Algorithm: LoRA, 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..compiler.ir.graph import insert, is_call, is_tensor, value
from ..compiler.ir.linear import compute_dtype
from ..compiler.ir.products import Product, products
from ..compiler.ir.rewrite import Kept, Match, Refusal
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.weights import constants, is_constant, is_int8, why_trained

NAME = "lora"
OPTION = "fold_weights"
aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Term:
    """diag(scales) W_n ... W_1 x: products from x on; a scale is a number or a node [..., N] of one row."""

    products: tuple[Product, ...]
    scales: tuple[float | Node, ...] = ()


@dataclasses.dataclass
class _Affine:
    """A sum of terms of one x and of biases (a node [N] with the products behind it, and scales); inner: the nodes that make it up."""

    x: Node
    terms: list[_Term]
    biases: list[tuple[Node, tuple[Product, ...], tuple[float | Node, ...]]]
    inner: list[Node]
    problem: Refusal | None = None

    def scaled(self, node: Node, scale) -> _Affine:
        return _Affine(self.x, [dataclasses.replace(t, scales=(*t.scales, scale)) for t in self.terms], [(b, p, (*s, scale)) for b, p, s in self.biases], [*self.inner, node], self.problem)

    @property
    def base(self) -> _Term | None:
        return next((t for t in self.terms if len(t.products) == 1), None)

    @property
    def kept(self) -> _Term:
        """Whose first product says what x is, and the dtype."""
        return self.base or self.terms[0]

    @property
    def adapters(self) -> list[_Term]:
        return [t for t in self.terms if len(t.products) == 2]


def find(graph: Graph, fold: bool = True) -> Iterator[Match | Refusal | Kept]:
    """Every sum of a linear and adapters, and every pair of linears whose product is smaller than both."""
    if not fold:
        return
    for node, form in _Reading(graph).roots():
        if not form.adapters or (form.base is None and (len(form.terms) > 1 or not _pays(form.terms[0]))):
            continue
        weight = value(form.kept.products[0].weight)
        root = _rounded(node, weight.dtype)
        rows = [s for scales in ([t.scales for t in form.terms] + [s for _, _, s in form.biases]) for s in scales if isinstance(s, Node)]
        sources = list(dict.fromkeys([*(p.weight for t in form.terms for p in t.products), *(b for b, _, _ in form.biases), *rows]))
        escaping = next((n for n in form.inner if n is not node and any(u not in form.inner for u in n.users)), None)
        if (held := next((p.weight for t in form.terms for p in t.products if is_int8(p.weight)), None)) is not None:
            if form.base is not None:
                yield Refusal("the adapter stays apart: the weight is held as int8, merged it would have to be floats again", held, "merge the adapter first, then quantize_; or quantise with options={'int8': ...}, which comes after merging")
        elif reason := why_trained(graph, sources):
            yield Kept(node, f"the weights stay apart: {reason}; run under torch.no_grad(), or frozen by requires_grad_(False), they are one")  # no refusal: who trains adapters wants them apart
        elif form.problem is not None:
            yield form.problem
        elif escaping is not None:
            if form.base is not None:
                yield Refusal("a part of the sum is also read elsewhere", escaping, "use the sum instead")
        elif value(root).dtype != weight.dtype:
            yield Refusal(f"the sum is {value(root).dtype}, the weight {weight.dtype}: merged, the adapter would be rounded to that", node, "cast the sum to the dtype of the layer")
        else:
            yield Match(root, (_stripped(form.kept.products[0].x), *sources), lambda graph, root=root, form=form: _build(graph, root, form), _detail(form))


class _Reading:
    """The affine forms of a graph, each node once, in order."""

    def __init__(self, graph: Graph):
        self.products, _ = products(graph)
        self.constant = constants(graph)
        self.forms: dict[Node, _Affine] = {}
        self.taken: set[Node] = set()  # read as a part of a larger form
        for node in graph.nodes:
            if node.op == "call_function" and is_tensor(node) and node not in self.constant and (form := self._read(node)) is not None:
                self.forms[node] = form

    def roots(self) -> list[tuple[Node, _Affine]]:
        return [(n, f) for n, f in self.forms.items() if n not in self.taken]

    def _is_constant(self, node) -> bool:
        return node in self.constant or (isinstance(node, Node) and node not in self.forms and is_constant(node))

    def _read(self, node: Node) -> _Affine | None:
        if (product := self.products.get(node)) is not None:
            return self._product(node, product) if self._is_constant(product.weight) and (product.bias is None or self._is_constant(product.bias)) else None
        if is_call(node, aten.add.Tensor, aten.sub.Tensor) and all(isinstance(a, Node) for a in node.args):
            return self._sum(node, *node.args, (-1.0 if is_call(node, aten.sub.Tensor) else 1.0) * node.kwargs.get("alpha", 1))
        if is_call(node, aten.neg.default):
            return self._scaled(node, node.args[0], -1.0)
        if is_call(node, aten.mul.Tensor):
            for a, scale in (node.args, node.args[::-1]):
                if isinstance(scale, (int, float)) or self._is_row(scale, node):
                    return self._scaled(node, a, scale)
        if is_call(node, aten.div.Tensor) and isinstance(node.args[1], (int, float)) and node.args[1] != 0:
            return self._scaled(node, node.args[0], 1.0 / node.args[1])
        if is_call(node, aten.to.dtype) and value(node).is_floating_point() or self._is_flattening(node):
            return self._scaled(node, node.args[0], None)
        return None

    def _scaled(self, node: Node, x, scale) -> _Affine | None:
        form = self.forms.get(x)
        if form is None or value(x).shape[-1:] != value(node).shape[-1:]:
            return None
        self.taken.add(x)
        return form.scaled(node, scale) if scale is not None else dataclasses.replace(form, inner=[*form.inner, node])

    def _sum(self, node: Node, a: Node, b: Node, sign: float) -> _Affine | None:
        left, right = self.forms.get(a), self.forms.get(b)
        if left is None and right is not None and self._is_row(a, node):
            form = right if sign == 1.0 else right.scaled(node, sign)
            self.taken.add(b)
            return dataclasses.replace(form, biases=[*form.biases, (a, (), ())], inner=[*right.inner, node])
        if left is not None and right is None and self._is_row(b, node):
            self.taken.add(a)
            return dataclasses.replace(left, biases=[*left.biases, (b, (), (sign,))], inner=[*left.inner, node])
        if left is None or right is None or value(a).shape != value(b).shape:
            return None
        problem = left.problem or right.problem
        if left.x is not right.x:
            if _behind_dropout(left.x) is not _behind_dropout(right.x) or not (left.adapters or right.adapters):
                return None
            dropout = next(n for f in (left, right) for n in [f.x, *f.x.all_input_nodes] if is_call(n, *_DROPOUTS))
            problem = Refusal("dropout is active on the way to an adapter", dropout, "call model.eval(), or set lora_dropout to 0")
        scaled = right if sign == 1.0 else right.scaled(node, sign)
        self.taken |= {a, b}
        return _Affine(left.x, [*left.terms, *scaled.terms], [*left.biases, *scaled.biases], [*left.inner, *right.inner, node], problem)

    def _product(self, node: Node, product: Product) -> _Affine:
        bias = [(product.bias, (), ())] if product.bias is not None else []
        before = _stripped(product.x)
        first = self.forms.get(before)
        if first is not None and len(first.terms) == 1 and len(first.terms[0].products) == 1:
            (term,) = first.terms
            if not any(isinstance(s, Node) for scales in (term.scales, *(s for _, _, s in first.biases)) for s in scales):  # a vector between the two is left there
                self.taken.add(before)
                biases = [(b, (*p, product), s) for b, p, s in first.biases]
                return _Affine(first.x, [_Term((*term.products, product), term.scales)], [*biases, *bias], [*first.inner, *self._way(product.x, before), node], first.problem)
        return _Affine(_stripped(product.x), [_Term((product,))], bias, [node])

    @staticmethod
    def _way(x: Node, source: Node) -> list[Node]:
        """The casts and views between."""
        found = []
        while x is not source:
            found.append(x)
            x = x.args[0]
        return found

    def _is_row(self, x, node: Node) -> bool:
        """A constant that is the same for every row: [N], [1, N], or one number."""
        return self._is_constant(x) and is_tensor(x) and value(x).is_floating_point() and all(n == 1 for n in value(x).shape[:-1]) and value(x).dim() <= value(node).dim() and tuple(value(x).shape[-1:]) in ((), (1,), tuple(value(node).shape[-1:]))

    @staticmethod
    def _is_flattening(node: Node) -> bool:
        """A view of the rows: the last dim stays."""
        return is_call(node, aten.reshape.default) and is_tensor(node.args[0]) and value(node).dim() > 0 and value(node.args[0]).dim() > 0 and isinstance(value(node).shape[-1], int) and value(node).shape[-1] == value(node.args[0]).shape[-1]


_DROPOUTS = (aten.dropout.default, aten.native_dropout.default)


def _behind_dropout(x: Node) -> Node:
    x = _stripped(x)
    while is_call(x, *_DROPOUTS) or getattr(x.target, "__name__", "") == "getitem" and is_call(x.args[0], *_DROPOUTS):
        x = _stripped(x.args[0])
    return x


def _stripped(x: Node) -> Node:
    """What x is a flattening of, or a cast to a wider float."""
    while _Reading._is_flattening(x) or is_call(x, aten.to.dtype) and value(x.args[0]).is_floating_point() and value(x).is_floating_point() and value(x).itemsize >= value(x.args[0]).itemsize:
        x = x.args[0]
    return x


def _pays(term: _Term) -> bool:
    """Is the product of a pair smaller than the two? r (N + K) > N K, r < min(N, K) or not."""
    first, second = term.products
    rank, n, k = first.width, second.width, value(first.x).shape[-1]
    return rank * (n + k) > n * k


def _rounded(node: Node, dtype: torch.dtype) -> Node:
    """The sum, or the cast of it to the layer's dtype that follows it, as peft has it for adapters of a wider dtype."""
    if value(node).dtype != dtype and len(node.users) == 1 and is_call(user := next(iter(node.users)), aten.to.dtype) and value(user).dtype == dtype:
        return user
    return node


def _build(graph: Graph, root: Node, form: _Affine) -> Node:
    """The merged weight and bias as an expression of weights, and one linear."""
    first = form.kept.products[0]
    dtype = value(first.weight).dtype
    wide = compute_dtype(dtype)

    def widened(node):
        return node if value(node).dtype == wide else insert(graph, aten.to.dtype, node, wide)

    def matrix(product):  # [N, K], as stored
        w = widened(product.weight)
        return insert(graph, aten.permute.default, w, [1, 0]) if product.transposed else w

    def scaled(x, scales, rows):
        for scale in scales:
            if isinstance(scale, Node):
                scale = widened(scale)
                scale = insert(graph, aten.reshape.default, scale, [-1, 1] if rows else [-1])
            x = insert(graph, aten.mul.Tensor, x, scale) if not (isinstance(scale, (int, float)) and scale == 1) else x
        return x

    weight = bias = None
    for term in form.terms:
        made = matrix(term.products[0])
        for product in term.products[1:]:
            made = insert(graph, aten.mm.default, matrix(product), made)
        made = scaled(made, term.scales, rows=True)
        weight = made if weight is None else insert(graph, aten.add.Tensor, weight, made)
    for node, behind, scales in form.biases:
        made = insert(graph, aten.reshape.default, widened(node), [-1])
        for product in behind:
            made = insert(graph, aten.mv.default, matrix(product), made)
        made = scaled(made, scales, rows=False)
        bias = made if bias is None else insert(graph, aten.add.Tensor, bias, made)
    if bias is not None and value(bias).shape[0] != value(root).shape[-1]:
        bias = insert(graph, aten.expand.default, bias, [value(root).shape[-1]])
    if wide != dtype:
        weight = insert(graph, aten.to.dtype, weight, dtype)
        bias = insert(graph, aten.to.dtype, bias, dtype) if bias is not None else None
    made = insert(graph, aten.linear.default, first.x, weight, *([bias] if bias is not None else []))
    sizes = [n if isinstance(n, int) else -1 for n in value(root).shape]
    if value(made).dim() == len(sizes) and all(statically_known_true(a == b) for a, b in zip(value(made).shape, value(root).shape)):
        return made  # else rows were grouped anew on the way
    if sizes.count(-1) > 1:
        raise Unliftable("its rows are viewed in several symbolic sizes")
    return insert(graph, aten.reshape.default, made, sizes)


def _detail(form: _Affine) -> str:
    ranks = ", ".join(str(t.products[0].width) for t in form.adapters)
    n, k = form.terms[0].products[-1].width, value(form.terms[0].products[0].x).shape[-1]
    return f"[{n}, {k}] + rank {ranks}" if form.base is not None else f"[{n}, {k}] of rank {ranks}"
