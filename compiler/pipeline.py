"""The pass driver: for every rewrite of the pipeline find its places, verify, replace, report."""
from __future__ import annotations

import math
from collections.abc import Callable, Collection

from torch.fx import GraphModule, Node

from . import cost_report, log
from .errors import RefusalError
from .ir.graph import is_tensor, source_of, value
from .ir.rewrite import Kept, Match, Refusal
from .ir.unliftable import Unliftable
from .options import Options
from .report import Fusion, Refused, Report
from .verify import differs


def run(gm: GraphModule, passes, options: Options, report: Report, settled: Callable[[GraphModule, Collection], None] | None = None) -> GraphModule:
    """Rewrite the captured graph in place with the passes that options leave on.

    settled: told, behind a pass that SETTLES ops, that their nodes will hardly change any more, so that their kernels can be begun.
    """
    number = len(report.graphs)
    for rewrite in passes:
        if not options.passes.get(rewrite.NAME, getattr(rewrite, "DEFAULT", True)):
            continue
        if hasattr(rewrite, "transform"):  # a normalisation: changes the graph's spelling, makes no fused op, reports nothing
            rewrite.transform(gm)
            continue
        before = cost_report.snapshot(gm) if report.detailed else None
        for found in rewrite.find(gm.graph, *(getattr(options, option) for option in getattr(rewrite, "OPTIONS", (rewrite.OPTION,) if hasattr(rewrite, "OPTION") else ()))):
            if isinstance(found, Refusal):
                _refuse(rewrite.NAME, found.reason, source_of(found.node), found.cure, options, report, number)
            elif isinstance(found, Kept):
                report.kept.append(Fusion(rewrite.NAME, found.detail, source_of(found.node), number))
            else:
                _apply(rewrite.NAME, gm, found, options, report, number)
        gm.graph.eliminate_dead_code()
        if before is not None:
            report.covered.append(cost_report.changed(rewrite.NAME, before, gm))
        if settled is not None and hasattr(rewrite, "SETTLES"):
            settled(gm, rewrite.SETTLES)
    gm.graph.lint()
    gm.recompile()
    return gm


def _apply(name: str, gm: GraphModule, match: Match, options: Options, report: Report, number: int) -> None:
    root, source = match.root, source_of(match.root)
    before = set(gm.graph.nodes)
    problem = None
    known = value(root)[0] if isinstance(value(root), list) else value(root)
    with gm.graph.inserting_before(root), known.fake_mode:
        try:
            new = match.build(gm.graph)
        except Unliftable as error:
            problem, new = str(error), ()
    roots, replacements = (root, *match.also), new if isinstance(new, tuple) else (new,)
    made = [node for node in gm.graph.nodes if node not in before]
    for node in made:
        if root.meta.get("stack_trace"):  # None would break AOT's tracing of a backward
            node.meta.setdefault("stack_trace", root.meta["stack_trace"])
        node.meta.update((key, root.meta[key]) for key in ("recompute", "ac_graph_id") if key in root.meta)  # torch.utils.checkpoint's marks
        node.meta["tileweld_rewrite"] = name
    problem = problem or next((p for old, new in zip(roots, replacements, strict=True) if (p := _changed_type(old, new))), None)
    if problem is None and options.verify and match.tolerance < math.inf:  # what is lossy on purpose has nothing to compare
        problem = next((p for old, new in zip(roots, replacements) if (p := differs(gm, match.inputs, old, new, match.tolerance))), None)
    if problem is not None:
        for node in reversed(made):
            if not node.users:
                gm.graph.erase_node(node)
        _refuse(name, problem, source, "", options, report, number)
        return
    for old, new in zip(roots, replacements):
        old.replace_all_uses_with(new)
    for old in reversed(roots):
        if not old.users:  # a root that a later root was computed from has no users any more
            gm.graph.erase_node(old)
    report.fusions.append(Fusion(name, match.detail, source, number))
    log.get("passes").debug("%s: %s at %s", name, match.detail, source)


def _changed_type(old: Node, new: Node) -> str | None:
    """A replacement must have the shape and dtype of what it replaces."""
    if not (is_tensor(old) and is_tensor(new)):
        return None
    a, b = value(old), value(new)
    if a.dtype != b.dtype or len(a.shape) != len(b.shape) or any(x is not y and not _same_size(x, y) for x, y in zip(a.shape, b.shape)):
        return f"the replacement gives {b.dtype} {[*b.shape]}, the model {a.dtype} {[*a.shape]}"
    return None


def _same_size(x, y) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(x == y)


def _refuse(name, reason, source, cure, options: Options, report: Report, number: int) -> None:
    report.refusals.append(Refused(name, reason, source, cure, number))
    log.get("passes").info("%s refused: %s (%s)", name, reason, source)
    if options.strict:
        raise RefusalError(f"{name} refused: {reason}", rewrite=name, where=source or None, cure=cure or "fix the model or pass options={'strict': False}")
