"""The C++ kernels against the float64 definition: dtypes, strides, odd class counts, caps, smoothing, and hostile rows."""
import functools

import pytest
import torch

from tileweld.codegen.cpp.cross_entropy import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir import cross_entropy as _op  # noqa: F401 (registers the ops)
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OP, BACKWARD = torch.ops.tileweld.cross_entropy, torch.ops.tileweld.cross_entropy_backward
GRADIENT = {F32: dict(rtol=3e-6, atol=3e-7), F16: dict(rtol=1e-3, atol=1e-7), BF16: dict(rtol=8e-3, atol=1e-7)}  # half an ulp of the dtype


@functools.cache
def launcher(*variant):
    kernel = emit(*variant)
    (library,) = compile_cpp([CppUnit(kernel.name, kernel.source)])
    return CppLauncher(library, kernel.entry)


def forward(x, t, ignore=-100, cap=0.0, smoothing=0.0):
    losses, statistics, status = torch.full(t.shape, 77.0), torch.full((*t.shape, 2), 77.0), torch.zeros(1, dtype=torch.int32)
    launcher(x.dtype, t.dim(), cap > 0, False)([losses, statistics, status, x, t], (ignore,), (cap, smoothing))
    return losses, statistics, bool(status.item())


def backward(grad, x, t, statistics, ignore=-100, cap=0.0, smoothing=0.0):
    out = torch.empty(x.shape, dtype=x.dtype).fill_(77)
    launcher(x.dtype, t.dim(), cap > 0, True)([out, grad, x, t, statistics], (ignore,), (cap, smoothing))
    return out


def check(x, t, **rest):
    numbers = rest.get("ignore", -100), rest.get("cap", 0.0), rest.get("smoothing", 0.0)
    exact, exact_statistics = OP(x.double(), t, *numbers)
    losses, statistics, failed = forward(x, t, **rest)
    assert not failed
    scale = exact.nan_to_num(posinf=0).abs().max().item() if exact.numel() else 1.0
    torch.testing.assert_close(losses.double(), exact, rtol=2e-6, atol=2e-6 * max(scale, 1.0), equal_nan=True)
    grad = torch.randn(t.shape)
    expected = BACKWARD(grad.double(), x.double(), t, exact_statistics, *numbers)
    torch.testing.assert_close(backward(grad, x, t, statistics, **rest), expected.to(x.dtype), equal_nan=True, **GRADIENT[x.dtype])


def rows(n, classes, dtype=F32, scale=4.0):
    t = torch.randint(0, classes, (n,))
    t[::5] = -100
    return (torch.randn(n, classes) * scale).to(dtype), t


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("rest", [{}, {"cap": 5.0}, {"smoothing": 0.1}, {"cap": 30.0, "smoothing": 0.3}, {"ignore": 0}])
def test_dtypes_and_odd_class_counts(dtype, rest):
    for n, classes in [(1, 1), (7, 3), (4, 16), (5, 127), (3, 1023), (3, 1024), (6, 5001)]:
        x, t = rows(n, classes, dtype)
        check(x, t.abs() % classes if rest.get("ignore") == 0 else t, **rest)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_strides_and_ranks(dtype):
    base, t = torch.randn(4, 6, 40).to(dtype), torch.randint(0, 20, (4, 6))
    check(base[..., :20], t)
    check(base[:, :-1, :20], t[:, 1:])  # shifted, without a copy
    check(base[..., ::2], t)
    check(base.transpose(1, 2)[:, :20].transpose(1, 2).contiguous().transpose(0, 1), t.t())
    check(base[:, :, :20].permute(2, 0, 1).contiguous().permute(1, 2, 0), t)  # the classes are strided
    check(base[0, 0, :20], t[0, 0])  # one row, no dims


def test_a_broadcast_gradient_and_many_rows_in_parallel():
    x, t = rows(300, 257)
    _, statistics, _ = forward(x, t)
    grad = torch.tensor(0.25).expand(300)
    expected = BACKWARD(grad.double(), x.double(), t, OP(x.double(), t, -100, 0.0, 0.0)[1], -100, 0.0, 0.0)
    torch.testing.assert_close(backward(grad, x, t, statistics), expected.float(), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_hostile_rows_stay_alone(dtype):
    x = torch.randn(9, 2100).to(dtype)
    big = torch.finfo(dtype).max
    x[1] = big
    x[2, 0] = float("inf")
    x[3, :1500] = -float("inf")  # a block of nothing before the first number
    x[4] = -float("inf")
    x[5, 2000] = float("nan")
    x[6] = 0
    x[7, 3], x[7, 4] = big, -big
    t = torch.tensor([0, 1, 1, 1600, 1, 1, 1, 3, -100])
    losses = forward(x, t)[0]
    assert losses.isnan().tolist() == [False, False, True, False, True, True, False, False, False]
    keep = [0, 1, 3, 6, 7, 8]
    check(x[keep], t[keep])


@pytest.mark.parametrize("target", [-1, 300, -101, 2**40])
def test_a_target_out_of_bounds_is_told_and_reads_nothing(target):
    x, t = rows(40, 300)
    t[17] = target
    losses, statistics, failed = forward(x, t)
    assert failed and losses.isnan().nonzero().tolist() == [[17]]
    assert backward(torch.ones(40), x, t, statistics).isnan().all(1).nonzero().tolist() == [[17]]


def test_no_rows():
    assert forward(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_what_has_no_kernel_says_so(dtype):
    with pytest.raises(UnsupportedError, match="no C\\+\\+ cross_entropy kernel"):
        emit(dtype, 1, False)
