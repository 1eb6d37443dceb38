"""Launches in a graph: ops with one result, with a list of them, regions with several roots, and what has no place."""
import pytest
import torch
from tileweld.compiler.ir.lowered import Launch, is_launch, restride
from tileweld.compiler.place import CannotPlace, Placer
from tileweld.compiler.select import Choice, results
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def traced(f, *inputs, symbolic=False):
    return make_fx(f, tracing_mode="symbolic" if symbolic else "fake")(*inputs)


def calls(gm, target):
    return [n for n in gm.graph.nodes if n.target is target]


def place(gm, choice, function):
    """The choice in the graph, run by a Python function of (outs, *ins) in the place of a kernel."""
    launch = Launch("kernel", [o.meta["val"] if isinstance(o, torch.fx.Node) else o for o in choice.outputs], launcher=object(), run=lambda _: function)
    Placer(gm).put(choice, launch)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    assert sum(map(is_launch, gm.graph.nodes)) == 1
    return gm


def test_one_result():
    gm = traced(lambda x, y: (x + y).exp() * 2, torch.randn(3), torch.randn(3))
    add, exp = calls(gm, aten.add.Tensor)[0], calls(gm, aten.exp.default)[0]
    place(gm, Choice("test", "", inputs=list(add.args), outputs=[exp]), lambda outs, x, y: torch.exp(x + y, out=outs[0]))
    x, y = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(gm(x, y), (x + y).exp() * 2)
    assert not calls(gm, aten.add.Tensor)


def test_a_list_of_results_one_of_them_unread():
    def f(x):
        a, b, c = torch.split(x, 2)
        return c * 2, a + c

    gm = traced(f, torch.randn(6))
    (split,) = calls(gm, aten.split.Tensor)
    outputs = results(split)
    assert [isinstance(o, torch.fx.Node) for o in outputs] == [True, False, True] or [isinstance(o, torch.fx.Node) for o in outputs] == [True] * 3

    def kernel(outs, x):
        for out, part in zip(outs, x.split(2)):
            out.copy_(part)

    place(gm, Choice("test", "", inputs=[split.args[0]], outputs=outputs), kernel)
    x = torch.randn(6)
    for got, expected in zip(gm(x), f(x)):
        torch.testing.assert_close(got, expected)


def test_two_roots_with_a_reader_of_the_first_between():
    def f(x, w):
        a = x * 2
        m = a @ w
        return m, (w + 1) * x

    gm = traced(f, torch.randn(3, 3), torch.randn(3, 3))
    roots = calls(gm, aten.mul.Tensor)
    w = calls(gm, aten.mm.default)[0].args[1]

    def kernel(outs, x, w):
        torch.mul(x, 2, out=outs[0])
        torch.mul(w + 1, x, out=outs[1])

    place(gm, Choice("test", "", inputs=[roots[0].args[0], w], outputs=roots), kernel)
    inputs = torch.randn(3, 3), torch.randn(3, 3)
    for got, expected in zip(gm(*inputs), f(*inputs)):
        torch.testing.assert_close(got, expected)


def test_what_depends_on_itself_has_no_place():
    gm = traced(lambda x: ((x * 2) @ x) * 3, torch.randn(3, 3))
    roots, (mm,) = calls(gm, aten.mul.Tensor), calls(gm, aten.mm.default)
    with pytest.raises(CannotPlace):
        place(gm, Choice("test", "", inputs=[mm], outputs=roots), None)


def test_sizes_that_are_known_at_run_time_alone():
    gm = traced(lambda x: (x.exp().flatten() + 1), torch.randn(3, 5), symbolic=True)
    (add,), (exp,) = calls(gm, aten.add.Tensor), calls(gm, aten.exp.default)
    place(gm, Choice("test", "", inputs=[exp.args[0]], outputs=[add]), lambda outs, x: torch.add(x.exp().flatten(), 1, out=outs[0]))
    for shape in ((3, 5), (4, 7)):
        x = torch.randn(shape)
        torch.testing.assert_close(gm(x), x.exp().flatten() + 1)


def test_a_choice_may_name_what_another_replaced():
    gm = traced(lambda x: (x.exp() * 2).sin(), torch.randn(3))
    (exp,), (mul,), (sin,) = (calls(gm, t) for t in (aten.exp.default, aten.mul.Tensor, aten.sin.default))
    placer = Placer(gm)
    fake = exp.meta["val"]
    placer.put(Choice("a", "", inputs=[exp.args[0]], outputs=[mul]), Launch("a", [fake], launcher=object(), run=lambda _: lambda outs, x: torch.mul(x.exp(), 2, out=outs[0])))
    placer.put(Choice("b", "", inputs=[mul], outputs=[sin]), Launch("b", [fake], launcher=object(), run=lambda _: lambda outs, x: torch.sin(x, out=outs[0])))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    x = torch.randn(3)
    torch.testing.assert_close(gm(x), (x.exp() * 2).sin())
    assert not calls(gm, aten.exp.default) and not calls(gm, aten.mul.Tensor)


def test_restride():
    x = torch.randn(1, 3, 4)
    odd = x.as_strided((1, 3, 4), (99, 4, 1))
    same = restride(odd, (1, 3, 4), (12, 4, 1))
    assert same.stride() == (12, 4, 1) and same.data_ptr() == x.data_ptr()
    other = restride(x.transpose(1, 2), (1, 4, 3), (12, 3, 1))
    assert other.stride() == (12, 3, 1) and torch.equal(other, x.transpose(1, 2))
