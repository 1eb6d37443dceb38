"""Small questions to an FX graph that every pass asks."""
from __future__ import annotations

import contextlib
import re

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node

from .nodes import floordiv, mod

aten = torch.ops.aten


def is_call(node, *targets) -> bool:
    """Is the node a call of one of these ops (overloads or overload packets)?"""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return node.target in targets or getattr(node.target, "overloadpacket", None) in targets


def value(node):
    """The fake value that capture recorded for a node; None for values that are not tensors or symbols."""
    return node.meta.get("val") if isinstance(node, Node) else node


def is_tensor(node) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node) -> list[sympy.Expr]:
    """A node's sizes as sympy integers; a symbolic size is its expression."""
    return [size(s) for s in value(node).shape]


def size(s) -> sympy.Expr:
    """An int or SymInt as a sympy expression of shape symbols."""
    return sympy.Integer(s) if isinstance(s, int) else _own(s.node.expr)


def _own(e):
    """torch's shape functions (its Max, FloorDiv, Mod, ...) as sympy's and ours, told by name: the classes are private."""
    if not e.args:
        return e
    arguments = [_own(a) for a in e.args]
    build = _SHAPE_FUNCTIONS.get(type(e).__name__)
    return build(*arguments) if build is not None else e.func(*arguments)


_SHAPE_FUNCTIONS = {
    "Max": sympy.Max, "Min": sympy.Min, "FloorDiv": floordiv, "CleanDiv": floordiv, "PythonMod": mod, "Mod": mod,
    "ModularIndexing": lambda x, divisor, modulus: mod(floordiv(x, divisor), modulus), "CeilDiv": lambda x, n: floordiv(x + n - 1, n),
}


def computed_from(node: Node) -> set[Node]:
    """The node and everything that it is computed from."""
    found, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            stack += n.all_input_nodes
    return found


def argument(node: Node, position: int, name: str, default=None):
    """An argument of a call by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def without_history(graph: torch.fx.Graph) -> None:
    """Forget what torch's tracers note of every node and nothing here reads: the nodes of earlier graphs that it was, and a second copy of its metadata. A third of the memory of a graph that was just traced."""
    for node in graph.nodes:
        node.meta.pop("from_node", None)
        node.meta.pop("tensor_meta", None)


_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)(?:\n\s*(.+))?')


def source_of(node: Node) -> str:
    """'model.py:41 in forward: scores = q @ k.T', the user's line that made the node; '' when it is not known."""
    trace = node.meta.get("stack_trace") or ""
    frames = _FRAME.findall(trace)
    if not frames:
        return ""
    path, line, function, code = frames[-1]
    short = "/".join(path.replace("\\", "/").split("/")[-2:])
    return f"{short}:{line} in {function}" + (f": {code.strip()}" if code else "")


@contextlib.contextmanager
def on_fakes(mode=None):
    """Ops run on fake tensors here (of this mode, if the tensors do not say), none recorded for a backward. Without the python dispatcher torch 2.11's linear refuses symbolic sizes."""
    with mode or contextlib.nullcontext(), enable_python_dispatcher(), torch.no_grad():
        yield


def insert(graph: torch.fx.Graph, target, *args, **kwargs) -> Node:
    """Add a call at the graph's insertion point, with its fake value computed; returns the node (or the number, when all is static)."""
    def fake(x):
        return torch.fx.node.map_arg(x, lambda n: n.meta["val"])

    with on_fakes():
        known = target(*fake(args), **fake(kwargs))
    if isinstance(known, int):
        return known
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = known
    return node


def op_name(node: Node) -> str:
    """What a person calls the op: "softmax" for aten.softmax.int."""
    return "the graph's output" if node.op == "output" else str(node.target).replace("aten.", "").replace("tileweld.", "fused ").split(".")[0]
