"""`lifted`: trace a function, lift its output to an expression, and evaluate the expression at every index."""

import pytest
import torch
from sympy import Integer, Symbol
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.evaluate import Evaluator
from tileweld.compiler.ir.graph import shape
from tileweld.compiler.ir.lift import Lift
from torch.fx.experimental.proxy_tensor import make_fx


class _Values(torch.fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm):
        super().__init__(gm)
        self.values = {}

    def run_node(self, node):
        self.values[node] = super().run_node(node)
        return self.values[node]


@pytest.fixture
def lifted():
    """lifted(fn, *tensors, symbolic=False) -> (expression, its values, eager's values, names of captured nodes)."""
    def run(fn, *inputs, symbolic=False):
        gm = make_fx(fn, tracing_mode="symbolic" if symbolic else "fake", pre_dispatch=True)(*inputs)
        run = _Values(gm)
        eager = run.run(*inputs)
        node = gm.graph.output_node().args[0]
        sizes = shape(node)
        index = [Symbol(f"y{d}", integer=True, nonnegative=True) for d in range(len(sizes))]
        lift = Lift({y: (Integer(0), n - 1) for y, n in zip(index, sizes)})
        e = lift.at(node, [Integer(0) if n == 1 else y for y, n in zip(index, sizes)])
        numbers = {symbol: int(x.shape[d]) for n, x in zip(gm.graph.find_nodes(op="placeholder"), inputs) for d, symbol in enumerate(shape(n)) if symbol.is_Symbol}
        renamed, captures = {}, []
        for source, symbol in lift.captures.items():
            renamed[symbol] = sc.capture_symbol(len(captures), bool(symbol.is_integer))
            captures.append(run.values[source].squeeze())
        env = {f"y{d}": torch.arange(n).view([-1 if d == k else 1 for k in range(eager.dim())]) for d, n in enumerate(eager.shape)}
        env |= {str(symbol): n for symbol, n in numbers.items()}
        values = Evaluator(env, captures, torch.float64)(e.xreplace(renamed)).expand(eager.shape)
        return e, values, eager, [n.name for n in lift.captures]

    return run
