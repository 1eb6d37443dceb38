"""Autocast becomes casts in the graph: a rewrite sees them, and what it makes of several ops is not cast again.

    with torch.autocast("cpu", torch.bfloat16): F.linear(x, w)      ->      F.linear(x.to(torch.bfloat16), w.to(torch.bfloat16))

Which arguments of which op are cast, and to what, is torch's business and changes with its versions. So no table is kept here: every op that autocast could touch runs on its fake
arguments with autocast and without, the casts that torch makes are noted, and the op is run again on arguments cast that way. Its inner ops must then see the same dtypes; where
one does not, the graph is left under autocast as it was, and the linear passes refuse its products with that reason.

A cast of a weight is an op like any other: in inference what depends on weights alone is kept between calls (folded.py), in training it is differentiated.
"""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import log
from .ir.graph import on_fakes, value

aten = torch.ops.aten
DEVICES = ("cpu", "cuda")
ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_CASTS = (aten._to_copy.default, torch.ops.prim.device.default)


def is_on() -> bool:
    """Is autocast on around what is compiled now?"""
    return any(torch.is_autocast_enabled(device) for device in DEVICES)


def off():
    """A context without autocast, as AOT's own around its calls."""
    return torch._C._DisableAutocast()


def is_under_autocast(gm: GraphModule) -> bool:
    """Is a captured graph to be run with the autocast that was on around it?"""
    return gm.meta.get("under_autocast", True)


def as_it_will_run(gm: GraphModule):
    """The context in which a captured graph is rewritten, differentiated and lowered: without autocast, unless it stayed under it."""
    return contextlib.nullcontext() if is_under_autocast(gm) else off()


def without_autocast(run: Callable) -> Callable:
    """A compiled graph that is called without autocast: its casts are ops, and one more in a backward of float32 would be a mistake."""
    @functools.wraps(run)
    def call(args):
        with off():
            return run(args)

    call._boxed_call = True
    return call


def make_casts_explicit(graph: Graph) -> bool:
    """Rewrite a captured graph in place, to be run without autocast; False where that cannot be, and the graph is as it was. The ambient autocast is the one it was captured under."""
    if not is_on() and not any(n.target is ENTER for n in graph.nodes):
        return True
    found: dict[Node, dict[Node | str, torch.dtype]] = {}
    mode = next((value(n).fake_mode for n in graph.nodes if hasattr(value(n), "fake_mode")), None)
    entered: dict[Node, torch.amp.autocast] = {}
    with on_fakes(mode):
        try:
            for node in graph.nodes:
                if node.target is ENTER:
                    entered[node] = torch.amp.autocast(*node.args, **node.kwargs)
                    entered[node].cache_enabled = False  # its casts of fake weights would be found again instead of made
                    entered[node].__enter__()
                elif node.target is EXIT:
                    entered.pop(node.args[0]).__exit__(None, None, None)
                elif is_on() and node.op not in ("placeholder", "get_attr", "output"):
                    with _uncached():
                        found[node] = _casts(node)
        except _Unknown as unknown:
            log.get("capture").info("autocast stays: %s", unknown)
            return False
        finally:
            for left in reversed(entered.values()):
                left.__exit__(None, None, None)
        for node, casts in found.items():
            _apply(graph, node, casts)
    for node in reversed(graph.nodes):
        if node.target in (ENTER, EXIT):
            graph.erase_node(node)
    return True


class _Unknown(Exception):
    """What autocast does to an op that cannot be said by casts of its arguments."""


class _Calls(TorchDispatchMode):
    """Notes the ops that are called; casts: (what was cast, to what)."""

    def __init__(self):
        super().__init__()
        self.computed, self.casts = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op is aten._to_copy.default:
            self.casts.append((args[0], result.dtype))
        elif op not in _CASTS and not _storages(result) & _storages((args, kwargs)):  # no view
            self.computed.append((str(op), *(x.dtype for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))))
        return result


@contextlib.contextmanager
def _uncached():
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _run(node: Node, fake=value):
    """(the calls inside of an op, the dtypes of its results), with whatever autocast is on."""
    args, kwargs = map_arg((node.args, node.kwargs), fake)
    with _Calls() as calls:
        result = node.target(*args, **kwargs)
    return calls, [x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor)]


def _casts(node: Node) -> dict[Node | str, torch.dtype]:
    """Argument -> the dtype that autocast casts it to, or "dtype" -> what the op is asked for."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        if isinstance(target, torch._ops.HigherOrderOperator) or node.op != "call_function":
            raise _Unknown(f"{target} has a body of its own")
        return {}
    name = target.name()
    keys = ("AutocastCPU", "AutocastCUDA", "CompositeImplicitAutograd")
    if not any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys) or not any(value(a).dtype.is_floating_point for a in node.all_input_nodes if isinstance(value(a), torch.Tensor)):
        return {}
    if target._schema.is_mutable:
        with off():
            plain = _dry(node)
        if _dry(node) != plain:
            raise _Unknown(f"{name} writes to an argument")
        return {}
    calls, dtypes = _run(node)
    with off():
        if len({value(a).dtype for a in node.all_input_nodes if isinstance(value(a), torch.Tensor) and value(a).dtype.is_floating_point}) == 1:  # else it may not even run
            plain, plain_dtypes = _run(node)
            if (calls.computed, dtypes) == (plain.computed, plain_dtypes):
                return {}
        casts = {a: dtype for a in node.all_input_nodes for x, dtype in calls.casts if isinstance(value(a), torch.Tensor) and _storage(x) == _storage(value(a)) and dtype != value(a).dtype}
        again, again_dtypes = _run(node, lambda n: value(n).to(casts[n]) if n in casts else value(n))
        if (calls.computed, dtypes) == (again.computed, again_dtypes):
            return casts
        if any(a.name == "dtype" and node.kwargs.get("dtype") is None for a in target._schema.arguments) and len(set(dtypes)) == 1:
            try:  # softmax(x, dim) on a GPU computes in float32 without a cast of x
                args, kwargs = map_arg((node.args, node.kwargs), value)
                if target(*args, **kwargs | {"dtype": dtypes[0]}).dtype == dtypes[0]:
                    return {"dtype": dtypes[0]}
            except (TypeError, RuntimeError):
                pass
    raise _Unknown(f"what it does to {name}")


def _dry(node: Node):
    """The calls of an op that writes to its argument, on copies."""
    calls, dtypes = _run(node, lambda n: value(n).clone() if isinstance(value(n), torch.Tensor) else value(n))
    return calls.computed, calls.casts and [d for _, d in calls.casts], dtypes


def _storages(x) -> set[int]:
    return {_storage(y) for y in tree_leaves(x)} - {None}


def _storage(x) -> int | None:
    return x.untyped_storage()._cdata if isinstance(x, torch.Tensor) and x.layout is torch.strided else None


def _apply(graph: Graph, node: Node, casts: dict[Node | str, torch.dtype]) -> None:
    made = {}
    with graph.inserting_before(node):
        for a, dtype in casts.items():
            if a == "dtype":
                node.kwargs = node.kwargs | {"dtype": dtype}
                continue
            made[a] = new = graph.call_function(aten.to.dtype, (a, dtype))
            new.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom", "recompute", "ac_graph_id")}
            new.meta["val"] = value(a).to(dtype)
    if made:
        node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
