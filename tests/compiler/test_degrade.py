"""Loud degradation: recompile limits and graph breaks become one warning with what, where and cure, and a line in the report."""

import functools
import warnings

import pytest
import torch

import tileweld
from tileweld.compiler import degrade
from tileweld.compiler.backend import tileweld as backend
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
