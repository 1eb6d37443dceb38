"""The report: what was fused, what was refused and why, which kernels run. ``str(report)`` is the table that `tileweld explain` prints."""
from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from typing import TYPE_CHECKING

from torch.fx import GraphModule

if TYPE_CHECKING:
    from .cost_report import Costs
    from .int8_use import Int8Use


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A rewrite that was made: pass, what it made (texts of the fused op), the user's line, the number of the graph."""

    rewrite: str
    detail: str
    source: str
    graph: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """A rewrite that was not made: pass, reason, the user's line, what to do about it, the number of the graph."""

    rewrite: str
    reason: str
    source: str
    cure: str
    graph: int


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """What really runs at one place: the op, the implementation ("cpp:attention_1a2b", "aten:scaled_dot_product_attention", "reference"), and why."""

    op: str
    implementation: str
    reason: str
    graph: int


@dataclasses.dataclass(frozen=True)
class FoldedWeight:
    """A value that is kept between calls because it depends on weights alone: its name in the graph, the operations and weights that it is computed from, its bytes, the number of the graph.

    key: the computation; graphs that have the same one of the same weights hold one value.
    """

    name: str
    operations: tuple[str, ...]
    weights: tuple[str, ...]
    bytes: int
    graph: int
    key: str = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class AotGraph:
    """A graph as AOTAutograd made it, before its fused ops become kernels: functional, decomposed by autograd's rules, forward or backward."""

    gm: GraphModule
    is_backward: bool
    graph: int


@dataclasses.dataclass(frozen=True)
class Softmaxes:
    """How many softmaxes a captured graph has (spelled-out ones and library attention included), and what became of them.

    other: no attention core, such as a router's or a class head's softmax.
    """

    seen: int
    fused: int
    refused: int

    @property
    def other(self) -> int:
        return max(0, self.seen - self.fused - self.refused)


class Report:
    """Filled by the backend as it compiles.

    counts: Counter of rewrites made; fusions, refusals, kernels, warnings: lists; kept: places that a pass weighed and left, with what it weighed; graphs: the rewritten GraphModules;
    captured: the graphs before the passes; aot: the graphs behind AOTAutograd, forward and backward; covered: what the passes replaced.
    device: a devices.Device for which the cost table has roofline times; None for a table without times.
    detailed False: nobody will read the costs, so that nothing is kept for them.
    """

    def __init__(self, detailed: bool = True):
        self.detailed = detailed
        self.device = None
        self.options = None  # what lowering chose by; set by the backend
        self.fusions: list[Fusion] = []
        self.refusals: list[Refused] = []
        self.kept: list[Fusion] = []
        self.kernels: list[KernelUse] = []
        self.folded: list[FoldedWeight] = []
        self.int8: list[Int8Use] = []
        self.int8_errors: dict = {}  # int8_choice.errors of the graphs that were captured
        self.warnings: list[str] = []
        self.merged: list = []  # merged_heads.MergedHeads, one a layer, with options gqa
        self.graphs: list[GraphModule] = []
        self.captured: list[GraphModule] = []
        self.aot: list[AotGraph] = []
        self.sources: list = []  # ir.kernel.Kernel, in order of first use
        self.covered: list = []  # cost_report.Covered, one a pass
        self.restored: list[int] = []  # kernels of each graph whose executable an earlier process had kept: it is in no list of graphs
        self.launches: list = []  # cost_report.launches of every graph in aot; empty where explain did not fill it in

    def mark(self) -> dict[str, int]:
        """The present lengths of all lists, for `rollback`."""
        return {name: len(rows) for name, rows in vars(self).items() if isinstance(rows, list)}

    def rollback(self, mark: dict[str, int]) -> None:
        """Forget what was noted since ``mark``."""
        for name, length in mark.items():
            del getattr(self, name)[length:]

    def restore(self, kernels: list, rows: dict[str, list]) -> int:
        """What was noted of a graph when its executable was made (executable_cache.py); returns the graph's number."""
        self.restored.append(len(kernels))
        number = -len(self.restored)  # those of graphs that were compiled count from 0
        self.sources += [k for k in kernels if k not in self.sources]
        for name, found in rows.items():
            getattr(self, name).extend(dataclasses.replace(row, graph=number) for row in found)
        return number

    @property
    def counts(self) -> Counter:
        """Rewrites made, by name."""
        return Counter(f.rewrite for f in self.fusions)

    @property
    def softmaxes(self) -> list[Softmaxes]:
        """For every graph, the softmaxes seen in it and those that became part of a fused attention."""
        return [_softmaxes(self, number, gm) for number, gm in enumerate(self.captured)]

    @property
    def cost(self) -> Costs:
        """FLOPs, bytes and kernels before and after, per rewrite and in total; counted when it is read, see cost_report.py."""
        from .cost_report import Costs, launches
        from .lower import choose
        from .options import Options

        known = len(self.captured), len(self.aot), len(self.covered)
        if getattr(self, "_costs", (None,))[0] != known:
            chosen = self.launches if len(self.launches) == len(self.aot) else [launches(choose(a.gm, self.options or Options())) for a in self.aot]
            self._costs = known, Costs(self, chosen)
        return self._costs[1]

    @property
    def fallbacks(self) -> Counter:
        """op -> calls that stay calls of torch's library: no fused op, in no region."""
        return self.cost.fallbacks

    @property
    def library_calls(self) -> list:
        """library_calls.LibraryCall for those of them of which there is something to say: experts' products, other libraries' custom ops."""
        from .library_calls import explained

        return explained(self.cost.calls)

    @property
    def products_left(self) -> list[str]:
        """The user's lines of products that no rewrite took and none refused: two activations with no softmax between, or a score whose softmax was refused."""
        from .ir.graph import is_call, source_of
        from .ir.products import PRODUCTS

        refused = {r.source for r in self.refusals if r.rewrite == "linear"}
        return [where for gm in self.graphs for n in gm.graph.nodes if is_call(n, *PRODUCTS) and (not (where := source_of(n)) or where not in refused)]

    @property
    def folded_bytes(self) -> int:
        """Bytes that the kept values take, with what several graphs share counted once."""
        return sum({(f.key, f.weights): f.bytes for f in self.folded}.values())

    def parts(self) -> dict[str, list[str]]:
        """Translation units that kernels share -> the names of those kernels, in order of first use."""
        return {part: [k.name for k in self.sources if part in k.parts] for kernel in self.sources for part in kernel.parts}

    def warn(self, message: str) -> None:
        """A degradation, listed once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def to_json(self) -> str:
        """Counts, fusions, refusals, kernels, softmaxes per graph, costs, library calls and warnings as JSON text."""
        rows = {name: [dataclasses.asdict(x) for x in getattr(self, name)] for name in ("fusions", "kept", "refusals", "kernels", "int8", "folded", "merged", "softmaxes")}
        return json.dumps({"counts": dict(self.counts), "graphs": len(self.graphs), **rows, "cost": self.cost.to_json(self.device), "fallbacks": dict(self.fallbacks), "library_calls": [dataclasses.asdict(c) for c in self.library_calls], "warnings": self.warnings}, indent=2)

    def __str__(self) -> str:
        return rendered(self.tables())

    def __repr__(self) -> str:
        fused = ", ".join(f"{n} {name}" for name, n in self.counts.items()) or "nothing fused"
        return f"<Report: {len(self.graphs)} graph(s), {fused}, {len(self.refusals)} refused>"

    def tables(self) -> list:
        """The rich renderables: a headline, fusions (equal ones in one row), costs, refusals in words, kernels, kept values, library calls, softmaxes of every graph, warnings."""
        from rich.text import Text

        from .cost_report import listed

        nodes = sum(len(gm.graph.nodes) for gm in self.captured), sum(len(gm.graph.nodes) for gm in self.graphs)
        size = f", {nodes[0]} nodes -> {nodes[1]}" if self.graphs else ""
        result = [Text(f"{_count(len(self.graphs), 'graph')}{size}: {sum(self.counts.values())} fused, {len(self.refusals)} refused", style="bold")]
        if self.fusions:
            table = _table("fused", "times", "what", "where")
            for (rewrite, detail), rows in _grouped(self.fusions, lambda f: (f.rewrite, f.detail)):
                table.add_row(Text(rewrite, style="green"), str(len(rows)), Text(detail), Text(_sources(rows), style="dim"))
            result.append(table)
        if self.kept:
            table = _table("best as it is", "times", "what", "where")
            for (rewrite, detail), rows in _grouped(self.kept, lambda f: (f.rewrite, f.detail)):
                table.add_row(Text(rewrite), str(len(rows)), Text(detail), Text(_sources(rows), style="dim"))
            result.append(table)
        result += self.cost.tables(self.device)
        if self.merged:
            result.append(_merged(self.merged))
        for (rewrite, reason, cure), rows in _grouped(self.refusals, lambda r: (r.rewrite, r.reason, r.cure)):
            result.append(_in_words("not fused", rewrite, reason, cure, rows))
        if self.kernels:
            table = _table("op", "times", "runs on", "because")
            for (op, implementation, reason), rows in _grouped(self.kernels, lambda k: (k.op, k.implementation, k.reason)):
                table.add_row(op, str(len(rows)), Text(implementation), Text(reason))
            result.append(table)
        if self.int8:
            from .int8_choice import table as int8_table

            result.append(int8_table(self.int8))
        if self.folded:
            table = _table("kept, computed from weights alone", "times", "bytes", "weights")
            for (operations, size), rows in _grouped({(f.key, f.weights): f for f in self.folded}.values(), lambda f: (f.operations, f.bytes)):
                table.add_row(Text(", ".join(operations)), str(len(rows)), f"{size:,}", Text(_few([", ".join(r.weights) for r in rows])))
            result += [table, Text(f"kept in total: {self.folded_bytes:,} bytes, made at the first call and again when a weight changes")]
        if self.fallbacks:
            result.append(Text("calls of torch's library: " + listed(self.fallbacks)))
        for (op, reason, cure), rows in _grouped(self.library_calls, lambda c: (c.op, c.reason, c.cure)):
            result.append(_in_words("library", op, reason, cure, rows))
        if left := self.products_left:
            result.append(Text(f"matmuls of two activations that are no attention: {len(left)}, the library's; {_few(list(dict.fromkeys(filter(None, left))))}".rstrip("; ")))
        counted = [s for s in self.softmaxes if s.seen]
        if counted:
            line = f"softmaxes: {sum(s.seen for s in counted)} seen, {sum(s.fused for s in counted)} fused into attention, {sum(s.refused for s in counted)} refused"
            other = sum(s.other for s in counted)
            result.append(Text(line + (f", {other} no attention core (a router, a head over classes)" if other else "")))
        result += [Text(f"warning: {message}", style="yellow") for message in self.warnings]
        return result


def _softmaxes(report: Report, number: int, gm: GraphModule) -> Softmaxes:
    import torch

    from ..passes import attention
    from ..passes.merge import merge_equal
    from .ir.graph import is_call

    library, graph = torch.ops.aten.scaled_dot_product_attention, torch.fx.Graph()
    graph.graph_copy(gm.graph, {})
    merge_equal(graph, set())  # two calls that share q and k have one softmax
    seen = sum(is_call(node, library) or attention.softmax_at(node) is not None for node in graph.nodes)
    fused, refused = (sum(r.graph == number and r.rewrite == attention.NAME for r in rows) for rows in (report.fusions, report.refusals))
    return Softmaxes(seen, fused, refused)


def _merged(rows):
    """The layers whose KV heads were merged: what it saves and what it costs."""
    before, after = (sum(getattr(r, name) for r in rows) for name in ("kv_bytes_before", "kv_bytes_after"))
    table = _table("lossy: KV heads merged", "of", "into", "KV bytes a token", "error of scores", "of values")
    table.title, table.title_justify = f"options gqa: the model computes something else now; KV {before} -> {after} bytes a token", "left"
    for r in rows:
        errors = ("not known", "not known") if r.residual is None else (f"{r.key_error:.1%}", f"{r.value_error:.1%}")
        table.add_row(r.layer, str(r.kv_heads_before), str(r.kv_heads_after), f"{r.kv_bytes_before} -> {r.kv_bytes_after}", *errors)
    return table


def _in_words(head, name, reason, cure, rows):
    """One reason as a block of words: what was not fused or stays a library's, why, where, what to do."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=10)
    grid.add_column()
    times = f", {len(rows)} times" if len(rows) > 1 else ""
    grid.add_row(Text(head, style="bold yellow"), Text(f"{name}{times}", style="bold"))
    grid.add_row("  because", Text(reason))
    grid.add_row("  where", Text(_sources(rows) or "the source line is not known", style="dim"))
    grid.add_row("  to do", Text(cure or "docs/refusals.md explains this reason"))
    return grid


def _table(*names: str):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name == "times" else "left", overflow="fold")
    return table


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _grouped(rows, key):
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups.items()


def _sources(rows) -> str:
    return _few(list(dict.fromkeys(" ".join(r.source.split()) for r in rows if r.source)))


def _few(lines: list[str]) -> str:
    return "\n".join(lines[:2]) + (f"\n... and {len(lines) - 2} more" if len(lines) > 2 else "")


def rendered(parts, width: int = 140) -> str:
    """rich renderables as plain text."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, no_color=True)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
