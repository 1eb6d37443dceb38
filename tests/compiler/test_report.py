"""The report's own arithmetic and text, without a model."""

import json

import pytest

from tileweld.compiler.report import Fusion, KernelUse, Refused, Report, Softmaxes


@pytest.fixture
def report():
    made = Report()
    made.fusions += [Fusion("attention", "score=s", f"m.py:{n}", 0) for n in (1, 1, 2, 3)] + [Fusion("rms_norm", "eps=1e-05", "m.py:9", 0)]
    made.refusals += [Refused("attention", "weights escape", "m.py:41 in forward: return w", "do not return them", 0)] * 2
    made.kernels.append(KernelUse("attention", "cpp:attention", "generated", 0))
    return made


def test_counts_and_representation(report):
    assert report.counts == {"attention": 4, "rms_norm": 1}
    assert repr(report) == "<Report: 0 graph(s), 4 attention, 1 rms_norm, 2 refused>"
    assert repr(Report()) == "<Report: 0 graph(s), nothing fused, 0 refused>"


def test_equal_rows_are_one_and_places_are_not_repeated(report):
    lines = str(report).splitlines()
    (row,) = [x for x in lines if x.lstrip().startswith("attention") and "score=s" in x]
    assert row.split() == ["attention", "4", "score=s", "m.py:1"]
    assert any("... and 1 more" in x for x in lines)


def test_a_refusal_is_words(report):
    text = " ".join(str(report).split())
    assert "not fused attention, 2 times because weights escape where m.py:41 in forward: return w to do do not return them" in text


def test_markup_in_a_models_text_is_not_read_as_markup():
    made = Report()
    made.fusions.append(Fusion("attention", "score=c0[b, j] + c1[bold]", "m.py:1: x[red]", 0))
    made.refusals.append(Refused("attention", "index [h] of [/b]", "m.py:2: y[/red]", "", 0))
    assert "c1[bold]" in str(made) and "x[red]" in str(made) and "[/b]" in str(made) and "y[/red]" in str(made)


def test_what_was_noted_after_a_mark_is_forgotten(report):
    mark = report.mark()
    before = report.to_json()
    report.fusions.append(Fusion("attention", "x", "", 1))
    report.warn("slow")
    report.rollback(mark)
    assert report.to_json() == before


def test_a_warning_is_listed_once(report):
    report.warn("g++ is not on PATH")
    report.warn("g++ is not on PATH")
    assert report.warnings == ["g++ is not on PATH"] and str(report).count("warning: g++") == 1


def test_json_holds_everything(report):
    made = json.loads(report.to_json())
    assert made["counts"] == {"attention": 4, "rms_norm": 1} and len(made["refusals"]) == 2
    assert set(made) == {"counts", "graphs", "fusions", "kept", "refusals", "kernels", "int8", "folded", "merged", "softmaxes", "cost", "fallbacks", "library_calls", "warnings"}
    assert made["cost"]["total"]["before"]["kernels"] == 0 and made["fallbacks"] == {}


def test_softmaxes_that_are_neither_fused_nor_refused():
    assert Softmaxes(seen=5, fused=2, refused=1).other == 2
    assert Softmaxes(seen=1, fused=2, refused=0).other == 0


def test_products_that_nothing_takes_are_named_with_their_line():
    import tileweld
    import torch

    def linear_attention(q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)

    report = tileweld.explain(linear_attention, *(torch.randn(2, 4, 6, 8) for _ in range(3)))
    assert len(report.products_left) == 2 and all("linear_attention" in where for where in report.products_left)
    assert "matmuls of two activations that are no attention: 2, the library's; " in str(report)
    assert not tileweld.explain(torch.nn.Linear(4, 4), torch.randn(3, 4)).products_left
