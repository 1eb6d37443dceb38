"""SmoothQuant: scale the columns of activations down and those of weights up, before both are rounded to int8. Source: Xiao et al., arXiv 2211.10438.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),   X' = X / s,   W' = W diag(s),   X' W'^T = X W^T

1/s goes into what makes X, which must scale each of its columns by a weight of its own:

    norm       weight (and bias) of the norm whose result X is; Gemma's (1 + w) too. Every reader of the result is a linear layer
    product    X = f(z) * up(z): rows of up, not of the gate, through which f is not linear
    linear     X = before(z) with nothing between: rows of before
    attention  X = attention's result: rows of the value projection, one s for all query heads that read a KV head

The first three are found in the graph that torch.export makes of the model, the last by the structure of its modules (sites.py), and where linear layers are Conv1D (GPT-2), whose names say
nothing, by what was seen while the model ran (flow.py); either is tried out in float64 (probe.py). That the whole computes what it did is checked at the end, or everything is taken back.
"""
from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..compiler.errors import ConversionError
from .calibrate import batches, input_maxima
from .flow import trace
from .linears import as_rows, check_linear, is_conv1d, is_linear, refuse_int8, sizes_of
from .observe import Inputs, evaluating, probe_calls, run
from .probe import carrying
from .sites import Site, find_sites, value_rows

aten = torch.ops.aten
_KEEPS_COLUMNS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)
_SIDES = {aten.linear.default: (0, 1), aten.addmm.default: (1, 2), aten.mm.default: (0, 1), aten.matmul.default: (0, 1)}  # where x and the weight stand; the first takes it [N, K], the others [K, N]
LEAST = 1e-5  # of s, and 1 / LEAST the largest
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the outputs, relative; many norms compute in float32 whatever the model is. Half types 0.1: their own rounding of weights


@dataclasses.dataclass(frozen=True)
class Fold:
    """A place: how ("norm", "product", "linear", "attention"), the module or parameter that takes 1/s, the linear layers that take s, the largest
    |X| on the calibration before and after."""

    kind: str
    producer: str
    consumers: tuple[str, ...]
    largest_before: float = 0.0
    largest_after: float = 0.0


@dataclasses.dataclass(frozen=True)
class SmoothReport:
    """What was folded, and the linear layers that were not, with the reason."""

    alpha: float
    folds: list[Fold]
    left_out: dict[str, str]

    def __str__(self) -> str:
        lines = [f"SmoothQuant, alpha {self.alpha:g}: {len(self.folds)} places, {sum(len(f.consumers) for f in self.folds)} linear layers"]
        lines += [f"  {f.kind:9} {f.producer} -> {', '.join(f.consumers)}   largest |x| {f.largest_before:.3g} -> {f.largest_after:.3g}" for f in self.folds]
        return "\n".join([*lines, *(f"  left     {name}: {reason}" for name, reason in self.left_out.items())])


@dataclasses.dataclass(frozen=True)
class _Place:
    kind: str
    consumers: tuple[str, ...]  # names of linear modules
    divided: tuple[tuple[str, slice | Tensor, float], ...]  # (parameter, its rows, offset): value -> (value + offset) / s - offset
    heads: tuple[int, int] | None = None  # of attention: KV heads, query heads of each


def smooth_(model: nn.Module, calibration, alpha: float = 0.5) -> SmoothReport:
    """Fold the scales of activations into the weights before them, in place; the model computes what it did, and quantises better.

    calibration: batches as for `quantize_`. alpha: 0 leaves the difficulty with the activations, 1 moves all of it to the weights; 0.5 suits most models.
    All or nothing: raises ConversionError, and the model is as it was, where it cannot be exported, is quantised already, has nothing to fold, or
    would not compute the same. Needs the memory of the folded weights once more while it works.
    """
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ConversionError(f"alpha is {alpha!r}, expected a number from 0 to 1")
    refuse_int8(model, ", and its columns have lost what scaling would have saved", "smooth_ first, then quantize_")
    first = batches(model, calibration)[0]
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    for name, linear in linears.items():
        check_linear(name, linear)
    with evaluating(model), torch.no_grad():
        places, left_out = _places(model, linears, first)
        wanted = {name for place in places for name in place.consumers}
        if not wanted:
            raise ConversionError(f"{type(model).__name__} has no place to fold scales into", cure="; ".join(f"{n}: {r}" for n, r in [*left_out.items()][:3]) or "it has no linear layers behind norms, products or attention")
        maxima = input_maxima(model, {name: linears[name] for name in wanted}, calibration)
        before = _outputs(model, first)
        for attempt in (places, [p for p in places if p.kind != "attention"]):
            undo: dict[int, tuple[Tensor, Tensor]] = {}
            error, allowed = math.inf, TOLERANCE.get(next(iter(linears.values())).weight.dtype, 0.1)
            try:
                _fold(model, attempt, maxima, alpha, undo)
                error = _difference(_outputs(model, first), before)
            finally:  # also where memory runs out halfway
                for parameter, old in undo.values() if not error <= allowed else ():
                    parameter.copy_(old)
            if error <= allowed:
                break
        else:
            raise ConversionError(f"the folded model differs from the original by {error:.2g}: it was left as it was", cure="look for weights that are read outside of their modules")
        if attempt is not places:
            left_out |= {name: "its attention does not carry a scale of the values to its output unchanged" for p in places if p.kind == "attention" for name in p.consumers}
        after = {name: maxima[name] / _scales(model, place, maxima, alpha, undo.values()) for place in attempt for name in place.consumers}
        folds = [Fold(p.kind, p.divided[0][0], p.consumers, float(maxima[p.consumers[0]].max()), float(after[p.consumers[0]].max())) for p in attempt]
    return SmoothReport(alpha, folds, left_out)


# ---------------------------------------------------------------- arithmetic


def _scales(model, place: _Place, maxima, alpha: float, undo=()) -> Tensor:
    """s [K] of a place, from the weights as they were."""
    old = {id(parameter): value for parameter, value in undo}
    layers = [model.get_submodule(name) for name in place.consumers]
    largest = torch.stack([as_rows(m, old.get(id(m.weight), m.weight)).abs().amax(0).float() for m in layers]).amax(0)
    given = torch.stack([maxima[name] for name in place.consumers]).amax(0)
    if place.heads is not None:
        largest, given = (t.view(*place.heads, -1).amax(1, keepdim=True).expand(*place.heads, -1).reshape(-1) for t in (largest, given))
    s = (given ** alpha / largest ** (1 - alpha)).clamp(LEAST, 1 / LEAST)
    return torch.where((given > 0) & (largest > 0), s, 1)


def _fold(model, places: list[_Place], maxima, alpha: float, undo: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Change the parameters; undo gets id -> (parameter, its old value). One parameter may be in two places: o_proj's columns and, before it, v_proj's rows."""
    scales = [_scales(model, place, maxima, alpha) for place in places]

    def change(name: str, by) -> None:
        parameter = model.get_parameter(name)
        undo.setdefault(id(parameter), (parameter, parameter.clone()))
        wide = parameter.double()
        by(as_rows(model.get_submodule(name.rpartition(".")[0]), wide) if wide.dim() == 2 else wide)
        parameter.copy_(wide)  # rounded once a fold

    for place, s in zip(places, scales):
        s = s.double()
        for name in place.consumers:
            change(f"{name}.weight", lambda w: w.mul_(s))
        rows = s.view(*place.heads, -1)[:, 0].reshape(-1) if place.heads is not None else s
        for name, part, offset in place.divided:
            def divide(w):
                w[part] = ((w[part] + offset) / (rows if w.dim() == 1 else rows[:, None])) - offset

            change(name, divide)


def _outputs(model, call) -> list[Tensor]:
    found: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: found.extend(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()))
    try:
        run(model, call)
    finally:
        handle.remove()
    return found


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative one; NaN or inf where an output is not finite that was, or was another."""
    each = []
    for a, b in zip(found, wanted, strict=True):
        a, b = a.double(), b.double()
        each.append(torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).norm() / torch.where(b.isfinite(), b, 0.0).norm().clamp_min(1e-300))
    return float(torch.stack(each).max()) if each else 0.0


# ---------------------------------------------------------------- where


def _places(model: nn.Module, linears, call) -> tuple[list[_Place], dict[str, str]]:
    graph = _Exported(model, call, linears)
    places, left_out = [], {}
    for node, name in graph.linears.items():
        if any(name in place.consumers for place in places):
            continue
        found = graph.place(node)
        if isinstance(found, str):
            left_out[name] = found
        else:
            places.append(found)
    for name, linear in linears.items():
        if is_conv1d(linear) and name not in graph.times:
            left_out[name] = "the graph has no product x w with its weight"
    for place in _attention(graph, _sites(model, graph, call, left_out)):
        if place.consumers[0] in left_out:  # else its scale goes elsewhere already
            places.append(place)
            left_out.pop(place.consumers[0])
    return places, left_out


def _sites(model: nn.Module, graph: _Exported, call: Inputs, left_out: dict[str, str]) -> Iterator[Site]:
    """Attention modules known by their names, and those of Conv1D that were seen at work; each tried out. left_out gets why one is none."""
    call, flow, sites = _one_row(model, call), [], []
    with contextlib.suppress(ConversionError):
        sites = find_sites(model)
    try:
        if any(is_conv1d(m) for m in graph.modules.values()):
            known = {site.name for site in sites}
            sites += [s for s in find_sites(model, turned=False, watch=lambda: flow.append(trace(model, call)) or flow[0]) if s.name not in known and any(is_conv1d(s.linear(child)) for child in s.children)]
    except ConversionError as error:
        left_out |= {a.output: f"attentions cannot be told apart: {error.what}" for seen in flow for a in seen.attentions if a.output in left_out and is_conv1d(graph.modules[a.output])}
    sites = [s for s in sites if all(graph.times[f"{s.name}.{child}".lstrip(".")] == 1 for child in s.children)]
    calls = probe_calls(model, sites, call, cross={})
    for site in (s for s in sites if s.name in calls):
        output, problem = f"{site.name}.{site.output}".lstrip("."), "another basis of the values changes its attention's output"
        try:
            found = carrying(site, calls[site.name])
        except Exception as error:  # the module does not run alone, in float64
            found = site if site.q.child != site.k.child and site.dtype in TOLERANCE else None  # then the check of the whole says it, which half types are too coarse for
            problem = f"its attention could not be tried out: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if found is not None:
            yield found
        elif output in left_out:
            left_out[output] = problem


def _one_row(model: nn.Module, call: Inputs) -> Inputs:
    """Enough to see what follows what, and every result between is kept meanwhile; the whole call where the model does not take it."""
    try:
        run(model, row := call.map(lambda x: x[:1]))
    except Exception:
        return call
    return row


def _attention(graph: _Exported, sites: Iterator[Site]) -> Iterator[_Place]:
    for site in sites:
        output, value = (f"{site.name}.{child}" if site.name else child for child in (site.output, site.v.child))
        if output not in graph.times or value not in graph.times or graph.problem_of(output) or graph.problem_of(value, rows=True) or sizes_of(site.linear(site.output))[1] != site.heads * site.dv:
            continue
        rows = value_rows(site)
        divided = [(f"{value}.weight", rows, 0.0)] + ([(f"{value}.bias", rows, 0.0)] if site.linear(site.v.child).bias is not None else [])
        yield _Place("attention", (output,), tuple(divided), (site.kv_heads, site.heads // site.kv_heads))


class _Exported:
    """The model's graph: which linear layer each product is, and what makes its input."""

    def __init__(self, model: nn.Module, call, linears):
        try:
            takes = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
            exported = torch.export.export(model, call.args, {**(call.kwargs or {}), **takes}, strict=False)
        except Exception as error:
            raise ConversionError(f"{type(model).__name__} cannot be exported: {str(error).splitlines()[0] if str(error) else type(error).__name__}", cure="torch.export.export(model, ...) says more; fold by hand, or quantise without") from error
        for check in exported.graph_module.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
            exported.graph_module.graph.erase_node(check)  # what export says of casts is no reader
        nodes = {n.name: n for n in exported.graph_module.graph.nodes}
        self.parameter = {nodes[place]: name for place, name in exported.graph_signature.inputs_to_parameters.items() if place in nodes}
        self.names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(p), []).append(name)
        self.model, self.modules = model, linears
        calls = {n: self._module(n) for n in exported.graph_module.graph.nodes if n.target in _SIDES}
        self.linears = {n: name for n, name in calls.items() if name is not None}
        self.times = Counter(self.linears.values())

    def _module(self, node: Node) -> str | None:
        """The linear module whose weight the product is with; a tied weight goes by its first name in the graph."""
        name = self.parameter.get(node.args[_SIDES[node.target][1]])
        names = self.names[id(self.model.get_parameter(name))] if name is not None else []
        return next((found for n in names if (found := n.rpartition(".")[0]) in self.modules and is_conv1d(self.modules[found]) == (node.target is not aten.linear.default)), None)

    def problem_of(self, name: str, rows: bool = False) -> str | None:
        """Why a linear layer's weight may not be changed; rows: of the bias too, which must be what its product is added to."""
        weight, bias = self.modules[name].weight, self.modules[name].bias
        if len(self.names[id(weight)]) > 1:
            return f"its weight is tied to {next(n for n in self.names[id(weight)] if n != f'{name}.weight')}"
        if self.times[name] > 1:
            return f"it runs {self.times[name]} times in one forward"
        node = next(n for n in self.linears if self.linears[n] == name)
        if len(node.args[_SIDES[node.target][1]].users) > 1:
            return "its weight is also read outside of it"
        added = node.args[0] if node.target is aten.addmm.default else node.args[2] if len(node.args) > 2 else None
        if rows and (added is None) != (bias is None) or rows and bias is not None and (len(self.names[id(bias)]) > 1 or len(added.users) > 1 or self.parameter.get(added) not in self.names[id(bias)]):
            return "its bias is shared, or another"
        return None

    def place(self, node: Node) -> _Place | str:
        """Where the scale of this linear layer's input goes, or why nowhere."""
        source = self._through(node.args[_SIDES[node.target][0]])
        consumers, other = self._consumers(source)
        if other is not None:
            return f"its input is also read by {getattr(other.target, '__name__', other.op)}, which is no linear layer" if other.op != "output" else "its input is also returned by the model"
        names = tuple(dict.fromkeys(self.linears[n] for n in consumers))
        for name in names:
            if (problem := self.problem_of(name)) is not None:
                return problem if name == self.linears[node] else f"{name} shares its input, and {problem}"
        found = self._norm(source) or self._linear(source)
        if isinstance(found, str):
            return found
        return _Place(found[0], names, found[1]) if found is not None else "what makes its input has no weight for each of its columns"

    def _through(self, node: Node) -> Node:
        while isinstance(node, Node) and node.args and (node.target in _KEEPS_COLUMNS or node.target in _RESHAPES and node.meta["val"].shape[-1] == node.args[0].meta["val"].shape[-1]
                                                         or node.target is aten.dropout.default):
            node = node.args[0]
        return node

    def _consumers(self, source: Node) -> tuple[list[Node], Node | None]:
        """(linear layers that read it, another reader)"""
        found, stack = [], [(source, u) for u in source.users]
        while stack:
            value, user = stack.pop()
            if user in self.linears and user.args[_SIDES[user.target][0]] is value and sum(a is value for a in user.args) == 1:
                found.append(user)
            elif self._through(user) is not user:
                stack.extend((user, u) for u in user.users)
            elif user.target is not aten.sym_size.int:
                return found, user
        return sorted(found), None

    def _parameter(self, node) -> str | None:
        """A vector of the model."""
        node = self._through(node) if isinstance(node, Node) else node
        name = self.parameter.get(node)
        return name if name is not None and node.meta["val"].dim() == 1 else None

    def _problem_of_vector(self, name: str, reader: Node) -> str | None:
        known = self.names[id(self.model.get_parameter(name))]
        node = next(n for n, other in self.parameter.items() if other == name)
        readers = [u for u in node.users]
        while len(readers) == 1 and self._through(readers[0]) is not readers[0]:
            readers = [*readers[0].users]
        return f"{name} is shared" if len(known) > 1 or len(readers) != 1 else None

    def _norm(self, source: Node):
        """("norm", parameters to divide), a reason, or None"""
        vectors: list[tuple[str, slice, float]] = []
        if source.target in (aten.layer_norm.default, aten.rms_norm.default):
            given = [a for a in source.args[2:4] if isinstance(a, Node)]
            if not given or source.target is aten.layer_norm.default and not isinstance(source.args[2] if len(source.args) > 2 else None, Node):
                return "its norm has no weight"
            vectors = [(self._parameter(a), slice(None), 0.0) for a in given]
        elif source.target is aten.mul.Tensor:
            for a in source.args:
                below, offset = (self._through(a), 0.0) if isinstance(a, Node) else (None, 0.0)
                if below is not None and below.target is aten.add.Tensor and 1 in below.args[1:]:
                    below, offset = self._through(below.args[0]), 1.0
                if (name := self._parameter(below)) is not None and _width(below) == _width(source):
                    vectors = [(name, slice(None), offset)]
                    break
        if not vectors or any(name is None for name, _, _ in vectors):
            return None
        problem = next((p for name, _, _ in vectors if (p := self._problem_of_vector(name, source))), None)
        return problem or ("norm", tuple(vectors))

    def _linear(self, source: Node):
        candidates = [source] if source in self.linears else []
        kind = "linear"
        if source.target is aten.mul.Tensor:
            kind, candidates = "product", [n for a in reversed(source.args) if isinstance(a, Node) and (n := self._through(a)) in self.linears and _width(n) == _width(source)]
            candidates = [n for n in candidates if candidates.count(n) == 1]  # x * x would be divided twice
        for node in candidates:
            name = self.linears[node]
            if self.problem_of(name, rows=True) is None and (node is source or self._reads_only(node, source)):
                parameters = [f"{name}.weight"] + ([f"{name}.bias"] if self.modules[name].bias is not None else [])
                return kind, tuple((p, slice(None), 0.0) for p in parameters)
        return None

    def _reads_only(self, node: Node, reader: Node) -> bool:
        stack = [*node.users]
        while stack:
            user = stack.pop()
            if user is reader:
                continue
            if self._through(user) is user:
                return False
            stack.extend(user.users)
        return True


def _width(node: Node) -> int:
    return node.meta["val"].shape[-1]
