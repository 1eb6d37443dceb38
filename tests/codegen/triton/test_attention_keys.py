"""Triton attention whose keys are a text of what is stored (scales of channels for groups of positions, the newest positions in floats): interpreted against the definition, and compiled ahead of time."""
import functools
import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.codegen.triton.attention import emit  # noqa: E402
from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.ir.attention import Variant  # noqa: E402
from tileweld.compiler.kernels_table import table  # noqa: E402

from . import stored_attention  # noqa: E402

I8, F32, F16, BF16 = torch.int8, torch.float32, torch.float16, torch.bfloat16
CENTRED = "k*c0[b, h, floordiv(j, 32), d] + c1[b, h, floordiv(j, 32), d]"
RECENT = f"where(j < c2, {CENTRED}, c3[b, h, mod(j, 32), d])"


def groups(D=16, Tk=70, B=2, Hk=2):
    return [torch.rand(B, Hk, (Tk + 31) // 32, D) / 60, torch.randn(B, Hk, (Tk + 31) // 32, D)]


def recent(D=16, Tk=70, filled=50):
    return [*groups(D, Tk), torch.tensor(filled), torch.randn(2, 2, 32, D)]


def run(key, captures, *, score="0.1*s", **rest):
    texts = {name: rest.pop(name) for name in ("mask", "fill", "empty", "sink", "value") if name in rest}
    return stored_attention.run({"score": score, "key": key, **texts}, captures, **rest)


@pytest.mark.parametrize("Tq", [1, 70])  # decode, split over programs; prefill
@pytest.mark.parametrize("rest", [dict(mask="j <= i + 3"), dict(mask="(j <= i) & (c4[b, j] != 0)", fill=-1e9), dict(mask="j < i", empty="zero"), dict(sink="0.5"), dict(D=33, Dv=20), dict(D=80)], ids=str)
def test_groups_and_the_newest_in_floats(rest, Tq):
    keep = torch.ones(2, 70, dtype=torch.bool)
    keep[0, :40] = False
    run(RECENT, [*recent(rest.get("D", 16)), *([keep] if "c4" in rest.get("mask", "") else [])], Tq=Tq, **rest)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("Tq", [1, 70])
def test_half_types(dtype, Tq):
    run(RECENT, recent(), dtype=dtype, v=dtype, Tq=Tq)


@pytest.mark.parametrize("filled", [-3, 1, 69, 90])
def test_any_share_of_newest_positions(filled):
    for Tq in (1, 70):
        run(RECENT, recent(filled=filled), Tq=Tq)


@pytest.mark.parametrize("stored", [1, 65])
def test_fewer_stored_positions_than_values(stored):
    for Tq in (1, 70):
        run(f"where(j < {stored}, k*c0[b, h, floordiv(j, 32), d], c1[b, h, max(0, j - {stored}), d])", [groups()[0], torch.randn(2, 2, 70, 16)], stored=stored, Tq=Tq)


def test_the_head_is_that_of_the_keys_and_other_texts():
    """h is the keys' in the text of the keys, the query's in a score that reads the same tensor."""
    for Tq in (1, 70):
        run("k*c0[h]", [torch.rand(4) / 60], Tq=Tq, score="0.1*(s*c0[h])")
        run("tanh(k)*c0[d] - 0.01*d + 0.01*j", [torch.rand(16)], Tq=Tq, k=F32, v=F32)
        run("c0[b, h, j, d]", [torch.randn(2, 2, 70, 16)], Tq=Tq)
        run("0.5*d", [], Tq=Tq)
        run("k*c0[b, h, floordiv(j, 5), d] + c1[floordiv(j, 16), d]", [torch.rand(2, 2, 14, 16) / 60, torch.randn(5, 16)], Tq=Tq)  # groups that no tile lies in


def test_scales_that_are_not_finite():
    """NaN reaches the heads that have it; one of a channel that does not exist reaches nobody."""
    captures = groups(33)
    wide = torch.full((2, 2, 3, 40), math.nan)
    wide[..., :33] = captures[0]
    for Tq in (1, 70):
        assert run("k*c0[b, h, floordiv(j, 32), d]", [wide[..., :33]], D=33, Tq=Tq).isfinite().all()
        wide[1, 1, 0, 3] = math.nan
        out = run("k*c0[b, h, floordiv(j, 32), d]", [wide[..., :33]], D=33, Tq=Tq)
        assert out[1, 2:].isnan().all() and out[1, :2].isfinite().all() and out[0].isfinite().all()
        wide[1, 1, 0, 3] = 0


def test_refusals():
    with pytest.raises(UnsupportedError, match="text of keys in parts"):
        emit(Variant(key="2*k"), q_dtype=F32, head_dim=32, value_dim=16, key_dims=(16, 16))


@functools.cache
def compiled(arch, dtype, dim):
    made = emit(Variant("0.125*s", "j <= i", key=RECENT, value="c4[b, floordiv(h, 2), j]", integer_captures=frozenset([2])), q_dtype=dtype, k_dtype=I8, v_dtype=I8,
                capture_dtypes=[F32, F32, torch.int64, F32, F32], capture_ranks=[4, 4, 0, 4, 3], head_dim=dim, value_dim=dim)
    return {row.kernel: row for row in table([made], [arch])}


@pytest.mark.parametrize(("arch", "dtype", "matmul"), [("sm_80", F16, "mma"), ("sm_90", BF16, "wgmma"), ("gfx942", BF16, "mfma")])
def test_ahead_of_time(arch, dtype, matmul):
    """Compiled for GPUs that are not here: the default tiles fit and use the matrix units."""
    for dim in (64, 128):
        for name, row in compiled(arch, dtype, dim).items():
            assert row.result is not None, row.error
            assert row.result.fits and row.result.spills == 0, (dim, name, row.result)
        assert compiled(arch, dtype, dim)["attention_kernel"].result.matmul == matmul
