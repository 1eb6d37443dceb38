"""The C++ kernel against the float64 definition: dtypes, strides, odd widths, and rows that overflow, vanish or hold NaN."""
import functools

import pytest
import torch

from tileweld.codegen.cpp.rms_norm import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.rms_norm import reference, result_dtype
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: dict(rtol=2e-6, atol=1e-6), F16: dict(rtol=2e-3, atol=1e-6), BF16: dict(rtol=1.6e-2, atol=1e-6)}  # two roundings of the dtype


@functools.cache
def launcher(*variant):
    kernel = emit(*variant)
    (library,) = compile_cpp([CppUnit(kernel.name, kernel.source)])
    return CppLauncher(library, kernel.entry)


def run(x, weight, eps, offset, cast):
    out = torch.empty_like(x, dtype=result_dtype(x, weight, cast)).fill_(77)
    tensors = [out, x] + ([] if weight is None else [weight])
    launcher(x.dtype, None if weight is None else weight.dtype, x.dim(), cast)(tensors, (), (eps, offset))
    return out


def check(x, weight, eps=1e-5, offset=0.0, cast="before"):
    actual = run(x, weight, eps, offset, cast)
    expected = reference(x.double(), None if weight is None else weight.double(), eps, offset, "after")
    torch.testing.assert_close(actual, expected.to(actual.dtype), equal_nan=True, **TOLERANCE[x.dtype if cast == "before" or weight is None else actual.dtype])
    assert actual.dtype == reference(x, weight, eps, offset, cast).dtype


@pytest.mark.parametrize("cast", ["before", "after"])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F32, BF16), (F32, None), (BF16, None)])
def test_dtypes_and_odd_widths(x_dtype, w_dtype, cast):
    for rows, width in [(1, 1), (3, 7), (5, 16), (4, 127), (2, 1023), (40, 1024)]:
        weight = torch.randn(width).to(w_dtype) if w_dtype else None
        check(torch.randn(rows, width).to(x_dtype), weight, offset=1.0 if weight is not None else 0.0, cast=cast)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_two_roundings_of_llama_bit_for_bit(dtype):
    x, w = torch.randn(64, 576).to(dtype), torch.randn(576).to(dtype)
    actual, expected = run(x, w, 1e-5, 0.0, "before"), reference(x, w, 1e-5, 0.0, "before")
    other = run(x, w, 1e-5, 0.0, "after")
    # another order of summing tips single roundings; rounding once instead of twice would change a third of all elements
    assert (actual != expected).float().mean() < 0.01 < (other != expected).float().mean()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_strides(dtype):
    w = torch.randn(24).to(dtype)
    base = torch.randn(6, 5, 4, 48).to(dtype)
    for x in (base[..., :24], base.transpose(1, 2)[..., 24:], base[..., ::2], base[:, :1, :, :24].expand(6, 5, 4, 24), base[:, :, 0, :24]):
        check(x, w)
    check(base[..., :24].permute(3, 0, 1, 2)[..., :4], w[:4])  # the last dim is strided
    check(torch.randn(5, 24).to(dtype), torch.randn(48).to(dtype)[::2])
    check(torch.randn(24).to(dtype), w)


def test_many_rows_run_in_parallel():
    check(torch.randn(3, 700, 96), torch.randn(96))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing_to_do(shape):
    assert run(torch.empty(shape), torch.empty(shape[-1]), 1e-5, 0.0, "before").shape == shape


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_extreme_rows_stay_alone(dtype):
    width = 200
    x = torch.randn(8, width).to(dtype)
    x[1] = 0
    x[2] = 6e4  # its square is out of float16's range
    x[3, 5] = float("nan")
    x[4, 7] = float("inf")
    x[5, 7] = -float("inf")
    x[6] = 6e-8
    check(x, torch.randn(width).to(dtype))
    check(x, None)
    zero_eps = run(x, None, 0.0, 0.0, "after")
    assert zero_eps[1].isnan().all() and zero_eps[0].isfinite().all()  # 0 * inf, as eager


def test_float32_overflow_of_the_square_gives_zero_as_eager():
    x = torch.full((2, 32), 1e25)
    assert torch.equal(run(x, None, 1e-5, 0.0, "after"), reference(x, None, 1e-5, 0.0, "after"))


@pytest.mark.parametrize("variant", [(torch.float64, None, 2, "after"), (F32, torch.int32, 2, "after"), (F32, F32, 0, "after"), (F32, F32, 2, "never")])
def test_what_has_no_kernel_says_so(variant):
    with pytest.raises(UnsupportedError, match="no C\\+\\+ rms_norm kernel"):
        emit(*variant)
