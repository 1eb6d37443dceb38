"""Index arithmetic: an element of a chain of views is the element of the source that the index says, by brute force."""

import math

import pytest
import sympy
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sympy import Integer, Symbol
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.evaluate import Evaluator
from tileweld.compiler.ir.index import divmod_index, reindex

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def factorisations(n):
    """Ordered ways to write n as a product, ones included here and there."""
    if n == 1:
        return [[1]]
    return [[n]] + [[d, *rest] for d in range(2, n) if n % d == 0 for rest in factorisations(n // d)]


@quick
@given(st.data())
def test_reindex_is_row_major(data):
    n = data.draw(st.sampled_from([12, 24, 30, 36]))
    old, new = (data.draw(st.sampled_from(factorisations(n))) for _ in range(2))
    old, new = ([m for x in sizes for m in ([x, 1] if data.draw(st.booleans()) else [x])] for sizes in (old, new))
    symbols = [Symbol(f"y{d}", integer=True, nonnegative=True) for d in range(len(new))]
    ranges = {y: (Integer(0), Integer(m) - 1) for y, m in zip(symbols, new)}
    index = reindex(symbols, [Integer(m) for m in old], [Integer(m) for m in new], ranges)
    grid = torch.meshgrid(*(torch.arange(m) for m in new), indexing="ij")
    evaluate = Evaluator({y.name: g for y, g in zip(symbols, grid)}, [], torch.float64)
    source = torch.arange(n).view(old)
    found = source[tuple(evaluate(sympy.sympify(e)).expand(new) for e in index)]
    assert torch.equal(found, torch.arange(n).view(new))


def test_symbolic_merge_and_split_is_the_identity():
    """[B, H, T] -> [B*H, T] -> [B, H, T] leaves no division behind."""
    batch, heads, n = (Symbol(name, integer=True, positive=True) for name in ("B", "H", "T"))
    index = [sc.B, sc.H, sc.I]
    ranges = {sc.B: (Integer(0), batch - 1), sc.H: (Integer(0), heads - 1), sc.I: (Integer(0), n - 1)}
    flat = reindex(index, [batch * heads, n], [batch, heads, n], ranges)
    assert flat == [sc.B * heads + sc.H, sc.I]
    assert reindex(flat, [batch, heads, n], [batch * heads, n], ranges) == index


def test_groups_of_heads_are_divisions():
    ranges = {sc.H: (Integer(0), Integer(11))}
    assert divmod_index(sc.H, Integer(4), ranges) == (sc.floordiv(sc.H, 4), sc.mod(sc.H, 4))
    assert divmod_index(4 * sc.B + sc.J, Integer(4), {sc.J: (Integer(0), Integer(3))}) == (sc.B, sc.J)
    assert divmod_index(sc.H, Integer(12), ranges) == (0, sc.H)


# ---------------------------------------------------------------- chains of views

def _split(draw, size):
    return draw(st.sampled_from([f for f in factorisations(size) if len(f) <= 3]))


def step(data, sizes):
    """One random view: (function, its text)."""
    rank, draw = len(sizes), data.draw
    kind = draw(st.sampled_from(["reshape", "permute", "unsqueeze", "expand", "slice", "select", "flip", "flatten", "repeat", "repeat_interleave", "transpose", "negative_slice", "long_slice", "squeeze", "unflatten", "roundtrip"]))
    d = draw(st.integers(0, rank - 1)) if rank else None
    if rank == 0 or math.prod(sizes) > 300:
        return lambda x: x.unsqueeze(0)
    if kind == "reshape":
        shape = _split(draw, math.prod(sizes)) if math.prod(sizes) else sizes
        return lambda x: x.reshape(shape)
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return lambda x: x.permute(order)
    if kind == "unsqueeze":
        return lambda x: x.unsqueeze(d)
    if kind == "expand":
        return lambda x: x.unsqueeze(d).expand(*sizes[:d], 3, *sizes[d:])
    if kind == "slice" and sizes[d] > 1:
        start, stride = draw(st.integers(0, sizes[d] - 1)), draw(st.integers(1, 2))
        return lambda x: x[(slice(None),) * d + (slice(start, None, stride),)]
    if kind == "negative_slice" and sizes[d] > 1:
        start = draw(st.integers(-sizes[d] + 1, -1))
        return lambda x: x[(slice(None),) * d + (slice(start, None),)]
    if kind == "long_slice":  # a start before the tensor, an end behind it
        return lambda x: x[(slice(None),) * d + (slice(-sizes[d] - 3, sizes[d] + 5),)]
    if kind == "select" and rank > 1:
        position = draw(st.integers(-sizes[d], sizes[d] - 1))
        return lambda x: x.select(d, position)
    if kind == "flip":
        return lambda x: x.flip(d)
    if kind == "flatten":
        last = draw(st.integers(d, rank - 1))
        return lambda x: x.flatten(d, last)
    if kind == "unflatten":
        shape = _split(draw, sizes[d]) if sizes[d] else [sizes[d]]
        return lambda x: x.unflatten(d, shape)
    if kind == "repeat":
        times = [draw(st.integers(1, 2)) for _ in sizes]
        return lambda x: x.repeat(*times)
    if kind == "repeat_interleave":
        return lambda x: x.repeat_interleave(2, d)
    if kind == "transpose":
        return lambda x: x.transpose(d, -1)
    if kind == "squeeze":
        return lambda x: x.squeeze()
    if kind == "roundtrip":
        return lambda x: x.reshape(-1).reshape(x.shape)
    return lambda x: x.contiguous()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
@given(data=st.data(), symbolic=st.integers(0, 4).map(lambda n: n == 0))
def test_chains_of_views(data, symbolic, lifted):
    sizes = data.draw(st.sampled_from([(4, 6), (2, 3, 4), (12,), (3, 1, 5), (2, 2, 3, 2)]))
    x, steps = torch.arange(math.prod(sizes)).view(sizes), []
    for _ in range(data.draw(st.integers(1, 5))):
        function = step(data, [*x.shape])
        steps.append(function)
        x = function(x)

    def chain(x):
        for function in steps:
            x = function(x)
        return x * 1

    _, values, eager, captured = lifted(chain, torch.arange(math.prod(sizes)).view(sizes) * 7 + 1, symbolic=symbolic)
    assert torch.equal(values, eager)
    assert symbolic or captured == ["x_1"]  # lifted through all of it, not captured half way


def test_symbolic_halves(lifted):
    """[4, T] -> [4, 2, T//2]: that T is even is a guard and no algebra, and the 4 stays apart all the same."""
    _, values, eager, _ = lifted(lambda x: x.reshape(4, 2, -1) * 1, torch.arange(24).view(4, 6), symbolic=True)
    assert torch.equal(values, eager)


@pytest.mark.parametrize("symbolic", [False, True])
def test_heads_of_a_query(symbolic, lifted):
    """[B, T, H*D] -> [B, H, T, D] is read at [b, i, h*D + d] with no division."""
    e, values, eager, _ = lifted(lambda x: x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2) + 0, torch.arange(2 * 5 * 32).view(2, 5, 32), symbolic=symbolic)
    assert torch.equal(values, eager)
    assert not e.has(sc.floordiv, sc.mod)
