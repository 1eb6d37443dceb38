"""Graphs as text that a person reads, as JSON, and as graphviz; before and after as a unified diff; kernels with the code that calls them.

    attention: f32[2, 4, 17, 16] = attention(add_4, reshape, reshape_1, [], [], score='0.25*s', mask='j <= i')  # modeling_llama.py:199
"""
from __future__ import annotations

import dataclasses
import difflib
import json

import torch
from torch.fx import GraphModule, Node

from ..codegen.executable import write
from .ir.graph import source_of, value
from .kept_together import keep_together
from .lower import choose, put
from .options import Options
from .place import Placer
from .reinplace import reinplace
from .report import Report

STAGES = ("capture", "passes", "aot", "kernels")
FORMATS = ("text", "dot", "json")
#: what an argument of a fused op is when there is nothing to say about it
SILENT = {"score": "s", "mask": "True", "fill": float("-inf"), "sink": "", "empty": "nan", "value": "", "offset": 0.0}

_DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "bool", torch.int64: "i64", torch.int32: "i32",
           torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.complex64: "c64"}


@dataclasses.dataclass(frozen=True)
class View:
    """One graph of a stage: a title, the graph, and the names of its inputs."""

    title: str
    gm: GraphModule


def views(report: Report, stage: str) -> list[View]:
    """The graphs of a stage ("capture", "passes" or "aot"), titled."""
    if stage == "aot":
        return [View(f"graph {a.graph}, {'backward' if a.is_backward else 'forward'}, behind AOTAutograd", a.gm) for a in report.aot]
    graphs = report.captured if stage == "capture" else report.graphs
    said = "as captured" if stage == "capture" else "after the passes"
    return [View(f"graph {number}, {said}", gm) for number, gm in enumerate(graphs)]


# ---------------------------------------------------------------- text


def text(gm: GraphModule) -> str:
    """One line a node."""
    return "\n".join(line(node) for node in gm.graph.nodes)


def line(node: Node) -> str:
    """name: dtype[shape] = op(arguments)  # file.py:line"""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op == "placeholder":
        said = node.meta.get("label")
        return f"{node.name}: {type_of(node)} = input({said if said and said != node.name else ''})"
    if node.op == "get_attr":
        return f"{node.name}: {type_of(node)} = constant({node.target})"
    where = source_of(node).split(" in ")[0]
    return f"{node.name}: {type_of(node)} = {op_name(node)}({', '.join(arguments(node))})" + (f"  # {where}" if where else "")


def type_of(node: Node) -> str:
    """f32[2, 17, 64] of a node's value; what it is for values that are no tensors."""
    known = value(node)
    if isinstance(known, torch.Tensor):
        return f"{_DTYPES.get(known.dtype, str(known.dtype))}[{', '.join(map(str, known.shape))}]"
    if isinstance(known, (tuple, list)):
        return "(" + ", ".join(f"{_DTYPES.get(x.dtype, x.dtype)}[{', '.join(map(str, x.shape))}]" if isinstance(x, torch.Tensor) else str(x) for x in known) + ")"
    return {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}.get(type(known), type(known).__name__) if known is not None else "?"


def op_name(node: Node) -> str:
    """attention for tileweld::attention, linear for aten.linear.default, add.Scalar where the overload says something."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        overload = target._overloadname
        plain = overload in ("default", "Tensor", "int", "dim", "self", "dtype", "device") or namespace == "tileweld"
        return ("" if namespace in ("aten", "tileweld") else f"{namespace}.") + name + ("" if plain else f".{overload}")
    return getattr(target, "__name__", str(target))


def is_fused(node: Node) -> bool:
    """Is the node one of tileweld's own ops?"""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tileweld"


def arguments(node: Node) -> list[str]:
    """The arguments as text; those of a fused op that are no tensors by name, and not at all where they say nothing."""
    schema = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
    shown = []
    for position, x in enumerate(node.args):
        name = schema[position].name if position < len(schema) else ""
        if not is_fused(node) or _has_nodes(x) or isinstance(x, (list, tuple)):
            shown.append(_argument(x))
        elif name not in SILENT or SILENT[name] != x:
            shown.append(f"{name}={_argument(x)}")
    return shown + [f"{name}={_argument(x)}" for name, x in node.kwargs.items() if x is not None and not (name == "pin_memory" and x is False)]


def _has_nodes(x) -> bool:
    return isinstance(x, Node) or (isinstance(x, (list, tuple)) and any(map(_has_nodes, x)))


def _argument(x) -> str:
    if isinstance(x, Node):
        return x.name
    if isinstance(x, (list, tuple)):
        inner = ", ".join(map(_argument, x))
        return f"[{inner}]" if isinstance(x, list) else f"({inner}{',' if len(x) == 1 else ''})"
    if isinstance(x, slice):
        return f"slice({x.start}, {x.stop}, {x.step})"
    if isinstance(x, torch.dtype):
        return _DTYPES.get(x, str(x))
    if isinstance(x, torch.device):
        return str(x)
    if isinstance(x, int) and x == 2**63 - 1:  # a slice to the end
        return "end"
    return repr(x)


def diff(report: Report, stage: str) -> str:
    """A unified diff of what the stage made of its graphs: the passes of the captured graph, AOT of the rewritten one. "" where nothing changed."""
    before, after = {"passes": ("capture", "passes"), "aot": ("passes", "aot"), "capture": ("capture", "passes")}[stage]
    parts = []
    pairs = zip(views(report, before), views(report, after)) if stage != "aot" else [(views(report, before)[a.graph], v) for a, v in zip(report.aot, views(report, after)) if not a.is_backward]
    for old, new in pairs:
        parts += difflib.unified_diff(text(old.gm).splitlines(), text(new.gm).splitlines(), old.title, new.title, lineterm="", n=2)
    return "\n".join(parts)


# ---------------------------------------------------------------- JSON and graphviz


def to_json(stage: str, graphs: list[View]) -> str:
    """{"stage", "graphs": [{"title", "nodes": [{"name", "op", "type", "arguments", "inputs", "source", "rewrite"}]}]}"""
    return json.dumps({"stage": stage, "graphs": [{"title": v.title, "nodes": [_record(n) for n in v.gm.graph.nodes]} for v in graphs]}, indent=1)


def _record(node: Node) -> dict:
    known = value(node)
    tensor = isinstance(known, torch.Tensor)
    return {
        "name": node.name,
        "op": op_name(node) if node.op == "call_function" else {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op),
        "dtype": _DTYPES.get(known.dtype, str(known.dtype)) if tensor else None,
        "shape": [n if isinstance(n, int) else str(n) for n in known.shape] if tensor else None,
        "arguments": arguments(node) if node.op == "call_function" else [],
        "inputs": [n.name for n in node.all_input_nodes],
        "label": node.meta.get("label"),
        "source": source_of(node) or None,
        "rewrite": node.meta.get("tileweld_rewrite"),
    }


def to_dot(graphs: list[View]) -> str:
    """Graphviz text, a cluster a graph; fused ops are filled, parameters that one node reads are left out to keep the picture readable."""
    out = ["digraph tileweld {", '  node [shape=box, fontname="monospace", fontsize=10];', "  compound=true;"]
    for number, view in enumerate(graphs):
        out += [f"  subgraph cluster_{number} {{", f"    label={_quoted(view.title)};"]
        for node in view.gm.graph.nodes:
            said = op_name(node) if node.op == "call_function" else node.meta.get("label") or node.op
            texts = [x for x in (arguments(node) if is_fused(node) else []) if "=" in x]
            label = "\n".join([said, *texts, *([] if node.op == "output" else [type_of(node)])])
            style = ', style=filled, fillcolor="lightblue"' if is_fused(node) else ", shape=ellipse" if node.op in ("placeholder", "output") else ""
            out.append(f"    g{number}_{node.name} [label={_quoted(label)}{style}];")
        out.append("  }")
        out += [f"  g{number}_{source.name} -> g{number}_{node.name};" for node in view.gm.graph.nodes for source in node.all_input_nodes]
    return "\n".join([*out, "}"])


def _quoted(x: str) -> str:
    return '"' + x.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


# ---------------------------------------------------------------- kernels


def kernels(report: Report, options: Options) -> str:
    """Every generated source, then for each graph the Python that runs, with the kernels by name. Nothing is built."""
    parts = [f"# ==== {k.language} kernel {k.name}  ({k.rewrite}: {k.detail})\n{k.source.rstrip()}" for k in report.sources]
    parts += [f"# ==== cpp, linked with {', '.join(names)}\n{part.rstrip()}" for part, names in report.parts().items()]
    for aot, view in zip(report.aot, views(report, "aot")):
        parts.append(f"# ==== {view.title}: what runs\n{_executable(aot.gm, options)}")
    return "\n\n".join(parts)


def _executable(gm: GraphModule, options: Options) -> str:
    """The function that runs: what prepares its memory, and its lines, kernels by name."""
    import copy

    lowered = GraphModule(gm, copy.deepcopy(gm.graph))
    choices, placer = choose(lowered, options), Placer(lowered)
    for choice in choices:
        put(placer, choice, {c.kernel.source: _Shown() for c in choices if c.kernel is not None})
    lowered.graph.eliminate_dead_code()
    reinplace(lowered)
    keep_together(lowered)
    return write(lowered, _Shown()).source.strip()


class _Shown:
    """In the place of a built kernel in a graph that is only shown."""

    def __init__(self):
        self.entry = self
