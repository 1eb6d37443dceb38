"""What options={"gqa": G} cost, layer by layer: the residuals of the merges in a rewritten graph, on the weights that it was compiled with."""
from __future__ import annotations

import dataclasses

import torch
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from .capture import real_tensors
from .ir.graph import is_call, source_of, value


@dataclasses.dataclass(frozen=True)
class MergedHeads:
    """One attention with fewer KV heads.

    layer: the module, by the name of its key projection's weight, else the user's line; kv_bytes_*: bytes of keys and values a token;
    key_error, value_error: relative error of the scores, and of the output at fixed attention, that merging makes (inputs taken as white noise);
    None where the graph was compiled on fake weights.
    """

    layer: str
    kv_heads_before: int
    kv_heads_after: int
    kv_bytes_before: int
    kv_bytes_after: int
    key_error: float | None
    value_error: float | None
    graph: int

    @property
    def residual(self) -> float | None:
        """The larger of the two errors."""
        return None if self.key_error is None else max(self.key_error, self.value_error)


def merged_heads(gm: GraphModule, example_inputs, number: int) -> list[MergedHeads]:
    """A row for every tileweld::merge_heads of graph ``number``; the merges are computed once for it, a second or two for a layer 4096 wide."""
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs))
    return [_row(node, inputs, number) for node in gm.graph.nodes if is_call(node, torch.ops.tileweld.merge_heads.default)]


def _row(node: Node, inputs: dict, number: int) -> MergedHeads:
    k, v, heads = node.args[1], node.args[2], node.args[8:10]
    size = (value(k).shape[0] + value(v).shape[0]) * value(k).element_size()
    errors = _errors(node, inputs)
    return MergedHeads(_layer(k) or source_of(node), *heads, size, size * heads[1] // heads[0], *errors, number)


def _layer(node: Node) -> str:
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.meta.get("label", "").removesuffix(".weight").rpartition(".")[0]


def _errors(node: Node, inputs: dict) -> tuple[float, float] | tuple[None, None]:
    known: dict[Node, object] = {}

    def compute(n: Node):
        if n not in known:
            known[n] = inputs[n].detach() if n.op == "placeholder" else n.target(*torch.fx.node.map_arg(n.args, compute), **torch.fx.node.map_arg(dict(n.kwargs), compute))
        return known[n]

    sources, stack = set(), [node]
    while stack:
        n = stack.pop()
        stack.extend(n.all_input_nodes)
        sources |= {inputs[n]} if n.op == "placeholder" else set()
    if any(isinstance(x, FakeTensor) for x in sources):
        return None, None
    with real_tensors():
        return tuple(compute(node)[-1].tolist())
