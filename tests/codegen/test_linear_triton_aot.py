"""Generated Triton matrix products compiled ahead of time: the default tiles do not spill, fit, and use the matrix units."""
import functools

import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

import triton.language as tl  # noqa: E402

from tileweld.codegen.triton.linear import emit  # noqa: E402
from tileweld.compiler.ir.linear import Spec  # noqa: E402
from tileweld.runtime.aot import compile_ahead, family_of  # noqa: E402
from tileweld.runtime.source_module import load_python_source  # noqa: E402

BF16, F32 = torch.bfloat16, torch.float32
ROTARY = "a{0}*c1[i, mod(j, 128)] + where(mod(j, 128) < 64, -p{0}, p{0})*c2[i, mod(j, 128)]"
GATED = Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1",)), 2, (1,)
QKV = Spec("rms", "x*r*c0[j]", (ROTARY.format(0), ROTARY.format(1), "a2"), ((128, 64), (128, 64), (0, 0))), 3, (1, 2, 2)
RESIDUAL = Spec("", "x", ("a0 + c0[j] + c1[i, j]",)), 1, (1, 2)
LAYER = Spec("layer", "(x - u)*r*c0[j] + c1[j]", ("a0 + c2[j]",)), 1, (1, 1, 1)


@functools.cache
def module(case, dtype=BF16):
    spec, weights, ranks = case
    kernel = emit(spec, x_dtype=dtype, weight_dtypes=[dtype] * weights, capture_dtypes=[dtype] * len(ranks), capture_ranks=ranks)
    return load_python_source(kernel.name, kernel.source)


@functools.cache
def compiled(case, kernel, arch, dtype=BF16, block_m=None, index="int32"):
    """The first configuration of a kernel, or the first with so many rows."""
    made = module(case, dtype)
    entry = next(e for e in made.AOT if e["kernel"] == kernel and e["backend"] == family_of(arch) and block_m in (None, e["config"][0]))
    constants = entry["constants"] | ({"INDEX": getattr(tl, index)} if "INDEX" in entry["constants"] else {})
    return compile_ahead(made, kernel, entry["signature"], constants, arch, divisible_by_16=entry["divisible_by_16"], num_warps=entry["config"][-2], num_stages=entry["config"][-1])


@pytest.mark.parametrize("case", [GATED, QKV, RESIDUAL], ids=["gated", "qkv", "residual"])
def test_hopper_default_spills_nothing_and_uses_wgmma(case):
    many, few, one_block, gemv = (compiled(case, *rest) for rest in (("tiled_kernel", "sm_90"), ("tiled_kernel", "sm_90", BF16, 64), ("tiled_kernel", "sm_90", BF16, 16), ("gemv_kernel", "sm_90")))
    for result in (many, few, one_block, gemv, compiled(case, "combine_kernel", "sm_90")):
        allowed = 8 if result is one_block else 0  # triton 3.6 keeps a predicate in 8 bytes of stack there, with 48 registers in use
        assert result.spills <= allowed and result.fits and 0 < result.registers <= 255, result
    assert (many.matmul, few.matmul, one_block.matmul, gemv.matmul) == ("wgmma", "wgmma", "mma", "")  # 16 rows are too few for wgmma's 64


@pytest.mark.parametrize(("case", "arch", "matmul"), [(QKV, "sm_80", "mma"), (GATED, "sm_100", "tcgen05"), (LAYER, "gfx942", "mfma")], ids=["sm_80 qkv", "sm_100 gated", "gfx942 layer norm"])
def test_other_gpus_use_their_matrix_units(case, arch, matmul):
    many, few, gemv = compiled(case, "tiled_kernel", arch), compiled(case, "tiled_kernel", arch, BF16, 64), compiled(case, "gemv_kernel", arch)
    for result in (many, few, gemv, compiled(case, "prepare_kernel", arch)):
        assert result.spills == 0 and result.fits, result
    assert many.matmul == few.matmul == matmul and gemv.matmul == ""


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_fp32_is_computed_in_fp32(arch):
    """TF32, Triton's default, would be an mma of 10 bits of mantissa."""
    for block_m in (None, 64):
        result = compiled(GATED, "tiled_kernel", arch, F32, block_m)
        assert "tf32" not in result.assembly and result.spills == 0 and result.fits, result
        assert result.matmul == ("mfma" if arch == "gfx942" else "")  # AMD multiplies matrices of fp32


def test_x_and_weights_are_read_in_16_bytes():
    """q, k and v take their pointers from one another's branches: what is known of their alignment must survive it."""
    for block_m in (None, 64):
        assembly = compiled(QKV, "tiled_kernel", "sm_80", BF16, block_m).assembly
        assert "cp.async.cg.shared.global" in assembly and "cp.async.ca.shared.global" not in assembly
    assert "ld.global.L1::evict_first.L2::cache_hint.v4.b32" in compiled(QKV, "gemv_kernel", "sm_90").assembly


@pytest.mark.parametrize(("span", "expected"), [(2**31 - 1, tl.int32), (2**31, tl.int64)])
def test_the_index_type_follows_the_furthest_element(span, expected):
    x = torch.empty_strided((2, 1), (span, 1), device="meta")
    assert module(GATED).index_type(torch.empty(2, 2), x) == expected


def test_wide_offsets_are_computed_in_64_bits():
    narrow, wide = (compiled(RESIDUAL, "tiled_kernel", "sm_90", BF16, None, index).assembly for index in ("int32", "int64"))
    products = ("mul.lo.s64", "mad.lo.s64", "mul.wide.s32", "mad.wide.s32")
    assert sum(map(narrow.count, products[:2])) < sum(map(wide.count, products[:2]))
