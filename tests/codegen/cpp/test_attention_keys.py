"""C++ attention whose keys are a text of what is stored (scales of channels for groups of positions, the newest positions in floats), against the definition in float64."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tileweld.codegen.cpp.attention import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.attention import Variant, integer_captures
from tileweld.compiler.ir.attention_keys import definition

from .stored_attention import compare, emitted, launchers, numbers

I8, F32, BF16, F16 = torch.int8, torch.float32, torch.bfloat16, torch.float16
SHAPES = ((1, 1), (1, 130), (3, 300), (8, 65), (17, 17), (150, 333))  # Tq, Tk: streamed, packed; whole and partial chunks, panels and groups
GROUPS, CENTRED = "k*c0[b, h, floordiv(j, 32), d]", "k*c0[b, h, floordiv(j, 32), d] + c1[b, h, floordiv(j, 32), d]"
RECENT = f"where(j < c2, {CENTRED}, c3[b, h, mod(j, 32), d])"


def groups(B, Hk, Tk, D):
    return [torch.rand(B, Hk, (Tk + 31) // 32, D) / 60, torch.randn(B, Hk, (Tk + 31) // 32, D)]


def recent(B, Hk, Tk, D):
    return [*groups(B, Hk, Tk, D), torch.tensor(Tk - 20), torch.randn(B, Hk, 32, D)]


def slices(B, Hk, Tk, D):
    """scales whose channels do not run along memory, of another dtype, one for all of the batch"""
    return [(torch.rand(1, Hk, D, (Tk + 31) // 32) / 60).bfloat16().transpose(2, 3).expand(B, -1, -1, -1), torch.randn(B, Hk, (Tk + 31) // 32, 2 * D)[..., ::2]]


# name -> (key, further texts, captures, q's dtype, k's dtype, v's dtype, head dims)
CASES = {
    "groups": (GROUPS, {}, lambda *n: groups(*n)[:1], F32, I8, F32, (64, 64)),
    "groups with centres": (CENTRED, {}, groups, F32, I8, I8, (64, 64)),
    "newest in floats": (RECENT, {}, recent, F32, I8, I8, (64, 64)),
    "newest in floats, odd head dims": (RECENT, {}, recent, F32, I8, I8, (33, 20)),
    "newest in floats, wide": (RECENT, {}, recent, F32, I8, F32, (160, 128)),
    "newest in floats, bfloat16": (RECENT, {}, recent, BF16, I8, I8, (64, 64)),
    "newest in floats, float16": (RECENT, {}, recent, F16, I8, F16, (64, 64)),
    "other strides": (CENTRED, {}, slices, F32, I8, I8, (64, 64)),
    "causal": (RECENT, {"mask": "j <= i + 3"}, recent, F32, I8, I8, (64, 64)),
    "finite fill": (CENTRED, {"mask": "(j <= i) & (c2[b, j] != 0)", "fill": -1e9}, lambda B, Hk, Tk, D: [*groups(B, Hk, Tk, D), torch.rand(B, Tk) > 0.5], F32, I8, I8, (64, 64)),
    "zero rows": (GROUPS, {"mask": "j < i", "empty": "zero"}, groups, F32, I8, I8, (16, 16)),
    "scores of tokens, a sink": (GROUPS, {"score": "0.25*(s*c1[b, floordiv(h, 2), j])", "sink": "0.5"}, lambda B, Hk, Tk, D: [groups(B, Hk, Tk, D)[0], torch.rand(B, Hk, Tk)], F32, I8, I8, (16, 16)),
    "every element": ("k*c0[b, h, j, d]", {}, lambda B, Hk, Tk, D: [torch.rand(B, Hk, Tk, D) / 60], F32, I8, I8, (64, 64)),
    "float keys": ("tanh(k)*c0[d] - 0.5*d/64 + 0.01*j", {}, lambda B, Hk, Tk, D: [torch.rand(D)], F32, F32, F32, (64, 64)),
    "channels alone": ("k*c0[b, h, d] - c1[b, h, d]/2", {}, lambda B, Hk, Tk, D: [torch.rand(B, Hk, D) / 60, torch.randn(B, Hk, D)], F32, I8, I8, (64, 64)),
    "every second position elsewhere": ("where(mod(j, 2) == 0, k*c0[b, h, floordiv(j, 32), d], c1[b, h, floordiv(j, 32), d])", {}, groups, F32, I8, I8, (64, 64)),
    "three parts, two sizes of groups": ("where(j < 45, where(j > 7, k*c0[b, h, floordiv(j, 32), d], k*c1[b, h, floordiv(j, 48), d]*c0[b, h, floordiv(j, 32), d]), c1[b, h, floordiv(j, 32), d])", {}, groups, F32, I8, I8, (64, 64)),
    "a number of each position": ("k*c0[b, h, floordiv(j, 32), d] + 0.01*c1[b, h, j]", {}, lambda B, Hk, Tk, D: [groups(B, Hk, Tk, D)[0], torch.randn(B, Hk, Tk)], F32, I8, I8, (64, 64)),
    "positions alone": ("0.01*k + 0.001*j", {}, lambda *n: [], F32, I8, I8, (64, 64)),
}


def variant_of(case, captures):
    return Variant(**{"score": "0.1*s", "fill": -math.inf, **case[1]}, key=case[0], integer_captures=integer_captures(captures))


def inputs(case, Tq, Tk, stored=None):
    _, _, captures, q, k, v, (d, e) = case
    return numbers(q, 2, 4, Tq, d), numbers(k, 2, 2, Tk if stored is None else stored, d), numbers(v, 2, 2, Tk, e), captures(2, 2, Tk, d)


def kernel(case, **known):
    _, _, captures, q, k, v, (d, e) = case
    made = captures(1, 2, 64, d)
    return emitted(variant_of(case, made), made, (q, k, v), (d, e), **known)


@pytest.fixture(scope="module")
def built():
    return dict(zip(CASES, launchers([kernel(case) for case in CASES.values()])))


def check(run, case, q, k, v, captures):
    return compare(run, variant_of(case, captures), q, k, v, captures, definition)


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(built, name):
    for Tq, Tk in SHAPES:
        check(built[name], CASES[name], *inputs(CASES[name], Tq, Tk))


@pytest.mark.parametrize("Tq", [1, 40])
@pytest.mark.parametrize("name", ["groups", "newest in floats"])
def test_one_way_alone_and_strides(name, Tq):
    """One of the kernel's two ways; keys as rows of [B, T, heads, D], one head for all, with a distance between their elements, and query heads in groups of four."""
    case = CASES[name]
    run, = launchers([kernel(case, queries=Tq)])
    q, k, v, captures = inputs(case, Tq, 99)
    for keys in (k.transpose(1, 2).contiguous().transpose(1, 2), k[:, :1].expand(2, 2, 99, 64), torch.randint(-127, 128, (2, 2, 99, 128), dtype=I8)[..., ::2]):
        check(run, case, q, keys, v, captures)
    check(run, case, torch.cat([q, q * 0.5], 1), k, v, captures)


@pytest.mark.parametrize("Tq", [1, 40])
@pytest.mark.parametrize("stored", [0, 1, 64, 90, 99])
def test_fewer_stored_positions_than_values(stored, Tq):
    """Behind the stored keys floats of their own; what is behind the end of k is not read: its row in memory is another tensor's."""
    case = (f"where(j < {stored}, k*c0[b, h, floordiv(j, 32), d], c1[b, h, max(0, j - {stored}), d])", {}, lambda B, Hk, Tk, D: [groups(B, Hk, Tk, D)[0], torch.randn(B, Hk, Tk, D)], F32, I8, F32, (64, 64))
    run, = launchers([kernel(case, queries=Tq)])
    check(run, case, *inputs(case, Tq, 99, stored))


def test_zero_scales_and_scales_that_are_not_finite(built):
    """A channel of zeros adds nothing; NaN and inf reach the heads and the groups that have them."""
    case = CASES["groups"]
    for Tq in (1, 40):
        q, k, v, captures = inputs(case, Tq, 100)
        captures[0][:, :, :, 5] = 0
        captures[0][:, :, 1] = 0
        assert check(built["groups"], case, q, k, v, captures).isfinite().all()
        captures[0][1, 0, 2, 7] = math.nan
        out = check(built["groups"], case, q, k, v, captures)
        assert out[1, :2].isnan().all() and out[0].isfinite().all() and out[1, 2:].isfinite().all()
        captures[0][1, 0, 2, 7] = math.inf
        k[1, 0, 64:96, 7], q[1, :2, :, 7] = 1, -q[1, :2, :, 7].abs() - 1  # scores of -inf: no weight
        assert check(built["groups"], case, q, k, v, captures).isfinite().all()


def test_masked_keys_are_not_seen(built):
    """NaN in the newest positions, which the mask hides from a row."""
    case = CASES["causal"]
    q, k, v, captures = inputs(case, 40, 99)
    captures[3][:] = math.nan  # of positions 79 to 98; rows see at most 42
    assert check(built["causal"], case, q, k, v, captures).isfinite().all()


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 200), st.sampled_from([1, 2, 7, 8, 9, 33]), st.integers(0, 200), st.integers(0, 99))
def test_any_sizes(built, Tk, Tq, filled, seed):
    torch.manual_seed(seed)
    case = CASES["newest in floats"]
    q, k, v, captures = inputs(case, Tq, Tk)
    captures[2] = torch.tensor(filled)
    check(built["newest in floats"], case, q, k, v, captures)


def test_refusals():
    with pytest.raises(UnsupportedError, match="text of keys in parts"):
        emit(Variant(key="2*k"), q_dtype=F32, head_dim=16, value_dim=16, key_dims=(8, 8))
    for wrong in ("k*s", "k + i", "v"):
        with pytest.raises(ValueError, match="reads"):
            emit(Variant(key=wrong), q_dtype=F32, head_dim=16, value_dim=16)
