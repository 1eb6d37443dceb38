"""The backend of ``torch.compile(model, backend="tileweld")``: capture, passes, AOT, lowering, joined here and nowhere else."""
from __future__ import annotations

from torch.fx import GraphModule

from .. import passes
from . import log
from .aot import compile_graph
from .capture import capture
from .lower import lower
from .options import Options
from .pipeline import run
from .report import Report


def tileweld(gm: GraphModule, example_inputs, *, options=None, mode=None, report: Report | None = None):
    """Compile one graph of Dynamo's. ``options``: see options.TABLE; ``mode`` is torch.compile's and changes nothing here."""
    checked = Options.parse(options, tuple(p.NAME for p in passes.PIPELINE))
    report = report if report is not None else Report()
    rewritten = rewrite(gm, example_inputs, checked, report)
    number = len(report.graphs) - 1
    log.get("passes").info("graph %d: %s", number, dict(report.counts) or "nothing fused")
    return compile_graph(rewritten, example_inputs, lambda graph, is_backward: lower(graph, checked, report, number))


def rewrite(gm: GraphModule, example_inputs, options: Options, report: Report) -> GraphModule:
    """Capture a graph and run the passes over it; the report gains a graph."""
    captured = capture(gm, example_inputs)
    report.captured.append(_copy(captured))
    rewritten = run(captured, passes.PIPELINE, options, report)
    report.graphs.append(rewritten)
    return rewritten


def _copy(gm: GraphModule) -> GraphModule:
    import copy

    return GraphModule(gm, copy.copy(gm.graph))
