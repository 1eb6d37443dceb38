"""The cost part of the report: FLOPs, bytes and kernels before and after, per rewrite and in total.

Nothing is computed while a model compiles: the pass driver keeps references to what a pass removed and made (`snapshot`, `changed`), and
`Costs` counts when somebody reads them. compiler/ir/cost.py says what a node costs.
"""
from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable

import sympy
from torch.fx import GraphModule, Node

from .constants import Constant
from .devices import Device
from .folded import Folded
from .ir.cost import Call, Cost, cost, fused, hints, is_kernel, is_known
from .ir.weights import constants


@dataclasses.dataclass(frozen=True)
class Covered:
    """What one pass took out of a graph and put in: nodes with the arguments that they had."""

    rewrite: str
    before: tuple[tuple[Node, tuple, dict], ...]
    after: tuple[tuple[Node, tuple, dict], ...]


def snapshot(gm: GraphModule) -> dict[Node, tuple]:
    """Every call of a graph with its present arguments; references alone, 0.1 ms for 1000 nodes."""
    gm.graph.eliminate_dead_code()  # what is dead already is not the pass's doing
    return {node: (node.args, node.kwargs) for node in gm.graph.nodes if node.op == "call_function"}


def changed(rewrite: str, before: dict[Node, tuple], gm: GraphModule) -> Covered:
    """What a pass made of the graph since the snapshot. In inference what depends on weights alone is computed once and costs a call nothing."""
    kept = constants(gm.graph)
    now = {node: (node.args, node.kwargs) for node in gm.graph.nodes if node.op == "call_function" and (node in before or node not in kept)}
    return Covered(rewrite, *(tuple((node, *arguments) for node, arguments in row.items() if node not in other) for row, other in ((before, now), (now, before))))


@dataclasses.dataclass(frozen=True)
class Work:
    """Kernels with their costs."""

    kernels: tuple[Cost, ...] = ()

    @functools.cached_property
    def flops(self) -> sympy.Expr:
        return sympy.expand(sympy.Add(*(k.flops for k in self.kernels)))

    @functools.cached_property
    def bytes(self) -> sympy.Expr:
        return sympy.expand(sympy.Add(*(k.bytes for k in self.kernels)))

    def at(self, known: dict) -> Work:
        """With numbers for the shape symbols."""
        return Work(tuple(k.at(known) for k in self.kernels))

    @property
    def intensity(self) -> float | None:
        """FLOPs a byte; None where a size is not known or nothing is moved."""
        return float(self.flops / self.bytes) if self.bytes != 0 and not (self.flops.free_symbols | self.bytes.free_symbols) else None

    def seconds(self, device: Device) -> float | None:
        """The sum of the kernels' roofline times, one after the other, launches free."""
        times = [device.seconds(k) for k in self.kernels]
        return None if None in times else sum(times)


@dataclasses.dataclass(frozen=True)
class Line:
    """A rewrite (all of its places) or the total; ``before`` and ``after`` are polynomials in the shape symbols."""

    name: str
    times: int
    before: Work
    after: Work

    def at(self, known: dict) -> Line:
        return Line(self.name, self.times, self.before.at(known), self.after.at(known))


class Costs:
    """FLOPs, bytes and kernels of everything in a report.

    lines: one a rewrite, then the regions that lowering made. total: the captured graphs op by op, against what runs in their place; where
    there are backward graphs, these too, before op by op as AOTAutograd made them. hints: shape symbol -> traced size. unknown: ops without a
    row, which count their bytes alone. fallbacks: op -> how many calls of it stay calls of torch's library; calls: those, as (op, node).
    """

    def __init__(self, report, launches: list[list[tuple[str, list[Node], list[Node]]]]):
        self.hints = hints([*report.captured, *(a.gm for a in report.aot)])
        self.unknown: Counter = Counter()
        self.calls: list[tuple[str, Node]] = []
        self.lines: list[Line] = []
        counts = report.counts
        for rewrite in dict.fromkeys(c.rewrite for c in report.covered):
            rows = [c for c in report.covered if c.rewrite == rewrite]
            before, after = (self._work(Call(*entry) for c in rows for entry in getattr(c, side)) for side in ("before", "after"))
            if counts[rewrite] and (before.kernels or after.kernels):
                self.lines.append(Line(rewrite, counts[rewrite], before, after))
        before = list(self._work(Call(node) for gm in report.captured for node in gm.graph.nodes).kernels)
        after, regions = [], {}
        for aot, graph_launches in zip(report.aot, launches):
            if aot.is_backward:
                before += self._work(Call(node) for node in aot.gm.graph.nodes).kernels
            after += self._launched(aot.gm, graph_launches, regions)
        if not report.aot:  # stopped before AOTAutograd: the graphs after the passes are the last that there are
            after = list(self._work(Call(node) for gm in report.graphs for node in gm.graph.nodes).kernels)
        self.lines += [Line(op, times, Work(tuple(a)), Work(tuple(b))) for op, (times, a, b) in regions.items()]
        self.total = Line("total", 1, Work(tuple(before)), Work(tuple(after)))

    def _work(self, calls: Iterable[Call]) -> Work:
        found = []
        for call in calls:
            counted = cost(call)
            if counted is not None:
                found.append(counted)
                if not is_known(call):
                    self.unknown[call.name.replace("aten::", "")] += 1
        return Work(tuple(found))

    def _launched(self, gm: GraphModule, launches, regions: dict) -> list[Cost]:
        """What runs of a graph: a kernel for every launch, one for each call that is in none."""
        inside: set[Node] = set()
        kernels = []
        for op, members, outputs in launches:
            real = [n for n in members if is_kernel(Call(n))]
            one = fused(members, outputs)
            kernels.append(one)
            if len(real) > 1:
                times, before, after = regions.setdefault(f"{op} (lowering)", (0, [], []))
                regions[f"{op} (lowering)"] = (times + 1, before, after)
                before += self._work(Call(n) for n in real if n not in inside).kernels  # what two kernels compute was computed once
                after.append(one)
            inside |= set(members)
        for node in gm.graph.nodes:
            if node not in inside and not isinstance(node.target, (Constant, Folded)) and (counted := cost(Call(node))) is not None:
                kernels.append(counted)
                self.calls.append((Call(node).name, node))
        return kernels

    @property
    def fallbacks(self) -> Counter:
        return Counter(name.replace("aten::", "") for name, _ in self.calls)

    def evaluated(self) -> tuple[list[Line], Line]:
        """lines and total at the traced sizes."""
        return [line.at(self.hints) for line in self.lines], self.total.at(self.hints)

    # ------------------------------------------------------------ as JSON, words and tables

    def to_json(self, device: Device | None = None) -> dict:
        """{"lines": [...], "total": {...}, "hints", "device", "unknown"}; polynomials as text, figures at the traced sizes."""
        lines, total = self.evaluated()
        rows = [_record(symbolic, line, device) for symbolic, line in zip((*self.lines, self.total), (*lines, total))]
        return {"lines": rows[:-1], "total": rows[-1], "hints": {str(k): n for k, n in self.hints.items()}, "device": dataclasses.asdict(device) if device else None, "unknown": dict(self.unknown)}

    def headline(self, device: Device | None = None) -> str:
        """One line: kernels, bytes, FLOPs and time before and after."""
        _, total = self.evaluated()
        a, b = total.before, total.after
        parts = [f"{len(a.kernels)} kernels -> {len(b.kernels)}", f"{si(a.bytes)}B moved -> {si(b.bytes)}B", f"{si(a.flops)}FLOP -> {si(b.flops)}FLOP"]
        if device is not None:
            parts.append(f"roofline on {device.name} {si(a.seconds(device))}s -> {si(b.seconds(device))}s")
        return "cost: " + ", ".join(parts)

    def tables(self, device: Device | None = None) -> list:
        """rich renderables: a row a rewrite, the total in a line, the polynomials where sizes are symbolic, ops without a row."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        if not self.total.before.kernels:
            return []
        lines, total = self.evaluated()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("cost")
        for name in ("times", "kernels", "bytes moved", "FLOPs", "FLOPs a byte", *([f"roofline, {device.name}"] if device else [])):
            table.add_column(name, justify="right")
        for line in (*lines, total):
            a, b = line.before, line.after
            cells = [(str(len(a.kernels)), str(len(b.kernels))), (si(a.bytes) + "B", si(b.bytes) + "B"), (si(a.flops), si(b.flops)), (ratio(a.intensity), ratio(b.intensity))]
            if device:
                cells.append((si(a.seconds(device)) + "s", si(b.seconds(device)) + "s"))
            table.add_row(line.name, "" if line is total else str(line.times), *(f"{x.strip()} -> {y.strip()}" for x, y in cells), end_section=line is lines[-1] if lines else False)
        result = [table]
        if self.total.after.flops.free_symbols | self.total.after.bytes.free_symbols:
            at = ", ".join(f"{k} = {n}" for k, n in self.hints.items())
            result.append(Text(f"after, at {at}: FLOPs = {self.total.after.flops}; bytes = {self.total.after.bytes}", style="dim"))
        if self.unknown:
            result.append(Text("no row in compiler/ir/cost_rows.py, counted by their bytes alone: " + listed(self.unknown), style="dim"))
        return result


def _record(symbolic: Line, line: Line, device: Device | None) -> dict:
    def side(text: Work, work: Work) -> dict:
        return {"kernels": len(work.kernels), "flops": _number(work.flops), "bytes": _number(work.bytes), "intensity": work.intensity,
                "seconds": work.seconds(device) if device else None, "flops_symbolic": str(text.flops), "bytes_symbolic": str(text.bytes)}

    return {"name": line.name, "times": line.times, "before": side(symbolic.before, line.before), "after": side(symbolic.after, line.after)}


def _number(e) -> int | None:
    return None if e.free_symbols else round(float(e))


def si(x) -> str:
    """12.3 M for 12345678, for microseconds too; ? for what is not known. Ends with a space or a prefix, for a unit to follow."""
    if x is None or getattr(x, "free_symbols", None):
        return "? "
    x = float(x)
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"), (1e-12, "p")):
        if abs(x) >= scale * 0.9995:
            return f"{x / scale:.3g} {prefix}"
    return "0 "


def ratio(x: float | None) -> str:
    return "-" if x is None else f"{x:.2g}" if x < 10 else f"{x:.0f}"


def listed(counts: Counter) -> str:
    """add 3, mm 2, ..."""
    return ", ".join(f"{name} {n}" for name, n in counts.most_common())


# ---------------------------------------------------------------- from what lowering chose


def launches(choices: Iterable) -> list[tuple[str, list[Node], list[Node]]]:
    """(op, nodes inside, outputs) of every choice of lower.choose."""
    return [_launch(choice) for choice in choices]


def _launch(choice) -> tuple[str, list[Node], list[Node]]:
    """A fused op is itself, and the getitems of its results; a region is what lies between its outputs and its inputs."""
    outputs = [x for x in choice.outputs if isinstance(x, Node)] or [choice.node]
    border, members, stack = {x for x in choice.inputs or () if isinstance(x, Node)} - set(outputs), {}, list(outputs)
    while stack:
        node = stack.pop()
        if node in members or node in border or node.op != "call_function":
            continue
        members[node] = True
        if node is not choice.node:
            stack += node.all_input_nodes
    return choice.op, list(members), outputs
