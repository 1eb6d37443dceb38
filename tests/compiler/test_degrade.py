"""Loud degradation: recompile limits, graph breaks, ops without a kernel and kernels that do not build become one warning with what, where and cure, and a line in the report; under strict all but a graph break raise."""

import functools
import re
import warnings

import pytest
import torch

import tileweld
from tileweld.compiler import degrade, lower
from tileweld.compiler.backend import tileweld as backend
from tileweld.compiler.errors import BuildError, CompilerNotFound, DegradedError
from tileweld.compiler.explain import trace
from tileweld.compiler.report import Report


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(degrade, "_said", set())


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w.message for w in caught if isinstance(w.message, tileweld.DegradedWarning)]


def test_a_recompile_limit_says_which_function_which_guard_and_what_to_do():
    report = Report()

    def grows(x):
        return torch.relu(x) + x.shape[0]

    def run():
        compiled = torch.compile(grows, backend=functools.partial(backend, report=report), dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=2):
            for n in (2, 3, 4, 5, 6):
                torch.testing.assert_close(compiled(torch.ones(n)), grows(torch.ones(n)))

    (warning,) = said(run)
    assert "grows was compiled 2 times (torch._dynamo.config.recompile_limit)" in warning.what and "size mismatch at index 0. expected 3, actual 4" in warning.what
    assert warning.where.startswith("compiler/test_degrade.py:") and "dynamic=True" in warning.cure and "mark_dynamic" in warning.cure
    assert report.warnings == [str(warning)] and len(report.graphs) == 2


def grown(strict):
    """A function with a limit of two compilations that sees five lengths; its reports, and the error that ended it."""
    def grows(x):
        return torch.relu(x) + x.shape[0]

    torch._dynamo.reset()
    report, error = Report(), None
    compiled = torch.compile(grows, backend=functools.partial(backend, report=report), dynamic=False, options={"strict": strict})
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (2, 3, 4, 5):
            try:
                torch.testing.assert_close(compiled(torch.ones(n)), grows(torch.ones(n)))
            except DegradedError as raised:
                error = error or raised
    return report, error


def test_a_recompile_limit_is_said_once_stands_in_every_report_and_raises_under_strict():
    results = []
    (warning,) = said(lambda: results.extend(grown(strict) for strict in (False, False, True)))
    assert [report.warnings for report, _ in results] == [[str(warning)], [str(warning)], []]
    assert results[0][1] is None and results[1][1] is None
    error = results[2][1]
    assert "grows was compiled 2 times" in error.what and error.where == warning.where and "mark_dynamic" in error.cure and str(error).startswith("DegradedError: ")


def test_another_backends_limit_is_not_ours():
    def theirs(x):
        return x * x.shape[0]

    torch.compile(lambda x: x + 1, backend="tileweld")(torch.ones(3))  # the handler is there, and Dynamo's number 0 is ours
    torch._dynamo.reset()  # number 0 is free again

    def run():
        compiled = torch.compile(theirs, backend="eager", dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=1):
            for n in (2, 3, 4):
                compiled(torch.ones(n))

    assert said(run) == []


def test_a_graph_break_is_said_once_and_stands_in_every_report():
    def broken(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    reports = []
    (warning,) = said(lambda: reports.extend(tileweld.explain(broken, torch.ones(3)) for _ in range(2)))
    assert warning.what.startswith("graph break: ") and warning.where.startswith("compiler/test_degrade.py:") and "fullgraph=True" in warning.cure
    assert [r.warnings for r in reports] == [[str(warning)]] * 2 and "warning: graph break" in str(reports[0])


def test_no_graph_at_all_is_said_by_explain():
    """nn.TransformerEncoder looks whether its mask is causal, at its values."""
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    x, mask = torch.randn(1, 4, 16), torch.nn.Transformer.generate_square_subsequent_mask(4)
    with torch.no_grad(), pytest.warns(degrade.DegradedWarning, match="no graph.*eager PyTorch.*item.*is_causal"):
        report = trace(encoder, (x,), {"mask": mask})
    assert not report.graphs and "no graph" in str(report)
    torch._dynamo.reset()
    with torch.no_grad():
        (again,) = trace(encoder, (x,), {"mask": mask}).warnings  # the same reason a second time in the process
        assert "item" in again
    with torch.no_grad():
        assert not trace(encoder, (x,), {"mask": mask, "is_causal": True}).warnings


def test_a_whole_graph_is_silent():
    assert said(lambda: tileweld.explain(lambda x: x + 1, torch.ones(3))) == []


def test_words_that_dynamo_changes_still_give_a_warning():
    what, where, cure = degrade.recompiled("torch._dynamo hit config.something else entirely")
    assert "a function was compiled" in what and where == "" and cure
    assert str(degrade.DegradedWarning("a", "b", "c")) == "a (b); c" and str(degrade.DegradedWarning("a")) == "a"


def test_a_degradation_needs_no_report():
    (warning,) = said(lambda: [degrade.degrade(None, "slow", "m.py:1", "hurry") for _ in range(3)])
    assert (warning.what, warning.where, warning.cure) == ("slow", "m.py:1", "hurry")


def test_a_fused_op_without_a_kernel_is_said_and_raises_when_strict():
    """float64 has no kernels: the ops run on their definition."""
    from tileweld.compiler.errors import UnsupportedError

    model, x = torch.nn.Sequential(torch.nn.RMSNorm(16, eps=1e-6), torch.nn.Linear(16, 16), torch.nn.SiLU()).double(), torch.randn(3, 16, dtype=torch.float64)
    report = Report()
    with torch.no_grad():
        result = torch.compile(model, backend=functools.partial(backend, report=report))(x)
        torch.testing.assert_close(result, model(x))
        assert any("linear runs on its definition: float64 has no kernel" in w for w in report.warnings)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="linear runs on its definition") as raised:
            torch.compile(model, backend="tileweld", options={"strict": True})(x)
    assert isinstance(raised.value, UnsupportedError) or isinstance(raised.value.__cause__, UnsupportedError) or "UnsupportedError" in str(raised.value)


def without_kernels(report=None, strict=False):
    torch._dynamo.reset()
    with torch.no_grad():
        model, x = torch.nn.Sequential(torch.nn.RMSNorm(16, eps=1e-6), torch.nn.Linear(16, 16), torch.nn.SiLU()).double(), torch.randn(3, 16, dtype=torch.float64)
        torch.compile(model, backend=functools.partial(backend, report=report), options={"strict": strict})(x)


def test_an_op_without_a_kernel_is_said_once_and_stands_in_every_report():
    reports = [Report(), Report()]
    found = [w for w in said(lambda: [without_kernels(report) for report in reports]) if "linear runs on its definition" in w.what]
    assert len(found) == 1 and "strict" in found[0].cure and all(r.warnings.count(str(found[0])) == 1 for r in reports)


@pytest.fixture
def broken(monkeypatch):
    """broken([a, b]): the C++ units whose names begin so do not compile."""
    monkeypatch.setenv("TILEWELD_EXECUTABLES", "0")
    compile_cpp, names = lower.compile_cpp, set()

    def build(units):
        for unit in units:
            if unit.name.startswith(tuple(names) or "no unit"):
                raise BuildError(f"{unit.name} does not compile", stderr="a.cpp: In function f:\na.cpp:1:2: error: expected ';'\nnote: here", source_path="a.cpp")
        return compile_cpp(units)

    monkeypatch.setattr(lower, "compile_cpp", build)
    return names.update


def two_kernels(x, residual):
    y = torch.softmax(x * 2 + residual, -1)
    return y, torch.softmax(torch.linalg.lu_factor(y)[0] * 2, -1)  # torch between the two


def run_of_two(strict=False):
    torch._dynamo.reset()
    report, x, residual = Report(), torch.randn(4, 4), torch.randn(4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(two_kernels, backend=functools.partial(backend, report=report), options={"strict": strict})(x, residual), two_kernels(x, residual))
    return report


def test_a_kernel_that_does_not_build_is_said_once_stands_in_every_report_and_raises_under_strict(broken):
    broken(["region"])
    reports = []
    found = said(lambda: reports.extend(run_of_two() for _ in range(2)))
    assert len({str(w) for w in found}) == len(found) == sum(k.reason == "its kernel could not be built" for k in reports[0].kernels) > 0
    for w in found:
        assert re.fullmatch(r"region_\w+ does not compile: a.cpp:1:2: error: expected ';'", w.what) and w.where == "a.cpp" and "definition in torch" in w.cure and "strict" in w.cure
        assert all(r.warnings.count(str(w)) == 1 for r in reports)
    assert any(k.implementation == "reference" and k.reason == "its kernel could not be built" for k in reports[0].kernels)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="BuildError: region_\\w+ does not compile") as raised:
        run_of_two(strict=True)
    assert isinstance(raised.value.inner_exception, BuildError)


def test_kernels_run_without_what_launches_them_together(broken):
    """The driver of a run of kernels is a unit of its own: without it every kernel is called alone, and none is lost."""
    whole = run_of_two()
    broken(["launches"])
    reports = []
    (warning,) = said(lambda: reports.extend(run_of_two() for _ in range(2)))
    assert warning.what.startswith("launches does not compile: ") and "called from Python" in warning.cure and "definition" not in warning.cure and "strict" in warning.cure
    for report in reports:
        assert report.warnings == [str(warning)] and f"warning: {warning.what}" in str(report)
        assert [(k.op, k.implementation) for k in report.kernels] == [(k.op, k.implementation) for k in whole.kernels] and sum(k.implementation.startswith("cpp:") for k in report.kernels) > 1
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="BuildError: launches does not compile") as raised:
        run_of_two(strict=True)
    assert isinstance(raised.value.inner_exception, BuildError)


def test_a_machine_without_a_compiler_is_said_once_and_raises_under_strict(broken, monkeypatch):
    monkeypatch.setattr(lower, "compile_cpp", lambda units: (_ for _ in ()).throw(CompilerNotFound("no compiler", cure="install g++")))
    reports = []
    (warning,) = said(lambda: reports.extend(run_of_two() for _ in range(2)))
    assert warning.what == "no compiler" and warning.cure.startswith("install g++; the ops run") and all(str(warning) in r.warnings for r in reports)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="CompilerNotFound: no compiler"):
        run_of_two(strict=True)
