"""int8 only where it pays: which int8_linear could run on the float weights that it was made of, that exchange, and the report's rows.

A product whose weights are int8 in the model already has no floats to go back to. One that the int8 pass made has: `quantize_rows(W)` is an op of the graph.
"""
from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Mapping
from difflib import get_close_matches

import torch
from torch.fx import Graph, GraphModule, Node

from .capture import real_tensors
from .int8_use import Int8Use
from .ir.graph import is_call, value
from .ir.int8_linear import arguments, dequantized
from .ir.int8_scheme import Int8, matches
from .row_max import take_none_unread

tileweld = torch.ops.tileweld


def _float_of(q: Node) -> Node | None:
    """W of getitem(quantize_rows(W, group), 0)."""
    return q.args[0].args[0] if is_call(q, operator.getitem) and is_call(q.args[0], tileweld.quantize_rows.default) else None


def replaceable(graph: Graph) -> set[str]:
    """Names of the int8_linear nodes whose weights are all quantised in this graph."""
    return {n.name for n in graph.nodes if is_call(n, tileweld.int8_linear.default) and all(_float_of(q) is not None for q in n.args[1])}


def to_floats(gm: GraphModule, names: Collection[str]) -> None:
    """tileweld::linear on the float weights in the place of these nodes; what quantised them goes."""
    for node in [n for n in gm.graph.nodes if n.name in names and is_call(n, tileweld.int8_linear.default)]:
        x, weights, _, captures, sizes, norm, eps, prologue, epilogues, pairs, _, _, _, _, maxima = arguments(node.args)
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node("call_function", tileweld.linear.default, (x, [_float_of(q) for q in weights], captures, sizes, norm, eps, prologue, epilogues, pairs, *([maxima] if maxima else [])), name=f"{node.name}_float")
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    take_none_unread(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _inputs(node: Node) -> list[Node]:
    """The placeholders that a weight is computed from, in order."""
    found, stack, seen = [], [node], set()
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            found += [n] if n.op == "placeholder" else []
            stack += n.all_input_nodes
    return sorted(found)


def _key(names: list[str], weight: Node) -> tuple:
    return (*names, *(int(n) for n in value(weight).shape))


def errors(gm: GraphModule, example_inputs) -> dict[tuple, float]:
    """Relative error of every weight that a captured graph quantises, from the real weights; equal keys (parts of a packed weight) have the largest."""
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs))
    found: dict[tuple, float] = {}
    for node in gm.graph.find_nodes(op="call_function", target=tileweld.quantize_rows.default):
        weight = node.args[0]
        sources = _inputs(weight)
        if any(type(given.get(n)) not in (torch.Tensor, torch.nn.Parameter) for n in sources):
            continue
        with real_tensors():
            w = _computed(weight, {n: given[n] for n in sources}).float()
            if not w.isfinite().all():
                continue
            error = float((w - dequantized(*tileweld.quantize_rows(w, node.args[1]), torch.float32)).norm() / w.norm().clamp_min(1e-30))
        key = _key([n.meta.get("label") or n.name for n in sources], weight)
        found[key] = max(error, found.get(key, 0.0))
    return found


def _computed(node: Node, known: dict):
    if node not in known:
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _computed(n, known))
        known[node] = node.target(*args, **kwargs)
    return known[node]


def uses(graph: Graph, known: Mapping[tuple, float], apart: Mapping[str, str], kept: Mapping[str, str], number: int, forced: bool = False) -> list[Int8Use]:
    """A row for every weight of every int8_linear of a graph as AOT made it. apart, kept: name of the node -> why it runs in floats, why in int8; forced: nothing was timed."""
    found = []
    for node in graph.find_nodes(op="call_function", target=tileweld.int8_linear.default):
        reason = apart.get(node.name)
        for q, scale in zip(node.args[1], node.args[2]):
            weight, shape = _float_of(q), tuple(int(n) for n in value(q).shape)
            sources = _inputs(weight if weight is not None else q)
            names = [n.meta.get("weight") or n.name for n in sources]
            why = reason or ("its weights are int8 in the model" if weight is None else "force" if forced else kept.get(node.name, "asked for"))
            item = value(weight if weight is not None else node.args[0]).element_size()
            error = known.get(_key(names, weight)) if weight is not None else None
            found.append(Int8Use(" + ".join(n.rpartition(".")[0] or n for n in names), shape, node.args[10], reason is None, why, error, shape[0] * shape[1] * item, shape[0] * shape[1] + 4 * value(scale).numel(), number))
    return found


def left(graph: Graph, settings: Int8, number: int) -> list[Int8Use]:
    """A row for every weight that stays float although int8 was asked for, of a graph behind the passes."""
    from ..passes.int8 import left_float

    found = []
    for weight, name, why in left_float(graph, settings):
        shape, item = tuple(int(n) for n in value(weight).shape), value(weight).element_size()
        found.append(Int8Use(name or weight.name, shape, settings.activation, False, why, None, shape[0] * shape[1] * item, shape[0] * shape[1] + 4 * shape[0] * (shape[1] // settings.group if settings.group else 1), number))
    return found


def unknown_names(settings: Int8, known: Collection[str]) -> list[str]:
    """What to say of every entry of `skip` that means none of these modules: misspelt, it would quantise the layer that was to be left alone."""
    found = []
    for pattern in settings.skip if known else ():
        if not any(matches(name, pattern) for name in known):
            near = get_close_matches(pattern, sorted({part for name in known for part in (name, name.rpartition(".")[2])}), n=1, cutoff=0.7)
            found.append(f"options['int8']: skip names {pattern!r}, which is no linear layer of this graph" + (f"; did you mean {near[0]!r}?" if near else ""))
    return found


def with_errors(rows: list[Int8Use], model: torch.nn.Module) -> list[Int8Use]:
    """The same with the errors that modules have noted when they were quantised (convert.quantize_)."""
    modules = dict(model.named_modules())
    return [dataclasses.replace(r, error=getattr(modules.get(r.name), "error", None)) if r.error is None and hasattr(modules.get(r.name), "q") else r for r in rows]


def table(rows: list[Int8Use]):
    """rich's table of them."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("int8", "shape", "activations", "runs in", "because"):
        made.add_column(heading, overflow="fold")
    for heading in ("error", "SQNR dB", "bytes"):
        made.add_column(heading, justify="right")
    for r in rows:
        error = ("", "") if r.error is None else (f"{r.error:.2%}", f"{r.sqnr_db:.1f}")
        made.add_row(r.name, "x".join(map(str, r.shape)), r.activation, "int8" if r.kept else "float", r.reason, *error, f"{r.bytes_before:,} -> {r.bytes_after:,}" if r.kept else f"{r.bytes_before:,}")
    return made
