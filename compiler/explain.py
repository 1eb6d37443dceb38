"""``tileweld.explain``: what would be fused, what refused and why, without building a kernel."""
from __future__ import annotations

import torch

from .. import passes
from .backend import tileweld
from .options import Options
from .report import Report


def explain(fn_or_module, *args, dynamic: bool | None = None, options: dict | None = None, **kwargs) -> Report:
    """Trace fn_or_module(*args, **kwargs) with torch.compile, run the passes, and report; the call itself runs on the fused ops' definitions.

    dynamic, options: as in torch.compile(..., backend="tileweld"). Returns a `Report`; ``print(report)`` shows the tables.
    The model and what is already compiled stay as they were.
    """
    Options.parse(options, tuple(p.NAME for p in passes.PIPELINE))  # a bad option is an OptionError here, not inside Dynamo's
    report = Report()

    def backend(gm, example_inputs):
        return tileweld(gm, example_inputs, options=options, report=report, build=False)

    torch.compile(fn_or_module, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return report
