"""The backend of ``torch.compile(model, backend="tileweld")``: capture, passes, AOT, lowering, joined here and nowhere else."""
from __future__ import annotations

import contextlib
import copy
import gc
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from . import executable_cache, log
from .capture import when_compiled
from .degrade import watch
from .ir.graph import without_history
from .ir.heap import give_back
from .ir.huge_pages import collapse
from .labels import label_inputs
from .report import AotGraph, Report

if TYPE_CHECKING:
    from .options import Options


GRAPH_MODES = ("reduce-overhead", "max-autotune")


def tileweld(gm: GraphModule, example_inputs, *, options=None, mode=None, report: Report | None = None, build: bool = True):
    """Compile one graph of Dynamo's. ``options``: see options.TABLE; ``mode`` is torch.compile's: with those of GRAPH_MODES repeated shapes on a GPU are replayed as CUDA graphs.

    report: filled with what happened; build False: stop before kernels, the fused ops run on their definition.
    """
    when_compiled(give_back)
    if build:
        collapse(example_inputs)
    keep, report = report is not None, report if report is not None else Report(detailed=False)  # keep: somebody will look, hold the graphs behind AOT too
    key = executable_cache.key(gm, example_inputs, options, mode, report) if build else None
    if key is not None and (found := executable_cache.find(key, report)) is not None:
        watch(gm, report, bool(options and options.get("strict")))
        return found
    return _compile(gm, example_inputs, options, mode, report, build, keep, key)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, Python's cyclic collector rests: graphs and formulas are many objects and next to no garbage, and walking a process's heap over and over took a third of the passes' time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_no_collection()
def _compile(gm: GraphModule, example_inputs, options, mode, report: Report, build: bool, keep: bool, key: str | None):
    """A graph that no process has compiled yet. Its imports are here: they take half a second, and a process that finds all its executables needs none of them."""
    from .. import passes
    from .ahead import kernels_ahead, nothing_ahead
    from .aot import compile_graph, guard_count
    from .lower import lower
    from .options import Options

    checked = Options.parse(options, tuple(p.NAME for p in passes.PIPELINE))
    report.options = checked
    before, guards, executables = report.mark(), guard_count(), []

    def finish(graph: GraphModule, is_backward: bool):
        without_history(graph.graph)
        gc.collect(0)  # what capture, passes and AOT left in cycles, before lowering makes as many objects again: Python gives back no memory that a few lasting objects are spread over
        if keep:
            report.aot.append(AotGraph(_copy(graph), is_backward, number))
        executables.append(lower(graph, checked, report, number, cuda_graphs=mode in GRAPH_MODES and not is_backward) if build else graph.forward)
        return executables[-1]

    try:
        with kernels_ahead(checked) if build else contextlib.nullcontext(nothing_ahead) as begin:
            rewritten = rewrite(gm, example_inputs, checked, report, begin)
            number = len(report.graphs) - 1
            watch(gm, report, checked.strict)
            log.get("passes").info("graph %d: %s", number, dict(report.counts) or "nothing fused")
            warnings = len(report.warnings)
            begin(rewritten)
            gc.collect(0)  # as in finish
            compiled = compile_graph(rewritten, example_inputs, finish)
        give_back()  # Dynamo is about to empty the caches with a block of 32 MiB: what is free until then would be the peak's
        if key is not None:
            refused = _not_kept(executables, len(example_inputs), guards, degraded=len(report.warnings) > warnings)
            executable_cache.keep(key, executables, report, before, refused)
            if not refused:
                return executable_cache.unboxed(executables[0], torch.is_grad_enabled())  # as a later process will have it; AOT's wrapper takes 0.1 ms a call and does nothing here
        return compiled
    except BaseException:  # also Dynamo's own restarts (it specialises floats and calls again): what was noted did not come to be
        report.rollback(before)
        raise


def _not_kept(executables: list, inputs: int, guards: int, degraded: bool) -> str:
    """Why an executable is not all there is to a graph; "" where it may be kept."""
    from .aot import wrapper_does

    if len(executables) != 1:
        return f"{len(executables)} graphs behind AOT"
    if degraded:
        return "it degraded"
    return f"AOT's wrapper has to do with {does}" if (does := wrapper_does(inputs, guards)) else ""


def rewrite(gm: GraphModule, example_inputs, options: Options, report: Report, settled=None) -> GraphModule:
    """Capture a graph and run the passes over it; the report gains a graph. settled: see pipeline.run."""
    from .. import passes
    from .autocast import as_it_will_run
    from .capture import cannot_capture, capture
    from .merged_heads import merged_heads
    from .pipeline import run
    from .vmapped import resolve

    gm = resolve(gm)
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
    if report.detailed:
        report.captured.append(_copy(captured))
    with as_it_will_run(captured):
        rewritten = run(captured, passes.PIPELINE, options, report, settled)
    if options.int8 is not None and options.passes.get("int8", True):
        _note_int8(rewritten, example_inputs, options.int8, report)
    report.graphs.append(rewritten)
    if options.gqa is not None:
        report.merged += merged_heads(rewritten, example_inputs, len(report.graphs) - 1)
    return rewritten


def _note_int8(rewritten: GraphModule, example_inputs, settings, report: Report) -> None:
    """What becomes of every layer into the report; what nobody would see otherwise, a misspelt layer, into the log."""
    from ..passes.int8 import names
    from . import int8_choice

    if report.detailed:
        report.int8_errors |= int8_choice.errors(rewritten, example_inputs)
        report.int8 += int8_choice.left(rewritten.graph, settings, len(report.graphs))
    for message in int8_choice.unknown_names(settings, names(rewritten.graph)):
        log.get("passes").log(logging.WARNING if "did you mean" in message else logging.INFO, "graph %d: %s", len(report.graphs), message)  # other names may be those of another graph


def _copy(gm: GraphModule) -> GraphModule:
    return GraphModule(gm, copy.deepcopy(gm.graph))
