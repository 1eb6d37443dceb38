"""Generated Triton attention in Triton's interpreter against the float64 definition. What runs on a GPU is the same source."""

import pytest
import torch

from tileweld.codegen.triton.attention import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.attention import Variant, empty_output, integer_captures, reference
from tileweld.runtime.interpret import interpreted_entry

INF = float("inf")
#: relative to the largest output; fp16 and bf16 round q, k, v alike for both sides, then P and the output
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def run(score="0.125*s", mask="True", *, B=1, H=2, Hk=None, Hv=None, Tq=70, Tk=None, D=16, Dv=None, dtype=torch.float32, captures=(), sizes=(), fill=-INF, sink="", empty="nan",
        inputs=None):
    """The kernel's output after comparing it with the definition."""
    Hk = Hk or H
    Hv, Tk, Dv = Hv or Hk, Tq if Tk is None else Tk, Dv or D
    q, k, v = inputs or (torch.randn(B, H, Tq, D).to(dtype), torch.randn(B, Hk, Tk, D).to(dtype), torch.randn(B, Hv, Tk, Dv).to(dtype))
    variant = Variant(score, mask, fill, sink, empty, integer_captures(captures))
    kernel = emit(variant, q_dtype=dtype, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], head_dim=q.shape[3], value_dim=v.shape[3],
                  num_sizes=len(sizes))
    out = empty_output(q, v.shape[3]).fill_(7)
    interpreted_entry(kernel.name, kernel.source, kernel.entry)([out, q, k, v, *captures], sizes)
    expected = reference(q.double(), k.double(), v.double(), [c.double() if c.is_floating_point() else c for c in captures], sizes, variant)
    assert torch.equal(out.isnan(), expected.isnan())
    scale = expected.nan_to_num().abs().max().clamp(min=1e-3)
    torch.testing.assert_close(out.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype], equal_nan=True)
    return out


def boolean(*shape, share=0.6):
    return torch.rand(shape) < share


MASKS = {
    "none": ("True", (), ()),
    "causal": ("j <= i", (), ()),
    "offset": ("j <= i + n0", (), (30,)),
    "window": ("(j <= i) & (i - j < 40)", (), ()),
    "window and global": ("(j <= i) & ((i - j < 40) | (j < 4))", (), ()),
    "two-sided window": ("(i - j < 9) & (j - i < 20)", (), ()),
    "dilated": ("(j <= i) & (mod(i - j, 3) == 0)", (), ()),
    "padding": ("c0[b,j] != 0", (boolean(2, 127),), ()),
    "lengths": ("(j < c0[b]) & (j <= i)", (torch.tensor([100, 61]),), ()),
    "cache positions": ("j <= c0[i]", (torch.randint(0, 127, (127,)),), ()),
    "block table": ("c0[floordiv(i, 16), floordiv(j, 16)] != 0", (boolean(8, 8),), ()),
    "per-head blocks": ("(c0[h, floordiv(j, 32)] != 0) | (j == i)", (boolean(2, 4),), ()),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask, captures, sizes = MASKS[name]
    run(mask=mask, captures=captures, sizes=sizes, B=2, Tq=127)


SCORES = {
    "softcap": ("30*tanh(0.004*s)", lambda: (), ()),
    "bias": ("0.125*s + c0[b,h,i,j]", lambda: (torch.randn(2, 2, 127, 127),), ()),
    "bias by broadcasting": ("0.125*s + c0[0,h,i,j]", lambda: (torch.randn(1, 2, 127, 127).half(),), ()),
    "alibi": ("0.125*s + c0[h]*(j - i)", lambda: (torch.tensor([0.5, 0.0625]),), ()),
    "t5": ("s + c0[c1[j - i + n0],h]", lambda: (torch.randn(32, 2), torch.randint(0, 32, (253,))), (126,)),
    "captured scale": ("c0*s", lambda: (torch.tensor(0.125),), ()),
    "row and key": ("0.1*s + c0[b,i] - c1[j]*c1[j]", lambda: (torch.randn(2, 127), torch.randn(127)), ()),
    "negative scale": ("-0.125*s", lambda: (), ()),
    "where": ("where(j < i, 0.1*s, 0.2*s + 1)", lambda: (), ()),
    "without s": ("0.01*(j - i)", lambda: (), ()),
    "index from the end": ("0.1*s + c0[j - i]", lambda: (torch.randn(127),), ()),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    score, captures, sizes = SCORES[name]
    run(score, "j <= i", captures=captures(), sizes=sizes, B=2, Tq=127)


@pytest.mark.parametrize(("D", "Dv", "dtype"), [(8, 8, torch.float32), (16, 16, torch.float16), (40, 72, torch.float32), (64, 64, torch.bfloat16), (80, 80, torch.float16),
                                                (128, 128, torch.float32), (192, 128, torch.float16), (256, 256, torch.float32)])
def test_head_dims_and_dtypes(D, Dv, dtype):
    run("0.1*s", "j <= i", D=D, Dv=Dv, dtype=dtype, Tq=67)


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (1, 127), (17, 17), (65, 1), (127, 17), (128, 128), (127, 127)])
def test_lengths(Tq, Tk):
    run(mask="j <= i", Tq=Tq, Tk=Tk)
    run(mask="j <= i + n0", sizes=(Tk - Tq,), Tq=Tq, Tk=Tk, empty="zero")


def test_a_long_odd_length():
    run(mask="(j <= i) & (i - j < 100)", H=1, Tq=1023)


@pytest.mark.parametrize(("H", "Hk", "Hv"), [(4, 2, 2), (4, 1, 1), (4, 2, 1)])
def test_groups(H, Hk, Hv):
    run(mask="j <= i", H=H, Hk=Hk, Hv=Hv, Tq=70)


@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_rows_without_a_key(empty):
    out = run(mask="j <= i - 5", empty=empty, Tq=70)
    rows = out[:, :, :5]
    assert rows.isnan().all() if empty == "nan" else (rows == 0).all()
    assert not out[:, :, 5:].isnan().any()


@pytest.mark.parametrize("fill", [-1e9, -1e4, torch.finfo(torch.float32).min, -3.0])
def test_a_finite_fill_counts_where_nothing_else_does(fill):
    run(mask="(j <= i - 5) & (c0[b,j] != 0)", fill=fill, B=2, Tq=70, captures=(boolean(2, 70),))


def test_a_bias_of_finfo_min_hides_keys_and_whole_rows():
    bias = torch.zeros(1, 1, 70, 70).masked_fill(boolean(1, 1, 70, 70, share=0.5), torch.finfo(torch.float32).min)
    bias[:, :, 3] = torch.finfo(torch.float32).min
    run("0.125*s + c0[b,0,i,j]", captures=(bias,))
    bias[:, :, 9] = -INF
    run("0.125*s + c0[b,0,i,j]", captures=(bias,))


@pytest.mark.parametrize("sink", ["c0[h]", "0", "c0[h] + 0.01*i"])
def test_sinks(sink):
    run(mask="j <= i - 2", sink=sink, captures=(torch.randn(2),), fill=-INF)
    run(mask="j <= i - 2", sink=sink, captures=(torch.randn(2),), fill=-1e4)


def test_a_sink_of_minus_infinity_is_none():
    run(mask="j <= i - 2", sink="c0[h]", captures=(torch.tensor([-INF, 1.0]),))


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_a_value_that_is_not_finite_stays_in_its_row(value):
    q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
    q[0, 0, 9, 3] = value
    out = run(inputs=(q, k, v), H=1)
    assert out[0, 0, 9].isnan().all() and not out[0, 0, 10:].isnan().any()


def test_tiles_outside_the_mask_are_never_read():
    q, k, v = (torch.randn(1, 1, 256, 16) for _ in range(3))
    expected = reference(q, k, v, (), (), Variant("0.125*s", "(j <= i) & (i - j < 30)"))
    k[:, :, :128] = v[:, :, :128] = float("nan")
    kernel = emit(Variant("0.125*s", "(j <= i) & (i - j < 30)"), q_dtype=torch.float32, head_dim=16, value_dim=16)
    out = empty_output(q, 16)
    interpreted_entry(kernel.name, kernel.source, kernel.entry)([out, q, k, v])
    assert out[:, :, :128].isnan().all()
    torch.testing.assert_close(out[:, :, 192:], expected[:, :, 192:])  # rows 192 to 255 see keys from 163 on, in tiles from 160


@pytest.mark.parametrize(("mask", "loops"), [("True", [False, True]), ("j <= i", [False, True]), ("(j <= i) & (i - j < 8)", [True, False, True]), ("c0[b,j] != 0", [True])])
def test_full_tiles_are_visited_without_a_mask(mask, loops):
    source = emit(Variant(mask=mask, integer_captures=frozenset({0})), q_dtype=torch.float16, capture_dtypes=[torch.bool], capture_ranks=[2], head_dim=64, value_dim=64).source
    kernel = source.split("def attention_kernel")[1].split("\ndef ")[0]
    assert [part.startswith("True") for part in kernel.split("MASKED=")[1:]] == loops


# ---------------------------------------------------------------- decoding: few rows, packed heads, split keys

DECODE = {
    "plain": dict(Tq=1),
    "two rows, offset": dict(Tq=2, mask="j <= i + n0", sizes=(198,)),
    "four rows of eight heads": dict(Tq=4, H=8, Hk=2, mask="(j <= i + 196) & (i + 196 - j < 50)"),
    "cache length, finite fill": dict(Tq=2, mask="j <= c0[i]", captures=(torch.tensor([40, 41]),), fill=-1e9),
    "a row without a key, finite fill": dict(Tq=2, mask="j <= c0[i]", captures=(torch.tensor([-1, 41]),), fill=-1e9),
    "a row without a key, nan": dict(Tq=2, mask="j <= c0[i]", captures=(torch.tensor([-1, 41]),)),
    "a row without a key, zero": dict(Tq=2, mask="j <= c0[i]", captures=(torch.tensor([-1, 41]),), empty="zero"),
    "sinks": dict(mask="j <= c0[b]", captures=(torch.tensor([40]), torch.randn(4)), sink="c1[h]", Tq=1),
    "bias": dict(Tq=2, score="0.1*s + c0[b,h,i,j]", captures=(torch.randn(1, 4, 2, 200),)),
    "alibi, per-head blocks": dict(Tq=1, score="0.1*s + c0[h]*(j - 199)", mask="c1[h, floordiv(j, 20)] != 0", captures=(torch.rand(4) / 8, torch.eye(10)[:4] + 1 > 1)),
    "padded head dims": dict(Tq=1, D=80, Dv=40),
    "half precision": dict(Tq=1, D=64, dtype=torch.float16),
}


@pytest.mark.parametrize("name", DECODE)
def test_decoding(name):
    run(**{"H": 4, "Hk": 2, "Tk": 200} | DECODE[name])


def test_decoding_without_splits():
    run(Tq=1, Tk=50, B=4, H=4, Hk=2, mask="j <= c0[b]", captures=(torch.tensor([3, 40, -1, 49]),), fill=-1e9)


# ---------------------------------------------------------------- inputs at the edge


def test_no_keys_give_zeros():
    out = run(Tq=5, Tk=0)
    assert (out == 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (1, 2, 0, 16)])
def test_nothing_to_compute(shape):
    kernel = emit(Variant(), q_dtype=torch.float32, head_dim=16, value_dim=16)
    q, kv = torch.randn(shape), torch.randn(shape[0], 2, 5, 16)
    interpreted_entry(kernel.name, kernel.source, kernel.entry)([empty_output(q, 16), q, kv, kv])


def test_any_strides():
    q = torch.randn(2, 70, 2, 16).transpose(1, 2)
    k = torch.randn(1, 1, 16, 70).transpose(2, 3).expand(2, 2, 70, 16)
    v = torch.randn(2, 2, 70, 33)[..., 1::2]
    run(mask="j <= i", inputs=(q, k, v))


def test_a_mask_that_hides_everything():
    assert run(mask="False", Tq=70, empty="zero").eq(0).all()
    run(mask="n0 > 3", sizes=(3,), fill=-1e9)


def test_what_has_no_kernel_is_refused():
    for arguments in (dict(q_dtype=torch.float64, head_dim=64, value_dim=64), dict(q_dtype=torch.float16, head_dim=577, value_dim=64), dict(q_dtype=torch.float16, head_dim=576, value_dim=64, key_dims=(300, 276)), dict(q_dtype=torch.float16, head_dim=64, value_dim=0),
                      dict(q_dtype=torch.float16, head_dim=64, value_dim=64, capture_dtypes=[torch.complex64], capture_ranks=[1])):
        with pytest.raises(UnsupportedError):
            emit(Variant(), **arguments)
