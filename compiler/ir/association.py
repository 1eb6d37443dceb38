"""The association engine: in what order a product of several tensors is taken, which products of constants are kept, and which edge is cached.

A linear region of a graph, between two barriers (softmax, a nonlinearity, rotary), is an einsum of operands with named indices:

    score[b, h, i, j] = sum over m, p, l of  x[b, i, m] WQ[h, p, m] WUK[h, p, l] c[b, j, l]          constants WQ, WUK; c is cached

Heads are an index that several operands carry to the result (a batch index), a norm's weight is a diagonal (one index, in common with its matrix), 1/rms a row
scalar (the indices of a token). Rotary multiplies by a rotation that depends on the position: it commutes with complex scalars of its pairs and nothing else, so
it is a barrier, and what stands behind it is an operand of its own.

Every order is a binary tree, and dynamic programming over subsets of at most 8 operands visits all of them. A tree costs

    flops   2 (product of all index sizes of a contraction) where something is summed, 1 otherwise; a product of constants alone is taken once, for nothing
    moved   bytes that its contractions read and write; a tensor that one kernel hands to its next step (scores, attention weights) is not moved

both polynomials in the sizes, which may be symbols (batch B, new tokens Sq, cached tokens C). Which of two polynomials is smaller may depend on the sizes, so a subset keeps every tree that is
not *dominated*: none whose coefficients are all at least another's. Roofline time is max(flops / peak, moved / bandwidth), `Plan.seconds`; `crossover` solves for the size at which two plans
do equal work. Exact for the model of cost; subset dynamic programming of products: Lam, Sadayappan, Wenger, Parallel Processing Letters 1997; the MLA numbers: DeepSeek-V3, 2412.19437.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import sympy
import torch
from sympy import Expr, Integer
from sympy.polys.domains import QQ
from sympy.polys.rings import sring
from torch import Tensor

ROLES = ("constant", "activation", "cached")
MAX_OPERANDS = 8  # 3^8 / 2 splits of subsets: well under a second


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of a product. indices: one name a dim; role: "constant" (weights), "activation" (computed by this call), "cached" (of all tokens, computed by earlier calls but for the new ones).

    on_chip: the kernel that reads it has just made it (attention weights): reading it moves nothing.
    """

    name: str
    indices: tuple[str, ...]
    role: str
    on_chip: bool = False

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"{self.name} has the role {self.role!r}; expected one of {', '.join(ROLES)}")
        if len(set(self.indices)) != len(self.indices):
            raise ValueError(f"{self.name} has an index twice: {self.indices}")


@dataclasses.dataclass(frozen=True)
class Product:
    """out[output] = the sum over all other indices of the product of the operands.

    sizes: (index, size) pairs, ints or sympy; joint: ((indices, size), ...) for indices that do not run freely, as the pairs (i, j) under a causal mask.
    new: (index, size) pairs: how many of a cached index come with this call; with keep_cached a product of cached and constant operands may itself be what the cache holds, and
    costs its new part alone. together: indices that meet inside one kernel only: no tensor between two contractions has all of them (attention's queries and keys). fold: are products of constants taken once, ahead of the calls? itemsize: bytes an element.
    """

    operands: tuple[Operand, ...]
    output: tuple[str, ...]
    sizes: tuple[tuple[str, Expr | int], ...]
    joint: tuple[tuple[frozenset[str], Expr | int], ...] = ()
    new: tuple[tuple[str, Expr | int], ...] = ()
    keep_cached: bool = False
    together: frozenset[str] = frozenset()
    fold: bool = True
    output_on_chip: bool = False
    itemsize: int = 4

    def __post_init__(self):
        known = dict(self.sizes)
        if not 1 <= len(self.operands) <= MAX_OPERANDS:
            raise ValueError(f"a product of {len(self.operands)} operands; expected 1 to {MAX_OPERANDS}")
        if len({x.name for x in self.operands}) != len(self.operands):
            raise ValueError(f"two operands of one name: {[x.name for x in self.operands]}")
        used = {k for x in self.operands for k in x.indices}
        if missing := sorted((used | set(self.output)) - set(known)):
            raise ValueError(f"no size for the indices {missing}")
        if missing := sorted(set(self.output) - used):
            raise ValueError(f"no operand has the output's indices {missing}")


@dataclasses.dataclass(frozen=True)
class Cost:
    """flops and moved (bytes): polynomials of the sizes. held: bytes of folded constants; cached: bytes of what the cache holds instead of its operand."""

    flops: Expr = Integer(0)
    moved: Expr = Integer(0)
    held: Expr = Integer(0)
    cached: Expr = Integer(0)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(sympy.expand(a + b) for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def seconds(self, machine: Machine, sizes: Mapping | None = None) -> Expr:
        """Roofline time: the products or the memory, whichever takes longer; a number where ``sizes`` names all symbols."""
        return sympy.Max(self.flops.subs(sizes or {}) / machine.flops, self.moved.subs(sizes or {}) / machine.bandwidth)


@dataclasses.dataclass(frozen=True)
class Machine:
    """flops: FLOP/s of matrix products, bandwidth: bytes/s of memory. Only their ratio decides between plans."""

    flops: Expr | int
    bandwidth: Expr | int


#: two CPU cores in float32: 200 GFLOP/s to 20 GB/s. GPUs are near 14 in float32 (H200: 67 TFLOP/s to 4.8 TB/s), 200 in half types
CPU = Machine(10, 1)


@dataclasses.dataclass(frozen=True)
class Tree:
    """An order: an operand, or the contraction of two trees. folded: a product of constants, taken ahead; kept: it is what the cache holds."""

    indices: tuple[str, ...]
    role: str
    operand: Operand | None = None
    left: Tree | None = None
    right: Tree | None = None
    folded: bool = False
    kept: bool = False

    def __str__(self) -> str:
        if self.operand is not None:
            return self.operand.name
        inner = f"{self.left} {self.right}"
        return f"[{inner}]" if self.folded else f"<{inner}>" if self.kept else f"({inner})"

    def names(self) -> frozenset[str]:
        """The operands below."""
        return frozenset({self.operand.name}) if self.operand is not None else self.left.names() | self.right.names()

    def nodes(self) -> Iterable[Tree]:
        """All contractions, inner ones first."""
        if self.operand is None:
            yield from self.left.nodes()
            yield from self.right.nodes()
            yield self


@dataclasses.dataclass(frozen=True)
class Plan:
    """One tree for every product of a region, and what they cost together."""

    trees: tuple[Tree, ...]
    cost: Cost

    def __str__(self) -> str:
        return "; ".join(str(t).removeprefix("(").removesuffix(")") if t.operand is None and not (t.folded or t.kept) else str(t) for t in self.trees)


# ---------------------------------------------------------------- all orders of one product


def leaf(operand: Operand) -> Tree:
    return Tree(operand.indices, operand.role, operand)


def contracted(product: Product, left: Tree, right: Tree, kept: bool = False) -> Tree:
    """The contraction of two trees: an index that nothing else needs is summed away."""
    below = left.names() | right.names()
    needed = set(product.output).union(*(x.indices for x in product.operands if x.name not in below))
    indices = tuple(k for k in dict.fromkeys(left.indices + right.indices) if k in needed)
    roles = {left.role, right.role}
    role = "constant" if roles == {"constant"} else "cached" if roles <= {"constant", "cached"} else "activation"
    return Tree(indices, role, None, left, right, product.fold and role == "constant", kept)


def is_allowed(product: Product, tree: Tree, is_root: bool) -> bool:
    """Is its result a tensor that may be in memory?"""
    return is_root or not product.together or not product.together <= set(tree.indices)


def may_keep(product: Product, tree: Tree) -> bool:
    """Can the cache hold this product instead of what it holds? One cached operand and constants: then the parts of earlier tokens do not change."""
    return product.keep_cached and tree.operand is None and tree.role == "cached" and sum(x.role == "cached" and x.name in tree.names() for x in product.operands) == 1


class _Counting:
    """Costs as elements of a polynomial ring: sympy's expressions would take most of the time."""

    def __init__(self, product: Product):
        self.product = product
        sizes, joint, new = dict(product.sizes), dict(product.joint), dict(product.new)
        everything = [sympy.sympify(e) for e in (*sizes.values(), *joint.values(), *new.values())]
        filler = sympy.Dummy("one")  # a ring needs a generator
        ring, elements = sring([filler, *everything], domain=QQ)
        elements = iter(elements[1:])
        self.ring = ring
        self.sizes = {k: next(elements) for k in sizes}
        self.joint = sorted(((k, next(elements)) for k in joint), key=lambda pair: -len(pair[0]))
        self.new = {k: next(elements) for k in new}

    def volume(self, indices: Iterable[str], new: bool = False):
        """How many elements these indices run over; new: of a cached index the new ones alone."""
        left, total = set(indices), self.ring.one
        if not new:
            for group, size in self.joint:
                if group <= left:
                    left -= group
                    total *= size
        for k in left:
            total *= self.new.get(k, self.sizes[k]) if new else self.sizes[k]
        return total

    def elements(self, indices: Iterable[str], new: bool = False):
        """Elements of a tensor in memory: a rectangle, whatever part of it is used."""
        return functools.reduce(lambda total, k: total * (self.new.get(k, self.sizes[k]) if new else self.sizes[k]), indices, self.ring.one)

    def step(self, tree: Tree, is_root: bool) -> tuple:
        """(flops, moved, held, cached) of the last contraction of a tree."""
        zero, item = self.ring.zero, self.product.itemsize
        if tree.folded:
            return zero, zero, zero, zero
        union = set(tree.left.indices) | set(tree.right.indices)
        sums = len(union) > len(tree.indices)
        flops = self.volume(union, tree.kept) * (2 if sums else 1)
        moved = sum((self.elements(x.indices, tree.kept) * item for x in (tree.left, tree.right) if not (x.operand is not None and x.operand.on_chip)), zero)
        if not (is_root and self.product.output_on_chip):
            moved += self.elements(tree.indices, tree.kept) * item
        held = sum((self.elements(x.indices) * item for x in (tree.left, tree.right) if x.folded), zero)
        return flops, moved, held, self.elements(tree.indices) * item if tree.kept else zero


@functools.lru_cache(256)
def orders(product: Product) -> tuple[Plan, ...]:
    """Every association that is the cheapest for some sizes and some machine, and maybe a few that are not: those that no other dominates."""
    counting = _Counting(product)
    zero = (counting.ring.zero,) * 4
    n = len(product.operands)
    best: dict[int, list[tuple[tuple, Tree]]] = {1 << k: [(zero, leaf(x))] for k, x in enumerate(product.operands)}
    everything = (1 << n) - 1
    for subset in range(1, everything + 1):
        if subset in best:
            continue
        found: list[tuple[tuple, Tree]] = []
        lowest = subset & -subset
        part = (subset - 1) & subset
        while part:  # every split once: the part with the lowest operand is the left one
            if part & lowest:
                for (a, left), (b, right) in itertools.product(best[part], best[subset ^ part]):
                    tree = contracted(product, left, right)
                    if not is_allowed(product, tree, subset == everything):
                        continue
                    for candidate in (tree, dataclasses.replace(tree, kept=True)) if may_keep(product, tree) else (tree,):
                        _add(found, tuple(x + y + z for x, y, z in zip(a, b, counting.step(candidate, subset == everything))), candidate)
            part = (part - 1) & subset
        best[subset] = found
    return tuple(_plan(cost, tree) for cost, tree in best[everything])


def _plan(cost, tree: Tree) -> Plan:
    return Plan((tree,), Cost(*(e.as_expr().expand() for e in cost)))


def dominates(a: Sequence, b: Sequence) -> bool:
    """Is a at most b for all sizes? Sizes are not negative, so it is enough that no coefficient of b - a is. Equal work: the one that holds less."""
    differences = [y - x for x, y in zip(a[:2], b[:2])]
    if any(c < 0 for d in differences for c in d.values()):
        return False
    return any(differences) or not any(c < 0 for x, y in zip(a[2:], b[2:]) for c in (y - x).values())


def _add(found: list, cost: tuple, tree: Tree) -> None:
    """Into a frontier of (cost, tree), unless one of it dominates; what is dominated leaves. A subset's trees all have the same indices, so that nothing else tells them apart."""
    if any(dominates(known, cost) for known, _ in found):
        return
    found[:] = [entry for entry in found if not dominates(cost, entry[0])]
    found.append((cost, tree))


def order(product: Product, nested) -> Plan:
    """The plan of one given order: operand names nested in pairs, (("x", "W"), "c")."""
    counting, operands = _Counting(product), {x.name: leaf(x) for x in product.operands}

    def build(part, is_root: bool = False):
        if isinstance(part, str):
            return (counting.ring.zero,) * 4, operands[part]
        (a, left), (b, right) = map(build, part)
        tree = contracted(product, left, right)
        return tuple(x + y + z for x, y, z in zip(a, b, counting.step(tree, is_root))), tree

    return _plan(*build(nested, True))


def together(parts: Sequence[Plan]) -> Plan:
    """The plan of a region from those of its products."""
    return Plan(tuple(p.trees[0] for p in parts), functools.reduce(Cost.__add__, (p.cost for p in parts), Cost()))


def plans(products: Sequence[Product]) -> tuple[Plan, ...]:
    """Plans of a region of several products: one order for each."""
    return tuple(map(together, itertools.product(*map(orders, products))))


def everything(product: Product) -> list[Plan]:
    """All association trees, by brute force: what `orders` is tested against. (2n - 3)!! of them: 945 for six operands."""
    counting = _Counting(product)

    def trees(names: tuple[Operand, ...]):
        if len(names) == 1:
            yield (counting.ring.zero,) * 4, leaf(names[0])
            return
        first, rest = names[0], names[1:]
        for size in range(len(rest)):
            for others in itertools.combinations(rest, size):
                right = tuple(x for x in rest if x not in others)
                for (a, x), (b, y) in itertools.product(list(trees((first, *others))), list(trees(right))):
                    tree, is_root = contracted(product, x, y), len(names) == len(product.operands)
                    for candidate in () if not is_allowed(product, tree, is_root) else (tree, dataclasses.replace(tree, kept=True)) if may_keep(product, tree) else (tree,):
                        yield tuple(s + t + u for s, t, u in zip(a, b, counting.step(candidate, is_root))), candidate

    return [_plan(cost, tree) for cost, tree in trees(product.operands)]


# ---------------------------------------------------------------- choosing


def cheapest(candidates: Sequence[Plan], machine: Machine, sizes: Mapping | None = None) -> Plan:
    """The plan of least roofline time at these sizes; the first of several equal ones."""
    sizes = sizes or {}
    return min(candidates, key=lambda p: _seconds(p.cost, tuple(sizes))(float(machine.flops), float(machine.bandwidth), *sizes.values()))


@functools.lru_cache(4096)
def _seconds(cost: Cost, symbols: tuple):
    """(FLOP/s, bytes/s, *sizes) -> seconds, as a function of numbers: sympy's substitution takes a millisecond."""
    work = sympy.lambdify(symbols, (cost.flops, cost.moved), "math")

    def seconds(flops, bandwidth, *sizes):
        done, moved = work(*sizes)
        return max(done / flops, moved / bandwidth)

    return seconds


def best_somewhere(candidates: Sequence[Plan], machine: Machine, grid: Sequence[Mapping]) -> list[Plan]:
    """The plans that are cheapest at some point of a grid of sizes, in order of their first point."""
    found = []
    for sizes in grid:
        if (plan := cheapest(candidates, machine, sizes)) not in found:
            found.append(plan)
    return found


def crossover(a: Plan, b: Plan, symbol: sympy.Symbol, of: str = "flops") -> list[Expr]:
    """The positive values of a size at which both plans do the same work (``of``: "flops" or "moved"), as expressions of the other sizes; [] where one is always the cheaper."""
    difference = sympy.factor(sympy.expand(getattr(a.cost, of) - getattr(b.cost, of)))
    if symbol not in difference.free_symbols:
        return []
    positive = {s: sympy.Symbol(s.name, positive=True) for s in difference.free_symbols}
    back = {v: k for k, v in positive.items()}
    roots = sympy.solve(difference.xreplace(positive), positive[symbol])
    return [sympy.simplify(r).xreplace(back) for r in roots if r.is_positive is not False and not r.has(sympy.I)]


# ---------------------------------------------------------------- evaluation


def evaluate(tree: Tree, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tree on real tensors by torch.einsum, dims in the order of ``tree.indices``."""
    if tree.operand is not None:
        return tensors[tree.operand.name]
    return torch.einsum(equation(tree), evaluate(tree.left, tensors), evaluate(tree.right, tensors))


def equation(tree: Tree) -> str:
    """The einsum equation of a tree's last contraction: "abc,cd->abd"."""
    letters = {k: chr(ord("a") + n) for n, k in enumerate(dict.fromkeys(tree.left.indices + tree.right.indices))}
    left, right, out = ("".join(letters[k] for k in indices) for indices in (tree.left.indices, tree.right.indices, tree.indices))
    return f"{left},{right}->{out}"
