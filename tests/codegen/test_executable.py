"""The generated function equals the graph it was made of; its buffers never meet while both are read."""
import gc
import random
import threading

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tileweld.codegen.executable import write
from tileweld.codegen.liveness import Liveness
from tileweld.compiler.assemble import assemble
from tileweld.compiler.ir.lowered import Launch, is_launch
from tileweld.compiler.place import Placer
from tileweld.compiler.select import Choice
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def traced(f, *inputs, symbolic=False):
    gm = make_fx(f, tracing_mode="symbolic" if symbolic else "fake")(*inputs)
    return gm


def check(f, *inputs, symbolic=False, others=()):
    """f equals its executable on the inputs and on the others; the results of a call outlive the next; inputs are what they were."""
    gm = traced(f, *inputs, symbolic=symbolic)
    run = assemble(gm)
    assert hasattr(run, "text"), "an executable, not the graph's forward"
    held = []
    for given in (inputs, *others, inputs):
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        expected, got = gm(*given), run([*given])
        held.append((leaves(expected), leaves(got), [x.clone() for x in leaves(got)]))
        for a, b in zip(before, given):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), "an input was written"
    for expected, got, then in held:
        assert len(expected) == len(got)
        for a, b, c in zip(expected, got, then):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(b, c) or b.isnan().any(), "a result was overwritten by a later call"
            assert b.stride() == a.stride() and b.dtype == a.dtype
    return run


def leaves(x):
    return [t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


def mlp(x, a, b):
    h = torch.mm(x, a.t())
    return torch.mm(torch.sigmoid(h) * h, b.t()) + x


CASES = {
    "matmuls": (mlp, [(5, 8), (16, 8), (8, 16)]),
    "a view of a buffer leaves": (lambda x: (x.exp() + 1).view(2, 6)[1:], [(3, 4)]),
    "an input leaves": (lambda x, y: (x, (x * y).exp().sin()), [(3,), (3,)]),
    "a view of an input leaves": (lambda x: (x.t(), x.exp() * 2), [(3, 4)]),
    "the same value twice": (lambda x: (lambda y: (y, y, y + 1))(x.exp() * 2), [(3,)]),
    "reads of a value and of its view": (lambda x: (lambda y: (y * 2).exp() + y.view(12).view(3, 4).sin())(x.cos()), [(3, 4)]),
    "transposes": (lambda x, y: torch.mm((x.t() + 1).exp(), (y * 2).t().exp()), [(4, 3), (5, 4)]),
    "cat and where": (lambda x, y: torch.where(x > 0, torch.cat([x[:2], y[2:]]), y * 2).exp(), [(4, 3), (4, 3)]),
    "reductions": (lambda x: ((x - x.amax(-1, keepdim=True)).exp().sum([1], keepdim=True) + x.mean([0])), [(4, 3)]),
    "copies": (lambda x: (x.t().clone(memory_format=torch.contiguous_format).view(12) * 2).exp(), [(4, 3)]),
    "empty": (lambda x: (x.exp() + 1).sin(), [(0, 3)]),
    "zero-dim": (lambda x: x.sum() * 2 + x, [(3,)]),
    "squares with itself": (lambda x: (lambda y: (y * y).exp() * 3)(x + 1), [(3,)]),
    "several results of one op": (lambda x: (lambda parts: parts[0] * parts[1] + 1)(torch.split(x.exp(), 2)), [(4, 3)]),
    "maximum and indices": (lambda x: (lambda v, i: (v.exp() * 2, i + 1))(*x.max(1)), [(4, 3)]),
    "a long chain": (lambda x: [x := (x * 1.5).sin() for _ in range(20)][-1], [(7, 9)]),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_graph(name):
    f, shapes = CASES[name]
    check(f, *(torch.randn(s) for s in shapes))


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("empty", "zero-dim")])
def test_equals_the_graph_with_symbolic_sizes(name):
    f, shapes = CASES[name]
    bigger = [tuple(n + 2 if name == "a long chain" else n for n in s) for s in shapes]
    check(f, *(torch.randn(s) for s in shapes), symbolic=True, others=[tuple(torch.randn(s) for s in bigger)] * 2)


def test_no_tensors():
    gm = traced(lambda x: None, torch.ones(3))
    assert assemble(gm)([torch.ones(3)]) in ((None,), ())


def test_arguments_are_cleared_and_freed():
    run = check(lambda x: (x + 1).exp() * 2, torch.randn(4))
    given = [torch.randn(4)]
    run(given)
    assert not given


def test_integers_and_lengths_leave():
    gm = traced(lambda x: (x.exp() + 1, x.shape[0] * 2, 7, None), torch.randn(5, 3), symbolic=True)
    got = assemble(gm)([torch.randn(4, 3)])
    assert got[1:] == (8, 7, None) and got[0].shape == (4, 3)


def test_infinity_and_nan_as_arguments():
    check(lambda x: x.clamp(-float("inf"), float("inf")).masked_fill(x > 0, float("nan")).exp() * 2, torch.randn(9))


def test_mutation_of_an_input():
    def f(x, y):
        x.add_(y)
        return x * 2 + y

    gm = traced(f, torch.zeros(3), torch.ones(3))
    x, y = torch.zeros(3), torch.ones(3)
    (got,) = leaves(assemble(gm)([x, y]))
    assert x.tolist() == [1.0] * 3 and got.tolist() == [3.0] * 3


def test_mutation_of_an_intermediate():
    def f(x):
        y = x.exp()
        a = y * 2
        y.add_(1)
        return a + y

    x = torch.randn(5)
    (got,) = leaves(assemble(traced(f, x))([x]))
    torch.testing.assert_close(got, x.exp() * 3 + 1)


def test_recursion():
    """A call within a call has its own workspace."""
    holder = []

    def inner(outs, x):
        torch.add(x, 1, out=outs[0])
        if x[0] < 3:
            holder[0]([x + 1])

    gm = traced(lambda x: ((x * 2).exp() + 1).sin() * x, torch.randn(3))
    add = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor)
    Placer(gm).put(Choice("k", "", inputs=[add.args[0]], outputs=[add]), Launch("k", [add.meta["val"]], launcher=object(), run=lambda _: inner))
    holder.append(assemble(gm))
    x = torch.zeros(3)
    torch.testing.assert_close(holder[0]([x])[0] if isinstance(holder[0]([x]), tuple) else None, ((x * 2).exp() + 1).sin() * x)


def test_two_threads():
    f, shapes = CASES["matmuls"]
    gm = traced(f, *(torch.randn(s) for s in shapes))
    run, errors = assemble(gm), []

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(100):
            inputs = [torch.randn(s, generator=g) for s in shapes]
            (got,) = leaves(run([*inputs]))
            if not torch.equal(got, f(*inputs)):
                errors.append(seed)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors


def test_in_place_is_found_and_refused():
    def add_over(x, y):
        return torch.mm((x * 2).cos() + torch.mm(x, y), y)

    text = check(add_over, torch.randn(3, 3), torch.randn(3, 3)).text.source
    assert "in place" in text

    def read_later(x):
        a = x.exp()
        return torch.mm(a.sin(), a)  # a is read again: sin must not write over it

    gm = traced(read_later, torch.randn(3, 3))
    assert all(p.storage is None for p in Liveness(gm.graph).planned.values())

    def seen_twice(x):
        a = x.exp()
        return torch.mm(a + a.t(), x)  # a transposed is the same memory in another order

    assert all(p.storage is None for p in Liveness(traced(seen_twice, torch.randn(3, 3)).graph).planned.values())
    check(seen_twice, torch.randn(3, 3))


def random_function(seed):
    """A random straight line over 4x4 matrices: pointwise, products, views, several results."""
    def f(*inputs):
        rng, values = random.Random(seed), [*inputs]
        for _ in range(rng.randrange(3, 30)):
            x, y = rng.choice(values), rng.choice(values)
            values.append(rng.choice([lambda: x + y, lambda: torch.sin(x), lambda: torch.mm(x, y) / 4, lambda: x.t(), lambda: x.view(2, 8).view(4, 4) if x.is_contiguous() else x * 0.5,
                                      lambda: x.t().clone(memory_format=torch.contiguous_format), lambda: torch.cat([x[:2], y[2:]]), lambda: x[1:3].expand(2, 2, 4).reshape(4, 4), lambda: x * y]).__call__())
        return tuple(rng.sample(values, min(len(values), rng.randrange(1, 4))))
    return f


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(0, 10**6))
def test_random_graphs(seed):
    f = random_function(seed)
    inputs = [torch.randn(4, 4), torch.randn(4, 4)]
    run = check(f, *inputs)
    gm = traced(f, *inputs)
    assert not clashes(Liveness(gm.graph))
    text = write(gm)
    assert run.text.lives is None or len(run.text.lives) == len(text.lives)
    assert text.arena is None or text.arena >= text.naive


def clashes(live):
    """By brute force: buffers of one home of which one is written while another value in it is still read by somebody later."""
    found = []
    for p in live.planned.values():
        if p.storage is None:
            continue
        for other in live.planned.values():
            if other is not p and other.home is p.home and other.first < p.first:
                late = [u for n, bases in live.bases.items() if other.base in bases and n.op == "call_function" for u in n.users if live.lines[u] > p.first and p.base not in live.bases.get(n, ())]
                late = [u for u in late if not (u.target is aten.detach.default)]
                found += [(p.node, other.node, u) for u in late]
    return found


def test_memory_of_a_chain_is_two_buffers():
    def chain(x, w):
        for _ in range(12):
            x = torch.mm(x, w)
        return x + 1

    text = write(traced(chain, torch.randn(32, 32), torch.randn(32, 32)))
    assert text.arena == text.naive == 2 * 32 * 32 * 4 and len(text.lives) == 11  # the last product lies where the result will be


def test_saved_values_are_not_in_the_arena():
    """What a forward graph keeps for its backward leaves the graph, like any other result."""
    def forward(x, w):
        h = torch.mm(x, w)
        s = h.sigmoid()
        return torch.mm(s, w), x, h, s.t()

    run = check(forward, torch.randn(3, 3), torch.randn(3, 3))
    assert run.workspaces is None or run.workspaces.bytes == 0


def test_arena_is_freed_with_the_executable():
    run = check(CASES["matmuls"][0], *(torch.randn(s) for s in CASES["matmuls"][1]))
    import weakref
    pool = weakref.ref(run.workspaces)
    del run
    gc.collect()
    assert pool() is None


def test_names_that_python_or_the_text_use():
    gm = traced(lambda x: (x + 1).exp(), torch.randn(3))
    for n, name in zip([n for n in gm.graph.nodes if n.op != "output"], ("torch", "workspace", "take")):
        n.name = name
    x = torch.randn(3)
    torch.testing.assert_close(leaves(assemble(gm)([x]))[0], (x + 1).exp())
    assert not any(map(is_launch, gm.graph.nodes))


@torch.library.custom_op("tests_executable::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    """x + 1, from back to front in memory; the fake says otherwise."""
    return (x + 1).t().contiguous().t()


@turned.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize("f", [lambda x: turned(x).view(12) * 2, lambda x: turned(x).view(2, 6).view(3, 4).t(), lambda x: turned(x).exp().view(2, 6)], ids=["a view", "views", "behind an op"])
def test_a_library_call_may_lay_its_result_out_otherwise_than_its_fake_says(f):
    """A view of such a tensor is refused by torch; what is read is the same elements."""
    x = torch.randn(3, 4)
    run = assemble(traced(f, x))
    torch.testing.assert_close(run([x])[0], _plain(f, x), rtol=0, atol=0)


def _plain(f, x):
    """f with its views as reshapes."""
    with _Reshapes():
        return f(x)


class _Reshapes(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (torch.Tensor.reshape if function is torch.Tensor.view else function)(*args, **(kwargs or {}))
