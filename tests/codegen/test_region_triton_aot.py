"""Triton regions compiled ahead of time for GPUs that are not here: no spills, memory in 16 bytes a thread, wide indices where needed."""
import functools

import pytest

pytest.importorskip("triton")

import sympy
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tileweld.codegen.expand import expand
from tileweld.codegen.regions import find_regions
from tileweld.codegen.triton.region import emit
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.region import Body, Nest, Output, Tensor
from tileweld.compiler.kernels_table import table
from tileweld.compiler.lower import choose
from tileweld.compiler.options import Options
from tileweld.runtime.source_module import load_python_source

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDE_LOADS = {"cuda": ("ld.global.v4.b32", "ld.global.v8.b32", "ld.global.v4.b64", "ld.global.v2.b64"), "hip": ("load_dwordx4", "load_dwordx2")}


def made(f, shapes, dtype=torch.bfloat16, device="cpu"):
    """The kernel of the only region of f; nothing is allocated or run."""
    with FakeTensorMode():
        graph = make_fx(f)(*(torch.empty(s, dtype=dtype, device=device) for s in shapes))
    expand(graph)
    [region] = find_regions(graph, device)
    return emit(region.body)


def rms_norm(x, w):
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def add_rms_norm(x, residual, w):
    y = x + residual
    return y, rms_norm(y, w)


def rotary(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


CASES = {
    "add and rms norm": (add_rms_norm, [(4096, 4096), (4096, 4096), (4096,)]),
    "softmax of 32768 columns": (lambda x: torch.softmax(x * 2, -1), [(64, 32768)]),
    "softmax of 128256 columns": (lambda x: torch.softmax(x * 2, -1), [(64, 128256)]),
    "rotary": (rotary, [(2, 32, 1024, 128), (1024, 128), (1024, 128)]),
    "column sums": (lambda x, y: (x * y).sum(0), [(8192, 4096), (8192, 4096)]),
}


@functools.cache
def case(name):
    return made(*CASES[name])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_no_spills_and_16_bytes_a_thread(name, arch):
    rows = table([case(name)], [arch])
    assert {r.kernel for r in rows} == ({"region_kernel", "combine_kernel"} if name == "column sums" else {"region_kernel"})
    for row in rows:
        assert row.result is not None, row.error
        assert row.result.spills == 0 and row.result.fits, (row.kernel, row.result)
    main = next(r.result.assembly for r in rows if r.kernel == "region_kernel")
    family = "hip" if arch.startswith("gfx") else "cuda"
    assert any(word in main for word in WIDE_LOADS[family])
    if family == "cuda":  # elements one by one: of a weight shared by the tile at most
        assert main.count("ld.global.b16") == 0, main.count("ld.global.b16")


def test_the_widest_row_in_registers_with_a_weight_and_in_fp32_spills_nothing():
    for dtype in (torch.bfloat16, torch.float32):
        [row] = table([made(rms_norm, [(64, 32768), (32768,)], dtype)], ["sm_90"])
        assert row.result is not None and row.result.spills == 0 and row.config == "1x32768 w16 s3", row


def test_more_than_2_31_elements_take_64_bit_indices():
    small, large = (made(lambda x, y: F.silu(x) * y, [(n, 65536)] * 2) for n in (1024, 40000))
    for kernel, wide in ((small, False), (large, True)):
        module = load_python_source(kernel.name, kernel.source)
        assert all(entry["constants"]["WIDE"] is wide for entry in module.AOT)
        [row] = table([kernel], ["sm_90"])
        assert row.result is not None and row.result.spills == 0 and "ld.global.v4.b32" in row.result.assembly
        assert ("or.b64" in row.result.assembly) is wide  # of program * BLOCK and the place in the block


def test_a_symbolic_size_chooses_its_index_when_it_is_known():
    n, i, x = sympy.Symbol("s0", integer=True, positive=True), sympy.Symbol("x0", integer=True, nonnegative=True), sympy.Symbol("x1", integer=True, nonnegative=True)
    tensor = Tensor(torch.float16, (n, sympy.Integer(4096)), (sympy.Integer(4096), sympy.Integer(1)))
    load = sc.load(sc.capture_symbol(0), i, x)
    body = Body((Nest(((i, n), (x, sympy.Integer(4096))), (), (), (Output(0, (i, x), sc.unary("exp", sc.mul(sc.number(2.0), load))),)),), (tensor,), (tensor,), (n,), (), 2)
    kernel = emit(body)
    module = load_python_source(kernel.name, kernel.source)
    assert not module.planned(132, 1024).constants["WIDE"] and module.planned(132, 600_000).constants["WIDE"]
    [row] = table([kernel], ["sm_90"])
    assert row.result is not None and "ld.global.v4.b32" in row.result.assembly, row.error


def test_tensors_on_a_gpu_choose_triton_and_a_scalar_on_the_host_is_moved():
    with FakeTensorMode():
        graph = make_fx(lambda x, w, scale: rms_norm(x * scale, w))(torch.empty(64, 128, device="cuda"), torch.empty(128, device="cuda"), torch.empty(()))
    [choice] = choose(graph, Options())
    assert choice.kernel.language == "triton" and not choice.interpreted and choice.outputs[0].meta["val"].device.type == "cuda"
    assert choice.run is not None and len(choice.inputs) == 3


def test_regions_of_another_device_are_left_alone():
    with FakeTensorMode():
        graph = make_fx(lambda x: torch.exp(x * 2) + 1)(torch.empty(8, 8))
    assert find_regions(graph, "cpu") and not find_regions(graph, "cuda")
