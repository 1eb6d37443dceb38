"""Generated Triton kernels compiled ahead of time for GPUs that are not here: they compile, do not spill, and use the matrix units."""

import functools

import pytest
import torch
from rich.console import Console

from tileweld.codegen.triton.attention import emit
from tileweld.compiler.errors import BuildError, OptionError
from tileweld.compiler.ir.attention import Variant
from tileweld.compiler.ir.kernel import Kernel
from tileweld.compiler.kernels_table import Row, render, table
from tileweld.runtime import aot
from tileweld.runtime.source_module import load_python_source


@functools.cache
def kernel(dtype=torch.bfloat16, dim=64, score="0.125*s", mask="j <= i", fill=-float("inf")):
    return emit(Variant(score, mask, fill), q_dtype=dtype, head_dim=dim, value_dim=dim)


@functools.cache
def rows(made, arch) -> dict[str, Row]:
    found = {row.kernel: row for row in table([made], [arch])}
    assert set(found) == {"attention_kernel", "decode_kernel", "combine_kernel"} and all(row.default for row in found.values())
    return found


@pytest.mark.parametrize("made", [kernel(dim=64), kernel(torch.float16, 128), kernel(torch.float16, 64, "50*tanh(0.0025*s)", "(j <= i) & (i - j < 4096)", -1e9)],
                         ids=["bf16 d64 causal", "fp16 d128 causal", "fp16 d64 window, softcap, finite fill"])
def test_hopper_default_spills_nothing_and_uses_wgmma(made):
    for name, row in rows(made, "sm_90").items():
        assert row.result is not None, row.error
        assert row.result.spills == 0 and row.result.fits and 0 < row.result.registers <= 255, (name, row.result)
    assert rows(made, "sm_90")["attention_kernel"].result.matmul == "wgmma"
    assert rows(made, "sm_90")["decode_kernel"].result.matmul == "mma"  # 16 rows are too few for wgmma's 64


@pytest.mark.parametrize(("arch", "matmul"), [("sm_80", "mma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")])
def test_other_gpus_use_their_matrix_units(arch, matmul):
    found = rows(kernel(dim=64), arch)
    for row in found.values():
        assert row.result is not None, row.error
        assert row.result.fits
    assert found["attention_kernel"].result.matmul == matmul
    for name, row in found.items():
        assert row.result.spills == 0 or (arch == "sm_100" and name != "attention_kernel"), (name, row.result)


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_default_at_head_dim_128_spills_nothing(arch):
    """64 is held above; fp32 and decode on sm_100 spill up to 8 bytes around tensor memory: measured, not limited."""
    row = rows(kernel(dim=128), arch)["attention_kernel"]
    assert row.result is not None and row.result.spills == 0 and row.result.fits, row


def test_fp32_is_computed_in_fp32():
    """TF32, Triton's default, would be an mma of 10 bits of mantissa."""
    for row in rows(kernel(torch.float32, 16), "sm_80").values():
        assert row.result.matmul == "" and "tf32" not in row.result.assembly and row.result.spills == 0


def test_keys_and_values_are_read_in_16_bytes():
    """Without the alignment in AOT, as without it at run time, each element is a load of its own."""
    assembly = rows(kernel(dim=64), "sm_80")["attention_kernel"].result.assembly
    assert "cp.async.cg.shared.global" in assembly and "cp.async.ca.shared.global" not in assembly


SMALL = """import triton
import triton.language as tl

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)

AOT = [dict(kernel="kernel", backend=backend, config=(n, 4, 1), signature={"x_ptr": "*fp32", "BLOCK": "constexpr"}, constants={"BLOCK": n}, divisible_by_16=["x_ptr"])
       for backend in ("cuda", "ampere", "hip") for n in (128, 256)]
"""


def test_a_table_of_every_configuration_and_its_text():
    small = Kernel("small", "triton", SMALL, "kernel", detail="ones")
    found = table([small, Kernel("c", "cpp", "", "c")], ["sm_90", "gfx942"], every_config=True)
    assert [(row.arch, row.config, row.default) for row in found] == [(arch, f"{n} w4 s1", n == 128) for arch in ("sm_90", "gfx942") for n in (128, 256)]
    assert [row.config for row in table([small], ["sm_90"])] == ["128 w4 s1"]
    spilling = aot.AotResult("sm_80", 255, 48, 200_000, "mma", 1024, "")
    broken = Row("sm_80", "attention_kernel", "score=s", "64x64 w4 s3", False, None, "BuildError: does not compile\nmore")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(render([*found, Row("sm_80", "attention_kernel", "score=s", "128x64 w8 s3", False, spilling), broken]))
    text = console.export_text()
    for word in ("gfx942", "ones", "128 w4 s1 *", "195 too much", "48", "BuildError: does not compile"):
        assert word in text, text
    assert "more" not in text


def test_what_cannot_be_compiled_says_so():
    with pytest.raises(OptionError, match="sm_90"):
        table([kernel()], ["sm_9"])
    source = SMALL.replace("1.0)", "nothing)")
    module = load_python_source("broken", source)
    with pytest.raises(BuildError, match="kernel does not compile for sm_80.*\n(.*\n)*.*nothing"):
        aot.compile_ahead(module, "kernel", {"x_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 128}, "sm_80")
    made = Kernel("broken", "triton", source, "kernel")
    [row] = table([made], ["sm_80"])
    assert row.result is None and "nothing" in row.error
