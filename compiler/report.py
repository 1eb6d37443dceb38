"""The report: what was fused, what was refused and why, which kernels run. ``str(report)`` is the table that `tileweld explain` prints."""
from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter

from torch.fx import GraphModule


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


class Report:
    """Filled by the backend as it compiles.

    counts: Counter of rewrites made; fusions, refusals, kernels, warnings: lists; graphs: the rewritten GraphModules;
    captured: the graphs before the passes.
    """

    def __init__(self):
        self.fusions: list[Fusion] = []
        self.refusals: list[Refused] = []
        self.kernels: list[KernelUse] = []
        self.warnings: list[str] = []
        self.graphs: list[GraphModule] = []
        self.captured: list[GraphModule] = []
        self.sources: list = []  # ir.kernel.Kernel, in order of first use

    def mark(self) -> dict[str, int]:
        """The present lengths of all lists, for `rollback`."""
        return {name: len(rows) for name, rows in vars(self).items()}

    def rollback(self, mark: dict[str, int]) -> None:
        """Forget what was noted since ``mark``."""
        for name, length in mark.items():
            del getattr(self, name)[length:]

    @property
    def counts(self) -> Counter:
        """Rewrites made, by name."""
        return Counter(f.rewrite for f in self.fusions)

    def warn(self, message: str) -> None:
        """A degradation, listed once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def to_json(self) -> str:
        """Counts, fusions, refusals, kernels and warnings as JSON text."""
        rows = {name: [dataclasses.asdict(x) for x in getattr(self, name)] for name in ("fusions", "refusals", "kernels")}
        return json.dumps({"counts": dict(self.counts), "graphs": len(self.graphs), **rows, "warnings": self.warnings}, indent=2)

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        console = Console(file=out, width=160, no_color=True)
        for table in self.tables():
            console.print(table)
        return out.getvalue().rstrip()

    def __repr__(self) -> str:
        fused = ", ".join(f"{n} {name}" for name, n in self.counts.items()) or "nothing fused"
        return f"<Report: {len(self.graphs)} graph(s), {fused}, {len(self.refusals)} refused>"

    def tables(self) -> list:
        """The rich renderables: fusions (equal ones in one row), refusals, kernels, warnings."""
        from rich.table import Table
        from rich.text import Text

        title = f"tileweld: {len(self.graphs)} graph(s), {sum(self.counts.values())} fused, {len(self.refusals)} refused"
        fused = Table("rewrite", "times", "what", "where", title=title, title_justify="left")
        for (rewrite, detail), rows in _grouped(self.fusions, lambda f: (f.rewrite, f.detail)):
            fused.add_row(rewrite, str(len(rows)), Text(detail), Text(_sources(rows)))
        result = [fused]
        if self.refusals:
            refused = Table("rewrite", "times", "refused because", "where", "what to do", title="refused", title_justify="left")
            for (rewrite, reason, cure), rows in _grouped(self.refusals, lambda r: (r.rewrite, r.reason, r.cure)):
                refused.add_row(rewrite, str(len(rows)), Text(reason), Text(_sources(rows)), Text(cure))
            result.append(refused)
        if self.kernels:
            kernels = Table("op", "times", "runs on", "because", title="kernels", title_justify="left")
            for (op, implementation, reason), rows in _grouped(self.kernels, lambda k: (k.op, k.implementation, k.reason)):
                kernels.add_row(op, str(len(rows)), Text(implementation), Text(reason))
            result.append(kernels)
        result += [Text(f"warning: {message}") for message in self.warnings]
        return result


def _grouped(rows, key):
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups.items()


def _sources(rows) -> str:
    places = list(dict.fromkeys(r.source for r in rows if r.source))
    return "\n".join(places[:2]) + (f"\n... and {len(places) - 2} more" if len(places) > 2 else "")
