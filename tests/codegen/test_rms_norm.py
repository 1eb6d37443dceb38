"""tileweld::rms_norm as its region, C++ and Triton in the interpreter, against the float64 definition: dtypes, strides, and rows that overflow, vanish or hold NaN."""
import pytest
import torch

import tileweld
from tileweld.compiler.ir.rms_norm import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: dict(rtol=2e-6, atol=1e-6), F16: dict(rtol=2e-3, atol=1e-6), BF16: dict(rtol=1.6e-2, atol=1e-6)}  # two roundings of the dtype
CASES = [("cpp", F32, F32, "before"), ("cpp", F16, F16, "before"), ("cpp", BF16, BF16, "after"), ("cpp", BF16, F32, "before"), ("cpp", F32, None, "after")]
TRITON = [("triton", F32, F32, "before"), ("triton", F16, F16, "before"), ("triton", F16, None, "after")]  # its interpreter has no bfloat16


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def run(x, weight, eps, offset, cast, target="cpp"):
    """The op compiled alone; that one kernel made the result is held too."""
    def op(x, weight):
        return torch.ops.tileweld.rms_norm(x, weight, eps, offset, cast)

    kernels = tileweld.explain(op, x, weight, options={"target": target}).kernels
    assert [(k.op, k.implementation.split(":")[0]) for k in kernels] == [("region", target)]
    torch._dynamo.reset()
    return torch.compile(op, backend="tileweld", options={"target": target})(x, weight)


def check(x, weight, eps=1e-5, offset=0.0, cast="before", target="cpp"):
    actual = run(x, weight, eps, offset, cast, target)
    expected = reference(x.double(), None if weight is None else weight.double(), eps, offset, "after")
    torch.testing.assert_close(actual, expected.to(actual.dtype), equal_nan=True, **TOLERANCE[x.dtype if cast == "before" or weight is None else actual.dtype])
    assert actual.dtype == reference(x, weight, eps, offset, cast).dtype


def of_target(target):
    if target == "triton":
        pytest.importorskip("triton", reason="the Triton target needs triton")


@pytest.mark.filterwarnings("ignore::tileweld.DegradedWarning")
@pytest.mark.parametrize(("target", "x_dtype", "w_dtype", "cast"), CASES + TRITON)
def test_extreme_rows_stay_alone(target, x_dtype, w_dtype, cast):
    of_target(target)
    for width in (7, 200):
        x = torch.randn(8, width).to(x_dtype)
        x[1] = 0
        x[2] = 6e4  # its square is out of float16's range
        x[3, 5] = float("nan")
        x[4, 6] = float("inf")
        x[5, 6] = -float("inf")
        x[6] = 6e-8
        check(x, torch.randn(width).to(w_dtype) if w_dtype else None, offset=1.0 if w_dtype else 0.0, cast=cast, target=target)


@pytest.mark.filterwarnings("ignore::tileweld.DegradedWarning")
@pytest.mark.parametrize(("target", "dtype"), [("cpp", BF16), ("cpp", F16), ("triton", F16)])
def test_a_region_rounds_once_where_llama_rounds_twice(target, dtype):
    of_target(target)
    x, w = torch.randn(64, 576).to(dtype), torch.randn(576).to(dtype)
    exact, twice = reference(x.double(), w.double(), 1e-5, 0.0, "after"), reference(x, w, 1e-5, 0.0, "before")
    actual = run(x, w, 1e-5, 0.0, "before", target)
    # another order of summing tips single roundings; the second rounding changes a quarter of all elements
    assert (actual != exact.to(dtype)).float().mean() < 0.01 < (actual != twice).float().mean()
    assert (actual - exact).norm() < (twice - exact).norm()


def test_any_strides():
    w, base = torch.randn(24), torch.randn(6, 5, 4, 48)
    for x in (base.transpose(1, 2)[..., 24:], base[..., ::2], base[:, :1, :, :24].expand(6, 5, 4, 24)):
        check(x, w)
    check(base[..., :24].permute(3, 0, 1, 2)[..., :4], w[:4])  # the last dim is strided
    check(torch.randn(5, 24), torch.randn(48)[::2])
    check(torch.randn(24), w)


def test_float32_overflow_of_the_square_gives_zero_and_no_eps_a_nan_as_eager():
    x = torch.full((2, 32), 1e25)
    x[1] = 0
    assert torch.equal(run(x[:1], None, 1e-5, 0.0, "after"), reference(x[:1], None, 1e-5, 0.0, "after"))
    assert run(x[1:], None, 0.0, 0.0, "after").isnan().all()  # 0 * inf


def test_float64_runs_on_the_definition_and_says_so():
    x = torch.randn(3, 8).double()

    def op(x):
        return torch.ops.tileweld.rms_norm(x, None, 1e-5, 0.0, "after")

    assert [(k.op, k.implementation, k.reason) for k in tileweld.explain(op, x).kernels] == [("rms_norm", "reference", "float64 has no kernel")]
    torch.testing.assert_close(torch.compile(op, backend="tileweld")(x), op(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 4)])
def test_nothing_to_do(shape):
    def op(x, weight):
        return torch.ops.tileweld.rms_norm(x, weight, 1e-5, 0.0, "before")

    assert torch.compile(op, backend="tileweld")(torch.empty(shape), torch.empty(shape[-1])).shape == shape
