"""canonicalise: the normal form of a captured graph, so that no rewrite respells what means the same

First in-place ops become values (functionalise.py), then every node goes through the rows of this file (`@row(targets)`: a
builder that returns the new spelling, or None to leave the node), equal pure nodes become one, and dead ones go (merge.py).

    x.pow(2), x.square()                    ->  x * x
    1 - x, x - 1                            ->  -x + 1, x + -1
    x / 8                                   ->  x * 0.125              (powers of two: exact; x / 3 stays)
    x.float(), x.type_as(y), _to_copy       ->  aten.to.dtype(x, dtype)
    view, flatten, unflatten, view_as       ->  aten.reshape(x, sizes) (after functionalisation a view need not alias)
    t, mT, transpose, movedim               ->  aten.permute(x, dims)  with dims >= 0, successive ones composed
    einsum("btd,dhk->bthk", x, weight)      ->  matmul and views       (einsum.py; its sums are a library's too)
    dropout off, to and contiguous that do nothing, full slices, detach without grad  ->  x

Never changes a result: a row is exact in floating point, and a replacement that would have another dtype, shape, or for a graph
output another layout or aliasing, is dropped. Gradients stay: detach is dropped only where nothing requires grad.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..compiler.ir.graph import argument, is_call, is_tensor, value
from .einsum import as_matmul
from .functionalise import emit, faking, functionalise, requires_grad, storages, written
from .merge import drop_dead, is_inactive_dropout, merge_equal, reaching_output

NAME = "canonicalise"
aten = torch.ops.aten
ROWS: dict[object, Callable] = {}
_END = 2**63 - 1  # a slice that was written without an end


def canonicalise(gm: GraphModule) -> GraphModule:
    """Bring gm.graph to its normal form, in place; returns gm. New nodes have meta["val"] and the stack trace of what they replace."""
    _drop_inactive_dropout(gm.graph)
    frozen = functionalise(gm)
    with faking(gm.graph):
        _Rewriter(gm.graph, frozen).run()
    merge_equal(gm.graph, frozen)
    drop_dead(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


transform = canonicalise  # what the pass driver calls: a normalisation, which makes no fused op and reports nothing


def row(*targets):
    """``build(at, node, *args, **kwargs)`` is the new spelling of a call of one of these; None leaves it. `at` emits a call."""
    def register(build):
        ROWS.update(dict.fromkeys(targets, build))
        return build

    return register


class _Rewriter:
    def __init__(self, graph: Graph, frozen: set[int]):
        self.graph, self.frozen = graph, frozen
        self.grads = requires_grad(graph)
        self.outputs = reaching_output(graph)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            build = ROWS.get(node.target) if node.op == "call_function" else None
            if build is None or any(storages(n) & self.frozen for n in (node, *node.all_input_nodes)):
                continue
            made: list[Node] = []

            def at(target, *args, node=node, made=made, **kwargs):
                rewritten = ROWS.get(target)
                new = emit(self.graph, node, target, *args, **kwargs)
                made.append(new)
                if rewritten is not None:  # a row may use what another row respells
                    return rewritten(at, new, *args, **kwargs) or new
                return new

            at.requires_grad = self.grads.__contains__
            with self.graph.inserting_before(node):
                new = build(at, node, *node.args, **node.kwargs)
            if new is not None and new is not node and self._may_replace(node, new, made):
                node.replace_all_uses_with(new)
                if node in self.grads:
                    self.grads.update(made)
                if node in self.outputs:
                    self.outputs.update([new, *made])
                self.graph.erase_node(node)
            for extra in reversed(made):
                if not extra.users:
                    self.graph.erase_node(extra)

    def _may_replace(self, node: Node, new: Node, made: list[Node]) -> bool:
        old_value, new_value = value(node), value(new)
        if not is_tensor(node):
            return True
        if old_value.dtype != new_value.dtype or old_value.device != new_value.device or not _same(old_value.shape, new_value.shape):
            return False
        if node not in self.outputs:
            return True
        # Where the value leaves the graph: the layout must be eager's, and so must what it shares its storage with.
        same_layout = _same(old_value.stride(), new_value.stride())
        sources = {s for a in node.all_input_nodes for s in storages(a)}
        return same_layout and (storages(node) & sources) == (storages(new) & sources)


def _same(a, b) -> bool:
    """Are two lists of sizes known to be equal, without a guard?"""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b))


# ---------------------------------------------------------------- arithmetic


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_float(x) -> bool:
    return is_tensor(x) and value(x).dtype.is_floating_point


@row(aten.square.default)
def _(at, node, x):
    return at(aten.mul.Tensor, x, x)


@row(aten.pow.Tensor_Scalar)
def _(at, node, x, exponent):
    """Only the square: ATen's pow(-0.0, 0.5) is 0 where sqrt gives -0.0, and the cube is rounded in another order."""
    return at(aten.mul.Tensor, x, x) if is_number(exponent) and exponent == 2 and is_float(x) else None


_PER_TENSOR = {aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor, aten.mul.Scalar: aten.mul.Tensor, aten.div.Scalar: aten.div.Tensor}


@row(*_PER_TENSOR)
def _(at, node, *args, **kwargs):
    return at(_PER_TENSOR[node.target], *args, **kwargs)


@row(aten.mul.Tensor)
def _(at, node, x, y):
    if not is_tensor(x) and is_tensor(y):
        return at(aten.mul.Tensor, y, x)  # 2 * x  ->  x * 2
    if is_number(y) and is_float(x):
        return x if y == 1 else at(aten.neg.default, x) if y == -1 else None
    return None


@row(aten.add.Tensor)
def _(at, node, x, y, alpha=1):
    return at(aten.add.Tensor, y, x) if alpha == 1 and not is_tensor(x) and is_tensor(y) else None


@row(aten.sub.Tensor)
def _(at, node, x, y, alpha=1):
    return at(aten.add.Tensor, x, -y) if is_float(x) and is_number(y) and is_number(alpha) and alpha == 1 else None


@row(aten.rsub.Scalar, aten.rsub.Tensor)
def _(at, node, x, y, alpha=1):
    """rsub(x, y) is y - x."""
    if isinstance(alpha, Node) or alpha != 1:
        return None
    if is_tensor(y):
        return at(aten.sub.Tensor, y, x)
    return at(aten.add.Tensor, at(aten.neg.default, x), y) if is_float(x) else None


@row(aten.div.Tensor)
def _(at, node, x, y):
    """x / c is x * (1/c) exactly when c is a power of two whose inverse is a normal number in every dtype."""
    if not is_number(y) or not is_float(x) or y == 0 or not math.isfinite(y):
        return None
    mantissa, exponent = math.frexp(y)
    return at(aten.mul.Tensor, x, 1.0 / y) if abs(mantissa) == 0.5 and abs(exponent) <= 12 else None


# ---------------------------------------------------------------- casts


@row(aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
def _(at, node, x, *args, **kwargs):
    """One cast, aten.to.dtype(x, dtype), where device and layout stay; nothing at all where the dtype stays too."""
    old, new = value(x), value(node)
    if not is_tensor(x) or old.device != new.device or old.layout != new.layout:
        return None
    if old.dtype == new.dtype:
        return x if storages(x) == storages(node) else None  # eager returned x itself; else it made a copy
    memory_format = kwargs.get("memory_format")
    if memory_format not in (None, torch.preserve_format) or isinstance(args[-1] if args else None, torch.memory_format):
        return None
    if node.target is aten.to.dtype and len(args) == 1 and not kwargs:
        return None
    return at(aten.to.dtype, x, new.dtype)


# ---------------------------------------------------------------- values that use only another tensor's type or size

_FILLED = {aten.new_ones.default: 1, aten.ones_like.default: 1, aten.new_zeros.default: 0, aten.zeros_like.default: 0}


@row(*_FILLED, aten.new_full.default, aten.full_like.default)
def _(at, node, x, *args, **kwargs):
    """x.new_ones(n), ones_like(x) -> full(n, 1): a mask made "like the scores" does not read them."""
    known = value(node)
    like = node.target in (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default)
    if known.layout != torch.strided or kwargs.get("memory_format") not in (None, torch.preserve_format) or (like and not known.is_contiguous()):
        return None
    number = _FILLED[node.target] if node.target in _FILLED else args[0 if like else 1]
    shape = [s if isinstance(s, int) else at(aten.sym_size.int, x, d) for d, s in enumerate(known.shape)] if like else args[0]
    return at(aten.full.default, shape, number, dtype=known.dtype, device=known.device)


@row(aten.sym_size.int)
def _(at, node, x, dim):
    """A size that an input of the graph also has is read there: asking a score for its size would keep it alive."""
    wanted = value(node)
    for source in node.graph.nodes:
        if source.op != "placeholder":
            break
        if isinstance(value(source), torch.SymInt) and isinstance(wanted, torch.SymInt) and value(source).node.expr == wanted.node.expr:  # it may be known by now: an input's that equals a weight's
            return source
    return None


# ---------------------------------------------------------------- views


@row(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default, aten.flatten.using_ints, aten.unflatten.int)
def _(at, node, x, *args):
    """reshape(x, sizes); a reshape of a reshape is one; a reshape to the same sizes is none."""
    if _same(value(x).shape, value(node).shape):
        return x
    source = x.args[0] if is_call(x, aten.reshape.default) else x
    if node.target is aten.reshape.default and source is x:
        return None
    given = node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
    return at(aten.reshape.default, source, args[0] if given else _sizes_of(at, node, x))


def _sizes_of(at, node, x) -> list:
    """The sizes of a node that is a reshape of x; symbolic ones as products of x's, or those of whom it is to be like."""
    if node.target in (aten.view_as.default, aten.reshape_as.default, aten.expand_as.default):
        return [s if isinstance(s, int) else at(aten.sym_size.int, node.args[1], d) for d, s in enumerate(value(node).shape)]
    own = [s if isinstance(s, int) else at(aten.sym_size.int, x, d) for d, s in enumerate(value(x).shape)]
    if node.target is aten.unflatten.int:
        d = node.args[1] % len(own)
        made = [n if isinstance(n, int) else s for s, n in zip(node.args[2], value(node).shape[d:])]  # -1 is of this dimension: of a tensor without elements a reshape could not tell it
        return [*own[:d], *made, *own[d + 1:]]
    first, last = (argument(node, n, name, default) % max(len(own), 1) for n, name, default in ((1, "start_dim", 0), (2, "end_dim", -1)))
    if not own:
        return [1]
    merged = own[first]
    for s in own[first + 1:last + 1]:
        merged = merged * s if isinstance(merged, int) and isinstance(s, int) else at(operator.mul, merged, s)
    return [*own[:first], merged, *own[last + 1:]]


def _order(node, rank: int) -> list[int] | None:
    """For a permuting op: which dim of the argument each dim of the result is."""
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        a, b = (d % rank for d in node.args[1:3])
    elif node.target in (aten.mT.default, aten.t.default):
        a, b = (rank - 2, rank - 1) if rank > 1 else (0, 0)
    elif node.target is aten.numpy_T.default:
        return order[::-1]
    else:  # movedim
        sources, targets = ([d % rank for d in ([x] if isinstance(x, int) else x)] for x in node.args[1:3])
        rest = iter(d for d in order if d not in sources)
        moved = dict(zip(targets, sources))
        return [moved[d] if d in moved else next(rest) for d in order]
    order[a], order[b] = b, a
    return order


@row(aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.numpy_T.default, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int, aten.movedim.intlist)
def _(at, node, x, *args):
    rank = len(value(x).shape)
    if rank == 0:
        return x
    order = _order(node, rank)
    if is_call(x, aten.permute.default):
        order = [x.args[1][d] % rank for d in order]
        x = x.args[0]
    if order == list(range(rank)):
        return x
    if node.target is aten.permute.default and x is node.args[0] and order == list(node.args[1]):
        return None
    return at(aten.permute.default, x, order)


@row(aten.slice.Tensor)
def _(at, node, x, dim=0, start=None, end=None, step=1):
    return x if _same(value(node).shape, value(x).shape) and start in (None, 0) and step == 1 else None


row(aten.einsum.default)(as_matmul)

_PIECES = (aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default)


@row(operator.getitem)
def _(at, node, pieces, k):
    """chunk(x, n)[k], split(x, n)[k]  ->  a slice of x;  unbind(x, dim)[k]  ->  select(x, dim, k)"""
    if not is_call(pieces, aten.unbind.int, *_PIECES):
        return None
    x = pieces.args[0]
    if is_call(pieces, aten.unbind.int):
        return at(aten.select.int, x, argument(pieces, 1, "dim", 0), k)
    dim, wanted = argument(pieces, 2, "dim", 0) % value(x).dim(), pieces.args[1]
    if is_call(pieces, aten.chunk.default):
        total = value(x).shape[dim]
        wanted = -(-total // wanted) if isinstance(total, int) and total else None
    sizes = wanted[:k] if isinstance(wanted, (list, tuple)) else [wanted] * k
    own = value(node).shape[dim]
    if not all(isinstance(n, int) for n in (*sizes, own, *([] if isinstance(wanted, (list, tuple)) else [wanted]))):
        return None
    return at(aten.slice.Tensor, x, dim, sum(sizes), sum(sizes) + own)


@row(aten.index.Tensor)
def _(at, node, x, indices):
    """x[..., [-2], :], the constant a list of one or of neighbours, -> a slice: Falcon takes its key head so."""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    numbers = _numbers(given[0][1]) if len(given) == 1 else None
    if not numbers:
        return None
    d, total = given[0][0], value(x).shape[given[0][0]]
    if not isinstance(total, int) or not all(-total <= n < total for n in numbers):
        return None
    first = numbers[0] % total
    return at(aten.slice.Tensor, x, d, first, first + len(numbers)) if [n % total for n in numbers] == [*range(first, first + len(numbers))] else None


def _numbers(node) -> list[int] | None:
    """The elements of a small constant vector of integers in the graph; None for anything else."""
    while is_call(node, aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.clone.default, aten.to.dtype, aten.detach.default):
        node = node.args[0]
    if not isinstance(node, Node) or node.op != "get_attr" or node.graph.owning_module is None or value(node).dtype not in (torch.int32, torch.int64) or value(node).dim() != 1 or value(node).numel() > 64:
        return None
    known = getattr(node.graph.owning_module, node.target, None)
    return known.tolist() if isinstance(known, torch.Tensor) and type(known) is torch.Tensor and not any(written(user) for user in node.users) else None


@row(aten.slice_scatter.default)
def _(at, node, x, src, dim=0, start=None, end=None, step=1):
    return src if start in (None, 0) and end in (None, _END) and step == 1 else None


# ---------------------------------------------------------------- what does nothing


@row(aten.expand_as.default)
def _(at, node, x, other):
    """Of other it reads the sizes alone."""
    return at(aten.expand.default, x, _sizes_of(at, node, x))


@row(aten.alias.default, aten.contiguous.default, aten.expand.default)
def _(at, node, x, *args, **kwargs):
    return x if storages(x) == storages(node) and _same_layout(x, node) else None


@row(aten.clone.default, aten.lift_fresh_copy.default, aten.lift_fresh.default)
def _(at, node, x, **kwargs):
    """A copy that nobody can tell from its source: same strides, and it does not leave the graph (see _may_replace)."""
    return x if _same_layout(x, node) else None


def _same_layout(x: Node, y: Node) -> bool:
    a, b = value(x), value(y)
    return _same(a.shape, b.shape) and _same(a.stride(), b.stride())


@row(aten.detach.default)
def _(at, node, x):
    return x if not at.requires_grad(x) else None


def _drop_inactive_dropout(graph: Graph) -> None:
    """Eager returns the input itself, so later writes to either are seen in both; its fake value claims a copy. Hence before all else."""
    for node in list(graph.nodes):
        if is_inactive_dropout(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
