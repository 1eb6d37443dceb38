"""Which nodes of a graph behind AOT share a kernel.

Three ideas. *Depth*: how many calls that stay calls (matmuls, attention, library ops) lie before a node; nodes of one depth cannot
depend on each other through one, so groups of one depth are convex but for each other. *Space*: a group runs over one index
space: pointwise nodes of one number of elements, reductions over the same columns of it, and values of its rows. *Free* nodes
(positions, masks, constants: nothing is read) belong to no group; whoever needs one computes it.

Views are never materialised: a value is lifted through them, and a group's result that is needed as a view is stored as it is
and viewed outside. An update in place (of a KV cache) is a call; what reads its memory is of a depth behind it, and before the next one (memory_order.py).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable

import networkx as nx
import sympy
import torch
from torch.fx import GraphModule, Node

from ..compiler.ir.graph import is_tensor, shape, value
from ..compiler.ir.index import groups_of_dims
from ..compiler.ir.lift import POINTWISE, ROWS
from ..compiler.ir.views import VIEWS
from .liveness import is_inplace
from .memory_order import memory_order

aten = torch.ops.aten
#: op -> kind; over dims args[1], kept if args[2]
REDUCTIONS = {aten.sum.dim_IntList: "sum", aten.mean.dim: "sum", aten.amax.default: "max", aten.amin.default: "min", aten.sum.default: "sum", aten.mean.default: "sum"}
#: rows of the lifting table that stay calls: products of matrices (the library's), running sums (of a constant alone), dropout
STAY = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default, aten.baddbmm.default, aten.einsum.default, aten.cumsum.default, aten.dropout.default}
COPIES = {aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_EXPENSIVE = {aten.exp.default, aten.exp2.default, aten.log.default, aten.tanh.default, aten.sigmoid.default, aten.sin.default, aten.cos.default, aten.erf.default, aten.silu.default, aten.gelu.default, aten.pow.Tensor_Scalar,
              aten.pow.Scalar, aten.pow.Tensor_Tensor, aten.embedding.default, aten.index.Tensor, aten.index_select.default}


def is_view(node: Node) -> bool:
    """Does the node only rename its input's elements, without a copy?"""
    return node.op == "call_function" and node.target in VIEWS and node.target not in COPIES and node.target not in (aten.repeat.default, aten.repeat_interleave.self_int, aten.flip.default)


def computes(node: Node, device: str) -> bool:
    """May the node be part of a kernel?"""
    if node.op != "call_function" or not is_tensor(node) or is_view(node):
        return False
    known = value(node)
    if known.device.type != device or known.dtype not in DTYPES or type(known).__name__ != "FakeTensor" or known.layout != torch.strided:
        return False
    if not (node.target in POINTWISE or node.target in ROWS or node.target in REDUCTIONS) or node.target in STAY:
        return False
    if node.target in REDUCTIONS and (not known.dtype.is_floating_point or 0 in value(node.args[0]).shape):
        return False
    return all(value(a).dtype in DTYPES for a in node.all_input_nodes if is_tensor(a)) and 0 not in known.shape


def numel(node: Node) -> sympy.Expr:
    return sympy.Mul(*shape(node))


def regroups(a, b) -> bool:
    """Does every dim of one shape split into dims of the other, or the other way round?"""
    return all(p1 - p0 == 1 or q1 - q0 == 1 for (p0, p1), (q0, q1) in groups_of_dims([n for n in a if n != 1], [n for n in b if n != 1]))


def reduced_dims(node: Node) -> tuple[int, ...]:
    """The dims of its input over which a reduction runs."""
    if not (rank := len(shape(node.args[0]))):
        return ()
    dims = node.args[1] if len(node.args) > 1 and node.target not in (aten.sum.default, aten.mean.default) else None
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(sorted(d % rank for d in dims)) if dims else tuple(range(rank))


@dataclasses.dataclass(eq=False)
class Group:
    """Nodes that share an index space. full: its number of elements; rows: that of a reduction's result, None without one."""

    depth: int
    full: sympy.Expr
    rows: sympy.Expr | None = None
    shapes: list[list[sympy.Expr]] = dataclasses.field(default_factory=list)  # of its nodes that run over the whole space
    nodes: list[Node] = dataclasses.field(default_factory=list)

    def takes(self, node: Node) -> bool:
        """Does a node run over this space?"""
        if node.target in REDUCTIONS:
            rows = numel(node)
            return numel(node.args[0]) == self.full and (self.rows is None or self.rows == rows) and self.fits(shape(node.args[0]))
        return numel(node) == self.full and self.fits(shape(node)) or numel(node) == self.rows

    def fits(self, sizes) -> bool:
        """Is a shape one of these but for dims split or merged? [9, 16] and [2, 9, 8] have as many elements and no index in common."""
        return all(regroups(sizes, known) for known in self.shapes[:1])

    def add(self, node: Node) -> None:
        runs_over = node.args[0] if node.target in REDUCTIONS else node
        if numel(runs_over) == self.full:
            self.shapes.append(shape(runs_over))
        self.nodes.append(node)


def _is_larger(a, b) -> bool:
    if a.is_Integer and b.is_Integer:
        return a >= 4 * b
    return b.is_Integer or bool(sympy.cancel(a / b).is_Integer and sympy.cancel(a / b) >= 4)


class Partition:
    """Groups of a graph. ``outside``: nodes that must stay calls."""

    def __init__(self, gm: GraphModule, outside: set[Node], device: str):
        self.order = {node: k for k, node in enumerate(gm.graph.nodes)}
        self.computed = {node for node in gm.graph.nodes if node not in outside and computes(node, device)}
        self.device = device
        self.memory = memory_order(gm.graph)
        self.before_in_memory = self.memory.before(self.order) if self.memory else {}
        self.copied = {n for n in gm.graph.nodes if is_view(n) and self.memory.copies_quietly(n)} if self.memory else set()  # what they hold is not what their source holds later
        self.free = self._free(gm)
        self.depth = self._depths(gm)
        self.group_of: dict[Node, Group] = {}
        self.before = nx.DiGraph()  # group -> group that reads it, within one depth
        for node in gm.graph.nodes:
            if node in self.computed and node not in self.free:
                self._place(node)
        for node in gm.graph.nodes:  # a free node that a call needs is computed once, with what leads to it
            if node in self.free and node in self.computed and any(user not in self.computed for user in _readers(node)):
                chain = [a for a in gm.graph.nodes if a in self.computed and a in self._ancestors(node)]
                group = Group(self.depth[node], numel(node), nodes=[*chain, node])
                self.before.add_node(group)
                self.group_of[node] = group

        for group in reversed(self.groups()):
            self._sink(group)
        self.launched = self.before.copy()  # the same between launches, each of several groups

    def _sink(self, group: Group) -> None:
        """A group that one other alone reads is computed there, at each place where it is read: a half negated for rotary's cat, a slice."""
        if group.rows is not None or any(n in self.free for n in group.nodes):
            return
        inside = set(group.nodes)
        readers = [user for node in group.nodes for user in _readers(node) if user not in inside]
        homes = {self.group_of.get(user) for user in readers}
        if len(homes) != 1 or None in homes or (home := homes.pop()).depth != group.depth:
            return
        once = len({id(user) for user in readers}) == len(readers) and all(user.target is aten.cat.default for user in readers)
        expensive = [n for n in group.nodes if n.target in _EXPENSIVE and not any(_gathers_alike(n, other) for other in home.nodes)]
        if not once and expensive and not (group.full == home.full and len(readers) == 1):
            return
        self._join(group, home, keeps_space=True)

    def _ancestors(self, node) -> set[Node]:
        found, stack = set(), list(node.all_input_nodes)
        while stack:
            a = stack.pop()
            if a in self.free and a not in found:
                found.add(a)
                stack += a.all_input_nodes
        return found

    def groups(self) -> list[Group]:
        """In the order of their first nodes."""
        found = dict.fromkeys(self.group_of[n] for n in sorted(self.group_of, key=self.order.__getitem__))
        return list(found)

    # ---- what is known of a node before it is placed

    def _free(self, gm) -> set[Node]:
        """Nodes that read nothing and compute nothing dear (positions, constants, masks of them), and small ones that large ones broadcast (1 + weight)."""
        free: set[Node] = set()
        for node in gm.graph.nodes:
            tensors = [a for a in node.all_input_nodes if is_tensor(a) or isinstance(value(a), (list, tuple))]  # a call's results are no constants
            cheap = node in self.computed and node.target not in _EXPENSIVE and node.target not in REDUCTIONS and node not in self.before_in_memory or is_view(node)
            if cheap and (all(a in free for a in tensors) or (all(a in free or a.op in ("placeholder", "get_attr") for a in tensors) and self._is_spread(node))):
                free.add(node)
        return free

    def _is_spread(self, node) -> bool:
        """Do all users run over at least four times as many elements?"""
        stack, own = list(node.users), numel(node)
        while stack:
            user = stack.pop()
            if is_view(user):
                stack += user.users
            elif user not in self.computed or user.target in REDUCTIONS or not _is_larger(numel(user), own):
                return False
        return not is_view(node) and bool(node.users)

    def _depths(self, gm) -> dict[Node, int]:
        depth: dict[Node, int] = {}
        for node in gm.graph.nodes:
            inside = node in self.computed or is_view(node)
            depth[node] = max((depth[a] for a in (*node.all_input_nodes, *self.before_in_memory.get(node, ()))), default=0)
            if not inside and node.op == "call_function" and (is_tensor_result(node) or is_inplace(node)) and not node.meta.get("kept"):
                depth[node] += 1
        for node in reversed(gm.graph.nodes):  # a value that nobody needs before a later depth is computed there, if that keeps nothing alive longer
            if not node.users or not (node in self.computed and node not in self.free or is_view(node)):
                continue
            wanted = min((depth[u] - (0 if u in self.computed or is_view(u) else 1) if u.op != "output" else depth[node]) for u in node.users)
            if wanted > depth[node] and (is_view(node) or self._may_wait(node)):
                depth[node] = wanted
        return depth

    def _may_wait(self, node) -> bool:
        inputs = [a for a in node.all_input_nodes if is_tensor(a)]
        kept = sum((numel(a) for a in inputs if a.op not in ("placeholder", "get_attr")), sympy.Integer(0))
        return bool((numel(node) - kept).is_nonnegative) and node not in self.before_in_memory

    def producers(self, node) -> list[Node]:
        """The computed nodes behind a node, through views."""
        found, stack = [], list(node.all_input_nodes)
        while stack:
            a = stack.pop()
            if is_view(a):
                stack += a.all_input_nodes
            elif a in self.group_of and a not in found:
                found.append(a)
        return found

    # ---- placing

    def _place(self, node) -> None:
        mine = [self.group_of[p] for p in self.producers(node) if self.group_of[p].depth == self.depth[node]]
        mine = list(dict.fromkeys(mine))
        group = None
        for candidate in mine:
            if candidate.takes(node) and self._may_join(candidate, mine):
                group = candidate
                break
        if group is None:
            reduces = node.target in REDUCTIONS
            group = Group(self.depth[node], numel(node.args[0]) if reduces else numel(node))
            self.before.add_node(group)
        if node.target in REDUCTIONS and group.rows is None:
            group.rows = numel(node)
        group.add(node)
        self.group_of[node] = group
        others = [other for other in mine if other is not group]
        self.before.add_edges_from((other, group) for other in others)  # all of them first: one may lie between another and this one
        for other in others:
            if self._can_merge(other, group):
                self._join(other, group)

    def _may_join(self, group, mine) -> bool:
        """No other producer's group may need this one's results."""
        return all(other is group or not nx.has_path(self.before, group, other) for other in mine)

    def _can_merge(self, first, second) -> bool:
        """Two groups of one space with nothing in between."""
        if first.full != second.full and not (second.rows is None and second.full == first.rows) or first.full == second.full and not all(map(second.fits, first.shapes[:1])):
            return False
        if first.rows is not None and second.rows is not None and first.rows != second.rows:
            return False
        return not any(s is not second and nx.has_path(self.before, s, second) for s in self.before.successors(first)) and not nx.has_path(self.before, second, first)

    def _join(self, first, second, keeps_space: bool = False) -> None:
        """first's nodes move to second."""
        for node in first.nodes:
            self.group_of[node] = second
        second.nodes = first.nodes + second.nodes
        if not keeps_space:
            second.shapes = first.shapes + second.shapes if first.full == second.full else first.shapes
            second.full = first.full
            second.rows = first.rows if first.rows is not None else second.rows
        for s in self.before.successors(first):
            if s is not second:
                self.before.add_edge(second, s)
        for p in self.before.predecessors(first):
            if p is not second:
                self.before.add_edge(p, second)
        self.before.remove_node(first)

    def siblings(self, groups: list[Group], reads: Callable[[Group], set[Node]], most: int) -> list[list[Group]]:
        """Groups of one depth that read a tensor in common and do not depend on each other: bundles that share a launch, of at most so many."""
        bundles: list[list[Group]] = []
        for group in groups:
            for bundle in bundles:
                if len(bundle) < most and any(reads(group) & reads(other) for other in bundle) and self.may_bundle(bundle[0], group):
                    self.bundle(bundle[0], group)
                    bundle.append(group)
                    break
            else:
                bundles.append([group])
        return bundles

    def may_bundle(self, first: Group, second: Group) -> bool:
        """May two groups share a launch? Neither needs the other, nor what is launched together with something that does."""
        return first.depth == second.depth and not nx.has_path(self.launched, first, second) and not nx.has_path(self.launched, second, first)

    def bundle(self, first: Group, second: Group) -> None:
        """The second is launched with the first, which stands for both from now on."""
        self.launched.add_edges_from([(p, first) for p in self.launched.predecessors(second)] + [(first, s) for s in self.launched.successors(second)])
        self.launched.remove_node(second)


def _gathers_alike(a: Node, b: Node) -> bool:
    """Do two embeddings look up the same rows, those of a table and their scales? What the second costs is a load behind the first one's index."""
    return a.target is b.target is aten.embedding.default and a.args[1] is b.args[1]


def _readers(node: Node) -> list[Node]:
    """The users of a node, through views."""
    found, stack = [], list(node.users)
    while stack:
        user = stack.pop()
        if is_view(user):
            stack += user.users
        else:
            found.append(user)
    return found


def is_tensor_result(node: Node) -> bool:
    """Does a call make new tensors (a tensor, or a tuple of them)? getitem does not."""
    known = node.meta.get("val")
    return getattr(node.target, "__name__", "") != "getitem" and (isinstance(known, torch.Tensor) or isinstance(known, (tuple, list)))
