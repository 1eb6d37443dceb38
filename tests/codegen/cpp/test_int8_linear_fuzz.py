"""Random int8 products: sums against int64, all activations against the definition; shapes, strides, thresholds, rows that are not finite."""

import functools
import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tileweld.codegen.cpp.int8_linear import emit
from tileweld.compiler.ir.int8_linear import quantized, reference
from tileweld.compiler.ir.linear import Spec
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

F32 = torch.float32
SHAPES = ((3, 2), (47, 63), (80, 192), (5, 1030))  # N, K
WAYS = {"this processor": ("-O1",), "narrow vectors": ("-O1", "-march=x86-64")}
VARIANTS = [(shape, way) for shape in SHAPES for way in WAYS if way == "this processor" or shape == (47, 63)]
KINDS = (("float", False), ("int8", False), ("mixed", False), ("mixed", True))  # activation, static columns


@functools.cache
def launches():
    wanted = [(shape, activation, columns, way) for shape, way in VARIANTS for activation, columns in KINDS]
    kernels = [emit(Spec(), x_dtype=F32, widths=[N], k=K, activation=activation, groups=[1], has_columns=columns) for (N, K), activation, columns, _ in wanted]
    libraries = compile_cpp([CppUnit("int8", kernel.source, extra_flags=WAYS[key[-1]]) for kernel, key in zip(kernels, wanted)])
    return {key: CppLauncher(library, "int8_linear") for key, library in zip(wanted, libraries)}


def bits(*shape, low, high, seed):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(variant=st.sampled_from(VARIANTS), M=st.integers(0, 40), span=st.sampled_from((1, 3, 127)), seed=st.integers(0, 2**31))
def test_sums_are_those_of_int64(variant, M, span, seed):
    (N, K), way = variant
    t, q = bits(M, K, low=-span, high=span + 1, seed=seed), bits(N, K, low=-128, high=128, seed=seed + 1).to(torch.int8)
    t[:, seed % K] = 127  # so that the step is 1
    out = torch.full((M, N), 7.0)
    launches()[(N, K), "int8", False, way]([out, t.float(), q, torch.ones(N, 1)], (), (0.0, math.inf))
    assert torch.equal(out, (t @ q.long().T).float())


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(variant=st.sampled_from(VARIANTS), kind=st.sampled_from(KINDS), M=st.integers(1, 40),
       threshold=st.sampled_from((0.0, 0.5, 2.0, 6.0, math.inf)), hostile=st.lists(st.sampled_from((math.nan, math.inf, -math.inf, 0.0, 1e30, 1e-42)), max_size=3), stretch=st.sampled_from((1, 2)), seed=st.integers(0, 2**31))
def test_values_are_those_of_the_definition(variant, kind, M, threshold, hostile, stretch, seed):
    """x is of whole quarters, whose bytes are the same in float32 and float64 (but at halves, which steps of 1/127 do not meet)."""
    ((N, K), way), (activation, has_columns) = variant, kind
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(M, stretch * K, generator=random) * 4).round()[:, ::stretch] / 4
    for n, value in enumerate(hostile):
        x[(seed + n) % M, (seed + 7 * n) % K] = value
    q, s = quantized(torch.randn(N, K, generator=random) / K**0.5)
    columns = bits(K, low=0, high=2, seed=seed).bool() if has_columns else None
    out = torch.full((M, N), 7.0)
    launches()[(N, K), activation, has_columns, way]([out, x, q, s, *([columns] if has_columns else [])], (), (0.0, threshold))
    exact = reference(x, [q], [s], [], (), 0.0, Spec(), activation, threshold, columns)[0]
    bound = 1e-5 * x.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True) + 1e-5
    finite = exact.isfinite()
    assert torch.equal(finite, out.isfinite()) and torch.equal(exact[~finite].nan_to_num(1.5), out[~finite].nan_to_num(1.5))
    assert ((out - exact).abs() <= bound)[finite].all(), (out - exact).abs()[finite].max()
