"""functionalise: in-place ops of a captured graph become values

    y = x[:, 1:]; y.add_(1); use(x)     ->     y' = x[:, 1:] + 1; x' = slice_scatter(x, y', 1, 1); use(x')

so that a node's meaning no longer depends on where it stands. All tensors over one storage form a *family*: a base and views of
it. A write through a view is carried up to the base by the view's inverse; a later read applies the view again. If the base
comes from outside (an input, a buffer), one copy_ at the end of the graph gives it its new value, as eager left it.

Legality; a family that breaks a rule keeps its in-place ops, and its storage is returned as *frozen*:
- every write is an aten op with a functional counterpart, is not random, and writes its first argument alone;
- every view written through has an inverse (an expanded view or an as_strided has none);
- nothing else writes to it: no batch norm in training, no higher-order op, no out= argument; one base, not two inputs;
- no gradient depends on when it happened: no detached alias and no change of grad mode where the base requires grad.
If an output would come out with other strides than eager's, the graph stays as it was.
"""
from __future__ import annotations

import contextlib
import operator

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..compiler.ir import stop_gradient as _stop_gradient_op  # noqa: F401 (registers the op)
from ..compiler.ir.graph import is_call, is_tensor, on_fakes, size, value

NAME = "functionalise"
aten = torch.ops.aten
_SAME = frozenset({aten.alias.default, aten.contiguous.default, aten.detach.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default})
_RESHAPED = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
                       aten.reshape_as.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default})
#: view -> op(base, new view, *the view's other arguments): the base with the view written
_SCATTER = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default, aten.diagonal.default: aten.diagonal_scatter.default}
_OWN_INVERSE = frozenset({aten.transpose.int, aten.t.default, aten.mT.default, aten.numpy_T.default, aten.swapaxes.default, aten.swapdims.default})
_AUTOCAST_SENSITIVE = frozenset({"addmm_", "addmv_", "addbmm_", "baddbmm_", "addr_"})  # under autocast these compute in another dtype than their counterparts
#: what a node says about where it comes from, and about checkpointing
PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom", "recompute", "ac_graph_id")
#: no gradient passes through these
STOPS = (aten.detach.default, torch.ops.tileweld.stop_gradient.default)
#: ops that write to an argument although their schema does not say so
HIDDEN_WRITES = frozenset({aten.batch_norm.default, aten.instance_norm.default, aten._batch_norm_impl_index.default, aten.native_batch_norm.default,
                           aten.cudnn_batch_norm.default})


def storage(x) -> int | None:
    """A number for the storage that a fake value lies in."""
    return x.untyped_storage()._cdata if isinstance(x, torch.Tensor) and x.layout is torch.strided else None


def storages(node) -> set[int]:
    """The storages of a node's value: several for a list of tensors."""
    found = value(node) if isinstance(node, Node) else None
    return {s for x in (found if isinstance(found, (list, tuple)) else [found]) if (s := storage(x)) is not None}


def written(node: Node) -> list[Node]:
    """The arguments that a node writes to, or may write to."""
    if node.op in ("placeholder", "get_attr", "output") or node.target is operator.getitem:
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        if node.target is torch.ops.higher_order.autograd_function_apply:  # it says itself what it writes to
            return list(node.all_input_nodes) if node.kwargs.get("dirty_idx") else []
        pure = node.op == "call_function" and not isinstance(node.target, torch._ops.HigherOrderOperator)
        return [] if pure else list(node.all_input_nodes)
    if node.target in HIDDEN_WRITES:
        return list(node.all_input_nodes) if True in node.args else []
    if not node.target._schema.is_mutable:
        return []
    bound = list(zip(node.target._schema.arguments, node.args))
    bound += [(a, node.kwargs[a.name]) for a in node.target._schema.arguments if a.name in node.kwargs]
    found = []
    for argument, x in bound:
        if argument.alias_info is not None and argument.alias_info.is_write:
            map_arg(x, found.append)
    return found


def requires_grad(graph: Graph) -> set[Node]:
    """Nodes whose value may carry a gradient: inputs that do, and whatever is computed from them while gradients are on."""
    found, enabled = set(), torch.is_grad_enabled()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            x = value(node)
            if isinstance(x, torch.Tensor) and x.dtype.is_floating_point and node.meta.get("requires_grad", True):
                found.add(node)
        elif node.target is torch._C._set_grad_enabled:
            enabled = node.args[0]
        elif enabled and not is_call(node, *STOPS) and any(a in found for a in node.all_input_nodes):
            found.add(node)
            for s in {s for x in written(node) for s in storages(x)}:  # what shares memory with it carries a gradient too
                found.update(n for n in graph.nodes if n < node and s in storages(n))
    return found


@contextlib.contextmanager
def faking(graph: Graph):
    """Run ops on the fake values of a graph."""
    mode = next((value(n).fake_mode for n in graph.nodes if is_tensor(n) and hasattr(value(n), "fake_mode")), None)
    with on_fakes(mode):
        yield


def emit(graph: Graph, like: Node, target, *args, **kwargs) -> Node:
    """A call at the graph's insertion point with its fake value; provenance is that of ``like``. Call it within `faking`."""
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = map_arg((args, kwargs), value)
    node.meta = {k: like.meta[k] for k in PROVENANCE if k in like.meta}
    node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def functionalise(gm: GraphModule) -> set[int]:
    """Rewrite gm.graph; returns the storages that in-place ops still write to."""
    families = _families(gm.graph)
    legal = {s: family for s, family in families.items() if family.is_legal()}
    if legal:
        try:
            with faking(gm.graph):
                graph = _Rebuild(gm.graph, legal).run()
        except (RuntimeError, ValueError, TypeError):  # an op refuses the new strides: keep what works
            graph = None
        if graph is not None and _same_outputs(gm.graph, graph):
            gm.graph = graph
            return {s for s in families if s not in legal}
    return set(families)


def _same_outputs(old: Graph, new: Graph) -> bool:
    def layouts(graph):
        outputs = []
        map_arg(graph.output_node().args, outputs.append)
        return [(value(n).dtype, [size(x) for x in (*value(n).shape, *value(n).stride())]) if is_tensor(n) else None for n in outputs]

    return layouts(old) == layouts(new)


class _Family:
    """All nodes over one storage that somebody writes to; ``parent`` leads from each to the node it is a view of."""

    def __init__(self, nodes: list[Node], writers: list[Node], grads: set[Node], modes_change: bool, autocast: bool):
        self.nodes, self.writers, self.grads, self.modes_change, self.autocast = nodes, writers, grads, modes_change, autocast
        members = set(nodes)
        self.parent = {n: p for n in nodes if (p := next((a for a in n.all_input_nodes if a in members), None)) is not None}
        self.base = nodes[0]

    def is_legal(self) -> bool:
        if [n for n in self.nodes if n not in self.parent] != [self.base] or not is_tensor(self.base):
            return False
        if any(n in self.grads for n in self.nodes) and (self.modes_change or any(is_call(n, *STOPS) for n in self.nodes)):
            return False
        for n in self.nodes:
            if n in self.writers or n is self.base or n.target is operator.getitem:
                continue
            known = isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "aten" and n.target is not aten.as_strided.default
            if not known or n.args[0] is not self.parent[n]:
                return False
        return all(self._is_legal_write(w) for w in self.writers)

    def _is_legal_write(self, node: Node) -> bool:
        if counterpart(node) is None or node not in self.parent or node.args[0] is not self.parent[node]:
            return False
        if self.autocast and node.target._schema.name.split("::")[1] in _AUTOCAST_SENSITIVE:
            return False
        if is_call(node, aten.copy_.default) and (not is_tensor(node.args[1]) or value(node.args[1]).device != value(node).device):
            return False
        view = node.args[0]
        while view is not self.base:
            if view not in self.writers and view.target not in _SAME | _RESHAPED | _OWN_INVERSE | _SCATTER.keys() | {aten.permute.default}:
                return False
            view = self.parent[view]
        return True


def counterpart(node: Node):
    """The functional op of an in-place one; None if there is none, or it is random, or changes sizes or strides in place."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or [a for a in written(node)] != [node.args[0]]:
        return None
    if torch.Tag.inplace_view in op.tags or torch.Tag.nondeterministic_seeded in op.tags:
        return None
    name = op._schema.name.split("::")[1]
    if name in ("copy_", "fill_", "zero_"):
        return op
    plain = name.replace("__i", "__", 1) if name.startswith("__i") else name[:-1] if name.endswith("_") else None
    found = getattr(getattr(aten, plain or "", None), op._overloadname, None) if plain else None
    return found if found is not None and not found._schema.is_mutable else None


def _families(graph: Graph) -> dict[int, _Family]:
    by_storage, writers = {}, {}
    for node in graph.nodes:
        for s in storages(node):
            by_storage.setdefault(s, []).append(node)
        for x in written(node):
            for s in storages(x):
                writers.setdefault(s, []).append(node)
    if not writers:
        return {}
    grads = requires_grad(graph)
    modes_change = any(n.target is torch._C._set_grad_enabled for n in graph.nodes)  # capture leaves one only where it cannot tell what that means
    autocast = any("autocast" in getattr(n.target, "__name__", "") for n in graph.nodes)
    return {s: _Family(by_storage[s], w, grads, modes_change, autocast) for s, w in writers.items()}


class _Rebuild:
    """Copies a graph node by node; members of a family are made when they are read, from the base's value at that time."""

    def __init__(self, old: Graph, families: dict[int, _Family]):
        self.old, self.graph, self.env = old, Graph(), {}
        self.family = {n: f for f in families.values() for n in f.nodes}
        self.current: dict[_Family, dict[Node, Node]] = {f: {} for f in families.values()}  # values since the last write

    def run(self) -> Graph:
        for node in self.old.nodes:
            family = self.family.get(node)
            if node.op == "output":
                self._write_back(node)
            if family is None or node is family.base:
                self.env[node] = new = self.graph.node_copy(node, self.read)
                if family is not None:
                    self.current[family] = {node: new}
            elif node in family.writers:
                self._write(family, node)
        return self.graph

    def read(self, node: Node) -> Node:
        family = self.family.get(node)
        if family is None:
            return self.env[node]
        values = self.current[family]
        if node not in values:
            if node in family.writers:  # an in-place op returns its first argument
                values[node] = self.read(family.parent[node])
            else:
                target = aten.reshape.default if node.target is aten.view.default else node.target  # the new base may have other strides
                args, kwargs = map_arg((node.args, node.kwargs), self.read)
                values[node] = emit(self.graph, node, target, *args, **kwargs)
        return values[node]

    def _write(self, family: _Family, node: Node) -> None:
        target = node.args[0]
        new = self._new_value(node, self.read(target))
        latest = {target: new, node: new}
        view = target
        while view is not family.base:
            parent = family.parent[view]
            new = new if view in family.writers else self._inverse(view, self.read(parent), new)
            view = parent
        self.current[family] = latest | {family.base: new}

    def _new_value(self, node: Node, old: Node) -> Node:
        """What an in-place op leaves in its first argument, of the argument's shape and dtype."""
        def make(target, *args, **kwargs):
            return emit(self.graph, node, target, *args, **kwargs)

        like = value(old)
        if is_call(node, aten.zero_, aten.fill_) and (is_call(node, aten.zero_) or not isinstance(node.args[1], Node)):
            return make(aten.full_like.default, old, node.args[1] if len(node.args) > 1 else 0)
        if is_call(node, aten.copy_, aten.fill_):
            new, needs_copy = self.read(node.args[1]), True
        else:
            args, kwargs = map_arg((node.args, node.kwargs), self.read)
            new, needs_copy = make(counterpart(node), *args, **kwargs), False
        if not is_tensor(new):
            return make(aten.full_like.default, old, new)
        if value(new).dtype != like.dtype:
            new = make(aten.to.dtype, new, like.dtype)
        if [size(s) for s in value(new).shape] != [size(s) for s in like.shape]:
            new = make(aten.expand.default, new, self._sizes(old, node))
        return make(aten.clone.default, new, memory_format=torch.contiguous_format) if needs_copy else new

    def _inverse(self, view: Node, parent: Node, new: Node) -> Node:
        if view.target in _SCATTER:
            args = map_arg(tuple(view.args[1:]), self.read)
            return emit(self.graph, view, _SCATTER[view.target], parent, new, *args, **map_arg(dict(view.kwargs), self.read))
        if view.target in _OWN_INVERSE:
            return emit(self.graph, view, view.target, new, *view.args[1:])
        if view.target is aten.permute.default:
            order = [d % len(view.args[1]) for d in view.args[1]]
            return emit(self.graph, view, aten.permute.default, new, [order.index(d) for d in range(len(order))])
        if view.target in _RESHAPED:
            return emit(self.graph, view, aten.reshape.default, new, self._sizes(parent, view))
        return new

    def _sizes(self, tensor: Node, like: Node) -> list:
        return [s if isinstance(s, int) else emit(self.graph, like, aten.sym_size.int, tensor, d) for d, s in enumerate(value(tensor).shape)]

    def _write_back(self, output: Node) -> None:
        for family, values in self.current.items():
            base = family.base
            if base.op in ("placeholder", "get_attr") and values[base] is not self.env[base]:
                copied = emit(self.graph, family.writers[-1], aten.copy_.default, self.env[base], values[base])
                self.current[family] = {base: copied}  # outputs that alias the input go on doing so
            else:
                self.current[family] = {base: values[base]}
