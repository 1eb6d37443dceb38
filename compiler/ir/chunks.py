"""Attention in chunks of keys, read off a graph: what every tensor behind the scores is in terms of the chunks' sums.

For the scores x of chunk k let E_k = sum_j exp(x_j) and O_k = sum_j exp(x_j) v_j / E_k, of every row. What a model computes of them on the way to its result is a rational function, of a tensor or of its exponential:

    logsumexp(x) = log E_k       amax(x) = log M_k       exp(x - r) = weights over R for r = log R       their sum: E_k / R       their product with v: E_k O_k / R
    max(log A, log B) = log M, M a new symbol            log A - log B = log(A / B)            sigmoid(log A) = A / (1 + A)            logaddexp(log A, log B) = log(A + B)

and so on (`RULES`). A tensor whose function is  sum_k E_k O_k / sum_k E_k  is the attention over all chunks together, however it was written: with log-sum-exps, with running maxima and sums
(FlashAttention's online softmax, 2205.14135, algorithm 1), with sigmoids of differences (ring attention), over a stack of chunks. The maxima are free symbols: that the result does not depend on them is proved, not
assumed. The functions are elements of a field of fractions (sympy), always in lowest terms, so that equality is a comparison.

A dim of a tensor is labelled: ("row", n) is dim n of the scores, KEY the keys, WIDTH the head dim of the values, STACK the chunks in a stack; None has one element, or the same for all.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from sympy.polys.domains import QQ
from sympy.polys.fields import field
from torch.fx import Graph, Node

from .graph import argument, is_call, is_tensor, shape, value

aten = torch.ops.aten
KEY, WIDTH, STACK = "key", "width", "stack"
CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.contiguous.default, aten.clone.default, aten.to.dtype_layout)
REDUCTIONS = (aten.softmax.int, aten._softmax.default, aten.logsumexp.default, aten.amax.default, aten.max.dim)
MAX_CHUNKS = 64


class Unknown(Exception):
    """A tensor that is no such function."""


@dataclasses.dataclass(frozen=True)
class Term:
    """What one element is. kind: "plain", a function; "log", its logarithm; "scores" of chunk k, log of what they are divided by taken off; "weights", exp(scores) times a function."""

    kind: str
    f: object
    chunk: int = -1


@dataclasses.dataclass(frozen=True)
class Tensor:
    """labels: one a dim; terms: one, or one for every place of the STACK dim."""

    labels: tuple
    terms: tuple[Term, ...]


@dataclasses.dataclass
class Chunk:
    """One chunk: its scores, their dim of keys, and the product of its weights with the values: which argument of it they are. shifted: its exponentials take off another maximum than its own."""

    scores: Node
    dim: int
    product: Node | None = None
    position: int = 0
    labels: tuple = ()
    shifted: bool = False
    is_plain: bool = False


class Chunks:
    """The tensors of a graph that are such functions: `tensors`, node -> Tensor, in the graph's order."""

    def __init__(self, graph: Graph):
        seeds = dict.fromkeys(_scores(graph))
        self.chunks = [Chunk(x, dim) for x, dim in seeds][:MAX_CHUNKS]
        self.number = {c.scores: n for n, c in enumerate(self.chunks)}
        count = len(self.chunks)
        maxima = sum(is_call(n, aten.maximum.default, aten.max.other, aten.amax.default, aten.max.dim) for n in graph.nodes) + count
        constants = 8
        names = [f"{letter}{n}" for letter, total in (("E", count), ("O", count), ("M", maxima), ("C", constants)) for n in range(total)]
        self.field, *symbols = field(names or ["E"], QQ)
        self.sums, self.means, self.free = symbols[:count], symbols[count:2 * count], iter(symbols[2 * count:2 * count + maxima])
        self.constant_symbols, self.constants = iter(symbols[2 * count + maxima:]), {}
        self.tops: dict = {}
        self.tensors: dict[Node, Tensor] = {}
        for node in graph.nodes:
            if node.op == "call_function" and (found := self._read(node)) is not None:  # first: a stack of log-sum-exps is what a softmax is taken of as well
                self.tensors[node] = found
            elif node in self.number:
                chunk = self.chunks[self.number[node]]
                labels = tuple(KEY if n == chunk.dim else ("row", n) for n in range(value(node).dim()))
                self.tensors[node] = Tensor(labels, (Term("scores", self.field.one, self.number[node]),))

    # ------------------------------------------------------------------------------------------ one node

    def _read(self, node: Node) -> Tensor | None:
        known = [a for a in _flat(node.args) if a in self.tensors]
        try:
            if is_call(node, aten.full.default, aten.zeros.default, aten.full_like.default, aten.zeros_like.default, aten.new_zeros.default, aten.new_full.default):
                return self._filled(node)
            if not known:
                return None
            rule = next((f for f in (RULES.get(node.target), RULES.get(getattr(node.target, "overloadpacket", None))) if f is not None), None)
            if rule is not None:
                return rule(self, node)
            if getattr(node.target, "__name__", "") == "getitem":
                return self._item(node)
        except (Unknown, ZeroDivisionError, StopIteration):
            return None
        return None

    def _filled(self, node: Node) -> Tensor:
        number = 0.0 if "zeros" in str(node.target) else argument(node, {aten.new_full.default: 2}.get(node.target, 1), "fill_value")
        if not is_tensor(node) or not isinstance(number, (int, float)) or not value(node).dtype.is_floating_point:
            raise Unknown
        return Tensor((None,) * value(node).dim(), (self.constant(number),))

    def constant(self, number: float) -> Term:
        if number == -math.inf:
            return Term("log", self.field.zero)
        if not math.isfinite(number):
            raise Unknown
        return Term("plain", self.field(QQ.from_float(float(number)) if number != int(number) else int(number)))

    def as_log(self, term: Term) -> object:
        """A such that the element is log A; a number c is the logarithm of a symbol."""
        if term.kind == "log":
            return term.f
        if term.kind == "plain" and self.is_number(term.f):
            if term.f == 0:
                return self.field.one
            if term.f not in self.constants:
                self.constants[term.f] = next(self.constant_symbols)
            return self.constants[term.f]
        raise Unknown

    @staticmethod
    def is_number(f) -> bool:
        return f.numer.is_ground and f.denom.is_ground

    def top(self, *terms):
        """The function whose logarithm is the largest of these."""
        found = tuple(t for t in dict.fromkeys(terms) if t != 0)  # log 0 is smaller than anything
        if len(found) == 1:
            return found[0]
        key = frozenset(found)
        if key not in self.tops:
            self.tops[key] = next(self.free)
        return self.tops[key]

    def operands(self, node: Node, count: int = 2) -> tuple[tuple, list[tuple[Term, ...]]]:
        """(labels of the result, the terms of every operand for each element of it) of a pointwise operation."""
        tensors = []
        for a in node.args[:count]:
            if isinstance(a, (int, float)) and not isinstance(a, bool):
                tensors.append(Tensor((), (self.constant(a),)))
            elif a in self.tensors:
                tensors.append(self.tensors[a])
            else:
                raise Unknown
        rank = max(len(t.labels) for t in tensors)
        padded = [(None,) * (rank - len(t.labels)) + t.labels for t in tensors]
        labels = []
        for here in zip(*padded):
            names = {x for x in here if x is not None}
            if len(names) > 1:
                raise Unknown
            labels.append(next(iter(names), None))
        length = max(len(t.terms) for t in tensors)
        if any(len(t.terms) not in (1, length) for t in tensors):
            raise Unknown
        return tuple(labels), [tuple(t.terms[n if len(t.terms) > 1 else 0] for t in tensors) for n in range(length)]

    def _item(self, node: Node) -> Tensor:
        source, n = node.args
        if is_call(source, aten.max.dim) and n == 0:
            return self.tensors[source]
        if is_call(source, aten.unbind.int):
            tensor, dim = self.tensors[source], argument(source, 1, "dim", 0) % (len(self.tensors[source].labels))
            return self.selected(tensor, dim, n)
        raise Unknown

    def selected(self, tensor: Tensor, dim: int, n: int) -> Tensor:
        if tensor.labels[dim] != STACK:
            raise Unknown
        return Tensor(tensor.labels[:dim] + tensor.labels[dim + 1:], (tensor.terms[n],))

    # ------------------------------------------------------------------------------------------ results

    def merged(self, tensor: Tensor) -> tuple[str, tuple[int, ...]] | None:
        """("out" or "lse", the chunks) of a tensor that is the attention over these chunks together, or the logarithm of its sum."""
        if len(tensor.terms) != 1:
            return None
        (term,) = tensor.terms
        if term.kind not in ("plain", "log") or term.f == 0:
            return None
        used = term.f.numer.ring.gens
        count = len(self.chunks)
        present = [n for n in range(count) if any(m[used.index(used[n if term.kind == "log" else count + n])] for m in term.f.numer.itermonoms())]
        if not present:
            return None
        total = sum((self.sums[n] for n in present), self.field.zero)
        if term.kind == "log":
            return ("lse", tuple(present)) if term.f == total else None
        wanted = sum((self.sums[n] * self.means[n] for n in present), self.field.zero) / total
        return ("out", tuple(present)) if term.f == wanted and WIDTH in tensor.labels else None


def _scores(graph: Graph) -> Iterable[tuple[Node, int]]:
    """(tensor, dim) of all that a softmax, a log-sum-exp or a maximum is taken of, as it was before a shift."""
    for node in graph.nodes:
        if is_call(node, *REDUCTIONS) and is_tensor(node.args[0]) and value(node.args[0]).dtype.is_floating_point:
            x, dims = node.args[0], argument(node, 1, "dim")
            dims = [dims] if isinstance(dims, int) else list(dims or ())
            while is_call(x, *CASTS) or is_call(x, aten.sub.Tensor) and len(x.args) == 2 and is_tensor(x.args[0]) and shape(x) == shape(x.args[0]) and is_tensor(x.args[1]) and shape(x.args[1]) != shape(x):
                x = x.args[0]
            if len(dims) == 1 and value(x).dim() >= 2:
                yield x, dims[0] % value(x).dim()


def _flat(x) -> list[Node]:
    return [x] if isinstance(x, Node) else [n for y in x for n in _flat(y)] if isinstance(x, (list, tuple)) else []


RULES: dict[object, Callable] = {}
from . import chunk_rules  # noqa: E402,F401  (fills RULES)
