"""cross_entropy: loss(float(softcap(logits)), targets)  ->  tileweld::cross_entropy(logits, targets), a loss a row, and their sum or mean

Start at aten.cross_entropy_loss, at nll_loss of a log-softmax, or at a gather of one (log-probabilities of given tokens). Look behind
the logits: a widening cast, a copy, a flattening of rows and a cap c tanh(x / c) that nobody else reads become part of the op, so that
a language model's loss reads the head's own output, shifted or not, in its own dtype and strides (Liger, 2410.10989, section 3.2).

Cost for N rows of V classes in bfloat16: eager casts to float32 (reads 2, writes 4 bytes an element), takes the log-softmax (reads 4,
writes 4) and keeps it; the backward reads 4, writes 4, casts back (reads 4, writes 2). The op reads 2 N V bytes, its backward reads and
writes 2 N V, and 2 N numbers are kept in place of 4 N V bytes. FLOPs are the same, about 4 N V.

Legality, each with a test that must be refused:
- no weights of classes; targets are int64 class numbers, not probabilities;
- the log-softmax is used by the loss alone, and runs over the classes.
A target out of bounds raises IndexError as in eager. Rounding: eager in half types rounds the log-softmax and the mean; the op rounds once.
"""
from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir.cross_entropy import NOTHING_IGNORED
from ..compiler.ir.graph import argument, insert, is_call, is_tensor, op_name, shape, value
from ..compiler.ir.match import is_cast, is_widening
from ..compiler.ir.rewrite import Match, Refusal, Refused

NAME = "cross_entropy"
aten = torch.ops.aten
REDUCTIONS = ("none", "mean", "sum")


@dataclasses.dataclass
class Loss:
    """root = reduction over rows of the loss of (logits, targets); class_dim of logits; sign 1, or -1 for log-probabilities."""

    root: Node
    logits: Node
    targets: Node
    class_dim: int
    reduction: str = "none"
    ignore_index: int = NOTHING_IGNORED
    smoothing: float = 0.0
    sign: int = 1


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every cross entropy of the graph, as a Match or a Refusal."""
    for node in list(graph.nodes):
        try:
            if is_call(node, aten.cross_entropy_loss.default):
                yield _match(_library(node))
            elif is_call(node, aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default):
                if is_call(node.args[0], aten.log_softmax.int, aten._log_softmax.default):
                    yield _match(_negative_log_likelihood(node))
            elif is_call(node, aten.gather.default) and is_call(node.args[0], aten.log_softmax.int, aten._log_softmax.default):
                if (loss := _gathered(node)) is not None:
                    yield _match(loss)
        except Refused as refused:
            yield refused.refusal


# ---------------------------------------------------------------- the three ways to write it


def _class_dim(node: Node) -> int:
    return 0 if len(shape(node)) == 1 else 1


def _library(node: Node) -> Loss:
    logits, targets = node.args[:2]
    weight, reduction, ignored, smoothing = (argument(node, k, n, d) for k, n, d in ((2, "weight", None), (3, "reduction", 1), (4, "ignore_index", -100), (5, "label_smoothing", 0.0)))
    _plain(node, targets, weight, ignored)
    if isinstance(smoothing, Node):
        raise Refused("the label smoothing is known only at run time", node, "make it a Python number that does not change")
    return Loss(node, logits, targets, _class_dim(logits), REDUCTIONS[reduction], ignored, float(smoothing))


def _negative_log_likelihood(node: Node) -> Loss:
    softmax, targets = node.args[:2]
    weight, reduction, ignored = (argument(node, k, n, d) for k, n, d in ((2, "weight", None), (3, "reduction", 1), (4, "ignore_index", -100)))
    _plain(node, targets, weight, ignored)
    loss = Loss(node, softmax.args[0], targets, _class_dim(softmax), REDUCTIONS[reduction], ignored)
    _alone(softmax, loss.class_dim, node)
    return loss


def _gathered(node: Node) -> Loss | None:
    """log_softmax(x, -1).gather(-1, t[..., None]), one class a row; a gather of several is something else."""
    softmax, dim, index = node.args[:3]
    rank = len(shape(softmax))
    if dim % rank != rank - 1 or shape(index)[-1] != 1 or shape(index)[:-1] != shape(softmax)[:-1] or argument(node, 3, "sparse_grad", False):
        return None
    _alone(softmax, rank - 1, node)
    return Loss(node, softmax.args[0], index, rank - 1, sign=-1)


def _plain(node: Node, targets: Node, weight, ignored) -> None:
    if weight is not None:
        raise Refused("the classes have weights", node, "weight the loss of each row (reduction='none') instead")
    if value(targets).dtype != torch.int64:
        raise Refused(f"the targets are {str(value(targets).dtype).removeprefix('torch.')}, expected int64 class numbers", node, "" if value(targets).dtype.is_floating_point else "targets.long()")
    if isinstance(ignored, Node):
        raise Refused("ignore_index is known only at run time", node, "make it a Python number that does not change")


def _alone(softmax: Node, class_dim: int, loss: Node) -> None:
    dim = softmax.args[1] % len(shape(softmax))
    if dim != class_dim:
        raise Refused(f"the log-softmax runs over dim {dim}, the classes are dim {class_dim}", softmax)
    for user in softmax.users:
        if user is not loss:
            raise Refused(f"the log-softmax is also used outside the loss, by {op_name(user)}", softmax, "take the entropy or the probabilities from the logits, or use F.cross_entropy")


# ---------------------------------------------------------------- what lies behind the logits


@dataclasses.dataclass
class Source:
    """logits [..., V] with the rows as they were before they were flattened; flattened: their number is now one dim."""

    node: Node
    softcap: float = 0.0
    flattened: bool = False


def _behind(node: Node, reads_through_rows: bool) -> Source:
    found = Source(node)
    while True:
        x = found.node
        if is_cast(x) and is_widening(x) or is_call(x, aten.contiguous.default, aten.clone.default):
            found.node = x.args[0]
        elif reads_through_rows and is_call(x, aten.reshape.default) and len(shape(x)) == 2 and len(shape(x.args[0])) > 2 and shape(x)[-1] == shape(x.args[0])[-1]:
            found.node, found.flattened = x.args[0], True
        elif not found.softcap and (cap := _cap(x)) is not None:
            found.node, found.softcap = cap
        else:
            return found


def _cap(node: Node) -> tuple[Node, float] | None:
    """(x, c) of c tanh(x / c), if nobody else reads what lies between."""
    def constant(n):
        return isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0

    inner = node.args[0] if is_call(node, aten.mul.Tensor) and constant(node.args[1]) else None
    chain = [node]
    while inner is not None and is_cast(inner):
        chain.append(inner)
        inner = inner.args[0]
    if inner is None or not is_call(inner, aten.tanh.default):
        return None
    cap, scaled = float(node.args[1]), inner.args[0]
    chain += [inner]
    while is_cast(scaled):
        chain.append(scaled)
        scaled = scaled.args[0]
    if not is_call(scaled, aten.mul.Tensor, aten.div.Tensor) or not constant(scaled.args[1]):
        return None
    chain.append(scaled)
    divisor = float(scaled.args[1]) if is_call(scaled, aten.div.Tensor) else 1 / float(scaled.args[1])
    if abs(divisor - cap) > 1e-6 * cap or any(len(n.users) > 1 for n in chain):
        return None
    return scaled.args[0], cap


# ---------------------------------------------------------------- the op in place of it


def _match(loss: Loss) -> Match:
    logits, permutation = loss.logits, None
    rank = len(shape(logits))
    if loss.class_dim != rank - 1:
        to_last = [*(d for d in range(rank) if d != loss.class_dim), loss.class_dim]
        if is_call(logits, aten.permute.default) and [logits.args[1][d] % rank for d in to_last] == list(range(rank)):
            logits = logits.args[0]
        else:
            permutation = to_last
    source = _behind(logits, loss.root.target is aten.cross_entropy_loss.default or is_call(loss.root, aten.nll_loss_nd.default)) if permutation is None else Source(logits)
    if source.flattened and loss.reduction == "none" and len(shape(loss.root)) != 1:
        source = Source(logits)
    start = source.flattened and _unflattened(loss.targets, shape(source.node)[:-1]) or loss.targets
    dtype = value(loss.root).dtype
    short = str(value(source.node).dtype).removeprefix("torch.")
    parts = [f"{short} logits [..., {shape(source.node)[-1] if permutation is None else shape(logits)[loss.class_dim]}]", f"reduction {loss.reduction}"]
    parts += [f"ignores {loss.ignore_index}"] if loss.ignore_index != NOTHING_IGNORED else []
    parts += [f"softcap {source.softcap}"] if source.softcap else []
    parts += [f"smoothing {loss.smoothing}"] if loss.smoothing else []

    def build(graph: Graph) -> Node:
        x, targets = source.node, start
        if permutation is not None:
            x = insert(graph, aten.permute.default, x, permutation)
        if loss.sign < 0:
            targets = insert(graph, aten.squeeze.dim, targets, -1)
        elif source.flattened and targets is loss.targets:
            sizes = [n if isinstance(n, int) else insert(graph, aten.sym_size.int, x, d) for d, n in enumerate(value(x).shape[:-1])]
            targets = insert(graph, aten.reshape.default, targets, sizes)
        op = insert(graph, torch.ops.tileweld.cross_entropy.default, x, targets, loss.ignore_index, source.softcap, loss.smoothing)
        losses = insert(graph, operator.getitem, op, 0)
        return _reduced(graph, loss, losses, targets, source, dtype)

    inputs = tuple(dict.fromkeys((source.node, start)))
    return Match(loss.root, inputs, build, ", ".join(parts))


def _reduced(graph: Graph, loss: Loss, losses: Node, targets: Node, source: Source, dtype: torch.dtype) -> Node:
    if loss.sign < 0:
        losses = insert(graph, aten.unsqueeze.default, insert(graph, aten.neg.default, losses), -1)
    if loss.reduction != "none":
        result = insert(graph, aten.sum.default, losses)
        if loss.reduction == "mean":  # 0 / 0, as eager, where every row is ignored
            result = insert(graph, aten.div.Tensor, result, insert(graph, aten.sum.default, insert(graph, aten.ne.Scalar, targets, loss.ignore_index)))
    else:
        result = insert(graph, aten.reshape.default, losses, [-1]) if source.flattened else losses
    return result if value(result).dtype == dtype else insert(graph, aten.to.dtype, result, dtype)


def _unflattened(targets: Node, rows: list) -> Node | None:
    """What the targets were flattened from, if it has these leading dims."""
    node = targets
    while is_tensor(node) and shape(node) != rows:
        node = node.args[0] if is_call(node, aten.reshape.default, aten.contiguous.default, aten.clone.default) else None
    return node
