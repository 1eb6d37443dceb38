"""Ops of a graph behind AOT that stand for several, as their parts, so that region fusion sees through them.

Normalisations, softmaxes and their gradients are library calls in ATen; here each is a plain function of torch operations. The fused
ops of the dialect bring theirs (compiler/ir/expansions.py). A function is traced once for equal arguments.
"""
from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..compiler.ir.add_norm import layer_norm_parts
from ..compiler.ir.expansions import EXPANSIONS
from ..compiler.ir.graph import is_tensor, value

aten = torch.ops.aten


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    wide = _wide(x)
    e = torch.exp(wide - wide.amax(dim, keepdim=True))
    y = e / e.sum(dim, keepdim=True)
    return y if half_to_float else y.to(x.dtype)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    wide = _wide(x)
    shifted = wide - wide.amax(dim, keepdim=True)
    y = shifted - torch.log(torch.exp(shifted).sum(dim, keepdim=True))
    return y if half_to_float else y.to(x.dtype)


def softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    wide = _wide(y)
    product = _wide(grad) * wide
    return (product - wide * product.sum(dim, keepdim=True)).to(dtype)


def log_softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    wide = _wide(grad)
    return (wide - torch.exp(_wide(y)) * wide.sum(dim, keepdim=True)).to(dtype)


def native_layer_norm(x: Tensor, shape, weight: Tensor | None, bias: Tensor | None, eps: float):
    return layer_norm_parts(x, weight, bias, eps, list(range(x.dim() - len(shape), x.dim())))


def native_layer_norm_backward(grad: Tensor, x: Tensor, shape, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, mask):
    rank, rows = x.dim() - len(shape), list(range(x.dim() - len(shape)))
    dims = list(range(rank, x.dim()))
    g, y = _wide(grad), (_wide(x) - mean) * rstd
    scaled = g * weight if weight is not None else g
    dx = rstd * (scaled - scaled.mean(dims, keepdim=True) - y * (scaled * y).mean(dims, keepdim=True))
    total = (lambda t: t.sum(rows)) if rows else (lambda t: t.clone())
    return (dx.to(x.dtype) if mask[0] else None, total(g * y).to(weight.dtype) if mask[1] and weight is not None else None,
            total(g).to(bias.dtype) if mask[2] and bias is not None else None)


def var_mean(x: Tensor, dim=None, *, correction=None, keepdim: bool = False):
    dims = list(range(x.dim())) if dim is None else list(dim)
    count = 1
    for d in dims:
        count = count * x.shape[d]
    wide = _wide(x)
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    total = (centred * centred).sum(dims, keepdim=keepdim)
    count = torch.sym_max(count - (1 if correction is None else correction), 0)  # none left: a division by zero, as torch's
    return (total / count).to(x.dtype), (mean if keepdim else mean.reshape(total.shape)).to(x.dtype)


def var(x: Tensor, dim=None, *, correction=None, keepdim: bool = False) -> Tensor:
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def elu_backward(grad: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor) -> Tensor:
    """torch's own says strides that its kernel does not make; x is elu's argument, or with is_result its result."""
    wide, g = _wide(x), _wide(grad)
    below = wide + alpha * scale if is_result else torch.exp(wide * input_scale) * (alpha * scale)
    return torch.where(wide <= 0, g * input_scale * below, g * scale).to(grad.dtype)


PARTS = {aten._softmax.default: softmax, aten._log_softmax.default: log_softmax, aten._softmax_backward_data.default: softmax_backward, aten._log_softmax_backward_data.default: log_softmax_backward,
         aten.native_layer_norm.default: native_layer_norm, aten.native_layer_norm_backward.default: native_layer_norm_backward, aten.var_mean.correction: var_mean, aten.var.correction: var, aten.elu_backward.default: elu_backward}


def expand(gm: GraphModule, whole: frozenset = frozenset(), apart: Collection[str] = ()) -> None:
    """Replace every op that has parts by them, in place; ``whole``: ops that have a kernel of their own, but for the nodes named in ``apart``."""
    parts = {**PARTS, **EXPANSIONS}
    traced: dict = {}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in parts and (node.target not in whole or node.name in apart) and _is_float(node):
            _inline(gm, node, parts[node.target], traced)


def _is_float(node) -> bool:
    """Real, float32 and below: kernels compute in float32; and not empty: the largest of no elements is an error."""
    return all(value(a).dtype != torch.float64 and not value(a).dtype.is_complex and 0 not in value(a).shape for a in node.all_input_nodes if is_tensor(a))


def _inline(gm: GraphModule, node: Node, function, traced: dict) -> None:
    leaves, spec = torch.utils._pytree.tree_flatten((node.args, dict(node.kwargs)))
    nodes = [x for x in leaves if isinstance(x, Node)]
    key = (node.target, str(spec), tuple(_described(x) for x in leaves), tuple(nodes.index(x) for x in nodes))
    known = traced.setdefault(key, [])
    sub, _ = next((found for found in known if not found[1] & _storages(nodes)), (None, None))
    if sub is None:  # fake values say what shares memory, so a call may not read what the same trace made: a residual stream through equal layers takes two in turn
        sub = _trace(function, leaves, spec, nodes)
        known.append((sub, _storages(sub.graph.nodes) - _storages(sub.graph.find_nodes(op="placeholder"))))
    if not _fits(node, sub):
        return
    with gm.graph.inserting_before(node):
        replaced = dict(zip(sub.graph.find_nodes(op="placeholder"), nodes))
        for name in {n.target for n in sub.graph.find_nodes(op="get_attr")}:
            setattr(gm, f"{node.name}{name}", getattr(sub, name))
        result = None
        for inner in sub.graph.nodes:
            if inner.op == "output":
                result = torch.fx.node.map_arg(inner.args[0], replaced.__getitem__)
            elif inner.op == "get_attr":
                replaced[inner] = gm.graph.get_attr(f"{node.name}{inner.target}")
                replaced[inner].meta = dict(inner.meta)
            elif inner.op != "placeholder":
                replaced[inner] = gm.graph.node_copy(inner, replaced.__getitem__)
                replaced[inner].meta = inner.meta | {k: v for k, v in node.meta.items() if k in ("stack_trace", "tileweld_rewrite")}
        if isinstance(result, Node):
            result = _laid_out_as(gm, node, result)
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            if user.target is not operator.getitem:
                return
            with gm.graph.inserting_before(user):
                part = result[user.args[1]]
                user.replace_all_uses_with(_laid_out_as(gm, user, part) if isinstance(part, Node) else part)
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _storages(nodes) -> set[int]:
    """The memory of what calls make, or of some nodes' values."""
    return {value(n).untyped_storage()._cdata for n in nodes if n.op != "output" and is_tensor(n) and value(n).layout is torch.strided}


def _laid_out_as(gm, node, result):
    """The result in the dtype of the op, since what is kept for a backward is read in it (a norm's statistics on a CPU are of x's), and in its strides: softmax of a transposed tensor is contiguous, its parts are not."""
    if value(result).dtype != value(node).dtype:
        narrow = gm.graph.call_function(aten._to_copy.default, (result,), {"dtype": value(node).dtype})
        narrow.meta = node.meta | {"val": value(result).to(value(node).dtype)}
        result = narrow
    if [str(n) for n in value(result).stride()] == [str(n) for n in value(node).stride()] or not value(node).is_contiguous():
        return result
    copy = gm.graph.call_function(aten.clone.default, (result,), {"memory_format": torch.contiguous_format})
    copy.meta = node.meta | {"val": value(node)}
    return copy


def _fits(node, sub: GraphModule) -> bool:
    """Have the parts' results the op's strides, or the op's are contiguous, for which there is a copy? Whoever views them relies on it."""
    results, known = sub.graph.output_node().args[0], value(node)
    pairs = zip(results, known) if isinstance(known, (tuple, list)) else [(results, known)]
    return all(not isinstance(a, Node) or not isinstance(b, torch.Tensor) or b.is_contiguous() or [str(n) for n in value(a).stride()] == [str(n) for n in b.stride()] for a, b in pairs)


def _described(x):
    if not isinstance(x, Node):
        return str(x)
    known = value(x)
    return (str(known.dtype), *map(str, known.shape), "/", *map(str, known.stride())) if isinstance(known, torch.Tensor) else str(known)


def _trace(function, leaves, spec, nodes):
    """The function's graph for these arguments."""
    def call(*values):
        it = iter(values)
        args, kwargs = torch.utils._pytree.tree_unflatten([next(it) if isinstance(x, Node) else x for x in leaves], spec)
        return function(*args, **kwargs)

    fakes = [value(n) for n in nodes]
    mode = next(f.fake_mode for f in fakes if isinstance(f, torch.Tensor))
    with mode, torch.no_grad():
        sub = make_fx(call, tracing_mode="real")(*fakes)
    sub.graph.eliminate_dead_code()
    return sub
