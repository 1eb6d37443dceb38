"""Regions in Triton, run by its interpreter: equal to eager, whatever the shapes, strides, dtypes and sizes."""
import functools

import pytest

pytest.importorskip("triton")

import torch
import torch.nn.functional as F
from tileweld.codegen.triton.region_plan import Flat, Rows, plan
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report

def compiled(f, dynamic=False):
    """(the compiled function, its report) on the triton target."""
    torch._dynamo.reset()
    report = Report()
    return torch.compile(f, backend=functools.partial(tileweld, options={"target": "triton", "strict": True}, report=report), dynamic=dynamic), report


def run(f, *inputs):
    """(result, kernels of regions, their sources)"""
    function, report = compiled(f)
    with torch.no_grad():
        result = function(*inputs)
    kernels = [u for u in report.kernels if u.op == "region"]
    assert all(u.implementation.startswith("triton:region_") for u in kernels), kernels
    return result, kernels, [k.source for k in report.sources]


def close(got, expected, double, dtype):
    """Within twice eager's own error, and a few ulp: against float64."""
    got, expected, double = (x if isinstance(x, tuple) else (x,) for x in (got, expected, double))
    assert len(got) == len(expected)
    for a, e, d in zip(got, expected, double):
        assert a.shape == e.shape and a.dtype == e.dtype
        if not a.dtype.is_floating_point:
            assert torch.equal(a, e)
            continue
        limit = 2 * (e.double() - d).abs().max() + (4e-6 if dtype == torch.float32 else 1e-3) * (d.abs().max() + 0.1)
        assert (a.double() - d).abs().max() <= limit, ((a.double() - d).abs().max(), limit)


def doubled(f, inputs):
    return f(*(x.double() if x.dtype.is_floating_point else x for x in inputs))


def rotary(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def interleaved(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


POINTWISE = {
    "rotary": (rotary, [(2, 3, 7, 16), (7, 16), (7, 16)]),
    "rotary of 6 columns": (rotary, [(2, 3, 7, 6), (7, 6), (7, 6)]),
    "rotary behind a transpose": (lambda x, c, s: rotary(x.transpose(1, 2), c, s), [(2, 7, 3, 16), (7, 16), (7, 16)]),
    "interleaved rotary": (interleaved, [(2, 3, 7, 16), (7, 8), (7, 8)]),
    "swiglu": (lambda g, u: F.silu(g) * u, [(5, 33), (5, 33)]),
    "geglu": (lambda g, u: F.gelu(g, approximate="tanh") * u, [(5, 33), (5, 33)]),
    "gelu": (lambda g, u: F.gelu(g) * u + 1, [(5, 33), (5, 33)]),
    "softcap": (lambda x: torch.tanh(x / 30) * 30, [(4, 9, 11)]),
    "broadcast": (lambda x, w, b: (x * w + b).relu(), [(3, 1, 5), (4, 1), (5,)]),
    "permuted result": (lambda x, y: (x.transpose(0, 1) * 2 + y).abs(), [(6, 4), (4, 6)]),
    "select and slice": (lambda x: x[:, 2] * x[:, 0, :] - x[:, 1], [(3, 4, 8)]),
    "views inside": (lambda x, y: (x.view(2, 6, 4) * 3 + y).view(12, 4) - 1, [(12, 4), (2, 6, 4)]),
    "masked": (lambda x: torch.where(torch.arange(9) < 4, x * 2, x.masked_fill(x > 0, -1.0)), [(5, 9)]),
    "clamped positions": (lambda x: x[:, (torch.arange(9) + 3).clamp(max=8)] * 2 + torch.where(torch.arange(9) < 4, x, x.flip(1)), [(5, 9)]),
    "flipped": (lambda x: x.flip(1) * 2 + 1, [(9, 40)]),
    "one element": (lambda x: (x + 1) * 2, [(1,)]),
    "several programs": (lambda x, y: torch.exp(-x * x) + y, [(50, 30), (50, 30)]),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_equals_eager(name):
    f, shapes = POINTWISE[name]
    for dtype in (torch.float32, torch.float16):
        inputs = [torch.randn(s).to(dtype) for s in shapes]
        got, kernels, _ = run(f, *inputs)
        assert len(kernels) == 1 or name in ("interleaved rotary", "clamped positions")
        close(got, f(*inputs), doubled(f, inputs), dtype)


def rms_norm(x, w):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def add_rms_norm(x, residual, w):
    y = x + residual
    return y, rms_norm(y, w)


REDUCING = {
    "softmax": (lambda x: torch.softmax(x * 2, -1), [(5, 33)]),
    "softmax down the memory": (lambda x: torch.softmax(x * 2, 1), [(3, 17, 40)]),
    "log-softmax": (lambda x: torch.log_softmax(x + 1, -1), [(5, 33)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (33,), w, b) * 2, [(5, 33), (33,), (33,)]),
    "layer norm of two dims": (lambda x, w, b: F.layer_norm(x, (6, 7), w, b) * 2, [(5, 6, 7), (6, 7), (6, 7)]),
    "rms norm": (rms_norm, [(2, 5, 64), (64,)]),
    "rms norm of long rows": (rms_norm, [(2, 33000), (33000,)]),
    "add and rms norm": (add_rms_norm, [(2, 5, 64), (2, 5, 64), (64,)]),
    "sum down the memory": (lambda x: (x * 2).sum(0) + 1, [(300, 70)]),
    "two sums of one tensor": (lambda x, y: ((x * y).sum((0, 1)), x.sum((0, 1))), [(5, 20, 33), (5, 20, 33)]),
    "mean of all": (lambda x: (x * x).mean(), [(100, 400)]),
    "cat and sum": (lambda x, y: torch.cat([x * 2, y.relu()], 0).sum(1), [(3, 5), (4, 5)]),
    "cat": (lambda x, y: torch.cat([x * 2, y.relu()], 1), [(3, 5), (3, 9)]),
    "lengths of one": (lambda x, y: torch.softmax((x * 2 + y).relu(), 0), [(1, 5, 1), (1, 1, 1)]),
    "transposed": (lambda x: (x.t() * 2).softmax(-1), [(40, 7)]),
    "variance": (lambda x: (x + 1).var(-1), [(5, 40)]),
    "column statistics and result": (lambda x: (x - x.mean(0)) / (x.std(0) + 1), [(70, 40)]),
    "sum, largest and softmax": (lambda x: ((x * 2).sum(-1), x.amax(-1), x.softmax(-1)), [(9, 40)]),
    "smallest of all": (lambda x: (x * x).amin(), [(30, 50)]),
}


@pytest.mark.parametrize("name", REDUCING)
def test_reductions_equal_eager(name):
    f, shapes = REDUCING[name]
    for dtype in (torch.float32, torch.float16):
        inputs = [torch.randn(s).to(dtype) for s in shapes]
        got, kernels, _ = run(f, *inputs)
        assert len(kernels) >= 1
        close(got, f(*inputs), doubled(f, inputs), dtype)


def test_bfloat16_is_computed_on_wider_copies():
    inputs = [torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()]
    got, kernels, _ = run(rms_norm, *inputs)
    assert kernels and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), doubled(rms_norm, inputs), rtol=2e-2, atol=2e-2)


def test_a_long_sum_is_shared_by_programs_and_the_same_every_time():
    made = plan([Rows(1, 40000, is_splittable=True)], [40000], 132)
    assert made.splits[0] > 1 and made.combine == (1,)
    x = torch.randn(8, 5000)
    function, report = compiled(lambda x: (x * x).sum())
    results = {function(x).item() for _ in range(3)}
    assert len(results) == 1 and "combine_kernel" in report.sources[0].source and "atomic" not in report.sources[0].source


@pytest.mark.parametrize("f, expected", [(lambda x: (x * 2).amax(-1), [True, False]), (lambda x: (x * 2).amin(-1), [True, False]), (lambda x: torch.softmax(x * 2, -1).amax(-1), [True, False])])
def test_nan_passes_through(f, expected):
    x = torch.randn(2, 20)
    x[0, 7] = float("nan")
    x[1, 3] = float("-inf")
    got, kernels, _ = run(f, x)
    assert kernels and got.isnan().tolist() == expected
    torch.testing.assert_close(got, f(x), equal_nan=True)


def test_fp16_rows_of_6e4_and_of_zeros():
    x = torch.stack([torch.full((64,), 6e4), torch.zeros(64)]).half()
    got, kernels, _ = run(rms_norm, x, torch.ones(64).half())
    assert kernels
    torch.testing.assert_close(got, torch.stack([torch.ones(64), torch.zeros(64)]).half())


def test_gathers():
    def embedded(table, ids, w):
        return rms_norm(F.embedding(ids, table) * 2, w)

    table, ids, w = torch.randn(11, 32), torch.tensor([[1, 10, 0], [3, 3, 7]]), torch.randn(32)
    got, kernels, [source] = run(embedded, table, ids, w)
    assert len(kernels) == 1 and "tl.device_assert" in source and '"debug": True' in source
    torch.testing.assert_close(got, embedded(table, ids, w), rtol=2e-6, atol=2e-6)


def test_an_index_out_of_range_is_asserted():
    function, _ = compiled(lambda table, ids: F.embedding(ids, table) * 2 + 1)
    table = torch.randn(11, 4)
    function(table, torch.tensor([1, 2]))
    with pytest.raises(Exception, match="index out of range"):  # Triton's interpreter names its own class
        function(table, torch.tensor([1, 11]))


def test_integers_booleans_and_scalars():
    def f(x, mask, counts, scale):
        return torch.where(mask, x * scale, -1.0), (counts * 3 + 1) > 4, counts * 2 - 5, (x > 0) & mask

    for count in (torch.int64, torch.int32):
        inputs = [torch.randn(6, 9), torch.rand(6, 9) > 0.5, torch.arange(54).reshape(6, 9).to(count) - 20, torch.tensor(2.5)]
        got, kernels, _ = run(f, *inputs)
        assert kernels
        for a, e in zip(got, f(*inputs)):
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e)


def test_strided_inputs_and_other_strides_than_those_compiled_for():
    f = lambda x, y: torch.softmax(x * 2 + y, -1)  # noqa: E731
    x, y = torch.randn(12, 14)[::2, ::2], torch.randn(7, 6).t()
    got, kernels, _ = run(f, x, y)
    assert len(kernels) == 1
    torch.testing.assert_close(got, f(x, y))


def test_dynamic_sizes_share_a_kernel():
    def f(x, w):
        y = F.silu(x) * x + 1
        return rms_norm(y, w), y.sum((0, 1)), torch.cat([y[:, 1:], y[:, :1]], 1) * 2

    function, report = compiled(f, dynamic=True)
    for batch, tokens, width in ((2, 5, 16), (3, 7, 16), (4, 32, 48)):
        inputs = torch.randn(batch, tokens, width), torch.randn(width)
        with torch.no_grad():
            got = function(*inputs)
        for a, e in zip(got, f(*inputs)):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert len(report.graphs if isinstance(getattr(report, "graphs", None), list) else [1]) == 1
    assert any(k.name.startswith("region") and "ints: s" in k.source for k in report.sources)
    transposed = torch.randn(16, 5, 2).permute(2, 1, 0)  # other strides: a guard of Dynamo's, or a copy
    torch.testing.assert_close(function(transposed, torch.ones(16))[0], f(transposed, torch.ones(16))[0], rtol=1e-5, atol=1e-5)


def test_gradients():
    def f(x, w, b):
        return (F.layer_norm(F.gelu(x, approximate="tanh"), (24,), w, b) * 2).softmax(-1)

    x, w, b, grad = torch.randn(10, 24), torch.randn(24), torch.randn(24), torch.randn(10, 24)
    results = []
    for call in (compiled(f)[0], f):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        (call(*inputs) * grad).sum().backward()
        results.append([t.grad for t in inputs])
    for a, e in zip(*results):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_a_scalar_on_another_device_is_moved():
    from tileweld.compiler.select import _moved

    seen = []
    run = _moved(1, torch.device("cpu"))(lambda tensors, ints, floats: seen.append((len(tensors), ints, floats)))
    run([torch.zeros(2)], torch.tensor(1.0), 7)
    assert seen == [(2, (7,), ())]


@pytest.mark.parametrize("nest, expected", [
    (Rows(4096, 4096), dict(ROWS0=1, BLOCK0=4096, LOOP0=False)), (Rows(100000, 128), dict(ROWS0=16, BLOCK0=128, LOOP0=False)), (Rows(64, 32769), dict(ROWS0=1, BLOCK0=4096, LOOP0=True)),
    (Rows(64, 32768, held=2), dict(ROWS0=1, BLOCK0=4096, LOOP0=True)), (Rows(64, 16384, held=2), dict(ROWS0=1, BLOCK0=16384, LOOP0=False)),
    (Rows(65536, 64, is_down=True), dict(ROWS0=64, BLOCK0=64, LOOP0=False)), (Rows(4096, 8192, is_down=True, is_splittable=True), dict(ROWS0=64, BLOCK0=32, LOOP0=True, SPLIT0=True)),
    (Flat(10), dict(BLOCK0=256)), (Flat(1 << 20), dict(BLOCK0=1024))])
def test_tiles(nest, expected):
    made = plan([nest], [1], 132)
    assert made.constants.items() >= expected.items()
    assert isinstance(nest, Flat) or (made.constants["ROWS0"] * made.constants["BLOCK0"]) // (32 * made.num_warps) <= 64  # elements a thread


def test_indices_widen_before_they_overflow():
    assert not plan([Flat(2**31 - 2**18)], [2**31 - 2**18], 132).constants["WIDE"]
    assert plan([Flat(2**31 - 1)], [2**31 - 1], 132).constants["WIDE"]
    assert plan([Flat(100)], [100, 2**31], 132).constants["WIDE"]  # few elements, far apart
