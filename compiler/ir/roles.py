"""Roles of the dims of attention scores: which is b, h, i and j."""
from __future__ import annotations

import sympy
from sympy import Integer

from . import scalar as sc
from .graph import is_call, is_tensor, shape
from .softmax import aten


class Roles:
    """Which dim of the scores is what: j the softmax's, i the queries', the others b and h (h is the product of all but the first)."""

    def __init__(self, dims, i_dim, j_dim, heads=None):
        lead = [n for k, n in enumerate(dims) if k not in (i_dim, j_dim)]
        self.rows = dims[i_dim] if i_dim is not None else Integer(1)
        self.keys = dims[j_dim]
        if len(lead) == 1:
            self.heads = heads if heads is not None else Integer(1)
            self.batch = sympy.cancel(lead[0] / self.heads)
        else:
            self.batch = lead[0] if lead else Integer(1)
            self.heads = sympy.Mul(*lead[1:])
        self.ranges = {sc.B: (Integer(0), self.batch - 1), sc.H: (Integer(0), self.heads - 1), sc.I: (Integer(0), self.rows - 1), sc.J: (Integer(0), self.keys - 1)}
        self.sizes = {sc.B: self.batch, sc.H: self.heads, sc.I: self.rows, sc.J: self.keys}
        self.index = []
        lead_index = iter(self._lead_index(lead))
        for k, n in enumerate(dims):
            e = sc.I if k == i_dim else sc.J if k == j_dim else next(lead_index)
            self.index.append(Integer(0) if n == 1 and k != j_dim else e)

    def _lead_index(self, lead):
        if len(lead) == 1:
            return [sc.B if self.heads == 1 else sc.H if self.batch == 1 else sc.B * self.heads + sc.H]
        rest, result = sc.H, []
        stride = self.heads
        for n in lead[1:]:
            stride = stride / n
            result.append(sc.floordiv(rest, stride) if n == lead[1] and not result else sc.mod(sc.floordiv(rest, stride), n) if stride != 1 else sc.mod(rest, n))
        if len(lead) == 2:
            result = [sc.H]
        return [sc.B, *result] if lead else []


def heads_behind(softmax, forward):
    """For scores of shape [N, T, S] with N = B*H: the H, read off the first reshape around the core that splits or merges N."""
    dims = shape(softmax.scores)
    if len(dims) != 3:
        return None
    behind, ahead, seen = [softmax.scores], list(forward.contraction.users) if forward.contraction else [], 0
    while (behind or ahead) and seen < 40:
        seen += 1
        node = behind.pop(0) if behind else ahead.pop(0)
        if is_call(node, aten.view, aten.reshape, aten._unsafe_view):
            for wide in (shape(node), shape(node.args[0])):
                if len(wide) >= 4 and sympy.expand(wide[0] * wide[1] - dims[0]) == 0:
                    return wide[1]
        if node.op == "call_function":
            behind += [a for a in node.all_input_nodes if is_tensor(a) and seen < 20]
    return None


def query_dims(softmax):
    """Candidates for the query dim: the one next to the keys first."""
    rank = len(shape(softmax.scores))
    order = sorted((d for d in range(rank) if d != softmax.dim), reverse=True)
    return order or [None]
