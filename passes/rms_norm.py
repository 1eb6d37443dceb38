"""rms_norm: x * rsqrt(mean(x^2, -1) + eps), with or without a weight  ->  tileweld::rms_norm(x, weight, eps, offset, cast)

The functions below are the patterns: what they compute is what the op computes, in the same order of rounding. Each is matched
in every spelling (compiler/ir/match.py): x*x, pow, square; mean or sum / width; rsqrt, 1 / sqrt, / sqrt, ** -0.5; the weight on
either side; casts in Llama's or Gemma's place; eps a number or symbolic. aten.rms_norm (nn.RMSNorm) is taken as it is.

Cost for N rows of width D: 5 N D FLOPs before and after; spelled out, eager reads 4 N D and writes 3 N D elements besides the
casts, the kernel reads N D and writes N D.

Legality, each with a test that must be refused:
- the mean is over the last dim, kept;                      - the weight has the shape [D];
- no intermediate has a consumer outside;                   - eps is a number, the same for every element;
- every step is computed in the op's dtype (float32, or float64 for float64), except that plain bfloat16 arithmetic may become
  float32's, which has the same range. float16 may not: its x*x overflows from 256 on, and eager's result then is 0.
A mean that was subtracted before (LayerNorm) is another pass's.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compiler.ir import rms_norm as op
from ..compiler.ir.graph import argument, insert, is_call, is_tensor, shape, value
from ..compiler.ir.match import Found, Mismatch, Pattern, is_cast, readings
from ..compiler.ir.rewrite import Match, Refusal
from .canonicalise import canonicalise

NAME = "rms_norm"
aten = torch.ops.aten


def normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * normalise(x.float(), eps).to(x.dtype)


def llama_offset(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return (weight.float() + offset) * normalise(x.float(), eps).to(x.dtype)


def gemma(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return (normalise(x.float(), eps) * (weight.float() + offset)).to(x.dtype)


def weight_then_cast(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (normalise(x.float(), eps) * weight.float()).to(x.dtype)


def bare(x: Tensor, eps: float) -> Tensor:
    return normalise(x.float(), eps).to(x.dtype)


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * normalise(x, eps)


def plain_offset(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return (weight + offset) * normalise(x, eps)


@dataclasses.dataclass(frozen=True)
class Form:
    """A pattern and where the op that replaces it rounds."""

    pattern: Pattern
    cast: str


def _form(function, cast: str) -> Form:
    shapes = {"x": "rows width"} | ({"weight": "width"} if "weight" in function.__annotations__ else {})
    return Form(Pattern(function, canonicalise, **shapes), cast)


_WITHOUT_CASTS = ("plain", "plain_offset", "normalise")

FORMS = (
    _form(llama_offset, "before"),  # (1 + w) * norm(x).to(x.dtype)
    _form(gemma, "after"),  # (norm(x) * (1 + w)).to(x.dtype)
    _form(llama, "before"),  # w * norm(x).to(x.dtype): Llama, Mistral, Qwen, T5
    _form(weight_then_cast, "after"),  # (norm(x) * w).to(x.dtype): OLMo 2
    _form(plain_offset, "before"),  # no casts at all
    _form(plain, "before"),
    _form(bare, "after"),  # no weight, or a weight that is applied in another way
    _form(normalise, "after"),
)


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every RMS norm of the graph, the last first, as a Match, or as a Refusal where it is one but for a legality rule."""
    nodes = [n for n in graph.nodes if is_tensor(n)]
    if not any(is_call(n, aten.mean.dim, aten.sum.dim_IntList, aten.rms_norm.default) for n in nodes):
        return
    taken: set[Node] = set()
    failures: list[Mismatch] = []
    results: list[Match | Refusal] = []
    for node in reversed(nodes):
        if node in taken:
            continue
        if is_call(node, aten.rms_norm.default):
            results.append(_library(node))
            continue
        if not is_call(node, *_BETWEEN) or not _is_behind_root(node):
            continue
        for form in FORMS:
            found = form.pattern.match(node)
            problem = found if isinstance(found, Mismatch) else _problem(found) if found is not None else None
            if problem is not None:
                failures.append(problem)
            elif found is not None and not _is_layer_norm(found):
                taken |= found.covered
                results.append(_replacement(found, form))
                break
    statistics = [(n, inside) for n in nodes if (inside := _statistic(n)) is not None]
    for node, inside in statistics:
        if not taken & inside.nodes:
            failure = inside.problem or next((f for f in reversed(failures) if node in _region(f)), None)
            if failure is not None:
                results.append(Refusal(failure.reason, failure.node, failure.cure))
    yield from results


_BETWEEN = (aten.mul.Tensor, aten.div.Tensor, aten.to.dtype)


def _is_behind_root(node: Node) -> bool:
    """Is there a root, in any spelling, behind products, quotients and casts? Every form has one; a form is traced when it is first asked for, 25 to 45 ms each."""
    found = {node}
    for _ in range(5):
        found = {a for n in found if is_call(n, *_BETWEEN, aten.reciprocal.default) for a in n.all_input_nodes}
        if any(is_call(n, aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar) for n in found):
            return True
    return False


# ---------------------------------------------------------------- the op in place of a match


def _replacement(found: Found, form: Form) -> Match:
    x, weight = found.tensors["x"], found.tensors.get("weight")
    eps, offset = found.scalars["eps"], found.scalars.get("offset", 0.0)
    root = found.root
    return Match(root, found.inputs, _build(x, weight, eps, offset, form.cast), _detail(eps, offset, form.cast, weight))


def _build(x, weight, eps, offset, cast):
    def build(graph: Graph) -> Node:
        numbers = [n if isinstance(n, Node) else float(n) for n in (eps, offset)]
        return insert(graph, torch.ops.tileweld.rms_norm.default, x, weight, *numbers, cast)

    return build


def _detail(eps, offset, cast: str, weight) -> str:
    text = f"eps={eps}" if not isinstance(eps, Node) else f"eps={eps.name} (symbolic)"
    if weight is None:
        return f"{text}, no weight"
    return f"{text}, weight{f' + {offset}' if offset else ''}, rounds {cast} it"


def _library(node: Node) -> Match | Refusal:
    """aten.rms_norm(x, [D], weight, eps): computed wide, rounded once, after the weight."""
    x, dims = node.args[:2]
    weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    if len(dims) != 1:
        return Refusal(f"normalises over the last {len(dims)} dims, expected one", node, "flatten the dims first")
    if eps is None:
        eps = op.default_eps(value(x).dtype)
    return Match(node, tuple(n for n in (x, weight, eps) if isinstance(n, Node)), _build(x, weight, eps, 0.0, "after"), _detail(eps, 0.0, "after", weight))


# ---------------------------------------------------------------- legality


def _problem(found: Found) -> Mismatch | None:
    x, weight, root = found.tensors["x"], found.tensors.get("weight"), found.root
    if not shape(x):
        return Mismatch("x is one number, expected a row of them", root, root)
    if weight is not None and (len(shape(weight)) != 1 or shape(weight)[0] != shape(x)[-1]):
        return Mismatch(f"the weight has the shape {shape(weight)}, expected [{shape(x)[-1]}]", weight, root)
    if found.pattern.name in _WITHOUT_CASTS and value(x).dtype == torch.float16:
        return Mismatch("computes x*x in float16, which overflows where |x| >= 256; the fused op would not, and so change the result", root, root,
                        "write x.float() first")
    return None


def _is_layer_norm(found: Found) -> bool:
    x = found.tensors["x"]
    return is_call(x, aten.sub.Tensor) and is_call(x.args[1], aten.mean.dim) and x.args[1].args[0] is x.args[0]


# ---------------------------------------------------------------- near misses


@dataclasses.dataclass
class _Statistic:
    """rsqrt(mean(x*x) + eps) in any spelling: its nodes, and what is wrong with it."""

    nodes: set[Node]
    problem: Mismatch | None


def _statistic(node: Node) -> _Statistic | None:
    """Does node compute the inverse root of a mean square? Then something around it kept it from being fused."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    inverse = next((t for t in readings(node) if t.target is aten.rsqrt.default), None)
    if inverse is None and any(t.target is aten.sqrt.default for t in readings(node)) and all(is_call(u, aten.div.Tensor) and u.args[1] is node for u in node.users):
        inverse = next(t for t in readings(node) if t.target is aten.sqrt.default)
    if inverse is None:
        return None
    total = _uncast(inverse.args[0])
    if not is_call(total, aten.add.Tensor):
        return None
    for mean, eps in (total.args[:2], total.args[1::-1]):
        term = next((t for t in readings(_uncast(mean)) if t.target is aten.mean.dim), None) if is_tensor(mean) else None
        squared = _uncast(term.args[0]) if term is not None else None
        if squared is None or not is_call(squared, aten.mul.Tensor) or squared.args[0] is not squared.args[1]:
            continue
        x = _uncast(squared.args[0])
        if is_call(x, aten.sub.Tensor) and is_call(_uncast(x.args[1]), aten.mean.dim):
            return None
        rank, dims, keepdim = len(shape(squared)), term.args[1], term.args[2]
        if rank == 0:
            continue
        problem = None
        if [d % rank for d in dims] != [rank - 1]:
            problem = Mismatch(f"the mean is over dims {list(dims)} of {rank}, expected the last", mean, node)
        elif not keepdim:
            problem = Mismatch("the mean drops its dim, so that it is broadcast along another; expected keepdim=True", mean, node)
        elif is_tensor(eps):
            problem = Mismatch(f"eps is a tensor {shape(eps)} that may differ between elements or calls, expected a number", eps, node, "make eps a Python float")
        return _Statistic({node, total, mean, squared}, problem)
    return None


def _uncast(node):
    while is_cast(node):
        node = node.args[0]
    return node


def _region(failure: Mismatch) -> set[Node]:
    """The nodes behind a failed match's root, a few steps back."""
    seen, front = {failure.root}, [failure.root]
    for _ in range(6):
        front = [a for n in front for a in n.all_input_nodes if a not in seen]
        seen.update(front)
    return seen
