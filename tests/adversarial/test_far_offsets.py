"""Elements 2^31 and more apart: kernels of both targets on views of memory that is reserved and hardly touched, against their definitions on copies that lie together."""
import functools
import math
import mmap

import pytest
import torch
from tileweld.codegen.cpp import attention as cpp_attention
from tileweld.codegen.cpp import int8_linear as cpp_int8
from tileweld.codegen.cpp import linear as cpp_linear
from tileweld.compiler.ir import int8_linear
from tileweld.compiler.ir.attention import Variant, empty_output, integer_captures, reference
from tileweld.compiler.ir.attention_parts import joined
from tileweld.compiler.ir.linear import Spec
from tileweld.compiler.ir.linear import reference as linear_reference
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.interpret import interpreted_entry
from tileweld.runtime.launch import CppLauncher

FAR = 2**31
F16, F32, I8 = torch.float16, torch.float32, torch.int8
TARGETS = ["cpp", pytest.param("triton", marks=pytest.mark.skipif(__import__("importlib").util.find_spec("triton") is None, reason="the Triton target needs triton"))]


@functools.cache
def reserved():
    """32 GiB of addresses, of which the pages that are touched take memory: 4 KiB each."""
    memory = mmap.mmap(-1, 1 << 35, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE, which has no name before Python 3.13
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=I8)


def place(x, axis):
    """Where x may lie so that the first and the last element along an axis are 3 2^31 elements apart: neighbours may be 2^31 apart within a tile, and from tile to tile. The other axes lie together."""
    strides = list(x.stride())
    strides[axis] = 3 * FAR // (x.shape[axis] - 1) + 5
    return reserved().view(x.dtype).as_strided(x.shape, strides)


def triton(family):
    return __import__(f"tileweld.codegen.triton.{family}", fromlist=["emit"]).emit


def launcher(target, kernel):
    return interpreted_entry(kernel.name, kernel.source, kernel.entry) if target == "triton" else CppLauncher(compile_cpp([CppUnit.of(kernel)])[0], kernel.entry)


def laid(tensors, which, axis):
    """The tensors, with one of them far apart; one at a time, they share the memory."""
    return [place(t, axis).copy_(t) if name == which else t for name, t in tensors.items()]


#: (tensor, axis): batches, heads, tokens, and elements of a row
PLACES = [("q", 0), ("q", 2), ("q", 3), ("k", 1), ("k", 2), ("k", 3), ("v", 0), ("v", 2), ("v", 3), ("out", 1), ("out", 2)]


@functools.cache
def attention(target, how, tokens):
    """(launch, variant, captures of a call) of one family."""
    texts, dims, dtypes = {
        "plain": ({"score": "0.2*s", "mask": "j <= i + 60"}, (16,), (F16, F16, F16)),
        "parts": ({"score": "0.2*s", "mask": "j <= i + 60"}, (16, 16), (F16, F16, F16)),
        "lse": ({"score": "0.2*s", "mask": "j <= i + 60"}, (16,), (F16, F16, F16)),
        "half keys": ({"score": "0.2*s"}, (16,), (F32, F16, F16)),
        "zero points": ({"score": "0.25*(s*c0[b, h, j] + c2[b, h, j]*c4[b, h, i])", "value": "c1[b, h, j]*v + c3[b, h, j]"}, (16,), (F32, I8, I8)),
    }[how]
    captures = captured(how, tokens)
    variant = Variant(**{"fill": -math.inf, **texts}, integer_captures=integer_captures(captures))
    emit = triton("attention") if target == "triton" else cpp_attention.emit
    q, k, v = dtypes
    kernel = emit(variant, q_dtype=q, k_dtype=k, v_dtype=v, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], head_dim=sum(dims), value_dim=16, key_dims=dims, lse=how == "lse")
    return launcher(target, kernel), variant, dims, dtypes


def captured(how, tokens):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 2, n, generator=generator) / 60 for n in (70, 70, 70, 70, tokens)] if how == "zero points" else []


@pytest.mark.parametrize("tokens", [3, 12])
@pytest.mark.parametrize("how", ["plain", "parts", "lse", "half keys", "zero points"])
@pytest.mark.parametrize("target", TARGETS)
def test_attention(target, how, tokens):
    launch, variant, dims, dtypes = attention(target, how, tokens)
    generator, captures = torch.Generator().manual_seed(0), captured(how, tokens)
    made = lambda dtype, *shape: torch.randint(-127, 128, shape, dtype=I8, generator=generator) if dtype == I8 else torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    q, parts, v = made(dtypes[0], 2, 2, tokens, sum(dims)), [made(dtypes[1], 2, 2, 70, d) for d in dims], made(dtypes[2], 2, 2, 70, 16)
    wide = [x if x.dtype == I8 else x.double() for x in (joined(parts, 2), v)]
    exact = reference(q.double(), *wide, [c.double() for c in captures], [], variant)
    names = {"q": q, "k": parts[0], **{f"k{n}": x for n, x in enumerate(parts[1:], 1)}, "v": v}
    for which, axis in [*PLACES, *([("k1", 2), ("k1", 3)] if how == "parts" else [])]:
        out = empty_output(q, 16).fill_(7)
        out = place(out, axis).fill_(7) if which == "out" else out
        lse = [torch.full((2, 2, tokens), 7.0)] if how == "lse" else []
        launch([out, *lse, *laid(names, which, axis), *captures], [])
        torch.testing.assert_close(out.double(), exact, rtol=5e-3 if q.dtype == F16 else 2e-5, atol=3e-3 if q.dtype == F16 else 2e-5, msg=lambda m: f"{which} {axis}: {m}")


LINEAR = [("x", 0), ("x", 1), ("w", 0), ("w", 1), ("c", 0), ("out", 0), ("out", 1)]


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("activation", ["", "float", "int8", "mixed"])
@pytest.mark.parametrize("target", TARGETS)
def test_products(target, activation, rows):
    """tileweld::linear, and the three schemes of int8_linear."""
    spec, k, n = Spec("", "x", ("a0 + c0[j]",)), 40, 24
    x, w, c = torch.randn(rows, k).half(), torch.randn(n, k) / 6, torch.randn(n)
    known = dict(x_dtype=F16, capture_dtypes=[F32], capture_ranks=[1], widths=[n], k=k)
    if activation:
        q, scale = int8_linear.quantized(w)
        kernel = (triton("int8_linear") if target == "triton" else cpp_int8.emit)(spec, **known, activation=activation, groups=[1])
        exact = int8_linear.reference(x.float(), [q], [scale], [c], (), 1e-5, spec, activation, 2.0, None)[0]
        names, rest, floats = {"x": x, "w": q}, [scale], (1e-5, 2.0)
    else:
        kernel = (triton("linear") if target == "triton" else cpp_linear.emit)(spec, **known, weight_dtypes=[F16])
        names, rest, floats = {"x": x, "w": w.half()}, [], (1e-5,)
        exact = linear_reference(x.double(), [names["w"].double()], [c.double()], (), 1e-5, spec)[0]
    launch = launcher(target, kernel)
    for which, axis in LINEAR:
        if which == "w" and axis == 1 and activation and target == "cpp":
            continue  # rows of int8 weights lie together: emit says so, a selector sees to it
        out = torch.full((rows, n), 7.0, dtype=F16)
        out = place(out, axis).fill_(7) if which == "out" else out
        launch([out, *laid(names, which, axis), *rest, *laid({"c": c}, which, axis)], (), floats)
        torch.testing.assert_close(out.double(), exact.double(), rtol=2e-2, atol=2e-2, msg=lambda m: f"{which} {axis}: {m}")


def test_the_index_type_is_chosen_by_bounds(monkeypatch):
    """What the host functions decide, from shapes and strides alone: nothing is launched. The bytes of int8 products are [M, K] even where x repeats one row."""
    tl = pytest.importorskip("triton.language")
    from tileweld.runtime.interpret import interpreting, load_interpreted

    kernel = triton("attention")(Variant("s", "True"), q_dtype=F16, head_dim=16, value_dim=16)
    index_type = load_interpreted(kernel.name, kernel.source).index_type
    for length, stride, expected in ((70, 2**20, tl.int32), (1024, 2**21, tl.int64), (8, 2**28, tl.int64), (1, 2**40, tl.int64), (10**6, 2**20, tl.int32)):
        assert index_type(torch.empty_strided((2, 2, length, 16), (2**50, 2**45, stride, 1), device="meta")) == expected, (length, stride)
    kernel = triton("int8_linear")(Spec(), x_dtype=F32, activation="int8", groups=[1], widths=[24], k=40)
    module, asked = load_interpreted(kernel.name, kernel.source), []
    monkeypatch.setattr(module, "index_type", lambda *tensors: asked.extend(tensors) or tl.int32)
    with interpreting():
        module.linear([torch.empty(20, 24), torch.randn(1, 40).expand(20, 40), *int8_linear.quantized(torch.randn(24, 40))], [], [1e-5, math.inf])
    assert any(t.dtype == I8 and t.shape == (20, 40) for t in asked)
