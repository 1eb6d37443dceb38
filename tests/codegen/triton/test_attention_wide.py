"""The Triton attention kernels with wide heads and keys in parts, as absorbed multi-head latent attention has them: interpreted, and compiled ahead of time."""

import functools

import pytest
import torch

from tileweld.codegen.triton.attention import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.attention import Variant, empty_output, integer_captures, reference
from tileweld.compiler.ir.attention_parts import joined
from tileweld.compiler.kernels_table import table
from tileweld.runtime.interpret import interpreted_entry

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def run(dims, value_dim, heads, Tq, Tk, dtype=torch.float32, mask="j <= i + n0", fill=-float("inf"), sink="", captures=(), score="0.1*s", batch=2):
    """heads: of q, of each part of k, of v."""
    q = torch.randn(batch, heads[0], Tq, sum(dims)).to(dtype)
    parts = [torch.randn(batch, h, Tk, d).to(dtype) for h, d in zip(heads[1:-1], dims)]
    v = parts[0][..., :value_dim] if value_dim <= dims[0] and heads[-1] == heads[1] else torch.randn(batch, heads[-1], Tk, value_dim).to(dtype)
    variant = Variant(score, mask, fill, sink, "nan", integer_captures(captures))
    kernel = emit(variant, q_dtype=dtype, head_dim=sum(dims), value_dim=value_dim, num_sizes=1, key_dims=dims, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures])
    out = empty_output(q, value_dim).fill_(7)
    interpreted_entry(kernel.name, kernel.source, kernel.entry)([out, q, *parts, v, *captures], [Tk - Tq])
    expected = reference(q.double(), joined(parts, heads[0]).double(), v.double(), captures, [Tk - Tq], variant)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dims", [(576,), (512, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_absorbed_latent_attention(dims, dtype):
    run(dims, 512, (4, *[1] * len(dims), 1), 1, 50, dtype, batch=1)


@pytest.mark.parametrize(("dims", "value_dim"), [((40, 16), 24), ((16, 8), 40), ((33, 20), 33), ((288,), 256), ((300,), 290)])
@pytest.mark.parametrize("Tq", [1, 19])
def test_dims(dims, value_dim, Tq):
    run(dims, value_dim, (4, *[1] * len(dims), 1), Tq, 41)


@pytest.mark.parametrize("heads", [(4, 4, 1, 4), (4, 1, 4, 1), (4, 2, 1, 2), (6, 2, 6, 3), (3, 3, 3, 3)])
@pytest.mark.parametrize("Tq", [1, 40])
def test_parts_with_heads_of_their_own(heads, Tq):
    run((24, 16), 24, heads, Tq, 45)


def test_more_heads_than_a_block_has_rows():
    """A wide head's block has 16 rows in float32: five blocks, split keys, and rows of several query positions in one."""
    run((272,), 260, (40, 1, 1), 2, 70, batch=1)
    run((272, 16), 260, (24, 1, 1, 1), 3, 40, batch=1)


def test_masks_sinks_and_a_finite_fill():
    keep = torch.rand(2, 60) > 0.4
    keep[0] = False
    for fill in (-float("inf"), -1e9):
        run((24, 16), 24, (4, 1, 1, 1), 2, 60, mask="(j <= i + n0) & (c0[b, j] != 0)", fill=fill, captures=[keep])
        run((272,), 16, (20, 1, 1), 1, 60, mask="c0[b, j] != 0", fill=fill, sink="c1[h]", captures=[keep, torch.randn(20)])


def test_refusals():
    for options, words in (({"head_dim": 577}, "head dim 577"), ({"value_dim": 600}, "value dim 600"), ({"head_dim": 576, "key_dims": (300, 276)}, "parts of .300, 276. take tiles of 608"),
                           ({"key_dims": (4, 5)}, "parts"), ({"key_dims": (3, 3, 2)}, "at most 2 parts")):
        with pytest.raises(UnsupportedError, match=words):
            emit(Variant(), **{"q_dtype": torch.float16, "head_dim": 8, "value_dim": 8} | options)


@functools.cache
def absorbed(dtype):
    return emit(Variant("0.07*s", "j <= i + n0"), q_dtype=dtype, head_dim=576, value_dim=512, num_sizes=1, key_dims=(512, 64))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_default_configurations_fit_and_spill_nothing(arch):
    rows = table([absorbed(torch.bfloat16)], [arch])
    assert {row.kernel for row in rows} == {"attention_kernel", "decode_kernel", "combine_kernel"}
    for row in rows:
        assert row.result is not None, row.error
        # two registers of decoding on sm_90 with Triton 3.7, whose ptxas aims at 128 of them (171 with 3.9, 177 with 3.6, and none spilled)
        assert row.result.fits and row.result.spills <= (8 if (arch, row.kernel) == ("sm_90", "decode_kernel") else 0), (row.kernel, row.config, row.result)
        assert row.kernel == "combine_kernel" or row.result.matmul == ("mfma" if arch == "gfx942" else "mma"), row.result


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_float32_fits_and_spills_nothing(arch):
    """In float32's own arithmetic, in the shared memory of an A100 and the 64 KiB of an MI300."""
    for row in table([absorbed(torch.float32)], [arch]):
        assert row.result is not None and row.result.fits and row.result.spills == 0, (row, row.error)
