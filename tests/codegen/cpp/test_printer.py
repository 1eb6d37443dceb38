"""Scalar expressions as C++: their text, their values on the CPU against the language's own evaluator, and the accuracy of every function."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

import tileweld.codegen.cpp.printer as module
from tileweld.codegen.cpp.printer import FUNCTIONS, CppPrinter
from tileweld.compiler.ir import evaluate
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.nodes import UNARY
from tileweld.compiler.ir.parser import parse
from tileweld.runtime.build import CppUnit, compile_cpp

HELPERS = "#include <omp.h>\n" + "".join((Path(module.__file__).parent / name).read_text() for name in ("vector.h", "scalar_math.h"))

#: largest error in ulp over all floats that were tried
ULPS = {"exp": 1, "exp2": 1.3, "log": 1, "tanh": 1.5, "sigmoid": 2.6, "sqrt": 0.51, "rsqrt": 1.6, "sin": 0.6, "cos": 0.6, "erf": 2.5, "abs": 0, "floor": 0, "ceil": 0, "relu": 0}

#: text -> C++ with Int = int32
TEXTS = {
    "0.125*s": "0.125f * s",
    "s*3 + j": "3.0f * s + float(j)",
    "i/j": "float(i) / float(j)",
    "0.1*s": "0.10000000149011612f * s",
    "s + 1e300": "s + std::numeric_limits<float>::infinity()",
    "where(j <= i, s, -inf)": "(j <= i ? s : -std::numeric_limits<float>::infinity())",
    "(j <= i) & (i - j < 8)": "(j <= i) & (i - j < 8)",
    "~(s < 0)": "!(s < 0.0f)",
    "i // 8 + j % 16": "(i >> 3) + (j & 15)",
    "(i - j) // 3": "floor_divide(i - j, 3)",
    "(i - j) % n0": "floor_mod(i - j, n0)",
    "s**0.5": "sqrt_of(s)",
    "s**3": "integer_power<3>(s)",
    "min(s, 1)": "minimum(s, 1.0f)",
    "tanh(i - j)": "tanh_of(float(i - j))",
}

VALUES = [*TEXTS, "i - j*2 + n0 % 7", "(j - i) // n0", "(j - i) % (0 - 3)", "s**2.5", "exp(s*0.1) - 1/(1 + s*s)", "max(min(i, j), h)", "abs(i - j)*0.5", "where(s > 0, i, j)",
          "where((j - i) % 2 == 0, s, where(s > 1, 2*s, nan))", "i*j*Tk*1000 % 1000003", "trunc(s*3)", "trunc(s) // 2", "max(s, nan)", "(i*i - j*j)*0.01 - s", "n1 - i", "(n1 + i) * 2 % 1001"]
NAMES = {"i": 40, "j": 50, "h": 3, "Tk": 50, "n0": 5, "n1": 2**40}


def text_of(text):
    e = parse(text)
    printer = CppPrinter()
    return printer(e) if sc.is_bool(e) or sc.is_int(e) else printer.real(e)


@pytest.mark.parametrize("text", TEXTS)
def test_text(text):
    assert text_of(text) == TEXTS[text]


def test_a_product_of_positions_is_widened_and_a_small_multiple_is_not():
    assert "int64_t" in text_of("i*j*h < 5")
    assert "int64_t" in text_of("i*j") and "int64_t" not in text_of("i*4 + j")


def test_doubles():
    assert CppPrinter(real="double").real(parse("0.1*s + i")) == "0.1 * s + double(i)"


def test_every_function_of_the_language_has_a_row():
    assert FUNCTIONS.keys() == UNARY.keys() == ULPS.keys()


@pytest.fixture(scope="module")
def library():
    source = HELPERS
    for n, text in enumerate(VALUES):
        wide = "n1" in text
        source += (f'extern "C" void value{n}(const float* __restrict s_, double* __restrict out) {{\n    using Int = {"int64_t" if wide else "int32_t"};\n'
                   f"    const Int h = 3, Tk = 50, n0 = 5; {'const Int n1 = Int(1) << 40;' if wide else ''}\n    (void)h, (void)Tk, (void)n0;\n"
                   f"    for (Int i = 0; i < 40; ++i)\n        for (Int j = 0; j < 50; ++j) {{\n            const float s = s_[i * 50 + j];\n            (void)s;\n"
                   f"            out[i * 50 + j] = double({text_of(text)});\n        }}\n}}\n")
    for name, function in FUNCTIONS.items():
        source += f'extern "C" void call_{name}(const float* __restrict x, float* __restrict y, int64_t n) {{\n    for (int64_t i = 0; i < n; ++i) y[i] = {function}(x[i]);\n}}\n'
    source += 'extern "C" void call_softmax(const float* x, float* y, int64_t n) {\n    for (int64_t i = 0; i < n; i += VL) store_vector(y + i, exp2_of(load_vector(x + i)));\n}\n'
    for name in ("Half", "BFloat16"):
        source += (f'extern "C" void to_{name}(const float* x, {name}* y, int64_t n) {{\n    for (int64_t i = 0; i < n; ++i) store_element(y + i, x[i]);\n}}\n'
                   f'extern "C" void from_{name}(const {name}* x, float* y, float* z, int64_t n) {{\n    for (int64_t i = 0; i < n; ++i) y[i] = element(x[i]);\n'
                   f"    for (int64_t i = 0; i + VL <= n; i += VL) store_vector(z + i, load_vector(x + i));\n}}\n")
    return compile_cpp([CppUnit("printed", source)])[0]


def pointer(x):
    return ctypes.c_void_p(x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr())


@pytest.mark.parametrize("text", VALUES)
def test_value(library, text):
    s = torch.randn(40, 50) * 3
    out = torch.empty(40, 50, dtype=torch.float64)
    getattr(library, f"value{VALUES.index(text)}")(pointer(s), pointer(out))
    env = {**NAMES, "i": torch.arange(40)[:, None], "j": torch.arange(50), "s": s}
    expected = evaluate.Evaluator(env, [], torch.float32)(parse(text)).expand(40, 50)
    torch.testing.assert_close(out, expected.double(), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", [*FUNCTIONS, "softmax"])
def test_accuracy(library, name):
    x = np.arange(0, 2**32, 6607, dtype=np.uint32).view(np.float32)  # every 6607th float of all, NaN and infinities among them
    x = np.concatenate([x, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0], np.float32), np.linspace(-20, 20, 100001, dtype=np.float32)])
    if name in ("sin", "cos"):
        x = x[~(np.abs(x) >= 2**20)]  # the reduction of larger arguments is exact with FMA alone
    if name == "softmax":
        x = x[~(x > 0)]
    x = np.ascontiguousarray(x[: len(x) // 16 * 16])
    y = np.empty_like(x)
    getattr(library, f"call_{name}")(pointer(x), pointer(y), ctypes.c_int64(len(x)))
    expected = (torch.exp2 if name == "softmax" else evaluate.UNARY[name])(torch.from_numpy(x).double()).numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = expected.astype(np.float32)
        assert np.array_equal(np.isnan(rounded), np.isnan(y))
        infinite = np.isinf(rounded)
        assert np.array_equal(rounded[infinite], y[infinite])
        finite = np.isfinite(rounded) & ((expected >= 2.0**-126) | (name != "softmax"))  # the softmax's exponential may flush subnormals
        error = np.abs(y.astype(np.float64) - expected)[finite] / np.maximum(np.spacing(np.abs(rounded[finite])), 2.0**-149)
    assert error.max() <= ULPS.get(name, 3), x[finite][error.argmax()]
    if name == "softmax":
        assert (y[x < -150] == 0).all()  # a masked score of -inf adds exactly nothing


@pytest.mark.parametrize(("name", "dtype"), [("Half", torch.float16), ("BFloat16", torch.bfloat16)])
def test_16_bit_floats_round_as_torch_does(library, name, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    y, z = torch.empty(2**16), torch.empty(2**16)
    getattr(library, f"from_{name}")(pointer(every), pointer(y), pointer(z), ctypes.c_int64(2**16))
    torch.testing.assert_close(y, every.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, every.float(), rtol=0, atol=0, equal_nan=True)
    x = torch.from_numpy(np.arange(0, 2**32, 9973, dtype=np.uint32).view(np.float32).copy())
    between = (every.float()[:-1] + every.float()[1:]) / 2  # ties
    x = torch.cat([x, between])
    out = torch.empty(len(x), dtype=dtype)
    getattr(library, f"to_{name}")(pointer(x), pointer(out), ctypes.c_int64(len(x)))
    torch.testing.assert_close(out.float(), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)

