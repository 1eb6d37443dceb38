"""attention_lse: the kernels of both targets store the logarithm of the denominator that their softmax has."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tileweld.codegen.cpp import attention as cpp
from tileweld.codegen.triton import attention as triton
from tileweld.compiler.ir import attention_lse  # noqa: F401 (registers the op)
from tileweld.compiler.ir.attention import Variant
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.interpret import interpreted_entry
from tileweld.runtime.launch import CppLauncher

MASKS = [("True", -math.inf, "nan", ""), ("j <= i + n0", -math.inf, "nan", ""), ("j < i", -math.inf, "nan", ""), ("j < i", -math.inf, "zero", ""), ("j < i", -5.0, "nan", ""), ("j <= i", -math.inf, "nan", "0.25")]


def launcher(target, variant, dtype, queries):
    known = dict(q_dtype=dtype, head_dim=16, value_dim=12, num_sizes=1, lse=True)
    if target == "triton":
        kernel = triton.emit(variant, **known)
        return interpreted_entry(kernel.name, kernel.source, kernel.entry)
    kernel = cpp.emit(variant, queries=queries, **known)
    return CppLauncher(compile_cpp([CppUnit.of(kernel)])[0], kernel.entry)


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("target", ["cpp", "triton"])
@pytest.mark.parametrize("mask, fill, empty, sink", MASKS)
def test_kernels_against_float64(mask, fill, empty, sink, target, tokens):
    dtype = torch.bfloat16 if empty == "zero" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, d, generator=generator).to(dtype) for h, n, d in ((4, tokens, 16), (2, 70, 16), (2, 70, 12)))
    variant = Variant("0.3*s", mask, fill, sink, empty)
    exact = torch.ops.tileweld.attention_lse(q.double(), k.double(), v.double(), [], [30], "0.3*s", mask, fill, sink, empty)
    out, lse = torch.full((2, tokens, 4, 12), 7.0, dtype=dtype).transpose(1, 2), torch.full((2, 4, tokens), 7.0)
    launcher(target, variant, dtype, tokens)([out, lse, q, k, v], [30], ())
    torch.testing.assert_close(lse, exact[1].float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(out.double(), exact[0], rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 2e-6, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 9), st.sampled_from(MASKS), st.floats(0.1, 40))
def test_the_definition_is_softmax_and_logsumexp(seed, tokens, keys, how, scale):
    mask, fill, empty, sink = how
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64) for n in (tokens, keys, keys))
    out, lse = torch.ops.tileweld.attention_lse(q, k, v, [], [1], f"{scale}*s", mask, fill, sink, empty)
    i, j = torch.arange(tokens)[:, None], torch.arange(keys)
    visible = {"True": j >= 0, "j <= i + n0": j <= i + 1, "j < i": j < i, "j <= i": j <= i}[mask].expand(tokens, keys)
    scores = (scale * q @ k.mT).masked_fill(~visible, fill)
    scores = torch.cat([scores, torch.full((1, 2, tokens, 1), float(sink))], -1) if sink and keys else scores
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    weights = scores.softmax(-1)[..., :keys]
    torch.testing.assert_close(out, (weights.nan_to_num(0.0) if empty == "zero" or not keys else weights) @ v, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_no_keys_give_zero_and_minus_infinity():
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 0, 16)
    for target in ("cpp", "triton"):
        out, lse = torch.full((1, 3, 2, 12), 7.0).transpose(1, 2), torch.full((1, 2, 3), 7.0)
        launcher(target, Variant("s", "True"), torch.float32, 3)([out, lse, q, k, k[..., :12]], [0], ())
        assert (out == 0).all() and (lse == -math.inf).all()
