"""C++ attention over int8 keys and values, and with a factor of the weights, against the definition in float64."""
import math

import pytest
import torch

from tileweld.codegen.cpp.attention import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.attention import Variant, integer_captures, reference

from .stored_attention import compare, emitted, launchers, numbers

I8, F32 = torch.int8, torch.float32
SHAPES = ((1, 1), (1, 130), (1, 700), (3, 300), (17, 17), (150, 333))  # Tq, Tk: streamed, packed; whole and partial panels
SCALED = {"score": "0.25*(s*c0[b, floordiv(h, 2), j])", "value": "c1[b, floordiv(h, 2), j]"}


#: zero points of tokens: s k8 + z for keys and for values; c4 is the sum of every query
ASYMMETRIC = {"score": "0.25*(s*c0[b, floordiv(h, 2), j] + c2[b, floordiv(h, 2), j]*c4[b, h, i])", "value": "c1[b, floordiv(h, 2), j]*v + c3[b, floordiv(h, 2), j]"}


def scales(B, Hk, Tq, Tk):
    return [torch.rand(B, Hk, Tk) / 60, torch.rand(B, Hk, Tk) / 60]


def rows_of(B, Hk, Tq, Tk):
    """the scales as a static cache keeps them, [B, Hk, length, 1], of which the first Tk are read; and one of another dtype"""
    return [(torch.rand(B, Hk, Tk + 5, 1) / 60)[:, :, :Tk, 0], (torch.rand(B, Tk, Hk) / 60).bfloat16().transpose(1, 2)]


def points(B, Hk, Tq, Tk):
    """scales and zero points, and numbers in the place of the queries' sums"""
    return [*scales(B, Hk, Tq, Tk), torch.randn(B, Hk, Tk), torch.randn(B, Hk, Tk), torch.randn(B, 2 * Hk, Tq)]


# name -> (variant's texts, captures, q's dtype, k's dtype, v's dtype, head dims)
CASES = {
    "both": (SCALED, scales, F32, I8, I8, (16, 16)),
    "both, head dim 64": (SCALED, scales, F32, I8, I8, (64, 64)),
    "both, odd head dims": (SCALED, scales, F32, I8, I8, (33, 20)),
    "both, wide": (SCALED, scales, F32, I8, I8, (128, 160)),
    "rows of a cache": (SCALED, rows_of, F32, I8, I8, (64, 64)),
    "bfloat16": (SCALED, scales, torch.bfloat16, I8, I8, (64, 64)),
    "float16": (SCALED, scales, torch.float16, I8, I8, (64, 64)),
    "keys": (SCALED | {"value": ""}, scales, F32, I8, F32, (64, 64)),
    "values": (SCALED | {"score": "0.1*s"}, scales, F32, F32, I8, (64, 64)),
    "causal": (SCALED | {"mask": "j <= i + 3"}, scales, F32, I8, I8, (64, 64)),
    "padding, finite fill": (SCALED | {"mask": "(j <= i) & (c2[b, j] != 0)", "fill": -1e9}, lambda B, Hk, Tq, Tk: [*scales(B, Hk, Tq, Tk), left_padding(B, Tk)], F32, I8, I8, (64, 64)),
    "zero rows": (SCALED | {"mask": "j < i", "empty": "zero"}, scales, F32, I8, I8, (16, 16)),
    "a sink": (SCALED | {"sink": "0.5"}, scales, F32, I8, I8, (16, 16)),
    "no scales": ({"score": "0.001*s"}, lambda *sizes: [], F32, I8, I8, (64, 64)),
    "a factor of float values": ({"score": "0.2*s", "value": "c0[h, i, j] - 1"}, lambda B, Hk, Tq, Tk: [torch.randn(2 * Hk, Tq, Tk)], F32, F32, F32, (16, 16)),
    "a factor of positions": ({"score": "0.2*s", "mask": "j <= i + 2", "value": "1 + 0.01*(i - j) + c0[j - i]"}, lambda B, Hk, Tq, Tk: [torch.randn(Tq + Tk)], F32, F32, F32, (16, 16)),
    "zero points": (ASYMMETRIC, points, F32, I8, I8, (64, 64)),
    "zero points, odd head dims": (ASYMMETRIC, points, F32, I8, I8, (33, 20)),
    "zero points, bfloat16": (ASYMMETRIC, points, torch.bfloat16, I8, I8, (64, 64)),
    "zero points, padding, finite fill": (ASYMMETRIC | {"mask": "(j <= i) & (c5[b, j] != 0)", "fill": -1e9}, lambda B, Hk, Tq, Tk: [*points(B, Hk, Tq, Tk), left_padding(B, Tk)], F32, I8, I8, (64, 64)),
    "zero points, zero rows": (ASYMMETRIC | {"mask": "j < i", "empty": "zero"}, points, F32, I8, I8, (16, 16)),
    "zero points, a sink": (ASYMMETRIC | {"sink": "0.5"}, points, F32, I8, I8, (16, 16)),
    "an offset alone": ({"score": "0.2*s", "value": "v + c0[h, i, j]"}, lambda B, Hk, Tq, Tk: [torch.randn(2 * Hk, Tq, Tk)], F32, F32, F32, (16, 16)),
    "a constant": ({"score": "0.2*s", "value": "2.5"}, lambda *sizes: [], F32, F32, F32, (16, 16)),
}


def left_padding(B, Tk):
    keep = torch.ones(B, Tk, dtype=torch.bool)
    keep[0, : Tk // 2] = False
    return keep


def variant_of(case, captures):
    return Variant(**{"fill": -math.inf, **case[0]}, integer_captures=integer_captures(captures))


def inputs(case, Tq, Tk, heads=4, kv_heads=2):
    _, captures, q, k, v, (d, e) = case
    return numbers(q, 2, heads, Tq, d), numbers(k, 2, kv_heads, Tk, d), numbers(v, 2, kv_heads, Tk, e), captures(2, kv_heads, Tq, Tk)


def kernel(case, **known):
    _, captures, q, k, v, (d, e) = case
    made = captures(1, 2, 2, 2)
    return emitted(variant_of(case, made), made, (q, k, v), (d, e), **known)


@pytest.fixture(scope="module")
def built():
    return dict(zip(CASES, launchers([kernel(case) for case in CASES.values()])))


def check(run, case, q, k, v, captures):
    return compare(run, variant_of(case, captures), q, k, v, captures, reference)


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(built, name):
    for Tq, Tk in SHAPES:
        check(built[name], CASES[name], *inputs(CASES[name], Tq, Tk))


@pytest.mark.parametrize("heads", [2, 6, 8])
def test_head_groups(built, heads):
    """One query row for each KV head, which reads int8 in registers, and several, which share what was converted."""
    case = CASES["both, head dim 64"]
    text = {name: value.replace("2", str(heads // 2)) for name, value in SCALED.items() if name != "score"} | {"score": f"0.25*(s*c0[b, floordiv(h, {heads // 2}), j])"}
    case = (text, *case[1:])
    run, = launchers([kernel(case, queries=1)])
    check(run, case, *inputs(case, 1, 500, heads))


@pytest.mark.parametrize("Tq", [1, 40])
def test_strides(built, Tq):
    """Keys and values as rows of [B, T, heads, D], reversed, and with a distance between the elements of a row."""
    case = CASES["both, head dim 64"]
    q, k, v, captures = inputs(case, Tq, 99)
    spread = torch.randint(-127, 128, (2, 2, 99, 128), dtype=I8)
    for keys, values in ((k.transpose(1, 2).contiguous().transpose(1, 2), v), (spread[..., ::2], spread[..., 1::2]), (k[:, :1].expand(2, 2, 99, 64), v.mT.contiguous().mT)):
        check(built["both, head dim 64"], case, q, keys, values, captures)


def test_the_numbers_at_the_ends():
    """-128 does not come from a symmetric quantisation, and is a number all the same."""
    case = CASES["no scales"]
    run, = launchers([kernel(case, queries=1)])
    q, k, v, captures = inputs(case, 1, 70)
    check(run, case, q, torch.full_like(k, -128), torch.where(v > 0, 127, -128).to(I8), captures)


def test_a_scale_that_is_nan_reaches_its_row_alone(built):
    case = CASES["both, head dim 64"]
    q, k, v, captures = inputs(case, 1, 100)
    captures[1][1, 0, 7] = math.nan
    out = check(built["both, head dim 64"], case, q, k, v, captures)
    assert out[1, :2].isnan().all() and not out[0].isnan().any() and not out[1, 2:].isnan().any()


def test_refusals():
    for wrong in ({"k_dtype": torch.int16}, {"v_dtype": torch.uint8}, {"k_dtype": torch.float64}):
        with pytest.raises(UnsupportedError, match="no C\\+\\+ attention kernel for q of torch.float32 and"):
            emit(Variant(), q_dtype=F32, head_dim=8, value_dim=8, **wrong)


def test_the_source_says_what_it_reads():
    source = kernel(CASES["both"]).source
    assert "//   value  c1[b, floordiv(h, 2), j]" in source and "q float32, k int8, v int8" in source
