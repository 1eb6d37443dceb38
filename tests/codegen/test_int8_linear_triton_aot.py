"""Generated Triton products with int8 weights compiled ahead of time: the default tiles do not spill, fit, and use the matrix units for int8."""
import functools

import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.codegen.triton.int8_linear import emit  # noqa: E402
from tileweld.compiler.ir.linear import Spec  # noqa: E402
from tileweld.runtime.aot import compile_ahead, family_of  # noqa: E402
from tileweld.runtime.source_module import load_python_source  # noqa: E402

BF16, F16 = torch.bfloat16, torch.float16
GATED = Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1",)), 2, (1,)
RESIDUAL = Spec("", "x", ("a0 + c0[j] + c1[i, j]",)), 1, (1, 2)


@functools.cache
def module(case, activation, dtype, groups=1, columns=False):
    spec, weights, ranks = case
    kernel = emit(spec, x_dtype=dtype, capture_dtypes=[dtype] * len(ranks), capture_ranks=ranks, activation=activation, groups=[groups] * weights, k=4096, has_columns=columns)
    return load_python_source(kernel.name, kernel.source)


@functools.cache
def compiled(case, kernel, arch, activation, dtype=BF16, block_m=None, groups=1, split=None):
    """The first configuration of a kernel, or the first with so many rows, with K split or not."""
    made = module(case, activation, dtype, groups)
    entry = next(e for e in made.AOT if e["kernel"] == kernel and e["backend"] == family_of(arch) and block_m in (None, e["config"][0]) and split in (None, e["constants"].get("SPLIT")))
    return compile_ahead(made, kernel, entry["signature"], entry["constants"], arch, divisible_by_16=entry["divisible_by_16"], num_warps=entry["config"][-2], num_stages=entry["config"][-1])


ARCHS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.parametrize("arch", ARCHS)
def test_weight_only(arch):
    """gemv without matrix units, tiles with; int8 weights become bf16 in registers."""
    gemv, few, many = (compiled(GATED, *rest) for rest in (("gemv_kernel", arch, "float"), ("tiled_kernel", arch, "float", BF16, 64), ("tiled_kernel", arch, "float")))
    for result in (gemv, few, many, compiled(RESIDUAL, "gemv_kernel", arch, "float", BF16, 8, 32)):
        assert result.spills == 0 and result.fits, result
    assert gemv.matmul == "" and few.matmul and many.matmul


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("activation", ["int8", "mixed"])
def test_activations_of_int8(arch, activation):
    rows = [compiled(RESIDUAL, "quantise_kernel", arch, activation, F16)] + ([compiled(RESIDUAL, "mark_kernel", arch, activation, F16)] if activation == "mixed" else [])
    tiled = [compiled(RESIDUAL, "tiled_kernel", arch, activation, F16, block, split=split) for block, split in ((None, False), (16, False), (16, True), (64, True))]
    combine = [compiled(case, "combine_kernel", arch, activation, F16) for case in (RESIDUAL, GATED)]
    for result in (*rows, *tiled, *combine):
        assert result.spills <= (8 if arch == "sm_100" else 0) and result.fits, result  # two registers around tensor memory with Triton 3.6, none with 3.9
    integers = {"sm_80": (".s32.s8.s8.s32",), "sm_90": (".s32.s8.s8",), "sm_100": (".s32.s8.s8", "tcgen05.mma.cta_group::1.kind::i8"), "gfx942": ("v_mfma_i32_",)}[arch]
    for result in tiled:
        assert any(instruction in result.assembly for instruction in integers), result


def test_weights_are_read_in_16_bytes_and_not_kept():
    assembly = compiled(RESIDUAL, "gemv_kernel", "sm_90", "float").assembly
    assert "evict_first" in assembly and ".v4.b32" in assembly
    assert "cp.async.cg.shared.global" in compiled(RESIDUAL, "tiled_kernel", "sm_80", "int8", F16).assembly
