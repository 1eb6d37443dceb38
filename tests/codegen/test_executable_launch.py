"""What a C++ kernel is passed: addresses, sizes and strides of buffers, of inputs, of views that no tensor is made for."""
import ctypes
import struct

import pytest
import torch
from tileweld.compiler.assemble import assemble
from tileweld.compiler.ir.kernel import Kernel
from tileweld.compiler.ir.lowered import Launch
from tileweld.compiler.place import Placer
from tileweld.compiler.select import Choice
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


class Doubles:
    """In the place of a built kernel: out = 2 x of float tensors of one rank, by what the bytes say."""

    def __init__(self):
        self.calls = []
        self.entry = self._entry

    def _entry(self, pointers, integers, floats):
        numbers = struct.unpack(f"{len(integers) // 8}q", integers)
        out, x = struct.unpack("2P", pointers)
        rank = len(numbers) // 4
        rows = [numbers[k * rank:(k + 1) * rank] for k in range(4)]
        self.calls.append((out, x, *rows))
        for index in torch.cartesian_prod(*(torch.arange(n) for n in rows[0])).view(-1, rank).tolist() if 0 not in rows[0] else []:
            at = [sum(i * s for i, s in zip(index, strides)) * 4 for strides in (rows[1], rows[3])]
            ctypes.c_float.from_address(out + at[0]).value = 2 * ctypes.c_float.from_address(x + at[1]).value


def doubled(f, *inputs, symbolic=False):
    """f with every multiplication by 2 as a kernel of ours; the executable and the kernel."""
    gm = make_fx(f, tracing_mode="symbolic" if symbolic else "fake")(*inputs)
    kernel, launcher = Kernel("double", "cpp", "", "double"), Doubles()
    for node in [n for n in gm.graph.nodes if n.target is aten.mul.Tensor and n.args[1] == 2]:
        Placer(gm).put(Choice("double", "", kernel=kernel, inputs=[node.args[0]], outputs=[node]), Launch("double", [node.meta["val"]], kernel, launcher))
    gm.graph.eliminate_dead_code()
    return assemble(gm), launcher


CASES = {
    "an input": lambda x: x * 2,
    "a slice of an input": lambda x: x[1:] * 2,
    "a column, transposed": lambda x: x[:, 2:].t() * 2 + 0,
    "a view of a view": lambda x: x.view(2, 2, 6)[1].view(3, 4)[:, 1:] * 2,
    "a buffer": lambda x: (x.sin() * 2).cos(),
    "a slice of a buffer": lambda x: (x.sin()[2:] * 2).cos(),
    "in sequence": lambda x: ((x * 2) * 2)[1:] * 2,
    "read by others, too": lambda x: (lambda y: (y * 2, y + 1))(x[1:]),
}


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_addresses_and_strides(name, symbolic):
    f = CASES[name]
    run, launcher = doubled(f, torch.randn(4, 6), symbolic=symbolic)
    for _ in range(2):
        x = torch.randn(4, 6)
        got = run([x])
        for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(f(x))):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert launcher.calls


def test_no_tensor_is_made_for_a_view_that_a_kernel_reads():
    run, _ = doubled(lambda x: x.view(2, 12)[1:] * 2, torch.randn(4, 6))
    assert "data_ptr() + 48" in run.text.source and ".view(" not in run.text.source


def test_an_input_with_other_strides_than_traced():
    """Of a dim of length 1 they say nothing; others are copied."""
    run, launcher = doubled(lambda x: x * 2, torch.randn(1, 6))
    x = torch.randn(1, 6).as_strided((1, 6), (99, 1))
    torch.testing.assert_close(run([x])[0] if isinstance(run([x]), tuple) else run([x]), x * 2)
    assert launcher.calls[-1][1] == x.data_ptr()
    run, launcher = doubled(lambda x: x * 2, torch.randn(4, 6))
    x = torch.randn(6, 4).t()
    assert torch.equal(torch.utils._pytree.tree_leaves(run([x]))[0], x * 2)


def test_an_input_that_is_written_is_never_replaced_by_a_copy():
    def f(x):
        y = x * 2
        x.add_(1)
        return y, x * 2

    run, _ = doubled(f, torch.randn(4, 6))
    x = torch.randn(6, 4).t()
    expected, before = x.clone(), x.clone()
    got = run([x])
    assert torch.equal(x, before + 1) and torch.equal(got[0], expected * 2) and torch.equal(got[1], (expected + 1) * 2)


def test_empty():
    run, _ = doubled(lambda x: (x * 2).sin(), torch.randn(0, 6))
    assert torch.utils._pytree.tree_leaves(run([torch.randn(0, 6)]))[0].shape == (0, 6)


def in_place(f, *inputs):
    """f with its first addition as a kernel that may write over its first input."""
    gm = make_fx(f, tracing_mode="fake")(*inputs)
    add = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor)
    launch = Launch("add", [add.meta["val"]], launcher=object(), run=lambda _: lambda outs, x, y: torch.add(x, y, out=outs[0]), inplace=[(0, 0)])
    Placer(gm).put(Choice("add", "", inputs=list(add.args), outputs=[add]), launch)
    gm.graph.eliminate_dead_code()
    return assemble(gm)


def test_a_kernel_may_write_over_an_input_that_dies():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    over = in_place(lambda x, y: (x.exp() + y).sum(0, keepdim=True) * 2, x, y)
    assert "in place: add over exp" in over.text.source
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(over([x, y]))[0], (x.exp() + y).sum(0, keepdim=True) * 2)
    for f in (lambda x, y: (lambda e: (e + y).sum(0) + e)(x.exp()),  # e is read later
              lambda x, y: (x + y).sum(0),  # an input
              lambda x, y: (lambda e: (e + e.view(12).view(3, 4)).sum(0))(x.exp()),  # the same memory twice
              lambda x, y: (lambda e: (e[:1] + y).sum(0))(x.exp())):  # broadcast: another size
        refused = in_place(f, x, y)
        assert "in place: add over" not in refused.text.source
        torch.testing.assert_close(torch.utils._pytree.tree_leaves(refused([x, y]))[0], f(x, y))
