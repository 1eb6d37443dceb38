"""layer_norm: (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * w + b, spelled out  ->  aten.layer_norm(x, [D], w, b, eps)

aten.layer_norm itself stays as it is: this pass brings other spellings to it, so that what fuses layer norms (layer_norm_linear,
add_layer_norm, embedding_norm) has one thing to look for. The functions below are the patterns, each with the statistic written
out or from torch's var, in every spelling of compiler/ir/match.py (Ba, Kiros, Hinton, 1607.06450).

Cost for N rows of width D: spelled out, eager reads 7 N D and writes 5 N D elements; the library's kernel reads and writes N D.

Legality, each with a test that must be refused:
- the variance divides by D (torch's var and std divide by D - 1 unless told otherwise);
- eps is added to the variance, not to the deviation (the annotated transformer does that);
- no intermediate has a consumer outside; every step is computed in one dtype, which is not float16: x*x overflows from 256 on there,
  and aten.layer_norm computes in float32.
A mean over other dims is another norm (batch, instance, group) and passed over.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compiler.ir.graph import argument, insert, is_call, is_tensor, op_name, shape, value
from ..compiler.ir.match import Found, Mismatch, Pattern, is_cast
from ..compiler.ir.rewrite import Match, Refusal
from .canonicalise import canonicalise

NAME = "layer_norm"
aten = torch.ops.aten


def written_out(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)


def by_var(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)


def _forms(core):
    def biased(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return core(x, eps) * weight + bias

    def weighted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return core(x, eps) * weight

    def plain(x: Tensor, eps: float) -> Tensor:
        return core(x, eps)

    def wide_biased(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return (core(x.float(), eps) * weight.float() + bias.float()).to(x.dtype)

    def wide_weighted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return (core(x.float(), eps) * weight.float()).to(x.dtype)

    def wide_plain(x: Tensor, eps: float) -> Tensor:
        return core(x.float(), eps).to(x.dtype)

    functions = (wide_biased, biased, wide_weighted, weighted, wide_plain, plain)
    return [Pattern(f, canonicalise, x="rows width", **{name: "width" for name in ("weight", "bias") if name in f.__annotations__}) for f in functions]


PATTERNS = [pattern for pair in zip(_forms(written_out), _forms(by_var)) for pattern in pair]  # the one that covers most first
_STATISTICS = (aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction)


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every spelled-out layer norm, the last first, as a Match, or as a Refusal where it is one but for a legality rule."""
    centred = [n for n in graph.nodes if _is_centred(n)]
    if not centred:
        return
    taken: set[Node] = set()
    failures: list[Mismatch] = []
    behind = _behind(centred)
    for node in reversed(list(graph.nodes)):
        if node in taken or node not in behind or not is_call(node, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.to.dtype):
            continue
        for pattern in PATTERNS:
            found = pattern.match(node)
            problem = found if isinstance(found, Mismatch) else _problem(found) if found is not None else None
            if problem is not None:
                failures.append(problem)
            elif found is not None:
                taken |= found.covered
                yield _replacement(found)
                break
    for node in centred:
        if node not in taken and (refusal := _refusal(node, failures)) is not None:
            yield refusal


def _replacement(found: Found) -> Match:
    x, weight, bias, eps, root = found.tensors["x"], found.tensors.get("weight"), found.tensors.get("bias"), found.scalars["eps"], found.root

    def build(graph: Graph) -> Node:
        dtype = value(x).dtype
        for t in (weight, bias):
            dtype = torch.promote_types(dtype, value(t).dtype) if t is not None else dtype
        arguments = [None if t is None else t if value(t).dtype == dtype else insert(graph, aten.to.dtype, t, dtype) for t in (x, weight, bias)]
        width = value(x).shape[-1]
        width = width if isinstance(width, int) else insert(graph, aten.sym_size.int, x, value(x).dim() - 1)
        y = insert(graph, aten.layer_norm.default, arguments[0], [width], *arguments[1:], eps if isinstance(eps, Node) else float(eps))
        return y if value(y).dtype == value(root).dtype else insert(graph, aten.to.dtype, y, value(root).dtype)

    detail = f"eps={eps.name if isinstance(eps, Node) else eps}, {'weight and bias' if bias else 'weight' if weight else 'no weight'}"
    return Match(root, found.inputs, build, detail)


def _problem(found: Found) -> Mismatch | None:
    x, root = found.tensors["x"], found.root
    for name in ("weight", "bias"):
        t = found.tensors.get(name)
        if t is not None and shape(t) != shape(x)[-1:]:
            return Mismatch(f"the {name} has the shape {shape(t)}, expected {shape(x)[-1:]}", t, root)
    if value(x).dtype == torch.float16 and not found.pattern.function.__name__.startswith("wide"):
        return Mismatch("squares in float16, which overflow where |x - mean| >= 256; aten.layer_norm would not, and so change the result", root, root, "write x.float() first")
    return None


# ---------------------------------------------------------------- near misses


def _is_centred(node: Node) -> bool:
    """x - mean(x) over the last dim."""
    if not is_call(node, aten.sub.Tensor) or len(node.args) != 2 or not all(map(is_tensor, node.args)):
        return False
    x, mean = (_uncast(a) for a in node.args)
    return is_call(mean, aten.mean.dim) and _uncast(mean.args[0]) is x and mean.args[1] is not None and shape(x) and [d % len(shape(x)) for d in mean.args[1]] == [len(shape(x)) - 1]


def _uncast(node):
    while is_cast(node):
        node = node.args[0]
    return node


def _behind(nodes: list[Node]) -> set[Node]:
    """What is computed from these within a few steps."""
    seen, front = set(nodes), list(nodes)
    for _ in range(12):
        front = [u for n in front for u in n.users if u not in seen]
        seen.update(front)
    return seen


def _refusal(node: Node, failures: list[Mismatch]) -> Refusal | None:
    """Why x - mean(x) became no layer norm, where it is divided by a deviation of x."""
    x, after = _uncast(node.args[0]), _behind([node])
    for statistic in node.graph.nodes:
        if is_call(statistic, *_STATISTICS) and _uncast(statistic.args[0]) is x and any(u in after for u in _few_steps(statistic)):
            correction = argument(statistic, 2, "unbiased", True) if is_call(statistic, aten.var.dim, aten.std.dim) else statistic.kwargs.get("correction", 1)
            if correction not in (0, False):
                return Refusal(f"{op_name(statistic)} divides by D - {int(correction or 1)}, a layer norm by D", statistic, "pass unbiased=False, or use nn.LayerNorm")
            if is_call(statistic, aten.std.dim, aten.std.correction):
                return Refusal("eps is added to the deviation, or none is; a layer norm adds it to the variance", statistic, "sqrt(var + eps), or nn.LayerNorm")
            return _mismatch(node, after, failures)
    if any(is_call(u, aten.mul.Tensor) and u.args[0] is u.args[1] for u in node.users):
        return _mismatch(node, after, failures)
    return None


def _mismatch(node, after, failures) -> Refusal | None:
    failure = next((f for f in reversed(failures) if f.root in after), None)
    return Refusal(failure.reason, failure.node, failure.cure) if failure is not None else None


def _few_steps(node: Node) -> set[Node]:
    seen = {node}
    for _ in range(5):
        seen |= {u for n in seen for u in n.users}
    return seen
