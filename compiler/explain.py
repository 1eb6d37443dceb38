"""``tileweld.explain``: what would be fused, what refused and why, and what each fused op would run on, without building a kernel."""
from __future__ import annotations

from collections.abc import Callable

import torch

from .. import passes
from .backend import tileweld
from .capture import breaks_seen
from .cost_report import launches
from .degrade import no_graph
from .int8_choice import unknown_names, with_errors
from .labels import label_inputs
from .lower import note_folded, settle
from .options import Options
from .report import KernelUse, Report


def explain(fn_or_module, *args, dynamic: bool | None = None, options: dict | None = None, **kwargs) -> Report:
    """Trace fn_or_module(*args, **kwargs) with torch.compile, run the passes, and report; the call itself runs on the fused ops' definitions.

    dynamic, options: as in torch.compile(..., backend="tileweld"). Returns a `Report`; ``print(report)`` shows the tables.
    The model and what is already compiled stay as they were. What the call raises, explain raises.
    """
    return trace(fn_or_module, args, kwargs, dynamic=dynamic, options=options)


def trace(fn: Callable, args=(), kwargs=None, *, dynamic: bool | None = None, options: dict | None = None, train: bool = False, grad: bool | None = None) -> Report:
    """`explain` with the arguments in containers.

    grad: trace with gradients on or off; None leaves the caller's setting. train: also run the backward of the sum of all
    float results, so that its graphs are there.
    """
    checked = Options.parse(options, tuple(p.NAME for p in passes.PIPELINE))  # a bad option is an OptionError here, not inside Dynamo's
    report = Report()

    def backend(gm, example_inputs):
        compiled = tileweld(gm, example_inputs, options=options, report=report, build=False)
        label_inputs(gm, report.captured[-1], report.graphs[-1])
        return compiled

    with torch.set_grad_enabled(torch.is_grad_enabled() if grad is None else grad):
        before = breaks_seen()
        result = torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **(kwargs or {}))
        if not report.graphs:
            no_graph(report, [*(breaks_seen() - before)])
        if train:
            losses = [x.float().sum() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad]
            if losses:
                torch.autograd.grad(sum(losses), [p for p in _leaves(fn, args, kwargs) if p.requires_grad], allow_unused=True)
    for aot in report.aot:
        gm, choices, _ = settle(aot.gm, checked, report, aot.graph, ("int8_linear",), build_all=False)  # int8 that may lose is built and timed, nothing else
        report.launches.append(launches(choices))
        note_folded(gm, report, aot.graph)
        for choice in choices:
            name = f"{choice.kernel.language}:{choice.kernel.name}" if choice.kernel is not None else choice.name
            report.kernels.append(KernelUse(choice.op, name, choice.reason, aot.graph))
            if choice.kernel is not None and choice.kernel not in report.sources:
                report.sources.append(choice.kernel)
    if isinstance(fn, torch.nn.Module):
        report.int8 = with_errors(report.int8, fn)
    if checked.int8 is not None:
        for message in unknown_names(checked.int8, {name for row in report.int8 for name in row.name.split(" + ")}):
            report.warn(message)
    return report


def _leaves(fn, args, kwargs) -> list[torch.Tensor]:
    tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return [*tensors, *(fn.parameters() if isinstance(fn, torch.nn.Module) else ())]
