"""Hostile numbers in the ops that came after the plain ones: float16 of 6e4, rows of zeros, NaN, inf, nothing and one of everything, in the kernels of both targets and as whole graphs, as the definition has them."""
import functools
import math

import pytest
import torch
from tileweld.codegen.cpp import attention as cpp_attention
from tileweld.compiler.ir.attention import Variant, empty_output, integer_captures, reference
from tileweld.compiler.ir.attention_parts import joined
from tileweld.compiler.ir.merge_lse import merge_lse
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.interpret import interpreted_entry
from tileweld.runtime.launch import CppLauncher

F16, F32, I8 = torch.float16, torch.float32, torch.int8
NAN, INF = math.nan, math.inf
POINTS = {"score": "0.25*(s*c0[b, h, j] + c2[b, h, j]*c4[b, h, i])", "value": "c1[b, h, j]*v + c3[b, h, j]"}
FAMILIES = {  # texts, dims of the parts of the keys, dtypes of q, k, v
    "parts": ({"score": "s", "mask": "j <= i + n0"}, (8, 4), (F32, F32, F32)),
    "parts, float16": ({"score": "0.001*s"}, (8, 4), (F16, F16, F16)),
    "lse": ({"score": "s", "mask": "j < i"}, (8,), (F32, F32, F32)),
    "half keys": ({"score": "s", "mask": "j <= i + n0"}, (8,), (F32, F16, F16)),
    "zero points": (POINTS, (8,), (F32, I8, I8)),
    "zero points, masked": (POINTS | {"mask": "j < i"}, (8,), (F32, I8, I8)),
}


def captured(family, Tq, Tk):
    return [torch.rand(1, 2, Tk) / 60, torch.rand(1, 2, Tk) / 60, torch.randn(1, 2, Tk), torch.randn(1, 2, Tk), torch.randn(1, 2, Tq)] if "zero" in family else []


@functools.cache
def launcher(target, family):
    texts, dims, (q, k, v) = FAMILIES[family]
    captures = captured(family, 2, 2)
    variant = Variant(**{"fill": -INF, **texts}, integer_captures=integer_captures(captures))
    if target == "triton":
        pytest.importorskip("triton", reason="the Triton target needs triton")
        from tileweld.codegen.triton.attention import emit
    else:
        emit = cpp_attention.emit
    kernel = emit(variant, q_dtype=q, k_dtype=k, v_dtype=v, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], head_dim=sum(dims), value_dim=8, key_dims=dims, num_sizes=1, lse=family == "lse")
    run = interpreted_entry(kernel.name, kernel.source, kernel.entry) if target == "triton" else CppLauncher(compile_cpp([CppUnit.of(kernel)])[0], kernel.entry)
    return run, variant


def check(target, family, q, parts, v, captures):
    run, variant = launcher(target, family)
    offset = v.shape[2] - q.shape[2]
    out, lse = empty_output(q, 8).fill_(7), torch.full(q.shape[:3], 7.0)
    run([out, *([lse] if family == "lse" else []), q, *parts, v, *captures], [offset], ())
    exact_lse = torch.empty(q.shape[:3], dtype=torch.float64) if family == "lse" else None
    keys = joined(parts, q.shape[1])
    exact = reference(q.double(), *(x if x.dtype == I8 else x.double() for x in (keys, v)), [c.double() for c in captures], [offset], variant, **({"lse": exact_lse} if family == "lse" else {}))
    top = exact[exact.isfinite()].abs().max().clamp(min=1.0).item() if exact.isfinite().any() else 1.0
    torch.testing.assert_close(out.double(), exact, rtol=2e-3 if q.dtype == F16 else 2e-5, atol=top * (2e-3 if q.dtype == F16 else 2e-5), equal_nan=True)
    if family == "lse":
        broken = ~exact_lse.isfinite()  # of a score of inf torch's logsumexp is inf and the result NaN: a kernel may say NaN for both
        torch.testing.assert_close(lse.double()[~broken], exact_lse[~broken], rtol=2e-5, atol=2e-5)
        assert not lse[broken].isfinite().any()
    return out


def made(family, Tq, Tk):
    _, dims, (q, k, v) = FAMILIES[family]
    new = lambda dtype, *shape: torch.randint(-127, 128, shape, dtype=I8) if dtype == I8 else torch.randn(shape).to(dtype)  # noqa: E731
    return new(q, 1, 2, Tq, sum(dims)), [new(k, 1, 2, Tk, d) for d in dims], new(v, 1, 2, Tk, 8), captured(family, Tq, Tk)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_attention_of_zeros_nothing_and_one(target, family):
    for Tq, Tk in ((1, 1), (3, 1), (1, 40), (3, 0), (0, 3), (9, 9)):
        q, parts, v, captures = made(family, Tq, Tk)
        check(target, family, q, parts, v, captures)
        check(target, family, torch.zeros_like(q), [torch.zeros_like(p) for p in parts], v, captures)
        check(target, family, q, parts, torch.zeros_like(v), [torch.zeros_like(c) for c in captures])
        check(target, family, q[:0], [p[:0] for p in parts], v[:0], [c[:0] for c in captures])


@pytest.mark.parametrize("value", [NAN, INF, -INF, 6e4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_attention_of_values_that_are_not_ordinary(target, family, value):
    """In every operand in turn, in a row that all queries see and in one that few do; few queries and a tile of them."""
    for Tq in (2, 12):
        ordinary = made(family, Tq, 40)
        places = [n for n, x in enumerate([ordinary[0], *ordinary[1], ordinary[2], *ordinary[3]]) if x.is_floating_point()]
        for n in places:
            for position in (0, -1):
                q, parts, v, captures = ordinary[0].clone(), [p.clone() for p in ordinary[1]], ordinary[2].clone(), [c.clone() for c in ordinary[3]]
                x = [q, *parts, v, *captures][n]
                if position and "j < i" in FAMILIES[family][0].get("mask", "") and x.shape[2] == 40:
                    continue  # a key that no row sees: eager's 0 * NaN is NaN, a kernel may never read it
                if x.dim() == 4:
                    x[0, 1, position, 2] = value
                else:
                    x[0, 1, position] = value
                out = check(target, family, q, parts, v, captures)
                assert torch.equal(out[0, 0].isnan(), reference_of_one_head(family, ordinary, 0)), "another head"


def reference_of_one_head(family, ordinary, head):
    """Which elements of a head without hostile values are NaN: rows that see no key."""
    q, parts, v, captures = ordinary
    _, variant = launcher("cpp", family)
    keys = joined(parts, q.shape[1])
    exact = reference(q.double(), *(x if x.dtype == I8 else x.double() for x in (keys, v)), [c.double() for c in captures], [v.shape[2] - q.shape[2]], variant)
    return exact[0, head].isnan()


@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_float16_keys_of_6e4_everywhere(target):
    """A dot product of 12 times 3.6e9 is no float16; times 0.001 it is 4e7, and the largest key wins."""
    q, parts, v, captures = made("parts, float16", 5, 20)
    check(target, "parts, float16", q.fill_(6e4), [p.fill_(6e4) for p in parts], v, captures)
    q, parts, v, captures = made("half keys", 5, 20)
    check(target, "half keys", q, [p.fill_(65504.0) for p in parts], v.fill_(-65504.0), captures)


def compiled(function, target):
    torch._dynamo.reset()
    return torch.compile(function, backend="tileweld", options={"target": target}, dynamic=False)


def same(function, *args, target="cpp", tolerance=2e-5):
    """tolerance: of the largest number of each result."""
    with torch.no_grad():
        actual, expected = (y if isinstance(y, tuple) else (y,) for y in (compiled(function, target)(*args), function(*args)))
    for a, e in zip(actual, expected, strict=True):
        finite = e[e.isfinite()]
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * max(1.0, finite.abs().max().item() if finite.numel() else 1.0), equal_nan=True)


@pytest.mark.parametrize("empty", ["zero", "nan", "each"])
def test_merge_lse(empty):
    """Chunks that see nothing, with NaN as their result; a NaN and an inf among the values; scores of 3e38; one chunk; no rows."""
    outs, lses = [torch.randn(2, 7, 4) for _ in range(3)], [torch.randn(2, 7) for _ in range(3)]
    lses[0][0, 0], outs[0][0, 0] = -INF, NAN  # the softmax of nothing
    for out, lse in zip(outs, lses):
        lse[0, 1], out[0, 1] = -INF, NAN  # no chunk sees a key
    outs[1][1, 2, 3], outs[2][1, 3, 0] = NAN, INF
    lses[0][1, 4], lses[1][1, 4] = 3e38, -3e38
    lses[2][1, 5] = NAN
    merged = lambda *x: merge_lse(x[: len(x) // 2], x[len(x) // 2:], empty)  # noqa: E731
    same(merged, *outs, *lses)
    same(merged, outs[0], lses[0])
    same(merged, *(x[:, :0] for x in (*outs, *lses)))
    same(merged, *(x[:1, :1] for x in (*outs, *lses)))
    same(merged, *(x.half() * 6e4 for x in outs), *lses, tolerance=2e-3)


def turned(x, w, angles):
    """Llama's rotary in complex numbers, on a projection."""
    y = torch.nn.functional.linear(x, w).unflatten(-1, (2, 8)).float()
    return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2).type_as(x)


def packed(x, w, cos, sin):
    """q, k and v of one head after another in one weight, q and k turned."""
    y = torch.nn.functional.linear(x, w).view(1, -1, 3, 24).transpose(1, 2)
    q, k, v = y.chunk(3, -1)
    rotate = lambda t: t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin  # noqa: E731
    return rotate(q), rotate(k), v


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("which", ["complex_product", "packed qkv"])
def test_projections_with_rotary(which, rows):
    """Rows that are not finite stay rows; float16 rows of 6e4 whose projection fits are its numbers."""
    x = torch.randn(1, rows, 20)
    x[0, 0] = 0
    if rows > 1:
        x[0, 1, 3], x[0, 2, 4], x[0, 3, 5] = NAN, INF, -INF
    function, w = (turned, torch.randn(16, 20)) if which == "complex_product" else (packed, torch.randn(72, 20))
    rest = (torch.randn(rows, 4),) if function is turned else (torch.randn(rows, 8), torch.randn(rows, 8))
    same(function, x, w, *rest, tolerance=1e-4)
    same(function, torch.full((1, rows, 20), 6e4).half(), (w * 1e-3).half(), *(r if function is turned else r.half() for r in rest), tolerance=5e-3)
    same(function, x[:, :0], w, *(r[:0] for r in rest))


def test_merged_heads_of_zeros_and_of_what_is_not_finite():
    """Weights of zeros merge to zeros, without NaN from 0 / 0; those that are not finite do not become finite ones unseen."""
    torch.manual_seed(0)
    weights = [torch.randn(8, 8), torch.randn(8, 8), torch.randn(8, 8), torch.randn(8, 8)]
    merge = lambda *w: torch.ops.tileweld.merge_heads(*w, None, None, None, 4, 4, 2, [0, 0], True)  # noqa: E731
    assert all(x.isfinite().all() for x in merge(*map(torch.zeros_like, weights))[:4])
    one_head_of_zeros = [w.clone() for w in weights]
    one_head_of_zeros[1][:2] = one_head_of_zeros[2][:2] = 0
    assert all(x.isfinite().all() for x in merge(*one_head_of_zeros))
