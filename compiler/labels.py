"""The names that the user's module has for the inputs of a graph: model.layers.0.q_proj.weight."""
from __future__ import annotations

import re

from torch.fx import GraphModule, Node

_PART = re.compile(r"\.(?:_modules|_parameters|_buffers)\['([^']+)'\]")


def label_inputs(traced: GraphModule, *graphs: GraphModule) -> None:
    """Give the inputs of captured graphs their names in meta["label"]; traced: Dynamo's graph, whose inputs are theirs."""
    labels = [_label(node) for node in traced.graph.find_nodes(op="placeholder")]
    for gm in graphs:
        for node, label in zip(gm.graph.find_nodes(op="placeholder"), labels):
            node.meta["label"] = label


def _label(node: Node) -> str:
    """The parts of Dynamo's L['self']._modules['model']..., whatever it starts from; for other inputs what is left without the noise."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    name = name() if callable(name) else name  # a method up to torch 2.11
    if not isinstance(name, str):
        return node.name
    if parts := _PART.findall(name):
        return ".".join(parts)
    for noise in ("L['self']", "L"):
        name = name.removeprefix(noise)
    return name.replace("']['", ".").replace("['", ".").replace("']", "").strip(".") or node.name
