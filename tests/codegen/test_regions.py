"""Regions of pointwise ops: what becomes one kernel, that the kernel equals eager, and what must stay outside."""
import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from tileweld.codegen.cpp.region import _pieces
from tileweld.compiler.backend import tileweld
from tileweld.compiler.ir.parser import parse
from tileweld.compiler.report import Report
from sympy import Symbol


def run(f, *inputs, **options):
    """(result, kernels of regions) of f compiled; rotary is left to the regions here."""
    torch._dynamo.reset()
    options = {"passes": {"rotary": False}, **options}
    report = Report()
    with torch.no_grad():
        result = torch.compile(f, backend=functools.partial(tileweld, options=options, report=report), dynamic=False)(*inputs)
    assert not report.warnings
    return result, [u for u in report.kernels if u.op == "region"]


def rotary(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def interleaved(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


CASES = {
    "rotary": (rotary, [(2, 3, 7, 16), (7, 16), (7, 16)]),
    "rotary behind a transpose": (lambda x, c, s: rotary(x.transpose(1, 2), c, s), [(2, 7, 3, 16), (7, 16), (7, 16)]),
    "swiglu": (lambda g, u: F.silu(g) * u, [(5, 33), (5, 33)]),
    "geglu": (lambda g, u: F.gelu(g, approximate="tanh") * u, [(5, 33), (5, 33)]),
    "gelu": (lambda g, u: F.gelu(g) * u + 1, [(5, 33), (5, 33)]),
    "softcap": (lambda x: torch.tanh(x / 30) * 30, [(4, 9, 11)]),
    "broadcast": (lambda x, w, b: (x * w + b).relu(), [(3, 1, 5), (4, 1), (5,)]),
    "permuted result": (lambda x, y: (x.transpose(0, 1) * 2 + y).abs(), [(6, 4), (4, 6)]),
    "select and slice": (lambda x: x[:, 2] * x[:, 0, :] - x[:, 1], [(3, 4, 8)]),
    "views inside": (lambda x, y: (x.view(2, 6, 4) * 3 + y).view(12, 4) - 1, [(12, 4), (2, 6, 4)]),
    "masked": (lambda x: torch.where(torch.arange(9) < 4, x * 2, x.masked_fill(x > 0, -1.0)), [(5, 9)]),
    "big enough for threads": (lambda x, y: torch.exp(-x * x) + y, [(64, 1024), (64, 1024)]),
    "one element": (lambda x: (x + 1) * 2, [(1,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_eager_in_one_kernel(name):
    f, shapes = CASES[name]
    inputs = [torch.randn(s) for s in shapes]
    got, kernels = run(f, *inputs)
    expected = f(*inputs)
    assert len(kernels) == 1
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_interleaved_rotary():
    inputs = [torch.randn(2, 3, 7, 16), torch.randn(7, 8), torch.randn(7, 8)]
    got, kernels = run(interleaved, *inputs)
    torch.testing.assert_close(got, interleaved(*inputs), rtol=2e-6, atol=2e-6)
    assert len(kernels) <= 2


def test_special_values_propagate():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e38, -1e38, 1e-45])
    f = lambda x: F.silu(x) * 2 + torch.maximum(x, -x)  # noqa: E731
    got, kernels = run(f, x)
    torch.testing.assert_close(got, f(x), equal_nan=True)
    assert len(kernels) == 1




@pytest.mark.parametrize("f, inputs", [
    (lambda x: x + 1, [torch.randn(4, 4)]),  # one op saves nothing
    (lambda x: (x.double() + 1) * 2, [torch.randn(4, 4)]),
    (lambda x: (x + 1) * 2, [torch.randn(0, 4)]),
])
def test_stays_with_aten(f, inputs):
    got, kernels = run(f, *inputs)
    assert not kernels
    torch.testing.assert_close(got, f(*inputs))


def test_a_value_that_others_read_is_one_more_output():
    def f(x, w):
        y = torch.tanh(x) * 2
        return y @ w + 1, (y + 1) * 3

    x, w = torch.randn(8, 8), torch.randn(8, 8)
    got, kernels = run(f, x, w)
    assert [k.reason for k in kernels] == ["4 ops in one kernel"]
    for a, b in zip(got, f(x, w)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alike", [True, False])
def test_rows_of_int8_and_their_scales_are_looked_up_in_one_kernel(alike):
    """A table with scales beside positions that weights alone make (a kept value, there before anything is computed); scales by other numbers stay a gather of their own."""
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("q", torch.randint(-127, 128, (40, 300), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(40, 1))
            self.positions = torch.nn.Embedding(16, 300)

        def forward(self, ids):
            numbers = ids if alike else ids.flip(0)
            return (F.embedding(ids, self.q).float() * F.embedding(numbers, self.scale) + self.positions(torch.arange(ids.shape[1]))).cos()

    model, ids = Table().eval(), torch.randint(0, 40, (3, 16))
    got, kernels = run(model, ids)
    assert [k.reason for k in kernels] == (["6 ops in one kernel"] if alike else ["2 ops in one kernel", "5 ops in one kernel"])
    torch.testing.assert_close(got, model(ids).detach(), rtol=1e-5, atol=2e-5)  # an ulp of what cos is taken of
    with pytest.raises(IndexError):
        torch.compile(model, backend="tileweld")(ids - 20)


def test_what_a_product_reads_through_a_view_is_computed_in_front_of_it():
    """The norm's end was put behind the product of its view, into one kernel with what reads that product, and the kernel could not be placed."""
    def f(x, g, b, w):
        z = torch.cumsum(x, -1)
        y = (z * g + b).view(-1, 16)
        scores = F.linear(y, w)
        return scores.abs().clamp(min=scores.max(-1, keepdim=True).values), torch.cumsum(y, -1)

    inputs = [torch.randn(*s) for s in ((2, 9, 16), (16,), (16,), (4, 16))]
    got, kernels = run(f, *inputs)
    assert kernels and not any(k.implementation == "reference" for k in kernels)
    for a, b in zip(got, f(*inputs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def a_sum_in_between(x, a, b, w):
    y = torch.softmax(x, -1)
    return torch.where(y > 0.1, y[:, 3:].sum(), y - 1)  # softmax and where share a space, and the sum between them has another


def crossed_neighbours(x, a, b, w):
    part = torch.cat([a, a]).mean(0)
    return torch.sigmoid(a + w.sum() * 0.1), torch.tanh(part[4:5])  # the mean goes with the sigmoid (both read a), and w's sum must not go with the tanh


def what_a_call_returns_is_no_constant(x, a, b, w):
    y = torch.topk(x, 5).values * 2  # not computed by each of its readers
    return y, y.mean() + b.sum(1, keepdim=True) * 0.1, (y - 1).abs()


@pytest.mark.parametrize("f", [a_sum_in_between, crossed_neighbours, what_a_call_returns_is_no_constant], ids=lambda f: f.__name__)
def test_kernels_that_need_each_other_are_two(f):
    inputs = [torch.randn(8, 8), torch.randn(72, 64), torch.randn(5, 8), torch.randn(8, 8)]
    got, kernels = run(f, *inputs)
    assert kernels and not any(k.implementation == "reference" for k in kernels)
    torch.testing.assert_close(got, f(*inputs), rtol=1e-5, atol=1e-5)


def test_equal_layers_share_a_kernel():
    layers = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.Hardtanh(-0.5, 0.5)) for _ in range(4)])
    _, kernels = run(layers, torch.randn(3, 8))
    assert len({k.implementation for k in kernels}) <= 2


@pytest.mark.parametrize("condition, cuts", [("j < 8", [8]), ("j <= 7", [8]), ("j > 7", [8]), ("j >= 8", [8]), ("j == 3", [3, 4]), ("j != 0", [1]), ("2*j < 9", [5]), ("5 - j < 2", [4]), ("5 - j <= 2", [3]), ("j < 99", []), ("mod(j, 3) < 2", [])])
def test_pieces_of_the_innermost_loop(condition, cuts):
    """Cut where the condition changes, and nowhere else; checked against the condition itself."""
    x = Symbol("j", integer=True, nonnegative=True)
    pieces = _pieces([parse(f"where({condition}, c0[j], c1[j])")], x, 0, 16, {})
    assert [low for low, _, _ in pieces] == [0, *cuts]
    for low, high, [expr] in pieces:
        held = {bool(eval(condition, {"j": j, "mod": lambda a, b: a % b})) for j in range(low, high)}
        assert len(held) == 1 or condition.startswith("mod")
        if cuts:
            assert expr == parse("c0[j]" if held == {True} else "c1[j]")


UNARY = [torch.tanh, torch.sigmoid, torch.relu, torch.abs, torch.neg, F.silu, lambda x: x * 0.5, lambda x: 1.0 - x, lambda x: torch.clamp(x, -0.5, 0.7), lambda x: x.masked_fill(x > 0.3, -0.25)]
VIEWS = [lambda x: x.transpose(0, 1).transpose(1, 0), lambda x: x.reshape(-1).reshape(x.shape), lambda x: x.flip(0),
         lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), lambda x: torch.cat([-x[1:], x[:1]], 0), lambda x: x[:, :1].expand(x.shape), lambda x: x.t().reshape(x.shape)]
BINARY = [torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: torch.where(a > b, a, b * 2), lambda a, b: a + b[:1], lambda a, b: a * b[:, :1]]


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.tuples(st.sampled_from(["unary", "view", "binary"]), st.integers(0, 63), st.integers(0, 63), st.integers(0, 63)), min_size=2, max_size=8))
def test_random_graphs(steps):
    """Random pointwise and view graphs over two inputs of shape [5, 6]: zero wrong."""
    def f(x, y):
        values = [x, y]
        for kind, which, a, b in steps:
            first, second = values[a % len(values)], values[b % len(values)]
            if kind == "binary":
                values.append(BINARY[which % len(BINARY)](first, second))
            else:
                table = UNARY if kind == "unary" else VIEWS
                values.append(table[which % len(table)](first))
        return values[-1], values[len(values) // 2] + 1

    inputs = [torch.randn(5, 6), torch.randn(5, 6)]
    got, _ = run(f, *inputs)
    for a, b in zip(got, f(*inputs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
