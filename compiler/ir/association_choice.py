"""Which plan of a region is taken at the sizes of a graph, held by a guard where the sizes are symbols.

A region's costs are polynomials in B, SQ and TK (batch, queries, keys). A graph's sizes are put in: numbers, or expressions of torch's shape symbols with a hint each. With numbers there is
nothing to hold. With one symbol the plan stays the cheapest over an interval around the hint, [1, 170] say, and comparing the SymInt with its ends makes torch guard on them: Dynamo compiles
again on the other side, if that side is ever called. With several symbols the inequality of the costs itself is the guard.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import sympy
import torch
from torch.fx import Graph, Node

from .association import Machine, Plan, _seconds, crossover
from .graph import is_tensor, size, value

B, SQ, TK = (sympy.Symbol(name, positive=True) for name in ("B", "Sq", "Tk"))
LARGEST = 1 << 24  # of a size: beyond it the interval is open


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The plan; bounds: (symbol, low, high) of the sizes over which it is the cheapest, None where the sizes are numbers or several symbols decide."""

    plan: Plan
    bounds: tuple[sympy.Symbol, int, int] | None = None
    symbols: tuple[sympy.Symbol, ...] = ()


def choose(candidates: Sequence[Plan], machine: Machine, sizes: dict, hints: dict) -> Chosen:
    """The cheapest plan; the first of equal ones. sizes: B, SQ, TK -> int or expression of shape symbols; hints: shape symbol -> int."""
    symbols = tuple(sorted({s for e in sizes.values() for s in sympy.sympify(e).free_symbols}, key=str))

    def best(at: dict) -> Plan:
        numbers = [int(sympy.sympify(sizes[s]).subs(at)) for s in (B, SQ, TK)]
        return min(candidates, key=lambda p: _seconds(p.cost, (B, SQ, TK))(machine.flops, machine.bandwidth, *numbers))

    plan = best(hints)
    if len(symbols) != 1:
        return Chosen(plan, None, symbols)
    (symbol,) = symbols
    low, high = (_last(lambda n: best({symbol: n}) is plan, hints[symbol], end) for end in (1, LARGEST))
    return Chosen(plan, (symbol, low, high), symbols)


def _last(holds: Callable[[int], bool], start: int, end: int) -> int:
    """The last n on the way from start to end up to which ``holds`` is true, if it changes once: steps that double, then halves."""
    sign = 1 if end >= start else -1
    good, step = start, 1
    while good != end:
        n = start + sign * step
        n = min(n, end) if sign > 0 else max(n, end)
        if not holds(n):
            break
        good, step = n, 2 * step
    else:
        return end
    bad = n
    while abs(bad - good) > 1:
        middle = (bad + good) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def guard(graph: Graph, nodes: Sequence[Node], chosen: Chosen, candidates: Sequence[Plan], machine: Machine, sizes: dict) -> None:
    """Make torch hold what the choice rests on: comparisons of SymInts, whose results its shape environment remembers as guards."""
    if not chosen.symbols or len(candidates) == 1 or promised(graph) & set(chosen.symbols):
        return
    known = symints(graph, nodes, chosen.symbols)
    if chosen.bounds is not None:
        symbol, low, high = chosen.bounds
        n = known[symbol]
        if low > 1:
            bool(n >= low)
        if high < LARGEST:
            bool(n <= high)
        return
    numbers = [known.get(e) if isinstance(e, sympy.Symbol) else e if isinstance(e, int) or sympy.sympify(e).is_Integer else sympy.lambdify(chosen.symbols, e, "math")(*(known[s] for s in chosen.symbols))
               for e in (sizes[s] for s in (B, SQ, TK))]
    numbers = [int(n) if isinstance(n, sympy.Integer) else n for n in numbers]
    for other in candidates:
        if other is not chosen.plan:
            bool(_work(chosen.plan, other, machine, numbers) <= _work(other, chosen.plan, machine, numbers))


def promised(graph: Graph) -> frozenset:
    """Shape symbols whose range the user gave, so that no guard may narrow it: the choice at the present size then serves all of them. See capture.py."""
    module = graph.owning_module
    return module.meta.get("promised_sizes", frozenset()) if module is not None else frozenset()


def _work(plan: Plan, other: Plan, machine: Machine, numbers: Sequence):
    """Roofline time in units that make all coefficients of both plans small integers: a guard is evaluated in 64 bits."""
    terms = [sympy.Poly(e * f, B, SQ, TK) for p in (plan, other) for e, f in ((p.cost.flops, machine.bandwidth), (p.cost.moved, machine.flops))]
    unit = functools.reduce(math.gcd, [int(c) for t in terms for c in t.coeffs()])
    flops, moved = (sympy.lambdify((B, SQ, TK), t.as_expr() / unit, "math")(*numbers) for t in terms[:2])
    return torch.sym_max(flops, moved)


def symints(graph: Graph, nodes: Sequence[Node], symbols) -> dict:
    """A SymInt of the graph for every shape symbol, found among the sizes of tensors and inputs."""
    found: dict = {}
    for node in (*nodes, *graph.nodes):
        known = value(node) if isinstance(node, Node) else None
        for n in [*known.shape] if is_tensor(node) else [known]:
            if isinstance(n, torch.SymInt) and (e := size(n)) in symbols:
                found.setdefault(e, n)
        if len(found) == len(symbols):
            break
    return found


def hints_of(nodes: Sequence[Node], graph: Graph, symbols) -> dict:
    """What the shape symbols are in this call."""
    return {s: int(n.node.hint) for s, n in symints(graph, nodes, symbols).items() if n.node.hint is not None}


@functools.lru_cache(64)
def in_words(plan: Plan, naive: Plan) -> str:
    """The polynomials, and where the two plans cross: what `explain` prints."""
    text = f"{plan}: {plan.cost.flops} FLOPs, {plan.cost.moved} bytes"
    if plan is naive:
        return text
    text += f"; as written ({naive}): {naive.cost.flops} FLOPs, {naive.cost.moved} bytes"
    try:
        roots = [r for r in crossover(naive, plan, SQ) if not r.free_symbols - {TK}]
    except NotImplementedError:  # sympy knows no formula for the root: the choice does not need one
        roots = []
    if roots:
        (root, *_) = roots
        limit = sympy.limit(root.xreplace({TK: sympy.Symbol("n", positive=True)}), sympy.Symbol("n", positive=True), sympy.oo)
        text += f"; fewer FLOPs for Sq < {root}" + (f", {float(limit):.1f} for many keys" if limit.is_number and limit.is_finite else "")
    return text
