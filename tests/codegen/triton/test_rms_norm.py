"""The Triton kernel in the interpreter against the float64 definition, and compiled ahead of time."""
import functools

import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.codegen.triton.rms_norm import emit  # noqa: E402
from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.ir.rms_norm import reference, result_dtype  # noqa: E402
from tileweld.runtime.aot import compile_ahead  # noqa: E402
from tileweld.runtime.interpret import interpreted_entry  # noqa: E402
from tileweld.runtime.source_module import load_python_source  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: dict(rtol=2e-6, atol=1e-6), F16: dict(rtol=2e-3, atol=1e-6)}


@functools.cache
def entry(*variant):
    kernel = emit(*variant)
    return interpreted_entry(kernel.name, kernel.source, kernel.entry)


def run(x, weight, eps, offset, cast):
    out = torch.empty_like(x, dtype=result_dtype(x, weight, cast)).fill_(77)
    tensors = [out, x] + ([] if weight is None else [weight])
    entry(x.dtype, None if weight is None else weight.dtype, x.dim(), cast)(tensors, (), (eps, offset))
    return out


def check(x, weight, eps=1e-5, offset=0.0, cast="before"):
    actual = run(x, weight, eps, offset, cast)
    expected = reference(x.double(), None if weight is None else weight.double(), eps, offset, "after")
    torch.testing.assert_close(actual, expected.to(actual.dtype), equal_nan=True, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("cast", ["before", "after"])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [(F32, F32), (F16, F16), (F16, F32), (F32, None), (F16, None)])
def test_dtypes_and_odd_widths(x_dtype, w_dtype, cast):
    for rows, width in [(1, 1), (3, 7), (5, 127), (2, 1023), (37, 64), (2, 5000)]:
        weight = torch.randn(width).to(w_dtype) if w_dtype else None
        check(torch.randn(rows, width).to(x_dtype), weight, offset=1.0 if weight is not None else 0.0, cast=cast)


def test_the_two_roundings_of_llama():
    x, w = torch.randn(16, 576).half(), torch.randn(576).half()
    actual, expected = run(x, w, 1e-5, 0.0, "before"), reference(x, w, 1e-5, 0.0, "before")
    other = run(x, w, 1e-5, 0.0, "after")
    assert (actual != expected).float().mean() < 0.01 < (other != expected).float().mean()


def test_a_row_wider_than_the_registers_is_read_in_steps():
    check(torch.randn(2, 33000), torch.randn(33000), offset=1.0)
    check(torch.randn(2, 40001).half(), torch.randn(40001).half())


def test_any_strides():
    w = torch.randn(24)
    base = torch.randn(6, 5, 4, 48)
    for x in (base[..., :24], base.transpose(1, 2)[..., 24:], base[..., ::2], base[:, :1, :, :24].expand(6, 5, 4, 24), base[:, :, 0, :24], base[:1, :, :1, :24],
              base[..., :24].permute(2, 1, 0, 3)):
        check(x, w)
    check(base[..., :24].permute(3, 0, 1, 2)[..., :4], w[:4])
    check(torch.randn(5, 24), torch.randn(48)[::2])
    check(torch.randn(24), w)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing_to_do(shape):
    assert run(torch.empty(shape), torch.empty(shape[-1]), 1e-5, 0.0, "before").shape == shape


@pytest.mark.parametrize("dtype", [F32, F16])
def test_extreme_rows_stay_alone(dtype):
    width = 200
    x = torch.randn(8, width).to(dtype)
    x[1] = 0
    x[2] = 6e4
    x[3, 5] = float("nan")
    x[4, 7] = float("inf")
    x[5, 7] = -float("inf")
    x[6] = 6e-8
    check(x, torch.randn(width).to(dtype))
    check(x, None)


@pytest.mark.parametrize("variant", [(torch.float64, None, 2, "after"), (F32, F32, 0, "after"), (F32, F32, 2, "never")])
def test_what_has_no_kernel_says_so(variant):
    with pytest.raises(UnsupportedError, match="no Triton rms_norm kernel"):
        emit(*variant)


def test_bfloat16_in_the_interpreter_is_an_error_and_no_wrong_number():
    with pytest.raises(TypeError, match="bfloat16"):
        run(torch.randn(2, 8).bfloat16(), None, 1e-5, 0.0, "after")


@pytest.mark.parametrize("variant", [(BF16, BF16, 3, "before"), (F32, None, 2, "after")])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_compiles_ahead_of_time_without_spills_and_with_wide_loads(arch, variant):
    kernel = emit(*variant)
    module = load_python_source(kernel.name, kernel.source)
    entries = [e for e in module.AOT if e["backend"] == ("hip" if arch == "gfx942" else "cuda")]
    assert len(entries) == 3
    for e in entries:
        result = compile_ahead(module, e["kernel"], e["signature"], e["constants"], arch, divisible_by_16=e["divisible_by_16"], num_warps=e["config"][2])
        assert result.spills == 0 and result.fits
        wide = "ld.global.v4" if arch == "sm_90" else "load_dwordx4"
        assert wide in result.assembly, f"{e['kernel']} {e['config']} loads in narrow steps"
