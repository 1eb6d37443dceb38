"""The generated C++ kernels of attention's backward against its definition in float64. The variants are those of the forward kernel; all kernels of the file are built at once, in parallel."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tileweld.codegen.cpp.attention_backward import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.attention import Variant, empty_output

spec = importlib.util.spec_from_file_location("forward_attention", Path(__file__).with_name("test_attention.py"))
forward = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(forward)
Case, launchers = forward.Case, forward.launchers

TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of a gradient's largest element
SHAPES = ((1, 1), (1, 130), (17, 17), (150, 333))  # Tq, Tk: parts of a panel and of a tile, several blocks
NAMES = ("none", "causal", "causal, zero rows", "window and global", "dilated", "a mask by head", "padding", "documents", "blocks", "dense bias", "additive mask", "alibi", "t5", "softcap", "many functions", "sink", "softmax plus one",
         "causal padding, zero", "causal padding, -1e9", "causal padding, finfo.min", "causal padding, finfo.min and sink", "a fill among the scores", "head dim 33/20", "head dim 192/128", "float16 64", "bfloat16 72")
CASES = {name: forward.CASES[name] for name in NAMES}
CASES |= {  # what has no forward kernel of its own there
    "a mask that is added": dataclasses.replace(CASES["causal padding, finfo.min"], empty="added"),
    "value": Case(score="s*0.25", mask="j <= i"),
    "no slope": Case(score="c0[j]", mask="j <= i", captures=lambda B, H, Tq, Tk: [torch.randn(Tk)]),
}
VALUES = {"value": "v*(1 + j % 3) + 0.5*i"}


def kernel(name, case):
    captures = case.captures(1, 4, 2, 2)
    return emit(variant(name, case), q_dtype=case.dtype, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], head_dim=case.dims[0], value_dim=case.dims[1], num_sizes=len(case.sizes(2, 2)))


def variant(name, case):
    return dataclasses.replace(case.variant(), value=VALUES.get(name, ""))


@pytest.fixture(scope="module")
def built():
    return dict(zip(CASES, launchers([kernel(name, case) for name, case in CASES.items()])))


def expected(v, grad, q, k, values, captures, sizes):
    wide = [x.double() for x in (grad, q, k, values)]
    return torch.ops.tileweld.attention_backward(*wide, [c.double() if c.is_floating_point() else c for c in captures], sizes, v.score, v.mask, v.fill, v.sink, v.empty, v.value)[:3]


def check(run, case, grad, q, k, v, captures, sizes, name="", tolerance=None):
    outs = [empty_output(x, x.shape[3]).fill_(7.0) for x in (q, k, v)]
    run([*outs, grad, q, k, v, *captures], sizes)
    references = expected(variant(name, case), grad, q, k, v, captures, sizes)
    scales = [x.nan_to_num().abs().max().item() if x.numel() else 0.0 for x in references]
    for what, ours, theirs, scale in zip(("dq", "dk", "dv"), outs, references, scales):
        bound = (tolerance or case.tolerance or TOLERANCE[q.dtype]) * max(scale, 0.01 * max(scales))  # equal values: dq is a difference of equal numbers
        torch.testing.assert_close(ours.double(), theirs, atol=bound, rtol=0, equal_nan=True, msg=lambda text, what=what: f"{what}: {text}")
    return outs


def inputs(case, Tq, Tk, *heads):
    q, k, v, captures, sizes = forward.inputs(case, Tq, Tk, *heads)
    return torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), q, k, v, captures, sizes


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(built, name):
    for Tq, Tk in SHAPES:
        check(built[name], CASES[name], *inputs(CASES[name], Tq, Tk), name=name)


@pytest.mark.parametrize("heads", [(4, 4, 4), (6, 1, 1), (6, 2, 3), (12, 4, 2), (3, 3, 1)])
def test_gradients_of_shared_heads_are_sums_over_their_group(built, heads):
    for Tq in (1, 40):
        check(built["causal"], CASES["causal"], *inputs(CASES["causal"], Tq, 70, 2, *heads))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_and_always_the_same(built, threads):
    """Fewer KV heads than threads: tiles are dealt out, and their sums added in order."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, heads in (("causal", (1, 2, 1, 1)), ("causal padding, finfo.min", (1, 3, 3, 3))):
            arguments = inputs(CASES[name], 300, 300, *heads)
            first = check(built[name], CASES[name], *arguments)
            again = check(built[name], CASES[name], *arguments)
            assert all(map(torch.equal, first, again))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["none", "float16 64", "head dim 33/20"])
def test_strides(built, name):
    case = CASES[name]
    grad, q, k, v, captures, sizes = inputs(case, 70, 70)
    by_position = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, q, k, v)]
    every_other = [torch.randn(*x.shape[:3], 2 * x.shape[3]).to(x.dtype)[..., ::2] for x in (grad, q, k, v)]
    expanded = [grad[:, :, :1, :1].expand(grad.shape), q[:, :1].expand(q.shape), k[:1, :1].expand(k.shape), v[:, :, :1].expand(v.shape)]  # the gradient of a sum is one number
    for tensors in (by_position, every_other, expanded):
        check(built[name], case, *tensors, captures, sizes)


def test_gradients_of_any_layout(built):
    grad, q, k, v, *_ = inputs(CASES["none"], 9, 9)
    outs = [torch.empty(*x.shape[::-1]).permute(3, 2, 1, 0) for x in (q, k, v)]
    built["none"]([*outs, grad, q, k, v])
    for ours, theirs in zip(outs, expected(CASES["none"].variant(), grad, q, k, v, [], [])):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-4)


def test_nothing_to_see(built):
    for batch, Tq, Tk in ((2, 50, 0), (0, 50, 5), (2, 0, 5)):
        check(built["none"], CASES["none"], *inputs(CASES["none"], Tq, Tk, batch))


def test_rows_that_see_no_key(built):
    """-inf: NaN reaches every value, no key and no query; zero: nothing; a fill: values have a share of each."""
    for name, nan in (("causal", True), ("causal padding, zero", False), ("causal padding, finfo.min", False)):
        case = CASES[name]
        grad, q, k, v, captures, sizes = inputs(case, 40, 40)
        if nan:
            case, run = dataclasses.replace(case, mask="j < i"), launchers([kernel("", dataclasses.replace(case, mask="j < i"))])[0]
        else:
            captures, run = [torch.zeros(2, 40, dtype=torch.bool)], built[name]
        dq, dk, dv = check(run, case, grad, q, k, v, captures, sizes)
        assert dv.isnan().all() == nan and dq.isfinite().all() and dk.isfinite().all()
        assert nan or (torch.equal(dv, torch.zeros_like(dv)) == (name == "causal padding, zero") and torch.equal(dq, torch.zeros_like(dq)))


def test_memory_is_linear_in_the_keys(built):
    """The workspace that a call takes, counted where it is asked for: 8 times the tokens, not 64."""
    source = kernel("causal", CASES["causal"]).source
    counted = source.replace("explicit Workspace(int64_t count) : kept(of_thread()) {", "static int64_t& last() { static int64_t floats; return floats; }\n    explicit Workspace(int64_t count) : kept(of_thread()) {\n        last() = count;")
    assert counted != source
    counted += '\nextern "C" void floats_taken(void* const* data, const int64_t*, const double*) { *static_cast<int64_t*>(data[0]) = Workspace::last(); }\n'
    from tileweld.runtime.build import CppUnit, compile_cpp
    from tileweld.runtime.launch import CppLauncher

    (library,) = compile_cpp([CppUnit("counted", counted, False)])
    taken = []
    for tokens in (512, 4096):
        grad, q, k, v, *_ = inputs(CASES["causal"], tokens, tokens, 1, 1, 1, 1)
        CppLauncher(library, "attention_backward")([torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad, q, k, v])
        found = torch.zeros(1, dtype=torch.int64)
        CppLauncher(library, "floats_taken")([found])
        taken.append(found.item())
    assert 0 < taken[1] < 9 * taken[0] and taken[1] < 4096 * 4096 / 8


def _captured():
    """name -> (variant, captures of B, H, Tq, Tk, sizes, numbers of the captures whose gradients are wanted)"""
    integers = frozenset
    return {
        "t5": (Variant("s + c0[c1[j - i + n0], h]", integer_captures=integers([1])), lambda B, H, Tq, Tk: [torch.randn(32, H), torch.randint(0, 32, (Tq + Tk,))], lambda Tq, Tk: [Tq], [0]),
        "bias": (Variant("0.25*s + c0[0, h, i, j]", "j <= i + 200"), lambda B, H, Tq, Tk: [torch.randn(1, H, Tq, Tk)], lambda Tq, Tk: [], [0]),
        "slopes and sink": (Variant("20*tanh(s/20) + c0[h]*(j - i)", "(j <= i + 200) & (c2[b, j] != 0)", -1e9, "c1[h]*2", "nan", integers([2])),
                            lambda B, H, Tq, Tk: [torch.rand(H) / 10, torch.randn(H), (torch.rand(B, Tk) > 0.3).long()], lambda Tq, Tk: [], [0, 1]),
        "one of two": (Variant("s*0.25 + c0 + c1[b, i]", "c2[b, j] != 0", -1e9, "", "added", integers([2])), lambda B, H, Tq, Tk: [torch.tensor(0.3), torch.randn(B, Tq).bfloat16(), (torch.rand(B, Tk) > 0.9).long()], lambda Tq, Tk: [], [1]),
        "an ordinary fill": (Variant("s*0.25 + c0[h]", "j <= i", -3.0), lambda B, H, Tq, Tk: [torch.randn(H)], lambda Tq, Tk: [], [0]),
    }


def test_gradients_of_captures():
    found = _captured()
    made = {name: captures(1, 4, 2, 2) for name, (_, captures, _, _) in found.items()}
    runs = launchers([emit(v, q_dtype=torch.float32, capture_dtypes=[c.dtype for c in made[name]], capture_ranks=[c.dim() for c in made[name]], head_dim=16, value_dim=16, num_sizes=len(sizes(2, 2)), wanted=wanted)
                      for name, (v, _, sizes, wanted) in found.items()])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for run, (name, (v, captures, sizes, wanted)) in zip(runs, found.items()):
                for B, Tq, Tk in ((2, 70, 300), (3, 5, 5), (2, 0, 5)):
                    q, k, values, grad = (torch.randn(B, h, t, 16) for h, t in ((4, Tq), (2, Tk), (2, Tk), (4, Tq)))
                    captured = captures(B, 4, Tq, Tk)
                    outs, again = ([torch.full_like(x, 7.0, memory_format=torch.contiguous_format) for x in (q, k, values, *(captured[n] for n in wanted))] for _ in range(2))
                    for results in (outs, again):
                        run([*results, grad, q, k, values, *captured], sizes(Tq, Tk))
                    floats = [n for n, c in enumerate(captured) if c.is_floating_point()]
                    all_gradients = torch.ops.tileweld.attention_backward(*(x.double() for x in (grad, q, k, values)), [c.double() if c.is_floating_point() else c for c in captured], sizes(Tq, Tk), v.score, v.mask, v.fill, v.sink, v.empty, v.value)
                    theirs = [*all_gradients[:3], *(all_gradients[3 + floats.index(n)] for n in wanted)]
                    largest = max([x.abs().max().item() for x in theirs if x.numel()], default=0.0)
                    for a, b, c in zip(outs, theirs, again):
                        bound = 2e-5 if a.dtype == torch.float32 else 1e-2
                        assert torch.equal(a, c)
                        torch.testing.assert_close(a.double(), b, atol=bound * max(1e-3 * largest, b.abs().max().item() if b.numel() else 0.0), rtol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("score, value, reason", [("s*c0[h]", "", "dot product"), ("tanh(s + c0[h])", "", "dot product"), ("s", "v*c0[h]", "values"), ("s", "v + c0[h]", "values")])
def test_gradients_of_captures_that_are_refused(score, value, reason):
    with pytest.raises(UnsupportedError, match=reason):
        emit(Variant(score, value=value), q_dtype=torch.float32, capture_dtypes=[torch.float32], capture_ranks=[1], head_dim=8, value_dim=8, wanted=[0])
    emit(Variant(score, value=value), q_dtype=torch.float32, capture_dtypes=[torch.float32], capture_ranks=[1], head_dim=8, value_dim=8)


def test_refusals():
    for options in ({"q_dtype": torch.float64}, {"head_dim": 513}, {"value_dim": 0}, {"capture_dtypes": [torch.complex64], "capture_ranks": [1]}):
        with pytest.raises(UnsupportedError):
            emit(Variant(), **{"q_dtype": torch.float32, "head_dim": 8, "value_dim": 8} | options)


def test_the_source_says_what_it_is():
    source = kernel("softcap", CASES["softcap"]).source
    head = "\n".join(source.splitlines()[:6])
    assert "20*tanh(0.0125*s)" in head and "by s: " in head and "i + n0 - j < 50" in head and "head dim 16" in head


@settings(max_examples=2, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.builds(Case, score=forward._scores(), mask=forward._masks(), empty=st.sampled_from(["nan", "zero"]), fill=st.sampled_from([float("-inf"), -1e9])), min_size=4, max_size=4))
def test_random_variants(cases):
    captures = lambda B, H, Tq, Tk: [torch.rand(B, H, 64), torch.randint(-3, 9, (64,))]  # noqa: E731
    cases = [dataclasses.replace(case, captures=captures, sizes=lambda Tq, Tk: [5], tolerance=1e-3) for case in cases]
    for run, case in zip(launchers([kernel("", case) for case in cases]), cases):
        for Tq, Tk in ((2, 64), (61, 50)):
            check(run, case, *inputs(case, Tq, Tk))
