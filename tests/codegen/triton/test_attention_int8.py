"""Triton attention over int8 keys and values, and with a factor of the weights: interpreted against the definition, and compiled ahead of time."""
import functools

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.codegen.triton.attention import emit  # noqa: E402
from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.ir.attention import Variant  # noqa: E402
from tileweld.compiler.kernels_table import table  # noqa: E402

from . import stored_attention  # noqa: E402

I8, F32, F16, BF16 = torch.int8, torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 5e-6, F16: 1e-3, BF16: 8e-3}
run = functools.partial(stored_attention.run, tolerance=TOLERANCE)
#: most that a kernel may spill (bytes; registers on gfx942): a thread's 255 or 256 registers are all taken, and each Triton parts them its own way. 3.8 alone spills more
SPILLS = {"sm_80": 8, "sm_100": 8, "gfx942": 1} | ({"sm_100": 40, "gfx942": 6} if triton.__version__.startswith("3.8.") else {})
SCALED = {"score": "0.25*(s*c0[b, floordiv(h, 2), j])", "value": "c1[b, floordiv(h, 2), j]"}


#: zero points of tokens: s k8 + z for keys and for values; c4 is the sum of every query
ASYMMETRIC = {"score": "0.25*(s*c0[b, floordiv(h, 2), j] + c2[b, floordiv(h, 2), j]*c4[b, h, i])", "value": "c1[b, floordiv(h, 2), j]*v + c3[b, floordiv(h, 2), j]"}


def scales(Tk=70, B=2, Hk=2):
    return [torch.rand(B, Hk, Tk) / 60, torch.rand(B, Hk, Tk) / 60]


@pytest.mark.parametrize("Tq", [1, 5, 70])  # decode, split over programs; prefill
@pytest.mark.parametrize("rest", [dict(), dict(mask="j <= i + 3"), dict(mask="(j <= i) & (c2[b, j] != 0)", fill=-1e9), dict(mask="j < i", empty="zero"), dict(sink="0.5")], ids=str)
def test_scales_of_tokens(rest, Tq):
    keep = torch.ones(2, 70, dtype=torch.bool)
    keep[0, :40] = False
    run(SCALED | rest, [*scales(), *([keep] if "c2" in rest.get("mask", "") else [])], Tq=Tq)


@pytest.mark.parametrize("Tq", [1, 5, 70])
@pytest.mark.parametrize("rest", [dict(), dict(mask="j <= i + 3"), dict(mask="(j <= i) & (c5[b, j] != 0)", fill=-1e9), dict(mask="j < i", empty="zero"), dict(sink="0.5"), dict(D=33, Dv=20)], ids=str)
def test_zero_points_of_tokens(rest, Tq):
    keep = torch.ones(2, 70, dtype=torch.bool)
    keep[0, :40] = False
    dims, texts = {name: n for name, n in rest.items() if name[0] == "D"}, {name: text for name, text in rest.items() if name[0] != "D"}
    run(ASYMMETRIC | texts, [*scales(), torch.randn(2, 2, 70), torch.randn(2, 2, 70), torch.randn(2, 4, Tq), *([keep] if "c5" in rest.get("mask", "") else [])], Tq=Tq, **dims)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("Tq", [1, 70])
def test_half_types(dtype, Tq):
    run(SCALED, scales(), dtype=dtype, Tq=Tq)


def test_small_scales_do_not_vanish_in_fp16():
    """p * scale is 1e-6 here: a subnormal of fp16, whose source therefore multiplies int8 values in bf16, which holds them exactly."""
    captures = scales()
    captures[1] *= 1e-2
    run(SCALED, captures, dtype=F16)
    source = emit(Variant(**SCALED), q_dtype=F16, k_dtype=I8, v_dtype=I8, capture_dtypes=[F32] * 2, capture_ranks=[3, 3], head_dim=64, value_dim=64).source
    assert "v0.to(tl.bfloat16 if q0.dtype == tl.float16 else q0.dtype)" in source


@pytest.mark.parametrize(("D", "Dv"), [(33, 20), (80, 64), (128, 16)])
def test_head_dims(D, Dv):
    for Tq in (1, 20):
        run(SCALED, scales(), Tq=Tq, D=D, Dv=Dv)


def test_keys_or_values_alone_and_other_factors():
    for Tq in (1, 70):
        run({"score": SCALED["score"]}, scales()[:1], v=F32, Tq=Tq)
        run({"score": "0.2*s", "value": "c0[b, floordiv(h, 2), j]"}, scales()[:1], k=F32, Tq=Tq)
        run({"score": "0.2*s", "value": "c0[h, i, j] - 1"}, [torch.randn(4, Tq, 70)], k=F32, v=F32, Tq=Tq)
        run({"score": "0.2*s", "mask": "j <= i + 2", "value": "1 + 0.01*(i - j) + c0[h]"}, [torch.randn(4)], k=F32, v=F32, Tq=Tq)
        run({"score": "0.2*s", "value": "2.5"}, [], k=F32, v=F32, Tq=Tq)
        run({"score": "0.2*s", "value": "v + c0[h, i, j]"}, [torch.randn(4, Tq, 70)], k=F32, v=F32, Tq=Tq)


def test_refusals():
    for wrong in ({"k_dtype": torch.int16}, {"v_dtype": torch.float64}):
        with pytest.raises(UnsupportedError, match="no Triton attention kernel for q of torch.float32 and"):
            emit(Variant(), q_dtype=F32, head_dim=16, value_dim=16, **wrong)


@functools.cache
def compiled(arch, dtype, dim):
    made = emit(Variant(SCALED["score"], "j <= i", value=SCALED["value"]), q_dtype=dtype, k_dtype=I8, v_dtype=I8, capture_dtypes=[F32] * 2, capture_ranks=[3, 3], head_dim=dim, value_dim=dim)
    return {row.kernel: row for row in table([made], [arch])}


@pytest.mark.parametrize(("arch", "dtype", "matmul"), [("sm_80", F16, "mma"), ("sm_90", BF16, "wgmma"), ("sm_100", BF16, "tcgen05"), ("gfx942", BF16, "mfma")])
def test_ahead_of_time(arch, dtype, matmul):
    """Compiled for GPUs that are not here: the default tiles fit, the prefill uses the matrix units. Spills: none but one register of 256 on gfx942, two of tensor memory's on sm_100, two on sm_80 with Triton 3.6; ten on sm_100 and six on gfx942 with 3.8."""
    for dim in (64, 128):
        for name, row in compiled(arch, dtype, dim).items():
            assert row.result is not None, row.error
            assert row.result.fits and row.result.spills <= SPILLS.get(arch, 0), (dim, name, row.result)
        assert compiled(arch, dtype, dim)["attention_kernel"].result.matmul == matmul
