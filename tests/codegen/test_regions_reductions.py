"""Regions with reductions, gathers, several outputs, half types and symbolic sizes: one kernel, and eager's values against float64."""
import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report


def run(f, *inputs, dynamic=False):
    """(result, the reasons of the regions' kernels) of f compiled."""
    torch._dynamo.reset()
    report = Report()
    with torch.no_grad():
        result = torch.compile(f, backend=functools.partial(tileweld, report=report), dynamic=dynamic)(*inputs)
    assert not report.warnings and all(k.implementation.startswith("cpp:") for k in report.kernels)
    return result, [k.reason for k in report.kernels if k.op == "region"]


def tensors(x):
    return list(x) if isinstance(x, (tuple, list)) else [x]


def check(f, inputs, dynamic=False):
    """Compiled f has eager's shapes, dtypes and strides, and at most twice eager's error against float64."""
    got, kernels = run(f, *inputs, dynamic=dynamic)
    exact = tensors(f(*(x.double() if x.is_floating_point() else x for x in inputs)))
    for a, b, e in zip(tensors(got), tensors(f(*inputs)), exact):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        if not a.is_floating_point():
            assert torch.equal(a, b)
            continue
        scale = e.abs().max().clamp_min(1e-9)
        assert (a.double() - e).abs().max() <= max(2 * (b.double() - e).abs().max(), 3e-6 * scale)
    return kernels


def rms(x, w):
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def residual_stream(x, y, w):
    """Equal layers, traced once: each reads the sum that the one before it made, and has to have memory of its own."""
    for _ in range(3):
        x = x + y
        y = rms(x, w)
    return x, y + torch.arange(64).mul(0.1).cos()  # a constant: what is computed from nothing asks who shares memory


def rotate(q, k, positions, frequencies):
    angles = torch.cat([positions[:, None] * frequencies] * 2, -1)
    return [x * angles.cos() + torch.cat([-x[..., 8:], x[..., :8]], -1) * angles.sin() for x in (q, k)]


R = torch.randn
W, TABLE, IDS = R(64), R(50, 64), torch.randint(0, 50, (2, 7))
#: name -> (function, inputs, kernels)
CASES = {
    "rms norm": (rms, [R(2, 9, 64), W], 1),
    "residual and norm, both results": (lambda x, y, w: (x + y, rms(x + y, w)), [R(2, 9, 64), R(2, 9, 64), W], 1),
    "a residual stream": (residual_stream, [R(2, 9, 64), R(2, 9, 64), W], 1),
    "Gemma's 1 + w stays inside": (lambda x, w: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + w.float())).to(x.dtype), [R(2, 9, 64), W], 1),
    "layer norm": (lambda x, w, b: F.layer_norm(x + 1, (64,), w, b) * 2, [R(2, 9, 64), W, W], 1),
    "softmax, last dim": (lambda x: (x * 2).softmax(-1), [R(3, 5, 33)], 1),
    "softmax, first dim": (lambda x: (x * 2).softmax(0), [R(13, 5, 33)], 1),
    "log softmax": (lambda x: F.log_softmax(x * 2, -1), [R(3, 5, 33)], 1),
    "embedding and norm": (lambda i, e, w: rms(F.embedding(i, e), w), [IDS, TABLE, W], 1),
    "two embeddings and norm": (lambda i, e, p, w, b: F.layer_norm(F.embedding(i, e) + p[:i.shape[1]], (64,), w, b), [IDS, TABLE, R(20, 64), W, W], 1),
    "sums down the rows": (lambda x, y: ((x * y).sum(0), (x * y).sum((0, 1))), [R(2, 9, 64), R(2, 9, 64)], None),
    "sums down the rows, and what they are of": (lambda g, x, w, r: ((g * x * r).sum(0), g * w, g * w * x), [R(9, 130), R(9, 130), R(130), R(9, 1)], 1),
    "sums down the rows that are wanted at once": (lambda x, y: (x * y).sum(0) * x, [R(9, 130), R(9, 130)], 1),
    "mean of all": (lambda x, y: ((x - y) ** 2).mean(), [R(2, 9, 64), R(2, 9, 64)], 1),
    "a long sum": (lambda x, y: ((x - y) ** 2).sum(), [R(300, 9, 64), R(300, 9, 64)], 1),
    "siblings": (lambda x, y: (F.silu(x) * y, (x + 1) * 3), [R(4, 64), R(4, 64)], 1),
    "extremes": (lambda x: x - x.amax(-1, keepdim=True) + x.amin(-1, keepdim=True), [R(4, 64)], 1),
    "variance": (lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1).sqrt(), [R(4, 64)], 1),
    "rows alone": (lambda x: (x * 2).sum(-1) + x.mean(-1), [R(4, 64)], 1),
    "conditions": (lambda x: (x > 0) & (x * 2 < 1), [R(4, 64)], 1),
    "rows by index, from the end too": (lambda x, i: x[i] * 2 + 1, [R(9, 64), torch.tensor([0, -1, 3])], 1),
    "cat": (lambda x, y: torch.cat([x * 2, y + 1], 1).relu(), [R(4, 6), R(4, 10)], 1),
    "cross entropy's parts": (lambda x: -F.log_softmax(x.float(), -1)[:, 0].mean(), [R(5, 33)], None),
    "rotary, q and k in one launch": (rotate, [R(1, 4, 9, 16), R(1, 2, 9, 16), torch.arange(9.0), R(8).abs()], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name):
    f, inputs, count = CASES[name]
    kernels = check(f, inputs)
    assert kernels and (count is None or len(kernels) == count), kernels


@pytest.mark.parametrize("name", ["rms norm", "residual and norm, both results", "softmax, last dim", "two embeddings and norm", "sums down the rows", "sums down the rows, and what they are of", "cat", "rotary, q and k in one launch"])
def test_symbolic_sizes(name):
    f, inputs, _ = CASES[name]
    assert check(f, inputs, dynamic=True)


@pytest.mark.parametrize("name", ["rms norm", "residual and norm, both results", "layer norm", "softmax, last dim", "embedding and norm", "sums down the rows", "sums down the rows, and what they are of"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(name, dtype):
    f, inputs, _ = CASES[name]
    assert check(f, [x.to(dtype) if x.is_floating_point() else x for x in inputs])


@pytest.mark.parametrize("name, down", [("sums down the rows, and what they are of", True), ("sums down the rows that are wanted at once", False)])
def test_neighbours_in_memory_are_summed_side_by_side(name, down):
    """A column at a time, every element of a norm's backward is a cache line of its own; benchmarks/cpu.py training has eight of them."""
    torch._dynamo.reset()
    f, inputs, _ = CASES[name]
    report = Report()
    with torch.no_grad():
        torch.compile(f, backend=functools.partial(tileweld, report=report), dynamic=False)(*inputs)
    (kernel,) = report.sources
    assert ("sum_r0[x" in kernel.source) == down


def test_an_index_out_of_range_raises_as_eager_does():
    f = CASES["embedding and norm"][0]
    compiled = torch.compile(f, backend="tileweld", dynamic=False)
    with torch.no_grad():
        compiled(IDS, TABLE, W)
        for bad in (50, -1):
            ids = IDS.clone()
            ids[1, 3] = bad
            with pytest.raises(IndexError):
                f(ids, TABLE, W)
            with pytest.raises(IndexError, match="out of range"):
                compiled(ids, TABLE, W)
        torch.testing.assert_close(compiled(IDS, TABLE, W), f(IDS, TABLE, W))


@pytest.mark.parametrize("dim, normed", [(1, True), (1, False), (0, True)])
@pytest.mark.parametrize("first", [True, False])
def test_tokens_that_are_a_part_of_a_cat_are_checked_where_they_are_and_nowhere_else(dim, normed, first):
    """ProphetNet's decoder: the cat is longer than the tokens, and what lies behind them in memory are no tokens. They raised, or another allocation was read, as it happened."""
    def f(ids, table, other):
        parts = [F.embedding(ids, table), other]
        joined = torch.cat(parts if first else parts[::-1], dim)
        return F.layer_norm(joined, (32,)) if normed else joined * 2 + 1

    memory = torch.full((12, 20), 10**6)
    ids, table, other = memory[4:8, 5:10], torch.randn(50, 32), torch.randn(4, 5, 32)
    ids.copy_(torch.randint(0, 50, (4, 5)))
    compiled = torch.compile(f, backend="tileweld", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, table, other), f(ids, table, other), rtol=1e-5, atol=1e-5)
        for bad in (50, -1):
            memory[7, 9] = bad
            with pytest.raises(IndexError, match="out of range"):
                compiled(ids, table, other)


def test_hostile_rows():
    """Rows of zeros, of -inf, with NaN, with fp16's largest numbers."""
    x = torch.randn(6, 32)
    x[0], x[1], x[2, 3], x[3, 4], x[4] = 0.0, float("-inf"), float("nan"), float("inf"), 6e4
    for f in (lambda x: (x * 1.0).softmax(-1), lambda x: x - x.amax(-1, keepdim=True), lambda x: rms(x, W[:32]), lambda x: F.layer_norm(x * 1.0, (32,)) + 1):
        torch.testing.assert_close(run(f, x)[0], f(x), equal_nan=True, rtol=1e-5, atol=1e-5)
    half = torch.full((2, 32), 6e4, dtype=torch.float16)
    torch.testing.assert_close(run(rms, half, W[:32].half())[0], rms(half, W[:32].half()))


POINTWISE = [torch.tanh, torch.sigmoid, lambda x: x * 0.5, lambda x: torch.clamp(x, -0.5, 0.7), lambda x: torch.exp(-x * x), lambda x: x.masked_fill(x > 0.3, -0.25), torch.abs]
REDUCED = [lambda x: x - x.mean(-1, keepdim=True), lambda x: x.softmax(-1), lambda x: x / (x.pow(2).sum(-1, keepdim=True) + 1), lambda x: x * x.amax(1, keepdim=True), lambda x: F.layer_norm(x, (x.shape[-1],)),
           lambda x: x + x.sum(0, keepdim=True), lambda x: x - x.mean((0, 1), keepdim=True), lambda x: x.logsumexp(-1, keepdim=True) + x]
MOVED = [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.reshape(-1).reshape(x.shape), lambda x: torch.cat([x[:, 1:], x[:, :1]], 1), lambda x: x.flip(-1), lambda x: x[:, :1].expand(x.shape) * x]
JOINED = [torch.add, torch.mul, torch.maximum, lambda a, b: torch.where(a > b, a, b * 2), lambda a, b: a + b.mean(-1, keepdim=True)]
STEPS = st.lists(st.tuples(st.sampled_from(["pointwise", "reduced", "moved", "joined"]), st.integers(0, 63), st.integers(0, 63), st.integers(0, 63)), min_size=2, max_size=7)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(STEPS, st.booleans())
def test_random_graphs(steps, dynamic):
    """Random graphs of pointwise ops, reductions and views over [5, 4, 6], two results: zero wrong."""
    def f(x, y):
        values = [x, y]
        for kind, which, a, b in steps:
            first, second = values[a % len(values)], values[b % len(values)]
            table = {"pointwise": POINTWISE, "reduced": REDUCED, "moved": MOVED, "joined": JOINED}[kind]
            op = table[which % len(table)]
            values.append(op(first, second) if kind == "joined" else op(first))
        return values[-1], values[len(values) // 2] + 1

    inputs = [torch.randn(5, 4, 6), torch.randn(5, 4, 6)]
    got = run(f, *inputs, dynamic=dynamic)[0]
    for a, b in zip(got, f(*inputs)):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
