"""Regions in graphs that update memory in place: what reads a cache before an update and what reads it behind it see what eager does, and are kernels."""
import pytest
import tileweld
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld.codegen.memory_order import memory_order
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def traced(f, *inputs):
    return make_fx(f, tracing_mode="fake")(*inputs).graph


def ties(graph) -> dict[str, set[str]]:
    order = memory_order(graph)
    return {node.name: {x.name for x in before} for node, before in order.before({n: k for k, n in enumerate(graph.nodes)}).items()}


def test_readers_are_tied_to_the_updates_around_them():
    def f(cache, position, x):
        before = cache.exp()
        cache.index_copy_(0, position, x)
        behind = cache.t().sin()
        cache.index_copy_(0, position + 1, x)
        return before, behind, x.cos()

    found = ties(traced(f, torch.zeros(6, 4), torch.tensor([1]), torch.randn(1, 4)))
    assert found["index_copy_"] == {"exp"} and found["sin"] == {"index_copy_"} and {"sin", "index_copy_"} <= found["index_copy__1"]
    assert "cos" not in found and "add" not in found and "t" not in found, "what touches no such memory, and a view, are free to move"
    assert memory_order(traced(lambda x: x.exp(), torch.randn(3))) is None


def test_an_op_that_may_copy_reads_where_it_stands():
    """reshape of a transposed cache is a copy: whoever reads it must not read the cache later instead."""
    graph = traced(lambda cache, x: (cache.t(), cache.copy_(x)), torch.zeros(6, 4), torch.randn(6, 4))
    (t,), (copy,) = ([n for n in graph.nodes if n.target is target] for target in (aten.t.default, aten.copy_.default))
    with graph.inserting_after(t):
        rows = graph.call_function(aten.reshape.default, (t, [-1]))
    rows.meta["val"] = t.meta["val"].reshape(-1)
    order = memory_order(graph)
    assert order.copies_quietly(rows) and not order.copies_quietly(t)
    assert rows in order.before({n: k for k, n in enumerate(graph.nodes)})[copy]


def grouped(cache, scales, position, x):
    """The state of a group so far, and the row that leaves: both read what is written in the same step."""
    slot, group = position % cache.shape[0], position // cache.shape[0]
    leaving = cache.index_select(0, slot)
    scale = torch.where(slot == 0, x.abs(), torch.maximum(x.abs(), scales.index_select(0, group)))
    scales.index_copy_(0, group, scale)
    q = leaving / (scales.index_select(0, group) + 1)
    cache.index_copy_(0, slot, x)
    return q, cache * 2 + 1


def test_a_step_that_reads_what_it_writes_is_kernels_alone():
    torch._dynamo.reset()
    ours, theirs = ([torch.zeros(4, 8), torch.zeros(3, 8)] for _ in range(2))
    wide = [x.double() for x in theirs]
    step = torch.compile(grouped, backend="tileweld", dynamic=False)
    for n in range(12):
        x, position = torch.randn(1, 8), torch.tensor([n])
        got, expected = step(*ours, position, x), grouped(*wide, position, x.double())
        torch.testing.assert_close(got, tuple(e.float() for e in expected), atol=1e-6, rtol=1e-6)
        grouped(*theirs, position, x)
        assert all(map(torch.equal, ours, theirs))
    report = tileweld.explain(grouped, *ours, torch.tensor([3]), x)
    assert set(report.fallbacks) == {"index_copy"}
    before = [x.clone() for x in ours]
    for wrong in (12, 400, -1):  # the group is out of range: eager says so too, and nothing behind it is done
        try:
            step(*ours, torch.tensor([wrong]), x)
        except IndexError:
            assert torch.equal(ours[1], before[1]) and torch.equal(ours[0], before[0])
        else:
            raise AssertionError("an index out of range was read")


def test_a_state_that_is_exchanged_and_one_that_counts():
    def f(state, low, count, x):
        low_now = torch.minimum(low, x)
        result = (x - low) * state + count
        state.copy_(x * 0.5 + state)
        low.copy_(low_now)
        count.add_(1)
        return result, low_now + 1

    torch._dynamo.reset()
    ours, theirs = ([torch.zeros(2, 5), torch.ones(2, 5), torch.tensor([0.0])] for _ in range(2))
    step = torch.compile(f, backend="tileweld", dynamic=False)
    for _ in range(3):
        x = torch.randn(2, 5)
        versions = [s._version for s in ours]
        torch.testing.assert_close(step(*ours, x), f(*theirs, x))
        torch.testing.assert_close(ours, theirs)
        assert all(s._version > v for s, v in zip(ours, versions)), "autograd asks for the version"


ROWS, WIDTH = 5, 6
READS = ["row", "row behind", "all", "scaled", "column sums"]
WRITES = ["index_copy", "copy", "slice", "add", "put"]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(READS + WRITES), st.integers(0, 1), st.integers(0, ROWS - 2)), min_size=2, max_size=7), st.booleans())
def test_any_order_of_reads_and_writes(program, transposed):
    def f(a, b, position, x):
        caches, results, carried = [a, b], [], x
        for op, which, n in program:
            cache, at = caches[which], position + n
            if op == "row":
                carried = torch.tanh(carried + cache.index_select(0, at))
            elif op == "row behind":
                carried = carried * 0.5 + cache[n + 1:n + 2]
            elif op == "all":
                results.append(torch.sigmoid(cache * 0.5 + carried))
            elif op == "scaled":
                results.append((cache.abs() + 1).amax(1) * 0.5)
            elif op == "column sums":
                carried = carried + (cache * 0.25).sum(0, keepdim=True)
            elif op == "index_copy":
                cache.index_copy_(0, at, carried * 0.5)
            elif op == "copy":
                cache.copy_(cache * 0.5 + carried)
            elif op == "slice":
                cache[n:n + 1] = carried
            elif op == "add":
                cache.add_(carried, alpha=0.5)
            else:
                cache[at] = carried + 1
            results.append(carried * 2)
        return results

    torch._dynamo.reset()
    make = (lambda: torch.randn(WIDTH, ROWS).t()) if transposed else (lambda: torch.randn(ROWS, WIDTH))
    ours = [make(), make()]
    theirs, wide = [x.clone() for x in ours], [x.double() for x in ours]
    step = torch.compile(f, backend="tileweld", dynamic=False)
    with torch.no_grad():
        for n in (0, 1):
            x, position = torch.randn(1, WIDTH), torch.tensor([n])
            got = step(*ours, position, x)
            f(*theirs, position, x)
            torch.testing.assert_close(got, [e.float() for e in f(*wide, position, x.double())], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_single_operation_goes_along_in_another_kernel():
    """A step of few elements would wait for torch's calls most of the time; a large one is as well with torch."""
    def f(position, x, weight):
        slot = position % 7
        return slot, (position // 7).float() * 0.5 + x, x.amax(0), weight.sin()

    for n, calls in ((8, {}), (200, {"sin": 1})):
        torch._dynamo.reset()  # sizes that have changed would be symbols, and how small they are not known
        inputs = torch.tensor([30]), torch.randn(3, n), torch.randn(n, n)
        report = tileweld.explain(f, *inputs)
        assert report.fallbacks == calls and sum(k.op == "region" for k in report.kernels) == 1
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(f, backend="tileweld", dynamic=False)(*inputs), f(*inputs))


def test_positions_from_data_are_checked_within_a_run():
    """One call from C for all of it; an index out of range stops it where eager would have stopped."""
    def f(table, cache, tokens, position):
        x = table[tokens] * 2
        cache.index_copy_(0, position, x)
        return cache * 0.5 + 1

    torch._dynamo.reset()
    table, ours, theirs = torch.randn(5, 4), torch.zeros(6, 4), torch.zeros(6, 4)
    step = torch.compile(f, backend="tileweld", dynamic=False)
    for token in (0, 4, -5):
        given = torch.tensor([token]), torch.tensor([token % 6])
        torch.testing.assert_close(step(table, ours, *given), f(table, theirs, *given))
    before = ours.clone()
    for token, position in ((5, 0), (-6, 0), (0, 6)):
        with pytest.raises(IndexError):
            step(table, ours, torch.tensor([token]), torch.tensor([position]))
        assert torch.equal(ours, before)
    report = tileweld.explain(f, table, ours, torch.tensor([1]), torch.tensor([1]))
    assert report.fallbacks == {"index_copy": 1}


def rows_in_between(cache, x, w):
    cache.copy_(x)
    a, b = torch.tanh(torch.tanh(cache)), torch.tanh(cache)
    cache.add_(torch.tanh((b.reshape(-1, 6) @ (w + w.t() * 0.5)).reshape(2, 4, 6)))  # the last size is the weight's, and no symbol any more
    return a.sum(2) * 0.1


def keys_of_a_product(cache, x, w):
    keys = (x @ (w + w.t() * 0.5))[None, None]
    return torch.nn.functional.scaled_dot_product_attention(cache[0][None, None], keys, keys)[0, 0]


@pytest.mark.parametrize("f", [rows_in_between, keys_of_a_product], ids=lambda f: f.__name__)
def test_sizes_that_are_symbols_beside_a_weight(f):
    torch._dynamo.reset()
    w, x, ours = torch.nn.Parameter(torch.randn(6, 6)), torch.randn(1, 6), torch.randn(2, 4, 6)
    theirs = ours.clone()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(f, backend="tileweld", dynamic=True)(ours, x, w), f(theirs, x, w), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
