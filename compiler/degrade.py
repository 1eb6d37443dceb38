"""Loud degradation: what makes a compiled model slower than it could be is said once, with what, where and the cure, and stands in the report.

    DegradedWarning: graph break: Unsupported Tensor.item() call (model.py:41); what lies on its two sides is compiled apart; ...

Five things degrade: Dynamo hands over no graph at all (which explain alone can say), it gives a function up after `torch._dynamo.config.recompile_limit` compilations, a graph break splits a graph,
a fused op has no kernel, a kernel cannot be built. Under strict all but the first and the graph break, which has torch's own fullgraph=True, are errors.
"""
from __future__ import annotations

import logging
import re
import warnings
import weakref

from .capture import compiled_frame
from .errors import DegradedError
from .report import Report

_said: set[str] = set()
_frames: dict[int, tuple[weakref.ref, str, bool]] = {}  # Dynamo's number of a function that we compile -> its report, its file, strict: torch._dynamo.reset() counts from 0 again
LIMIT = "hit config."


class DegradedWarning(UserWarning):
    """what happened, where (file and line, "" where it is not known), cure: what to do about it."""

    def __init__(self, what: str, where: str = "", cure: str = ""):
        super().__init__(what)
        self.what, self.where, self.cure = what, where, cure

    def __str__(self) -> str:
        return self.what + (f" ({self.where})" if self.where else "") + (f"; {self.cure}" if self.cure else "")


def degrade(report: Report | None, what: str, where: str = "", cure: str = "") -> None:
    """Say it: in the report every time, as a `DegradedWarning` once a process."""
    warning = DegradedWarning(what, where, cure)
    if report is not None:
        report.warn(str(warning))
    if str(warning) not in _said:
        _said.add(str(warning))
        warnings.warn(warning, stacklevel=3)


def watch(gm, report: Report, strict: bool = False) -> None:
    """Called with every graph that Dynamo hands over: notes the function it is from, and says where a graph break ended it. strict: its recompile limit is an error."""
    frame, reason = compiled_frame(), getattr(gm, "compile_subgraph_reason", None)  # Dynamo's GraphCompileReason
    if frame is not None:
        stack = reason.user_stack if reason is not None else None
        _frames[frame] = weakref.ref(report), f"'{stack[0].name}' ({stack[0].filename}:" if stack else "", strict
        logger = logging.getLogger("torch._dynamo.convert_frame")
        if _limit_handler not in logger.handlers:
            logger.addHandler(_limit_handler)
    if reason is not None and reason.graph_break:
        stack = [f for f in reason.user_stack or () if "torch/_dynamo" not in f.filename]
        where = f"{'/'.join(stack[-1].filename.split('/')[-2:])}:{stack[-1].lineno}" if stack else ""
        degrade(report, f"graph break: {_first_line(reason.reason)}", where, "what lies on its two sides is compiled apart; fullgraph=True makes it an error with the whole explanation")


def no_graph(report: Report, breaks: list[str]) -> None:
    """Said by who looks: a backend that gets no graph is never called."""
    why = f": {_first_line(breaks[0])}" if breaks else ""
    degrade(report, f"TorchDynamo handed over no graph, all of it runs in eager PyTorch{why}", "",
            "TORCH_LOGS=graph_breaks says where; often a Python condition on a tensor's values (nn.TransformerEncoder with a mask: pass is_causal too)")


def _first_line(text: str) -> str:
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "no reason given").rstrip(".")


class _LimitHandler(logging.Handler):
    """Dynamo says that it gives a function up in its log alone. The record comes while it compiles, so that the function is known by its number."""

    def emit(self, record: logging.LogRecord) -> None:
        error = None
        try:
            message = record.getMessage()
            report, function, strict = _frames.get(compiled_frame(), (None, "", False))
            if LIMIT in message and report is not None and function in message:
                what, where, cure = recompiled(message)
                if strict:
                    error = DegradedError(what, where=where, cure=cure)
                else:
                    degrade(report(), what, where, cure)
        except Exception:  # a log handler must not make the model fail
            self.handleError(record)
        if error is not None:  # from inside Dynamo's compilation: it reaches the caller of the function
            raise error


def recompiled(message: str) -> tuple[str, str, str]:
    """(what, where, cure) from Dynamo's words on a recompile limit."""
    limit = re.search(r"config\.(\w+) \((\d+)\)", message)
    function = re.search(r"function: '(.+?)' \((.+):(\d+)\)", message)
    guard = re.search(r"last reason: (?:\d+/\d+: )?(.+)", message)
    name, count = (limit[1], limit[2]) if limit else ("recompile_limit", "its limit of")
    where = f"{'/'.join(function[2].split('/')[-2:])}:{function[3]}" if function else ""
    reason = f". The guard that failed last: {guard[1].strip().rstrip('.')}" if guard else ""
    return (f"{function[1] if function else 'a function'} was compiled {count} times (torch._dynamo.config.{name}); inputs that fit none of them run in eager PyTorch from now on{reason}", where,
            "make what changes dynamic: torch.compile(dynamic=True), or torch._dynamo.mark_dynamic(tensor, dim); pass numbers that change as tensors")


_limit_handler = _LimitHandler(logging.WARNING)
