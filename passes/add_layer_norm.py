"""add_layer_norm: s = x + residual; y = layer_norm(s), with s used elsewhere too  ->  (s, y) = tileweld::add_layer_norm(x, residual, weight, bias, eps)

As add_rms_norm, which has the maths, cost and legality, for aten.layer_norm over the last dim; a layer norm over several dims is left.
Pre-norm blocks (GPT-2, OPT) use s as the residual stream; in a post-norm block (BERT) s is read by the norm alone, and one kernel does both anyway.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir.graph import argument, is_call
from ..compiler.ir.rewrite import Match, Refusal
from .add_rms_norm import sums_with_norms

NAME = "add_layer_norm"
aten = torch.ops.aten


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every residual addition with a layer norm behind it."""
    def call(norm: Node):
        return torch.ops.tileweld.add_layer_norm.default, (argument(norm, 2, "weight"), argument(norm, 3, "bias"), argument(norm, 4, "eps", 1e-5))

    yield from sums_with_norms(graph, is_row_norm, call)


def is_row_norm(node: Node) -> bool:
    """A layer norm over the last dim."""
    return is_call(node, aten.layer_norm.default) and len(node.args[1]) == 1
