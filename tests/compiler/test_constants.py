"""Values that depend on no input: computed once, never handed out, never random."""
import pytest
import tileweld.compiler.ir.table  # noqa: F401  (tileweld::table)
import torch
from tileweld.compiler.assemble import assemble
from tileweld.compiler.constants import Constant, fold_constants
from torch.fx.experimental.proxy_tensor import make_fx


def folded(f, *inputs, symbolic=False):
    gm = make_fx(f, tracing_mode="symbolic" if symbolic else "fake")(*inputs)
    count = fold_constants(gm)
    assert sum(isinstance(n.target, Constant) for n in gm.graph.nodes) == count
    gm.graph.lint()
    return gm, count


def frequencies(x):
    return torch.outer(x, 1.0 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)).cos()


def test_computed_once_and_equal():
    gm, count = folded(frequencies, torch.randn(3))
    assert count == 1 and not any("arange" in str(n.target) for n in gm.graph.nodes)
    run = assemble(gm)
    for _ in range(3):
        x = torch.randn(3)
        torch.testing.assert_close(run([x])[0] if isinstance(run([x]), tuple) else run([x]), frequencies(x), rtol=0, atol=0)
    (constant,) = [n.target for n in gm.graph.nodes if isinstance(n.target, Constant)]
    assert constant() is constant()


def test_a_table_is_a_constant_alone():
    def bias(x):
        return x + torch.ops.tileweld.table("log(max(t, 1))", 0, 5, [], torch.device("cpu"))

    gm, count = folded(bias, torch.randn(5))
    assert count == 1
    x = torch.randn(5)
    torch.testing.assert_close(assemble(gm)([x])[0], bias(x), rtol=0, atol=0)
    assert folded(lambda x: x + torch.ops.tileweld.table("t*n0", 0, x.shape[0], [x.shape[0]], torch.device("cpu")), torch.randn(5), symbolic=True)[1] == 0


def test_tables_are_remembered_and_never_handed_out():
    first = torch.ops.tileweld.table("2*t", 0, 4, [], torch.device("cpu"))
    first.zero_()
    assert torch.ops.tileweld.table("2*t", 0, 4, [], torch.device("cpu")).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("f", [
    lambda x: (torch.arange(4) * 2, x + 1),  # leaves: its receiver may write to it
    lambda x: (torch.arange(4) * 2).view(2, 2).t(),
    lambda x: x + torch.rand(3).exp(),
    lambda x: x + (torch.zeros(3) + 1).add_(x),
    lambda x: x + torch.arange(3),  # alone it costs nothing worth keeping
    lambda x: (torch.zeros(300, 300) + 1).sum() + x,
])
def test_made_anew(f):
    assert folded(f, torch.randn(3))[1] == 0 or not any(isinstance(n.target, Constant) and n.meta["val"].numel() > 1 for n in folded(f, torch.randn(3))[0].graph.nodes)


def test_sizes_are_no_constants():
    assert folded(lambda x: x + (torch.arange(x.shape[0]) * 2).cos(), torch.randn(5), symbolic=True)[1] == 0
