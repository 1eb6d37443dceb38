"""C++ attention of one to five query rows a KV head: keys and values widened where they are used, scales of whole chunks in the queries. Against the definition in float64."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld.compiler.ir.attention import Variant, integer_captures, reference
from tileweld.compiler.ir.attention_keys import definition

from .stored_attention import compare, emitted, launchers, numbers

I8, F32, BF16, F16 = torch.int8, torch.float32, torch.bfloat16, torch.float16


def text(key: str, group: int) -> str:
    return key.replace("SCALE", f"c0[b, h, floordiv(j, {group}), d]").replace("SHIFT", f"c1[b, h, floordiv(j, {group}), d]").replace("NEWEST", f"c3[b, h, mod(j, {group}), d]")


#: name -> (text of the keys, group, k's dtype, v's dtype, head dim). A chunk is 64 keys.
CASES = {
    "scales": ("k*SCALE", 64, I8, I8, 64), "scales and shifts": ("k*SCALE + SHIFT", 64, I8, I8, 64), "long groups": ("SHIFT + SCALE*k", 192, I8, I8, 32),
    "zero points": ("(k - SHIFT)*SCALE", 64, I8, F32, 64), "half of it": ("SCALE*k/2 - 3*SHIFT", 128, I8, BF16, 48), "a negative k": ("SHIFT - k*SCALE", 64, I8, I8, 16),
    "the newest elsewhere": ("where(j < c2, k*SCALE + SHIFT, NEWEST)", 64, I8, I8, 64), "no group": ("k*c0[b, h, 0, d] + c1[b, h, 0, d]", 64, I8, I8, 64),
    "short groups": ("k*SCALE + SHIFT", 32, I8, I8, 64), "a square": ("k*k*SCALE", 64, I8, I8, 64), "odd head dim": ("k*SCALE + SHIFT", 64, I8, I8, 20), "half keys": ("k*SCALE + SHIFT", 64, F16, F16, 64),
    "stored alone": ("", 64, I8, I8, 64), "bfloat16 alone": ("", 64, BF16, BF16, 80), "float16 and int8": ("", 64, F16, I8, 64), "floats": ("", 64, F32, F32, 64), "floats, odd": ("", 64, F32, F32, 36),
}
FOLDS = {"scales", "scales and shifts", "long groups", "zero points", "half of it", "a negative k", "the newest elsewhere", "no group", "short groups", "odd head dim", "half keys"}


def captures_of(case, B, Hk, Tk):
    key, group, _, _, d = case
    if not key:
        return []
    of = (B, Hk, -(-Tk // group), d)
    return [torch.rand(of) / 60, torch.randn(of) / 4, torch.tensor(max(0, Tk - 50)), torch.randn(B, Hk, group, d)]


def variant_of(case, captures):
    key, group, k, _, _ = case
    return Variant(score="0.1*s" if key or k != I8 else "0.002*s", mask="j <= i + 400", fill=-math.inf, key=text(key, group), integer_captures=integer_captures(captures))


def kernel(case):
    made = captures_of(case, 1, 2, 64)
    return emitted(variant_of(case, made), made, (F32, case[2], case[3]), (case[4], case[4]))


@pytest.fixture(scope="module")
def kernels():
    return {name: kernel(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def built(kernels):
    return dict(zip(kernels, launchers(list(kernels.values()))))


def inputs(case, Tk, rows, Tq=1):
    _, _, k, v, d = case
    return numbers(F32, 2, 2 * rows, Tq, d), numbers(k, 2, 2, Tk, d), numbers(v, 2, 2, Tk, d), captures_of(case, 2, 2, Tk)


def check(run, case, q, k, v, captures):
    return compare(run, variant_of(case, captures), q, k, v, captures, definition if case[0] else reference)


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_rows(built, name):
    for rows in (1, 2, 3, 4, 5):
        for Tk in (1, 63, 64, 300):
            check(built[name], CASES[name], *inputs(CASES[name], Tk, rows))
    check(built[name], CASES[name], *inputs(CASES[name], 130, 1, Tq=3))


def test_which_texts_fold(kernels):
    """Sums and products of k and what runs along the channels, no squares; whether a call's keys do is the kernel's to ask."""
    for name, made in kernels.items():
        assert ("static bool fold_keys" in made.source) == (name in FOLDS), name


@pytest.mark.parametrize("name", ["scales", "scales and shifts", "the newest elsewhere"])
def test_scales_that_are_zero_or_not_finite(built, name):
    case = CASES[name]
    for rows in (1, 3, 4):
        q, k, v, captures = inputs(case, 200, rows)
        captures[0][:, :, 1], captures[0][:, :, :, 5] = 0, 0
        assert check(built[name], case, q, k, v, captures).isfinite().all()
        captures[0][1, 0, 1, 7] = math.nan
        out = check(built[name], case, q, k, v, captures)
        assert out[1, :rows].isnan().all() and out[0].isfinite().all() and out[1, rows:].isfinite().all()


@pytest.mark.parametrize("name", ["scales and shifts", "stored alone", "bfloat16 alone"])
def test_strides(built, name):
    """Rows of a cache [B, T, heads, D], heads that are one, and elements with a distance between them."""
    case = CASES[name]
    for rows in (1, 3):
        q, k, v, captures = inputs(case, 150, rows)
        for lay in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x[:, :1].expand(x.shape), lambda x: x.repeat_interleave(2, 3)[..., ::2]):
            check(built[name], case, q, lay(k), lay(v), captures)
            check(built[name], case, q, k, lay(v), captures)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.integers(1, 300), st.integers(1, 6), st.integers(0, 300), st.integers(0, 2**31))
def test_any_sizes(built, name, Tk, rows, filled, seed):
    torch.manual_seed(seed)
    q, k, v, captures = inputs(CASES[name], Tk, rows)
    if captures:
        captures[2] = torch.tensor(filled)
    check(built[name], CASES[name], q, k, v, captures)
