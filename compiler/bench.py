"""``tileweld bench``: contenders on one target, interleaved in one process, against each other and against the roofline.

All contenders are held to the same work, that of tileweld's kernels: the FLOPs and bytes that the model needs. So achieved FLOP/s compare
as the times do, and "of roofline" says how much of the best possible time is left.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .cost_report import Costs, si
from .devices import Device, guess, named
from .report import Report, rendered
from .targets import Target

QUIET_SECONDS = 2.0  # what takes longer shows how far it is


@dataclasses.dataclass
class Row:
    """One contender. seconds: of every timed call; first: of the first call, which compiles; difference: largest |x - eager| over the largest |eager|; error: why there are no times."""

    name: str
    seconds: list[float] | None = None
    first: float | None = None
    difference: float | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclasses.dataclass
class Result:
    """What was measured, with the report of tileweld's compilation and the device it is held against."""

    target: str
    rows: list[Row]
    report: Report
    device: Device

    @property
    def costs(self) -> Costs:
        return self.report.cost

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def work(self):
        """(FLOPs, bytes, roofline seconds) of one call at the traced sizes; None where a size is not known or nothing was compiled."""
        after = self.costs.evaluated()[1].after
        if not after.kernels or after.flops.free_symbols or after.bytes.free_symbols:
            return None, None, None
        return float(after.flops), float(after.bytes), after.seconds(self.device)

    def measured(self) -> list[tuple[str, float, float]]:
        """(contender, FLOPs a byte, achieved FLOP/s) for the picture."""
        flops, moved, _ = self.work()
        return [(row.name, flops / moved, flops / row.median) for row in self.rows if row.median and flops and moved]

    def to_json(self) -> dict:
        """{"target", "device", "threads", "roofline_seconds", "flops", "bytes", "rows": [...], "warnings"}; times in seconds."""
        flops, moved, best = self.work()
        rows = [{"contender": r.name, "median": r.median, "lowest": min(r.seconds) if r.seconds else None, "highest": max(r.seconds) if r.seconds else None, "rounds": len(r.seconds or ()), "first_call": r.first,
                 "difference": r.difference, "flops_per_second": flops / r.median if flops and r.median else None, "bytes_per_second": moved / r.median if moved and r.median else None,
                 "of_roofline": best / r.median if best and r.median else None, "error": r.error} for r in self.rows]
        return {"target": self.target, "device": dataclasses.asdict(self.device), "threads": torch.get_num_threads(), "roofline_seconds": best, "flops": flops, "bytes": moved, "rows": rows, "warnings": self.report.warnings}

    def __str__(self) -> str:
        return rendered(self.tables())

    def tables(self) -> list:
        """rich renderables: a row a contender, the work that all are held to, warnings."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        flops, moved, best = self.work()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("contender")
        for name in ("median", "lowest .. highest", "first call", "speed", "error", "FLOP/s", "bytes/s", "of roofline"):
            table.add_column(name, justify="right")
        reference = self.rows[0].median
        for row in self.rows:
            if row.median is None:
                table.add_row(row.name, "-", "-", "-", "-", "-", "-", "-", "-")
                continue
            rates = (f"{si(flops / row.median)}FLOP/s", f"{si(moved / row.median)}B/s") if flops and moved else ("-", "-")
            table.add_row(row.name, f"{si(row.median)}s", f"{si(min(row.seconds))}s .. {si(max(row.seconds))}s", f"{row.first:.2f} s", f"{reference / row.median:.2f}x" if reference else "-",
                          f"{row.difference:.1e}" if row.difference is not None else "-", *rates, f"{100 * best / row.median:.0f}%" if best else "-")
        peak = f"{si(self.device.peak(torch.float32))}FLOP/s float32, {si(self.device.bandwidth)}B/s, {self.device.source}"
        held = f"the work: {si(flops)}FLOP, {si(moved)}B; roofline {si(best)}s on {self.device.name} ({peak})" if best else f"the work is not known; device {self.device.name} ({peak})"
        return [table, Text(held), *(Text(f"{r.name} has no times: {r.error}", style="yellow") for r in self.rows if r.error), *(Text(f"warning: {w}", style="yellow") for w in self.report.warnings)]


def run(target: Target, contenders: Sequence[str], *, rounds: int = 10, device: Device | None = None, options: dict | None = None, dynamic: bool | None = None) -> Result:
    """Time the contenders ("eager", "tileweld", or any backend of torch.compile) on a target, without gradients.

    Every contender is called once to compile and once to warm up; then each once a round, so that a slow minute of the machine meets all.
    A contender that fails is a row with the reason, unless it is eager: what eager raises, this raises.
    """
    report, rows, calls = Report(), [], {}
    with torch.no_grad(), _Progress(2 * len(contenders) + rounds * len(contenders)) as progress:
        expected = target.call(*target.args, **target.kwargs)
        for name in contenders:
            progress(f"first call of {name}")
            row, call = _first(name, target, report, options, dynamic, expected)
            rows.append(row)
            progress(f"warming up {name}")
            if call is not None:
                call()
                _wait(expected)
                calls[name] = call
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name, call in calls.items():
                progress(f"round {number + 1} of {rounds}: {name}")
                times[name].append(_timed(call, expected)[0])
        for row in rows:
            row.seconds = times.get(row.name)
        if device is None:
            device = named(guess(_device_of(expected)))
    return Result(target.name, rows, report, device)


def _first(name, target, report, options, dynamic, expected) -> tuple[Row, Callable | None]:
    """The row of a contender after its first call, and what to time; no call where it failed."""
    if name == "eager":
        call = functools.partial(target.call, *target.args, **target.kwargs)
        return Row(name, first=_timed(call, expected)[0], difference=0.0), call
    try:
        call = functools.partial(_compiled(name, target.call, report, options, dynamic), *target.args, **target.kwargs)
        first, result = _timed(call, expected)
        return Row(name, first=first, difference=difference(result, expected)), call
    except Exception as error:  # a compiler may fail in any way: no g++, no triton, an op it does not know
        return Row(name, error=_reason(error)), None


def _compiled(name, call, report, options, dynamic):
    torch._dynamo.reset()  # or the compilations of one contender count against the limit of the next
    if name != "tileweld":
        return torch.compile(call, backend=name, dynamic=dynamic)
    from .backend import tileweld

    return torch.compile(call, backend=functools.partial(tileweld, report=report, options=options), dynamic=dynamic)


def _reason(error: BaseException) -> str:
    while (inner := getattr(error, "inner_exception", None)) is not None:  # what Dynamo wrapped
        error = inner
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return first if first.startswith(type(error).__name__) else f"{type(error).__name__}: {first}"


def _timed(call, like) -> tuple[float, object]:
    _wait(like)
    start = time.perf_counter()
    result = call()
    _wait(like)
    return time.perf_counter() - start, result


def _leaves(x) -> list[torch.Tensor]:
    """The tensors of a result; those of a model's output object are its values."""
    return [t for t in torch.utils._pytree.tree_leaves(dict(x) if isinstance(x, dict) else x) if isinstance(t, torch.Tensor)]


def _device_of(result) -> torch.device:
    return next((x.device for x in _leaves(result)), torch.device("cpu"))


def _wait(result) -> None:
    if _device_of(result).type == "cuda":
        torch.cuda.synchronize()


def difference(result, expected) -> float | None:
    """The largest |x - y| over the largest |y|, over all float tensors of two results; inf where their structure differs, None without one."""
    a, b = _leaves(result), _leaves(expected)
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    found = []
    for x, y in zip(a, b):
        if y.is_floating_point() and y.numel():
            scale, gap = y.double().abs().nan_to_num().max().item(), (x.double() - y.double()).abs()
            same = (x == y) | (x.isnan() & y.isnan())
            found.append((torch.where(same, torch.zeros_like(gap), gap).nan_to_num(nan=float("inf"), posinf=float("inf")).max() / (scale or 1.0)).item())
    return max(found, default=None)


class _Progress:
    """A bar on stderr, where that is a terminal, once the work has taken longer than QUIET_SECONDS."""

    def __init__(self, steps: int):
        self.steps, self.done, self.bar, self.started = steps, 0, None, time.perf_counter()
        self.stack = contextlib.ExitStack()

    def __call__(self, what: str) -> None:
        self.done += 1
        if self.bar is None and (time.perf_counter() - self.started > QUIET_SECONDS or what.startswith("first")):
            self._show()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done - 1, description=what)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        if console.is_terminal:
            self.bar = self.stack.enter_context(Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True))
            self.task = self.bar.add_task("", total=self.steps)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stack.close()
