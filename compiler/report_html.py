"""One HTML file that needs nothing else: the tables of the report, every graph before and after, every generated source."""
from __future__ import annotations

import difflib
from html import escape

from . import dump
from .cost_report import listed, ratio, si
from .options import Options
from .report import Report, _count, _few, _grouped, _sources

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --add: #2da44e33; --del: #cf222e2b; --note: #0969da; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
code, pre { font: 12.5px/1.45 ui-monospace, monospace; } pre { overflow-x: auto; background: var(--soft); padding: .8rem; border-radius: 6px; }
.where { opacity: .7; font-size: .85rem; } .refused { border-left: 4px solid #bf8700; padding: .2rem 0 .2rem 1rem; margin: 1rem 0; }
.refused dt { float: left; clear: left; width: 6rem; opacity: .7; } .refused dd { margin: 0 0 .2rem 6rem; }
.add { background: var(--add); } .del { background: var(--del); } .at { color: var(--note); } pre span { display: block; min-height: 1.45em; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def page(report: Report, options: Options, title: str) -> str:
    """The report as the text of one HTML document; every text from the model is escaped."""
    nodes = sum(len(gm.graph.nodes) for gm in report.captured), sum(len(gm.graph.nodes) for gm in report.graphs)
    head = f"{_count(len(report.graphs), 'graph')}, {nodes[0]} nodes before the passes and {nodes[1]} after; {sum(report.counts.values())} fused, {len(report.refusals)} refused"
    parts = [f"<h1>{escape(title)}</h1><p>{escape(head)}</p>", *(f"<p>warning: {escape(w)}</p>" for w in report.warnings)]
    fused = [(rewrite, len(rows), _code(detail), _where(rows)) for (rewrite, detail), rows in _grouped(report.fusions, lambda f: (f.rewrite, f.detail))]
    parts.append(_section("Fused", _table(("rewrite", "times", "what", "where"), fused) if fused else "<p>Nothing was fused.</p>"))
    refused = "".join(_in_words("not fused", *key, rows) for key, rows in _grouped(report.refusals, lambda r: (r.rewrite, r.reason, r.cure)))
    parts.append(_section("Refused", refused or "<p>Nothing was refused.</p>"))
    kept = [(rewrite, len(rows), _code(detail), _where(rows)) for (rewrite, detail), rows in _grouped(report.kept, lambda f: (f.rewrite, f.detail))]
    if kept:
        parts.append(_section("Best as it is", _table(("rewrite", "times", "what", "where"), kept)))
    runs = [(op, len(rows), _code(name), escape(reason)) for (op, name, reason), rows in _grouped(report.kernels, lambda k: (k.op, k.implementation, k.reason))]
    if runs:
        parts.append(_section("What the fused ops run on", _table(("op", "times", "runs on", "because"), runs)))
    parts.append(_section("Cost", _costs(report)))
    calls = "".join(_in_words("library", *key, rows) for key, rows in _grouped(report.library_calls, lambda c: (c.op, c.reason, c.cure)))
    left = "".join(f"<li>{escape(where)}</li>" for where in dict.fromkeys(filter(None, report.products_left)))
    left = f"<p>Matmuls of two activations that are no attention, the library's:</p><ul>{left}</ul>" if left else ""
    parts.append(_section("Calls of torch's library", f"<p>{escape(listed(report.fallbacks) or 'none')}</p>{calls}{left}"))
    if report.folded:
        folded = [(_code(", ".join(operations)), len(rows), f"{size:,}", escape(_few([", ".join(r.weights) for r in rows])))
                  for (operations, size), rows in _grouped({(f.key, f.weights): f for f in report.folded}.values(), lambda f: (f.operations, f.bytes))]
        parts.append(_section("Kept, computed from weights alone", _table(("computed by", "times", "bytes", "weights"), folded)))
    seen = [(n, s.seen, s.fused, s.refused, s.other) for n, s in enumerate(report.softmaxes)]
    parts.append(_section("Softmaxes", _table(("graph", "seen", "fused into attention", "refused", "no attention core"), seen)))
    diffs = [_details(f"graph {n}: what the passes changed", _diff(a, b), n == 0) + _details(f"graph {n}: all of it, after the passes", f"<pre>{escape(dump.text(b))}</pre>")
             for n, (a, b) in enumerate(zip(report.captured, report.graphs))]
    parts.append(_section("Graphs", "".join(diffs)))
    sources = "".join(_details(f"{k.name} ({k.language}): {k.detail}", f"<pre>{escape(k.source)}</pre>") for k in report.sources)
    sources += "".join(_details(f"linked with {', '.join(names)}", f"<pre>{escape(part)}</pre>") for part, names in report.parts().items())
    parts.append(_section("Generated kernels", sources or "<p>None: everything runs on library calls.</p>"))
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: tileweld</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n'


def _costs(report) -> str:
    """A row a rewrite and the total, at the traced sizes; the polynomials where sizes are symbolic; ops without a row."""
    lines, total = report.cost.evaluated()
    device = report.device
    rows = []
    for line in (*lines, total):
        a, b = line.before, line.after
        cells = [(len(a.kernels), len(b.kernels)), (si(a.bytes) + "B", si(b.bytes) + "B"), (si(a.flops), si(b.flops)), (ratio(a.intensity), ratio(b.intensity))]
        cells += [(si(a.seconds(device)) + "s", si(b.seconds(device)) + "s")] if device else []
        rows.append((escape(line.name), *(f"{x} &rarr; {y}" for x, y in cells)))
    table = _table(("rewrite", "kernels", "bytes moved", "FLOPs", "FLOPs a byte", *([f"roofline, {escape(device.name)}"] if device else [])), rows)
    after = report.cost.total.after
    symbolic = f"<p>After, in symbols: FLOPs = {_code(str(after.flops))}, bytes = {_code(str(after.bytes))}</p>" if after.flops.free_symbols | after.bytes.free_symbols else ""
    unknown = f"<p>Counted by their bytes alone: {escape(listed(report.cost.unknown))}</p>" if report.cost.unknown else ""
    return table + symbolic + unknown


def _section(title, body) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _details(title, body, opened=False) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>\n"


def _table(names, rows) -> str:
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    return f"<table><tr>{head}</tr>" + "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows) + "</table>"


def _code(x) -> str:
    return f"<code>{escape(x)}</code>"


def _where(rows) -> str:
    return f'<span class="where">{escape(_sources(rows))}</span>'


def _in_words(head, name, reason, cure, rows) -> str:
    entries = ((head, f"<b>{escape(name)}</b>, {_count(len(rows), 'time')}"), ("because", escape(reason)), ("where", _where(rows) or "not known"), ("to do", escape(cure) or "-"))
    return '<dl class="refused">' + "".join(f"<dt>{name}</dt><dd>{said}</dd>" for name, said in entries) + "</dl>"


def _diff(before, after) -> str:
    kinds = {"+": "add", "-": "del", "@": "at"}
    lines = list(difflib.unified_diff(dump.text(before).splitlines(), dump.text(after).splitlines(), lineterm="", n=2))[2:]
    if not lines:
        return "<p>Nothing.</p>"
    return "<pre>" + "".join(f'<span class="{kinds.get(line[:1], "")}">{escape(line)}</span>' for line in lines) + "</pre>"
