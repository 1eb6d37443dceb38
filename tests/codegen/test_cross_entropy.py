"""cross_entropy's kernels, C++ and Triton in its interpreter, against the float64 definition: dtypes, strides, odd class counts, caps, smoothing, and hostile rows."""
import functools
import importlib

import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.ir import cross_entropy as _op  # noqa: E402,F401 (registers the ops)
from tileweld.runtime.aot import compile_ahead  # noqa: E402
from tileweld.runtime.build import CppUnit, compile_cpp  # noqa: E402
from tileweld.runtime.interpret import interpreted_entry  # noqa: E402
from tileweld.runtime.launch import CppLauncher  # noqa: E402
from tileweld.runtime.source_module import load_python_source  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OP, BACKWARD = torch.ops.tileweld.cross_entropy, torch.ops.tileweld.cross_entropy_backward
GRADIENT = {F32: dict(rtol=3e-6, atol=3e-7), F16: dict(rtol=1e-3, atol=1e-7), BF16: dict(rtol=8e-3, atol=1e-7)}  # half an ulp of the dtype
DTYPES = [("cpp", F32), ("cpp", F16), ("cpp", BF16), ("triton", F32), ("triton", F16)]  # the interpreter computes bf16 on raw bits
both = pytest.mark.parametrize("target", ["cpp", "triton"])


def emit(target, *variant):
    return importlib.import_module(f"tileweld.codegen.{target}.cross_entropy").emit(*variant)


@functools.cache
def launcher(target, *variant):
    kernel = emit(target, *variant)
    if target == "triton":
        return interpreted_entry(kernel.name, kernel.source, kernel.entry)
    (library,) = compile_cpp([CppUnit.of(kernel)])
    return CppLauncher(library, kernel.entry)


def forward(target, x, t, ignore=-100, cap=0.0, smoothing=0.0):
    losses, statistics, status = torch.full(t.shape, 77.0), torch.full((*t.shape, 2), 77.0), torch.zeros(1, dtype=torch.int32)
    launcher(target, x.dtype, t.dim(), cap > 0, False)([losses, statistics, status, x, t], (ignore,), (cap, smoothing))
    return losses, statistics, bool(status.item())


def backward(target, grad, x, t, statistics, ignore=-100, cap=0.0, smoothing=0.0):
    out = torch.empty(x.shape, dtype=x.dtype).fill_(77)
    launcher(target, x.dtype, t.dim(), cap > 0, True)([out, grad, x, t, statistics], (ignore,), (cap, smoothing))
    return out


def check(target, x, t, **rest):
    numbers = rest.get("ignore", -100), rest.get("cap", 0.0), rest.get("smoothing", 0.0)
    exact, exact_statistics = OP(x.double(), t, *numbers)
    losses, statistics, failed = forward(target, x, t, **rest)
    assert not failed
    scale = exact.nan_to_num(posinf=0).abs().max().item() if exact.numel() else 1.0
    torch.testing.assert_close(losses.double(), exact, rtol=2e-6, atol=2e-6 * max(scale, 1.0), equal_nan=True)
    grad = torch.randn(t.shape)
    expected = BACKWARD(grad.double(), x.double(), t, exact_statistics, *numbers)
    torch.testing.assert_close(backward(target, grad, x, t, statistics, **rest), expected.to(x.dtype), equal_nan=True, **GRADIENT[x.dtype])


def rows(n, classes, dtype=F32, scale=4.0):
    t = torch.randint(0, classes, (n,))
    t[::5] = -100
    return (torch.randn(n, classes) * scale).to(dtype), t


@pytest.mark.parametrize("target, dtype", DTYPES)
@pytest.mark.parametrize("rest", [{}, {"cap": 5.0}, {"smoothing": 0.1}, {"cap": 30.0, "smoothing": 0.3}, {"ignore": 0}])
def test_dtypes_and_odd_class_counts(target, dtype, rest):
    for n, classes in [(1, 1), (7, 3), (4, 16), (5, 127), (3, 1023), (3, 1024), (3, 5001)]:
        x, t = rows(n, classes, dtype)
        check(target, x, t.abs() % classes if rest.get("ignore") == 0 else t, **rest)


@pytest.mark.parametrize("target, dtype", [("cpp", F32), ("cpp", BF16), ("triton", F32), ("triton", F16)])
def test_any_strides_and_ranks(target, dtype):
    base, t = torch.randn(4, 6, 40).to(dtype), torch.randint(0, 20, (4, 6))
    check(target, base[..., :20], t)
    check(target, base[:, :-1, :20], t[:, 1:])  # shifted, without a copy
    check(target, base[..., ::2], t)
    check(target, base.transpose(1, 2)[:, :20].transpose(1, 2).contiguous().transpose(0, 1), t.t())
    check(target, base[:, :, :20].permute(2, 0, 1).contiguous().permute(1, 2, 0), t)  # the classes are strided
    check(target, base[0, 0, :20], t[0, 0])  # one row, no dims


@pytest.mark.parametrize("target, count", [("cpp", 300), ("triton", 30)])  # 300: several threads
def test_a_broadcast_gradient_and_many_rows(target, count):
    x, t = rows(count, 257)
    _, statistics, _ = forward(target, x, t)
    grad = torch.tensor(0.25).expand(count)
    expected = BACKWARD(grad.double(), x.double(), t, OP(x.double(), t, -100, 0.0, 0.0)[1], -100, 0.0, 0.0)
    torch.testing.assert_close(backward(target, grad, x, t, statistics), expected.float(), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("target, dtype", DTYPES)
def test_hostile_rows_stay_alone(target, dtype):
    x = torch.randn(9, 6100).to(dtype)
    big = torch.finfo(dtype).max
    x[1] = big
    x[2, 0] = float("inf")
    x[3, :4500] = -float("inf")  # a block of nothing before the first number
    x[4] = -float("inf")
    x[5, 6000] = float("nan")
    x[6] = 0
    x[7, 3], x[7, 4] = big, -big
    t = torch.tensor([0, 1, 1, 4600, 1, 1, 1, 3, -100])
    losses = forward(target, x, t)[0]
    assert losses.isnan().tolist() == [False, False, True, False, True, True, False, False, False]
    keep = [0, 1, 3, 6, 7, 8]
    check(target, x[keep], t[keep])


@both
@pytest.mark.parametrize("number", [-1, 300, -101, 2**40])
def test_a_target_out_of_bounds_is_told_and_reads_nothing(target, number):
    x, t = rows(40, 300)
    t[17] = number
    losses, statistics, failed = forward(target, x, t)
    assert failed and losses.isnan().nonzero().tolist() == [[17]]
    assert backward(target, torch.ones(40), x, t, statistics).isnan().all(1).nonzero().tolist() == [[17]]


@both
def test_no_rows(target):
    assert forward(target, torch.empty(0, 5), torch.empty(0, dtype=torch.int64))[0].shape == (0,)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_what_has_no_kernel_says_so(target, dtype):
    with pytest.raises(UnsupportedError, match=f"no {dict(cpp='C..', triton='Triton')[target]} cross_entropy kernel"):
        emit(target, dtype, 1, False)


def test_bfloat16_in_the_interpreter_is_an_error_and_no_wrong_number():
    with pytest.raises(TypeError, match="bfloat16"):
        forward("triton", *rows(2, 8, BF16))


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_compiles_ahead_of_time_without_spills_and_with_wide_loads(arch, backward, capped):
    kernel = emit("triton", BF16, 2, capped, backward)
    module = load_python_source(kernel.name, kernel.source)
    (entry,) = [e for e in module.AOT if e["backend"] == ("hip" if arch == "gfx942" else "cuda")]
    result = compile_ahead(module, entry["kernel"], entry["signature"], entry["constants"], arch, divisible_by_16=entry["divisible_by_16"], num_warps=entry["config"][1])
    assert result.spills == 0 and result.fits
    assert ("ld.global.v4" if arch == "sm_90" else "load_dwordx4") in result.assembly
