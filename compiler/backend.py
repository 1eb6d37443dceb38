"""The backend of ``torch.compile(model, backend="tileweld")``: capture, passes, AOT, lowering, joined here and nowhere else."""
from __future__ import annotations

import copy

from torch.fx import GraphModule

from .. import passes
from . import log
from .aot import compile_graph
from .capture import cannot_capture, capture
from .degrade import watch
from .labels import label_inputs
from .lower import lower
from .options import Options
from .pipeline import run
from .report import AotGraph, Report


GRAPH_MODES = ("reduce-overhead", "max-autotune")


def tileweld(gm: GraphModule, example_inputs, *, options=None, mode=None, report: Report | None = None, build: bool = True):
    """Compile one graph of Dynamo's. ``options``: see options.TABLE; ``mode`` is torch.compile's: with those of GRAPH_MODES repeated shapes on a GPU are replayed as CUDA graphs.

    report: filled with what happened; build False: stop before kernels, the fused ops run on their definition.
    """
    checked = Options.parse(options, tuple(p.NAME for p in passes.PIPELINE))
    keep = report is not None  # somebody will look: hold the graphs behind AOT too
    report = report if report is not None else Report(detailed=False)
    report.options = checked
    before = report.mark()
    try:
        rewritten = rewrite(gm, example_inputs, checked, report)
        number = len(report.graphs) - 1
        watch(gm, report)
        log.get("passes").info("graph %d: %s", number, dict(report.counts) or "nothing fused")

        def finish(graph: GraphModule, is_backward: bool):
            if keep:
                report.aot.append(AotGraph(_copy(graph), is_backward, number))
            return lower(graph, checked, report, number, cuda_graphs=mode in GRAPH_MODES and not is_backward) if build else graph.forward

        return compile_graph(rewritten, example_inputs, finish)
    except BaseException:  # also Dynamo's own restarts (it specialises floats and calls again): what was noted did not come to be
        report.rollback(before)
        raise


def rewrite(gm: GraphModule, example_inputs, options: Options, report: Report) -> GraphModule:
    """Capture a graph and run the passes over it; the report gains a graph."""
    if (reason := cannot_capture(gm)) is not None:
        log.get("capture").warning("%s", reason)
        report.warn(reason)
        for node in gm.graph.nodes:
            node.meta.setdefault("val", node.meta.get("example_value"))
        report.captured.append(_copy(gm))
        report.graphs.append(gm)
        return gm
    captured = capture(gm, example_inputs)
    label_inputs(gm, captured)
    report.captured.append(_copy(captured))
    rewritten = run(captured, passes.PIPELINE, options, report)
    report.graphs.append(rewritten)
    return rewritten


def _copy(gm: GraphModule) -> GraphModule:
    return GraphModule(gm, copy.deepcopy(gm.graph))
