"""Printed expressions against their meaning (compiler/ir/evaluate.py), in the interpreter; and that every function compiles for every GPU."""

import math
import re

import pytest
import torch

from tileweld.codegen.triton.printer import HELPERS, LOG2E, UNARY, TritonText, float_text, fold_log2e
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.evaluate import Evaluator
from tileweld.compiler.ir.nodes import UNARY as LANGUAGE_UNARY
from tileweld.compiler.ir.parser import parse
from tileweld.compiler.ir.printer import text
from tileweld.runtime.aot import compile_ahead
from tileweld.runtime.interpret import interpreted_entry, load_interpreted
from tileweld.runtime.source_module import load_python_source

HEAD = "import torch\nimport triton\nimport triton.language as tl\n\n"
N = 64
# both signs, zeros, large and not finite
S = torch.cat([torch.linspace(-4, 4, N - 10), torch.tensor([0.0, -0.0, 1e-6, -1e-4, 90.0, -90.0, 1e4, math.inf, -math.inf, math.nan])])
I = torch.arange(N, dtype=torch.int32)
J = torch.arange(N, dtype=torch.int32).flip(0) % 11

FLOATS = ["s + 2", "2 - s", "0.3*s/7", "s/(s + 0.5)", "min(s, 1)", "max(s, -s)", "where(s < 1, s, 2*s)", "where(i < j, 0, 1) + s", "-s*s", "s - (s - 1)", "1/s", "i/4 + s", "sqrt(s*s)",
          "s**3", "(s*s)**0.5", "(s*s + 1)**-0.5", "s**-2", "(s*s)**0.3", "s**11", "s**12", "c0[mod(i, 5), 2] + s", "c1[j] + s", "trunc(where(s < 50, where(s > -50, s, 0), 0)) + 0.5", "exp(-abs(s))",
          "sigmoid(tanh(s))", "3.4028234663852886e38 + s*0", "where(c2 > 0, s, -s)"]
INTEGERS = ["i + 2*j", "-(i - j)", "floordiv(i, 7)", "mod(i, 7)", "floordiv(i*j, 4)", "mod(i*j, 4)", "floordiv(i, j*j + 1)", "mod(i, -6)", "min(i, j)", "max(i, 3)", "abs(i - j)", "i*i",
            "where((i < j) | ~(j < 2), i, j)", "where((i == j) & (i != 3), 1, 0)", "c3[mod(i, 4)] + i", "trunc(i/4)"]
CAPTURES = (torch.randn(5, 3), torch.randn(N).half(), torch.tensor(1.0), torch.tensor([True, False, True, True]))


def build(expressions, names) -> tuple[str, set]:
    """A module with one kernel that stores each expression as one row, and the helpers it uses."""
    printer = TritonText()
    lines = [f"tl.store(out_ptr + {n} * {N} + lane, {printer(e)})" for n, e in enumerate(expressions)]
    parameters = ", ".join(["out_ptr", "s_ptr", "i_ptr", "j_ptr", *names])
    body = "\n    ".join([f"lane = tl.arange(0, {N})", "s = tl.load(s_ptr + lane)", "i = tl.load(i_ptr + lane)", "j = tl.load(j_ptr + lane)", *lines])
    helpers = "\n\n".join(HELPERS[name] for name in sorted(printer.helpers))
    source = f"{HEAD}{helpers}\n\n@triton.jit\ndef kernel({parameters}):\n    {body}\n\n\ndef run(tensors, ints, floats):\n    kernel[(1,)](*tensors, *ints)\n"
    return source, printer.helpers | {f"c{k}_n{axis}" for k, axis in printer.wrapped}


CAPTURE_NAMES = ["c0_ptr", "c1_ptr", "c2_ptr", "c3_ptr", "c0_s0", "c0_s1", "c0_n0", "c1_s0", "c1_n0", "c3_s0", "c3_n0"]
CAPTURE_INTS = [3, 1, 5, 1, N, 1, 4]


def check(texts, dtype):
    expressions = [parse(t, frozenset({3})) for t in texts]
    source, _ = build(expressions, CAPTURE_NAMES)
    out = torch.zeros(len(texts), N, dtype=dtype)
    interpreted_entry("expressions", source, "run")([out, S, I, J, *CAPTURES[:3], CAPTURES[3].view(torch.int8)], CAPTURE_INTS)
    evaluate = Evaluator({"s": S.double(), "i": I.long(), "j": J.long()}, [c.double() if c.is_floating_point() else c for c in CAPTURES], torch.float64)
    for t, e, got in zip(texts, expressions, out):
        expected = evaluate(e).expand(N)
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), expected.float().double(), rtol=2e-5, atol=1e-7, equal_nan=True, msg=lambda m, t=t: f"{t}: {m}")
        else:
            assert torch.equal(got, expected.long()), t


def around_zero(text: str) -> str:
    """i and j are never negative, and printed so; i - 30 and j - 5 stand on both sides of zero."""
    return re.sub(r"\bj\b", "(j - 5)", re.sub(r"\bi\b", "(i - 30)", text))


@pytest.mark.parametrize("change", [str, around_zero])
def test_float_expressions(change):
    check(list(map(change, FLOATS)), torch.float32)


@pytest.mark.parametrize("change", [str, around_zero])
def test_integer_expressions(change):
    check(list(map(change, INTEGERS)), torch.int64)


def test_a_row_for_every_function_and_its_values():
    assert set(UNARY) == set(LANGUAGE_UNARY)
    # torch.sin and cos of infinity give NaN, as here
    check([f"{name}(s)" for name in UNARY] + ["relu(s) + abs(i)"], torch.float32)


def test_tanh_keeps_its_relative_accuracy_around_zero():
    expressions = [parse("tanh(s)")]
    source, helpers = build(expressions, [])
    assert helpers == {"tanh"}
    s = torch.logspace(-6, 1, N, dtype=torch.float64).float()
    out = torch.zeros(1, N)
    interpreted_entry("tanh", source, "run")([out, s, I, J])
    torch.testing.assert_close(out[0].double(), torch.tanh(s.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_every_function_compiles(arch):
    """One kernel with all of them: none is missing from a backend, none is an external library's."""
    expressions = [parse(f"{name}(s)") for name in UNARY] + [parse(t, frozenset({3})) for t in FLOATS + INTEGERS]
    source, _ = build(expressions, CAPTURE_NAMES)
    types = {"out_ptr": "*fp32", "s_ptr": "*fp32", "i_ptr": "*i32", "j_ptr": "*i32", "c0_ptr": "*fp32", "c1_ptr": "*fp16", "c2_ptr": "*fp32", "c3_ptr": "*i8"}
    result = compile_ahead(load_python_source("expressions", source), "kernel", types | dict.fromkeys(CAPTURE_NAMES[4:], "i32"), {}, arch)
    assert result.binary_bytes > 0 and result.matmul == ""


def test_loads_are_guarded_and_hoisted_where_asked():
    e = parse("c0[b,j] + c1[h]")
    bias, slope = sc.loads(e)
    printed = TritonText(guards={"j": "j < Tk"}, hoisted={slope: "slope"})(e)
    assert printed.count("tl.load") == 1 and "mask=(j < Tk)" in printed and "slope" in printed and "tl.int64" in printed
    assert bias != slope


@pytest.mark.parametrize(("value", "expected"), [(0.1, "0.10000000149011612"), (1e300, 'float("inf")'), (-1e300, 'float("-inf")'), (1e-45, "0.0"), (float("nan"), 'float("nan")')])
def test_a_literal_stays_in_fp32(value, expected):
    assert float_text(value) == expected


@pytest.mark.parametrize("score", ["0.125*s", "50*tanh(0.01*s)", "0.125*s + 2*(j - i)", "where(j < i, s, -2*s)", "0.125*s - 3", "c0*s", "s*0.1 + c0[h]*(j - i)"])
def test_log2e_folds_into_a_score(score):
    env = {"s": torch.linspace(-5, 5, 9).double(), "i": torch.arange(9), "j": torch.tensor(3), "h": torch.tensor(1), "b": torch.tensor(0)}
    evaluate = Evaluator(env, [torch.tensor([0.3, 0.7]).double() if "[h]" in score else torch.tensor(0.3).double()], torch.float64)
    e = parse(score)
    torch.testing.assert_close(evaluate(fold_log2e(e)), evaluate(e) * LOG2E, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", ["s + c0[b,j]", "s + where(c0[j] > 0, 0, -3e38)", "s + 2*c0[b,h,i,j]", "c0[j]"])
def test_log2e_is_not_folded_where_finfo_min_would_become_infinite(score):
    assert fold_log2e(parse(score)) is None, text(parse(score))


def test_interpretation_ends_with_its_block():
    """Also where a kernel calls Triton's own library, which the interpreter patches and leaves so."""
    import triton

    source, _ = build([parse("s + 1")], [])
    module = load_interpreted("plain", source)
    reducing = source.replace("tl.store", "tl.sum(s, 0)\n    tl.store")
    out = torch.zeros(1, N)
    interpreted_entry("reducing", reducing, "run")([out, S, I, J])
    torch.testing.assert_close(out[0], S + 1, equal_nan=True)
    types = {"out_ptr": "*fp32", "s_ptr": "*fp32", "i_ptr": "*i32", "j_ptr": "*i32"}
    assert compile_ahead(load_python_source("reducing", reducing), "kernel", types, {}, "sm_80").registers > 0
    assert type(module.kernel).__name__ == "InterpretedFunction"
    assert not triton.knobs.runtime.interpret and type(triton.language.max).__name__ == "JITFunction"
    assert type(load_python_source("plain", source).kernel).__name__ == "JITFunction"
