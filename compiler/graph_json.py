"""A small graph of torch's own operations, and of those that make int8 rows, as JSON, and back: how a folded weight is computed (executable_cache.py). Anything else has no text here: `NotKept`.

A graph is a list of rows: ["placeholder", name], [op's name, args, kwargs], ["getitem", args, {}], ["output", [x], {}]; a node is {"node": its row}.
"""
from __future__ import annotations

import math
import operator

import torch
from torch.fx import Graph, Node

from .graph_key import NotKept, is_lasting, resolve

_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def written(graph: Graph) -> list:
    """The rows of a graph. Raises NotKept for a call that is none of torch's operations, and for arguments without a text."""
    numbers = {node: k for k, node in enumerate(graph.nodes)}
    return [["placeholder", str(n.target)] if n.op == "placeholder" else [_name(n), [_text(a, numbers) for a in n.args], {k: _text(a, numbers) for k, a in n.kwargs.items()}] for n in graph.nodes]


def read(rows: list) -> Graph:
    """The graph of such rows. Raises ValueError for rows that `written` does not make."""
    graph, nodes = Graph(), []
    for name, *rest in rows:
        if name == "placeholder":
            nodes.append(graph.placeholder(*rest))
            continue
        args, kwargs = [_value(a, nodes) for a in rest[0]], {k: _value(a, nodes) for k, a in rest[1].items()}
        if name == "output":
            nodes.append(graph.output(*args))
            continue
        target = operator.getitem if name == "getitem" else resolve(name) if is_lasting(name) else None
        if target is not operator.getitem and not isinstance(target, torch._ops.OpOverload):
            raise ValueError(f"there is no operation {name}")
        nodes.append(graph.call_function(target, tuple(args), kwargs))
    return graph


def _name(node: Node) -> str:
    if node.op == "output":
        return "output"
    if node.target is operator.getitem:
        return "getitem"
    name = str(node.target)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not is_lasting(name) or resolve(name) is not node.target:
        raise NotKept(f"the operation {name}")
    return name


def _text(x, numbers: dict[Node, int]):
    if isinstance(x, Node):
        return {"node": numbers[x]}
    if isinstance(x, (list, tuple)):
        return [_text(y, numbers) for y in x]
    if type(x) in (bool, int, str, type(None)) or (type(x) is float and math.isfinite(x)):
        return x
    if type(x) is float:
        return {"float": str(x)}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    for kind, of in _NAMED.items():
        if isinstance(x, of):
            return {kind: str(x).removeprefix("torch.")}
    raise NotKept(f"an argument of type {type(x).__name__}")


def _value(x, nodes: list[Node]):
    if isinstance(x, list):
        return [_value(y, nodes) for y in x]
    if not isinstance(x, dict):
        return x
    ((kind, text),) = x.items()
    if kind == "node":
        return nodes[text]
    if kind == "float":
        return float(text)
    if kind == "device":
        return torch.device(text)
    if kind in _NAMED and isinstance(found := getattr(torch, text, None), _NAMED[kind]):
        return found
    raise ValueError(f"an argument {x}")
