"""What an epilogue of ``tileweld::linear`` does to its accumulators, where that is a linear map a head: a scale, a bias, a rotation of pairs.

    y[i, j] = A(i, t) (a[i, j] + bias[j]) + P(i, t) (a[i, j'] + bias[j'])         t = j mod head dim, j' the partner of j

It is read off the text, column by column of one head, and it must be the same for every head. With rotary it is a product of complex
numbers, dims t and t' = partner(t) real and imaginary part, iff A(t) = A(t') and P(t) = -P(t'). A table [T, D] of cosines has the same
number at t and t' only if it was made so, cat((angles, angles)).cos(): that is read off the graph as well, through compiler/ir/lift.py.
"""
from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy import Integer
from torch.fx import Node

from . import scalar as sc
from .evaluate import Evaluator
from .graph import shape, value
from .lift import Lift
from .linear import spec_of
from .unliftable import Unliftable


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """Number of the weight, number of the capture that is its bias (None: none), and rotary's (block, half), (0, 0) without."""

    weight: int
    bias: int | None
    pair: tuple[int, int]

    def pairs(self, d: int) -> torch.Tensor | None:
        """[P, 2] dims of a head that rotate together."""
        return pairs_of(*self.pair, d)


def pairs_of(block: int, half: int, d: int) -> torch.Tensor | None:
    """[d / 2, 2]: dims t and t + half of every block, for 2 half = block; None for (0, 0)."""
    if not block:
        return None
    return torch.tensor([[start + t, start + t + half] for start in range(0, d, block) for t in range(half)])


def linear_map(op: Node, output: int, d: int) -> LinearMap:
    """The map of an output of a tileweld::linear node whose heads have d columns. Raises Unliftable where it is no such map."""
    x, weights, captures, sizes, norm, _, prologue, epilogues, pairs = op.args
    spec = spec_of([value(c) for c in captures], norm, prologue, epilogues, pairs)
    e, used, (block, half) = spec.epilogue_exprs[output], spec.accumulators(output), spec.pairs[output]
    if len(used) != 1:
        raise Unliftable("it joins several products")
    if half and (2 * half != block or d % block):
        raise Unliftable(f"rotary embedding of a part of the head ({2 * half} of every {block} dims)")
    width = shape(weights[used[0]])[0]
    reading = _Reading(op, captures, d, int(width))
    if not reading.is_periodic(e):
        raise Unliftable("it is not the same for every head")
    at = [reading.terms(e.xreplace({sc.J: Integer(t)})) for t in range(d)]
    biases = {k for terms in at for k, *_ in (leaf[1:] for leaf in terms if leaf[0] == "bias")}
    if len(biases) > 1:
        raise Unliftable("it adds two vectors")
    bias = next(iter(biases), None)
    for t in range(d):
        other = t if not half else t + half if t % block < half else t - half
        own, partner = at[t].pop(("a",), None), at[t].pop(("p",), None)
        if own is None or partner is not None and not half:
            raise Unliftable("it is no multiple of the product")
        if bias is not None and (at[t].pop(("bias", bias, t), None) != own or partner is not None and at[t].pop(("bias", bias, other), None) != partner):
            raise Unliftable("the vector that it adds is no bias of the product")
        if at[t]:
            raise Unliftable("it adds something to the product")
        at[t] = (own, partner)
    for t in range(d):
        other = 0 if not half else t + half if t % block < half else t - half
        if not reading.same(at[t][0], at[other][0]):
            raise Unliftable("dims of a head have factors of their own" if not half else "it cannot be seen that both dims of a pair turn by one angle: the table of cosines is an input, or made otherwise")
        if half and (at[t][1] is None or at[other][1] is None or not reading.same(at[t][1], (-at[other][1][0], at[other][1][1]))):
            raise Unliftable("pairs of dims are mixed by something else than a rotation")
    return LinearMap(used[0], bias, (block, half))


class _Reading:
    """Terms of an epilogue at one column. A coefficient is (number, factors), factors sorted."""

    def __init__(self, op: Node, captures, d: int, width: int):
        self.captures, self.d = captures, d
        self.columns = Evaluator({"j": torch.arange(width)}, (), torch.float64)
        self.width = width
        self.lift = Lift({sc.I: (Integer(0), shape(op.args[0])[0] - 1)})
        self._lifted: dict = {}

    def is_bias(self, e) -> bool:
        """A vector's element of this column or another of its head: [N] captures that move along with the head."""
        if not isinstance(e, sc.load) or len(e.args) != 2 or not e.args[1].has(sc.J) or e.args[1].free_symbols != {sc.J} or e.args[1].has(sc.load):
            return False
        known = value(self.captures[self._number(e)])
        if tuple(known.shape) != (self.width,) or not known.dtype.is_floating_point:
            return False
        index = torch.as_tensor(self.columns(e.args[1])).expand(self.width).view(-1, self.d)
        return bool((index == index[:1] + self.d * torch.arange(len(index))[:, None]).all())

    def is_periodic(self, e) -> bool:
        """Does j occur only as the column of a head, biases aside?"""
        if not e.has(sc.J) or self.is_bias(e):
            return True
        if isinstance(e, sc.mod):
            inner, stride = (e.args[0].args if isinstance(e.args[0], sc.floordiv) else (e.args[0], Integer(1)))
            if inner == sc.J:
                return bool(stride.is_Integer and e.args[1].is_Integer and self.d % (stride * e.args[1]) == 0)
        return bool(e.args) and all(self.is_periodic(a) for a in e.args)

    @staticmethod
    def _number(e) -> int:
        return int(e.args[0].name[1:])

    def terms(self, e) -> dict:
        """leaf -> coefficient, for e = sum of coefficient leaf; leaves are ("a",), ("p",), ("bias", capture, column)."""
        if e.is_Symbol and sc.accumulator_number(e) is not None:
            return {(e.name[0],): (1.0, ())}
        if isinstance(e, sc.load) and len(e.args) == 2 and e.args[1].is_Integer and shape(self.captures[self._number(e)]) == [Integer(self.width)]:
            return {("bias", self._number(e), int(e.args[1])): (1.0, ())}
        if isinstance(e, sc.where) and e.args[0] in (sympy.true, sympy.false):
            return self.terms(e.args[1 if e.args[0] is sympy.true else 2])
        if isinstance(e, (sc.fadd, sc.fsub)):
            terms = self.terms(e.args[0])
            for leaf, (number, factors) in self.terms(e.args[1]).items():
                if leaf in terms:
                    raise Unliftable("it adds the product to itself")
                terms[leaf] = (-number if isinstance(e, sc.fsub) else number, factors)
            return terms
        if isinstance(e, (sc.fmul, sc.fdiv)):
            x, y = e.args
            if isinstance(e, sc.fmul) and (_has_product(y) or sc.is_const(x)):
                x, y = y, x
            if _has_product(y):
                raise Unliftable("it is not linear in the product")
            number, factors = self.coefficient(y)
            if isinstance(e, sc.fdiv):
                number, factors = (1 / number if number else float("nan")), tuple(sc.div(Integer(1), f) for f in factors)
            return {leaf: (n * number, tuple(sorted((*fs, *factors), key=str))) for leaf, (n, fs) in self.terms(x).items()}
        raise Unliftable("it is not linear in the product")

    def coefficient(self, e) -> tuple[float, tuple]:
        if sc.is_const(e):
            return float(sc.value_of(e)), ()
        if isinstance(e, sc.where) and e.args[0] in (sympy.true, sympy.false):
            return self.coefficient(e.args[1 if e.args[0] is sympy.true else 2])
        if isinstance(e, sc.fmul):
            (n, f), (m, g) = map(self.coefficient, e.args)
            return n * m, tuple(sorted((*f, *g), key=str))
        return 1.0, (e,)

    def same(self, x, y) -> bool:
        """Are two coefficients one number? Tables that differ in name or column are compared by how they were made."""
        return x == y or x[0] == y[0] and len(x[1]) == len(y[1]) and self._made(x[1]) == self._made(y[1])

    def _made(self, factors: tuple) -> list:
        result = []
        for f in factors:
            if f not in self._lifted:
                names = {x: self.lift.at(self.captures[self._number(x)], x.args[1:]) for x in sc.loads(f)}
                self._lifted[f] = f.xreplace(names)
            result.append(self._lifted[f])
        return sorted(result, key=str)


def _has_product(e) -> bool:
    return any(sc.accumulator_number(s) is not None for s in e.free_symbols)
