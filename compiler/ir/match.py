"""Matching by a plain function: a fusion of fixed shape is written once, as pattern, reference and oracle.

    def scaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps))

    PATTERN = Pattern(scaled, canonicalise, x="rows width", weight="width")
    for node in graph.nodes:
        found = PATTERN.match(node)        # Found, Mismatch (a near miss, with the reason), or None

The function is traced on fakes, brought to the normal form by the canonicaliser it is given, and compared with the graph from
the root down. Tensor parameters match any tensor, float parameters any number or symbolic number; a parameter that is used
twice must be the same node or number in both places. Beyond the normal form,

- a product or sum matches in either order, and `READINGS` says what else a node may be read as: a / sqrt(b) as a * rsqrt(b);
- dims count from the end, so a pattern of rank 2 matches any rank;
- a cast to a wider float dtype changes no value and is looked through. Where the pattern rounds (to(x.dtype)), the graph must
  round to that dtype, and nowhere else: the pattern is traced again for the dtypes found, and every value must have its dtype;
- what the pattern computes from its first tensor must have no other consumer, since it would be computed twice.
"""
from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from .graph import argument, is_call, is_tensor, on_fakes, shape, size, source_of, value

aten = torch.ops.aten
COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.eq.Tensor, aten.ne.Tensor,
                         aten.logical_and.default, aten.logical_or.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor})
_DIMS = frozenset({"dim", "dims", "dim0", "dim1"})


@dataclasses.dataclass(frozen=True)
class Term:
    """A call that a graph node may be read as. ``nodes``: the nodes it stands for."""

    target: object
    args: tuple
    nodes: tuple[Node, ...]


# ---------------------------------------------------------------- readings: (node or term) -> another spelling of it


def _root_inverse(t: Term) -> Term | None:
    """1 / sqrt(v)  ->  rsqrt(v)"""
    inner = t.args[0]
    roots = (r for r in readings(inner) if r.target is aten.sqrt.default) if isinstance(inner, Node) and inner.op == "call_function" else ()
    return next((Term(aten.rsqrt.default, r.args[:1], (*t.nodes, *r.nodes)) for r in roots), None)


def _root_power(t: Term) -> Term | None:
    """v ** 0.5  ->  sqrt(v);  v ** -0.5  ->  rsqrt(v)"""
    root = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default}.get(t.args[1]) if isinstance(t.args[1], float) else None
    return Term(root, t.args[:1], t.nodes) if root is not None else None


def _quotient(t: Term) -> Term | None:
    """a / b  ->  a * (1 / b)"""
    a, b = t.args[:2]
    return Term(aten.mul.Tensor, (a, Term(aten.reciprocal.default, (b,), ())), t.nodes) if is_tensor(a) and is_tensor(b) else None


def _mean(t: Term) -> Term | None:
    """sum(x, dims) / n, sum(x, dims) * (1 / n)  ->  mean(x, dims), with n the number of elements summed"""
    total, n = t.args[:2]
    if not is_call(total, aten.sum.dim_IntList) or not total.args[1]:
        return None
    sizes = shape(total.args[0])
    count = functools.reduce(lambda a, b: a * b, (sizes[d] for d in total.args[1]))
    if isinstance(n, Node):
        known = value(n)
        equal = t.target is aten.div.Tensor and isinstance(known, torch.SymInt) and size(known) == count
    elif not count.is_Integer or int(count) == 0:
        return None
    else:
        equal = n == int(count) if t.target is aten.div.Tensor else n == 1.0 / int(count)
    return Term(aten.mean.dim, (*total.args[:2], argument(total, 2, "keepdim", False)), (*t.nodes, total)) if equal else None


def _variance(t: Term) -> Term | None:
    """var(x, dims, correction=0 or 1)  ->  var(x, dims, unbiased=False or True)"""
    x, dims, correction, keepdim = t.args
    correction = 1 if correction is None else correction
    return Term(aten.var.dim, (x, dims, correction == 1, keepdim), t.nodes) if dims and correction in (0, 1) else None


READINGS: dict[object, tuple[Callable[[Term], Term | None], ...]] = {
    aten.pow.Tensor_Scalar: (_root_power,),
    aten.reciprocal.default: (_root_inverse,),
    aten.div.Tensor: (_quotient, _mean),
    aten.mul.Tensor: (_mean,),
    aten.var.correction: (_variance,),
}


def readings(x: Node | Term) -> Iterator[Term]:
    """What a node may be read as, the node itself first."""
    term = x if isinstance(x, Term) else Term(x.target, _arguments(x), (x,))
    yield term
    for read in READINGS.get(term.target, ()):
        other = read(term)
        if other is not None:
            yield from readings(other)


def _arguments(node: Node) -> tuple:
    """All arguments of a call in the order of the schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return tuple(node.args)
    given = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
    return tuple(given[a.name] if a.name in given else a.default_value if a.has_default_value() else None for a in schema.arguments)


# ---------------------------------------------------------------- casts


def is_cast(x) -> bool:
    return is_call(x, aten.to.dtype) and value(x).dtype.is_floating_point and value(x.args[0]).dtype.is_floating_point


def is_widening(x) -> bool:
    """A cast that represents every value of its argument."""
    old, new = value(x.args[0]).dtype, value(x).dtype
    return torch.promote_types(old, new) == new


# ---------------------------------------------------------------- patterns


@dataclasses.dataclass
class Found:
    """Where a pattern occurs. tensors and scalars by parameter name: nodes, and numbers or nodes; covered: the nodes that the
    pattern computes, root among them."""

    pattern: Pattern
    root: Node
    tensors: dict[str, Node]
    scalars: dict[str, object]
    covered: frozenset[Node]

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (*self.tensors.values(), *(s for s in self.scalars.values() if isinstance(s, Node)))


@dataclasses.dataclass
class Mismatch:
    """The shape of the pattern is there, and something forbids it: why, and at which node."""

    reason: str
    node: Node
    root: Node
    cure: str = ""


@dataclasses.dataclass(frozen=True)
class _State:
    """One way to match so far."""

    bound: dict[str, object]
    pairs: dict[Node, object]
    covered: frozenset[Node]


class Pattern:
    """A plain function of tensors and floats (by its annotations) as a pattern.

    canonicalise: gm -> gm, the normal form that the graph is in. shapes: for every tensor its dims by name, for tracing alone.
    """

    def __init__(self, function: Callable, canonicalise: Callable, **shapes: str):
        self.function, self.canonicalise = function, canonicalise
        annotations = {name: str(p.annotation) for name, p in inspect.signature(function).parameters.items()}
        self.scalars = tuple(name for name, kind in annotations.items() if "float" in kind)
        self.tensors = tuple(name for name in annotations if name not in self.scalars)
        if set(shapes) != set(self.tensors):
            raise TypeError(f"{function.__name__}: shapes for {sorted(shapes)}, tensor parameters are {sorted(self.tensors)}")
        names = list(dict.fromkeys(dim for dims in shapes.values() for dim in dims.split()))
        self.shapes = {name: [3 + 2 * names.index(dim) for dim in dims.split()] for name, dims in shapes.items()}
        self.name = function.__name__
        self._exact: dict[tuple[torch.dtype, ...], tuple] = {}  # traces by the tensors' dtypes

    @functools.cached_property
    def _generic(self):
        return self._trace((torch.bfloat16,) * len(self.tensors))  # a narrow dtype: every cast of the function is in the graph

    def _trace(self, dtypes):
        """The function's graph for tensors of these dtypes, and its root."""
        environment = ShapeEnv()
        mode = FakeTensorMode(shape_env=environment)
        names = list(inspect.signature(self.function).parameters)
        with on_fakes(mode):
            values = {n: torch.empty(self.shapes[n], dtype=d) for n, d in zip(self.tensors, dtypes)}
            for number, name in enumerate(self.scalars):  # distinct hints, none of them a number that the function may contain
                source, hint = ConstantSource(f"scalar_{name}"), 0.3718 + number
                symbol = environment.create_unspecified_symbol(hint, source, DimDynamic.DYNAMIC)
                values[name] = environment.create_symfloatnode(symbol, hint=hint, source=source)
            gm = self.canonicalise(make_fx(self.function, pre_dispatch=True)(*(values[n] for n in names)))
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        for node, name in zip(placeholders, names):
            node.meta["parameter"] = name
        return gm, gm.graph.output_node().args[0]

    # ------------------------------------------------------------ matching

    def match(self, node: Node) -> Found | Mismatch | None:
        """The pattern with ``node`` as its result: a Found; a Mismatch where it is there but for dtypes or escapes; or None."""
        root = self._generic[1]
        if not is_tensor(node) or node.op != "call_function":
            return None
        failure = None
        for loose in _match(root, node, _State({}, {}, frozenset()), exact=False):
            if len(loose.bound) < len(self.tensors) + len(self.scalars) or not all(is_tensor(loose.bound[n]) for n in self.tensors):
                continue
            found = self._check(node, loose)
            if isinstance(found, Found):
                return found
            failure = failure or found
        return failure

    def _check(self, node: Node, loose: _State) -> Found | Mismatch:
        dtypes = tuple(value(loose.bound[n]).dtype for n in self.tensors)
        if dtypes not in self._exact:
            self._exact[dtypes] = self._trace(dtypes)
        exact = next((s for s in _match(self._exact[dtypes][1], node, _State({}, {}, frozenset()), exact=True)
                      if all(s.bound[n] is loose.bound[n] for n in self.tensors)), None)
        if exact is None:
            return Mismatch(f"rounds at other places than {self.name}: {_dtypes(loose, self)}", node, node)
        tensors = {n: exact.bound[n] for n in self.tensors}
        found = Found(self, node, tensors, {n: exact.bound[n] for n in self.scalars}, exact.covered)
        return self._escape(found) or found

    def _escape(self, found: Found) -> Mismatch | None:
        """A node computed from the first tensor, other than a cast of it, with a consumer outside."""
        first = found.tensors[self.tensors[0]]
        dependent = {first}
        inputs = set(found.tensors.values())
        for n in sorted(found.covered):
            if not dependent.isdisjoint(n.all_input_nodes):
                dependent.add(n)
        for n in sorted(found.covered - {found.root}):
            if n not in dependent or (is_cast(n) and n.args[0] in inputs):
                continue
            for user in n.users:
                if user not in found.covered:
                    where = source_of(user)
                    return Mismatch(f"{_name(n)} is also used outside, by {_name(user)}" + (f" ({where})" if where else ""), n, found.root,
                                    "keep the intermediate to itself")
        return None


def _name(node: Node) -> str:
    return "the graph's output" if node.op == "output" else str(node.target).removeprefix("aten.").split(".")[0]


def _dtypes(state: _State, pattern: Pattern) -> str:
    """'x is bfloat16, mean is bfloat16, ...': what a reader needs to see where the rounding is."""
    parts = [f"{name} is {_short(value(state.bound[name]).dtype)}" for name in pattern.tensors]
    seen = [n for n in sorted(state.covered) if not is_cast(n)]
    return ", ".join(parts + [f"{_name(n)} is {_short(value(n).dtype)}" for n in seen])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _match(p, g, state: _State, exact: bool) -> Iterator[_State]:
    """All ways to match the pattern value p with the graph value g. exact: dtypes must agree, and casts that round."""
    if not isinstance(p, Node):
        if _equal(p, g):
            yield state
        return
    if p.op == "placeholder":
        yield from _bind(p, g, state, exact)
        return
    if isinstance(g, Node) and is_cast(p) and is_cast(g) and (not exact or value(p).dtype == value(g).dtype):
        yield from _match(p.args[0], g.args[0], _covering(state, g), exact)
    if isinstance(g, Node) and is_cast(g) and (not exact or is_widening(g)):
        yield from _match(p, g.args[0], _covering(state, g), exact)
    if is_cast(p):
        if not exact or is_widening(p):
            yield from _match(p.args[0], g, state, exact)
        return
    if not isinstance(g, (Node, Term)) or isinstance(g, Node) and g.op != "call_function":
        return
    if exact and isinstance(g, Node) and is_tensor(p) and is_tensor(g) and value(p).dtype != value(g).dtype:
        return
    if p in state.pairs:
        if state.pairs[p] is g:
            yield state
        return
    for term in readings(g):
        if term.target is not p.target:
            continue
        args = _arguments(p)
        start = _State(state.bound, state.pairs | {p: g}, state.covered.union(term.nodes))
        yield from _match_all(p, args, term.args, start, exact)
        if p.target in COMMUTATIVE:
            yield from _match_all(p, args, (term.args[1], term.args[0], *term.args[2:]), start, exact)


def _match_all(p: Node, wanted: tuple, given: tuple, state: _State, exact: bool) -> Iterator[_State]:
    """Match argument lists one by one; names come from the pattern's schema."""
    names = [a.name for a in p.target._schema.arguments] if hasattr(p.target, "_schema") else [""] * len(wanted)
    given = (*given, *wanted[len(given):])  # a reading leaves arguments at the end out

    def rest(n: int, state: _State) -> Iterator[_State]:
        if n == len(wanted):
            yield state
        elif names[n] in _DIMS:
            if _from_the_end(wanted[n], wanted[0]) == _from_the_end(given[n], given[0]):
                yield from rest(n + 1, state)
        else:
            for after in _match(wanted[n], given[n], state, exact):
                yield from rest(n + 1, after)

    yield from rest(0, state)


def _bind(p: Node, g, state: _State, exact: bool) -> Iterator[_State]:
    name = p.meta["parameter"]
    if is_tensor(p):
        if is_tensor(g) and is_cast(g) and is_widening(g):  # beneath a widening cast first: the narrow tensor is cheaper to read
            yield from _bind(p, g.args[0], _covering(state, g), exact)
        if not is_tensor(g):
            return
    elif not (isinstance(g, (int, float)) and not isinstance(g, bool) or isinstance(g, Node) and isinstance(value(g), (torch.SymFloat, torch.SymInt))):
        return
    bound = state.bound.get(name)
    if bound is None:
        yield dataclasses.replace(state, bound=state.bound | {name: g})
    elif bound is g or not isinstance(bound, Node) and not isinstance(g, Node) and bound == g:
        yield state


def _covering(state: _State, node: Node) -> _State:
    return dataclasses.replace(state, covered=state.covered | {node})


def _equal(p, g) -> bool:
    if isinstance(p, (list, tuple)):
        return isinstance(g, (list, tuple)) and len(p) == len(g) and all(map(_equal, p, g))
    return not isinstance(g, (Node, Term)) and (p is g or p == g)


def _from_the_end(dims, tensor):
    """Dims as negative numbers, sorted."""
    rank = len(value(tensor).shape) if isinstance(tensor, Node) else None
    listed = [dims] if isinstance(dims, int) else list(dims or [])
    return sorted(d - rank if rank and d >= 0 else d for d in listed)
