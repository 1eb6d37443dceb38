"""What compiling leaves in a process: no rewritten graph, no report, no graph of a constant."""
import gc
import weakref

import pytest
import torch
from torch.fx import Graph

from tileweld import convert
from tileweld.compiler import backend
from tileweld.compiler.constants import Constant
from tileweld.compiler.report import Report
from tileweld.models import llama_gqa


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "weight_only"])
def test_the_rewritten_graph_of_an_inference_model_goes(quantised, monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path))  # no process has compiled it
    monkeypatch.setenv("TILEWELD_EXECUTABLES", "1")
    rewrite, seen, reports = backend.rewrite, [], []

    def noted(gm, inputs, options, report, *rest):
        made = rewrite(gm, inputs, options, report, *rest)
        assert not report.captured  # a copy for nobody
        seen.append(weakref.ref(made)), reports.append(weakref.ref(report))
        return made

    monkeypatch.setattr(backend, "rewrite", noted)
    torch._dynamo.reset()
    model = llama_gqa.build(layers=2).eval()
    if quantised:
        convert.quantize_(model, "weight_only")
    tokens = torch.randint(0, 64, (1, 5))
    with torch.no_grad():
        expected = model(tokens)
        compiled = torch.compile(model, backend="tileweld")
        assert (compiled(tokens) - expected).norm() < 1e-4 * expected.norm()
    gc.collect()
    assert seen and not any(r() is not None for r in (*seen, *reports))
    with torch.no_grad():
        assert (compiled(tokens) - expected).norm() < 1e-4 * expected.norm()


def test_a_report_that_somebody_reads_has_its_graphs():
    torch._dynamo.reset()
    report = Report()
    with torch.no_grad():
        torch.compile(lambda x: torch.softmax(x, -1) * 2, backend=lambda gm, inputs: backend.tileweld(gm, inputs, report=report))(torch.randn(3, 4))
    assert len(report.captured) == len(report.graphs) == 1 and report.softmaxes[0].seen == 1


def test_a_constant_lets_go_of_its_graph_once_it_has_its_value():
    graph = Graph()
    graph.output(graph.call_function(torch.ops.aten.arange.default, (5,), {}))
    kept = weakref.ref(graph)
    constant = Constant(graph, "positions")
    del graph
    assert kept() is not None and constant() is constant() and torch.equal(constant(), torch.arange(5))
    gc.collect()
    assert kept() is None
