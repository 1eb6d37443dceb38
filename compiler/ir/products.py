"""Matrix products of a graph that ``tileweld::linear`` can take: rows of an activation times a weight that no token changes.

    aten.linear(x, w, b), x [..., K], w [N, K], b [N]         matmul(x, w^T), mm(x, w^T): w^T a permutation of a weight [N, K]
    addmm(b, x, w), mm(x, w), matmul(x, w): w [K, N]          (GPT-2's Conv1D): the op is given the view w^T

A product of two activations (scores, probabilities times values) is none: its second operand must be a parameter, or, for
aten.linear and addmm, an input of the graph, through views, casts and slices.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import int8_linear as _int8_linear_op  # noqa: F401 (registers dequantize_rows)
from .graph import argument, is_call, is_tensor, value
from .views import VIEWS
from .weights import constants

aten = torch.ops.aten
TARGETS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
#: every matrix product of a captured graph
PRODUCTS = (*TARGETS, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Product:
    """node = x weight^T + bias. ``transposed``: the weight node is stored as [K, N] and is to be read as its transpose."""

    node: Node
    weight: Node
    bias: Node | None
    transposed: bool

    @property
    def x(self) -> Node:
        """Read from the node each time: an earlier match of the same pass may have replaced it."""
        return self.node.args[1 if self.node.target is aten.addmm.default else 0]

    @property
    def width(self) -> int:
        return value(self.node).shape[-1]

    @property
    def source(self) -> Node:
        """The tensor whose rows are multiplied: products of one source are siblings, also where one of them flattens it first."""
        x = self.x
        while is_call(x, aten.reshape.default) and value(x).shape[-1] is not None and _same(value(x).shape[-1], value(x.args[0]).shape[-1:]):
            x = x.args[0]
        return x


def _same(n, sizes) -> bool:
    return len(sizes) == 1 and isinstance(n, int) and n == sizes[0]


def product_of(node: Node, constant: Collection[Node] = ()) -> Product | str | None:
    """The node as a Product; why it cannot be one, although it multiplies by a weight; or None where it is something else.

    constant: what is computed from weights alone and kept between calls: such a matrix is a weight, and a product of two of them is none of ours.
    """
    if not is_call(node, *TARGETS) or not is_tensor(node) or node in constant:
        return None
    library, bias = node.target is aten.linear.default, None
    if node.target is aten.addmm.default:
        bias, x, w = node.args[:3]
        if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
            return None
    else:
        x, w = node.args[:2]
        bias = argument(node, 2, "bias") if library else None
    if w not in constant and not is_weight(w, anyway=library or bias is not None):
        computed = library and is_tensor(w) and value(w).dim() == 2
        return f"its weight is computed in the graph, by {w.target}; expected a parameter, or a view or cast of one" if computed else None
    if value(w).dim() != 2:
        return f"its weight has {value(w).dim()} dims, one matrix a batch element; expected [N, K]" if value(w).dim() > 2 else None
    if problem := _problem(node, x, w, bias):
        return problem
    transposed = not library
    if transposed and is_call(w, aten.permute.default) and [d % 2 for d in w.args[1]] == [1, 0]:
        w, transposed = w.args[0], False
    return Product(node, w, bias, transposed)


def _problem(node, x, w, bias) -> str | None:
    values = [value(t) for t in (x, w, bias) if t is not None]
    if any(is_traceable_wrapper_subclass(v) or v.is_sparse or v.is_quantized for v in values):
        return "its operands are sharded, quantised or sparse tensors; expected plain ones"
    if values[0].dtype not in DTYPES:
        return f"it multiplies {values[0].dtype}; expected a float dtype"
    if any(v.dtype != value(node).dtype for v in values):
        return f"x is {values[0].dtype}, the weight {values[1].dtype} and the result {value(node).dtype}; expected one dtype"
    if not all(isinstance(n, int) for n in values[1].shape):
        return f"its weight has a symbolic shape {[*values[1].shape]}"
    if bias is not None and tuple(values[2].shape) != (value(node).shape[-1],):
        return f"its bias has the shape {[*values[2].shape]}, expected [{value(node).shape[-1]}]"
    if value(x).device != values[1].device:
        return f"x is on {value(x).device}, the weight on {values[1].device}"
    return None


def is_weight(node, anyway: bool = False) -> bool:
    """A parameter or a constant of the graph, through views and casts; ``anyway``: an input of the graph is one too."""
    while isinstance(node, Node) and node.op == "call_function" and node.args and (node.target in VIEWS or is_call(node, aten.to.dtype, torch.ops.tileweld.dequantize_rows.default)):
        node = node.args[0]
    if not is_tensor(node):
        return False
    return node.op == "get_attr" or node.op == "placeholder" and (anyway or node.meta.get("is_weight", False))


def products(graph: Graph) -> tuple[dict[Node, Product], dict[Node, str]]:
    """(the products of a graph in order, those that are none and why)."""
    found, problems, constant = {}, {}, constants(graph)
    casting = [torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")]  # around the model, then inside it
    for node in graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            casting.append(bool(argument(node, 2, "enabled", True)))
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            casting.pop()
        made = product_of(node, constant)
        if made is not None and casting[-1]:  # which casts the operands of aten's matmuls, when the graph runs, and not the fused op's
            problems[node] = "it runs under autocast, which chooses its dtype"
        elif isinstance(made, Product):
            found[node] = made
        elif made is not None:
            problems[node] = made
    return found, problems


# ---------------------------------------------------------------- what else the graph does with memory


class Writes:
    """What is still written in place, and by whom, and where grad mode or autocast change: a read may not move across either."""

    def __init__(self, graph: Graph):
        self.writers: list[tuple[Node, set[int]]] = []
        self.modes: list[Node] = []
        for node in graph.nodes:
            schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
            if schema is not None and schema.is_mutable:
                named = dict(zip((a.name for a in schema.arguments), node.args)) | node.kwargs
                names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
                self.writers.append((node, {s for name in names for s in _storages(named.get(name))}))
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                self.writers.append((node, {s for a in node.all_input_nodes for s in _storages(a)}))
            elif node.op == "call_module" or node.op == "call_function" and schema is None and not is_movable(node):
                self.modes.append(node)

    def between(self, first: Node, last: Node, nodes) -> Node | None:
        """A node between two others that writes to one of these, or changes a mode."""
        if (mode := next((m for m in self.modes if first < m < last), None)) is not None or not self.writers:
            return mode
        read = {s for n in nodes for s in _storages(n)}
        return next((w for w, storages in self.writers if first < w < last and storages & read), None)


def _storages(x) -> set[int]:
    if isinstance(x, (list, tuple)):
        return {s for y in x for s in _storages(y)}
    known = value(x) if isinstance(x, Node) else None
    known = known if isinstance(known, (list, tuple)) else [known]
    return {t.untyped_storage()._cdata for t in known if isinstance(t, torch.Tensor) and t.layout is torch.strided}


def is_movable(node: Node) -> bool:
    """May a call stand earlier in the graph, where its arguments are known? It neither writes nor draws random numbers."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags and node.target.namespace in ("aten", "prims", "tileweld")
    return getattr(node.target, "__module__", "") in ("_operator", "math") or getattr(node.target, "__name__", "").startswith("sym_")


def late(first: Node, inputs, roots) -> list[Node] | None:
    """The nodes after ``first`` that inputs are computed from, in graph order, to be moved before it; None where one is a root or may not move."""
    found: set[Node] = set()
    stack = [n for n in inputs if first < n or n in roots]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        if node in roots or not is_movable(node):
            return None
        found.add(node)
        stack.extend(a for a in node.all_input_nodes if first < a or a in roots)
    return sorted(found)
