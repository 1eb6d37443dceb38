"""options={"verify": True}: a matched region and its replacement are run on the same random inputs in float64."""
from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .ir.graph import is_tensor, value

def differs(gm: GraphModule, inputs: tuple[Node, ...], old: Node, new: Node, tolerance: float = 1e-9) -> str | None:
    """None when both give the same values in float64 to within tolerance of the largest, else what differed. Integers and booleans are drawn from {0, 1}."""
    replay = _Replay(gm, inputs)
    with torch.no_grad():
        a, b = replay(old), replay(new)
    if a.shape != b.shape:
        return f"verification: shape {[*b.shape]} instead of {[*a.shape]}"
    if not torch.equal(a.isnan(), b.isnan()):
        return f"verification: {int((a.isnan() != b.isnan()).sum())} elements are NaN on one side only"
    error = (torch.nan_to_num(a) - torch.nan_to_num(b)).abs().max().item() if a.numel() else 0.0
    scale = torch.nan_to_num(a).abs().max().item() if a.numel() else 0.0
    if error > tolerance * max(scale, 1e-30):
        return f"verification: the replacement differs by {error:.3g} where values reach {scale:.3g} (float64)"
    return None


class _Replay:
    """Evaluates nodes on demand; ``inputs`` and the graph's own inputs are random, floats are float64 throughout."""

    def __init__(self, gm, inputs):
        self.gm, self.inputs, self.known = gm, set(inputs), {}
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, node: Node):
        order, stack = [], [node]
        while stack:  # depth first without recursion: a model is thousands of nodes deep
            top = stack[-1]
            if top in self.known:
                stack.pop()
                continue
            waiting = [] if self._is_input(top) else [a for a in top.all_input_nodes if a not in self.known]
            if waiting:
                stack.extend(waiting)
                continue
            self.known[top] = self._evaluate(top)
            order.append(stack.pop())
        return self.known[node]

    def _is_input(self, node):
        return node in self.inputs or node.op in ("placeholder", "get_attr")

    def _evaluate(self, node):
        if node.op == "get_attr":
            x = getattr(self.gm, node.target)
            return x.double() if x.is_floating_point() else x
        if self._is_input(node):
            return self._random(node)
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), self.known.__getitem__)
        return node.target(*_doubled(args), **_doubled(kwargs))

    def _random(self, node):
        known = value(node)
        if not is_tensor(node):
            return _hint(known)
        shape = [_hint(n) for n in known.shape]
        if known.dtype.is_floating_point:
            return torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return torch.randint(0, 2, shape, generator=self.generator).to(known.dtype)


def _doubled(x):
    """float dtypes in arguments become float64; devices become the CPU's."""
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if isinstance(x, (list, tuple)):
        return type(x)(map(_doubled, x)) if type(x) in (list, tuple) else [_doubled(y) for y in x]
    if isinstance(x, dict):
        return {k: _doubled(v) for k, v in x.items()}
    return x


def _hint(x):
    return x.node.hint if isinstance(x, (torch.SymInt, torch.SymFloat)) else x
