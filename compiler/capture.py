"""Capture: Dynamo's graph to pre-dispatch ATen with fake metadata, symbolic shapes and the user's source lines.

Private torch API lives here and in aot.py only: Dynamo hands a backend its own FX dialect, and the one way to whole ATen ops
(linear, matmul, softmax, rms_norm and scaled_dot_product_attention not yet decomposed) that also runs dynamic shapes is make_fx
with pre_dispatch under the fake mode of the ambient TracingContext. tests/compiler/test_capture.py names each call used.
"""
from __future__ import annotations

import contextlib
from collections import Counter

import torch
import torch.fx.traceback
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters
from torch._guards import CompileContext, TracingContext
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx, track_tensor_tree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy

from . import log
from .autocast import make_casts_explicit, off
from .fast_paths import PARTS
from .grad_regions import make_explicit
from .ir.graph import source_of, without_history
from .vmapped import is_transform


def fake_inputs(example_inputs) -> tuple[FakeTensorMode, list]:
    """Real tensors and parameters as fakes of the ambient mode, with Dynamo's dynamic-shape decisions; fakes and SymInts pass through."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None and context.fake_mode is not None else FakeTensorMode(allow_non_fake_inputs=True)
    fakes = []
    for x in example_inputs:
        if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor):
            symbolic = context.tensor_to_context.get(x) if context is not None else None
            x = mode.from_tensor(x, static_shapes=symbolic is None, symbolic_context=symbolic, source=getattr(symbolic, "tensor_source", None))
        fakes.append(x)
    return mode, fakes


def breaks_seen() -> Counter[str]:
    """Why Dynamo broke graphs in this process until now, and how often."""
    return Counter(counters["graph_break"])


def cannot_capture(gm: GraphModule) -> str | None:
    """Why a graph of Dynamo's has to go to AOT as it is: tensors inside vmap (of what vmapped.py leaves), grad or jvp are wrapped, and make_fx takes them for constants."""
    inside = next(filter(is_transform, gm.graph.nodes), None)
    if inside is None:
        return None
    where = f" ({source})" if (source := source_of(inside)) else ""
    return f"a graph with a torch.func transform (vmap, grad, jvp){where} is not captured: none of its ops are fused by a rewrite, only into regions"


class _Capturing(torch.fx.Interpreter):
    """Runs Dynamo's graph; two of its calls mean more to gradients than the ops inside them say, some are models of their own, and autocast has to be on where it is on."""

    def run(self, *args):
        self.modes: list[torch.amp.autocast] = []
        try:
            return super().run(*args)
        finally:
            while self.modes:  # an error in between
                self.modes.pop().__exit__(None, None, None)

    def call_function(self, target, args, kwargs):
        if target is torch.amp.autocast_mode._enter_autocast:  # Dynamo's call alone is noted and not made, and a matmul inside would seem to be float32
            self.modes.append(torch.amp.autocast(*args))
            return self.modes[-1].__enter__()
        if target is torch.amp.autocast_mode._exit_autocast:
            return self.modes.pop().__exit__(None, None, None)
        if target in PARTS and (result := PARTS[target](*args, **kwargs)) is not NotImplemented:
            return result
        if torch.is_grad_enabled():
            if target is torch.ops.higher_order.autograd_function_apply:
                return _whole(target, args, kwargs)
            if target is torch.ops.higher_order.tag_activation_checkpoint:
                return _checkpointed(*args)
        elif target is torch.ops.higher_order.tag_activation_checkpoint:
            return _Capturing(args[0]).run(*args[1:])
        return super().call_function(target, args, kwargs)


def _whole(target, args, kwargs):
    """An autograd.Function as one node, with its bodies as submodules, so that AOT differentiates it by its own backward.

    Traced like the rest it would leave its forward under no_grad, and what lies before it would silently get no gradient.
    """
    tracer = get_proxy_mode().tracer
    for body in args:
        if isinstance(body, GraphModule):
            tracer.root.register_module(f"autograd_function_{len(tracer.root._modules)}", body)
    call = tracer.create_proxy("call_function", target, tree_map(tracer.unwrap_proxy, args), kwargs)
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        result = target(*args, **kwargs)
    return track_tensor_tree(result, call, constant=None, tracer=tracer)


def _checkpointed(body: GraphModule, *args):
    """torch.utils.checkpoint: its ops among the others, to be fused, with the marks by which AOT's partitioner computes them again.

    Random ops are saved, since nothing here replays their state. A selective policy decides on ops that are fused by then: it is not
    asked, and the partitioner weighs time against memory as it does elsewhere.
    """
    graph = get_proxy_mode().tracer.graph
    before = set(graph.nodes)
    result = _Capturing(body).run(*args)
    if "_checkpoint_context_fn" not in body.meta:
        number = len(graph.nodes)  # grows along the graph: the partitioner keeps what passes from one checkpoint to the next
        for node in graph.nodes:
            if node not in before and node.op == "call_function":
                random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
                node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE if random else CheckpointPolicy.PREFER_RECOMPUTE)
                node.meta.setdefault("ac_graph_id", number)
    return result


def capture(gm: GraphModule, example_inputs) -> GraphModule:
    """The canonical graph of what Dynamo traced; every node has meta["val"] and, where known, meta["stack_trace"]."""
    mode, fakes = fake_inputs(example_inputs)
    with mode, enable_python_dispatcher(), torch.fx.traceback.preserve_node_meta():
        captured = make_fx(_Capturing(gm).run, pre_dispatch=True)(*fakes)
    for node, example in zip(captured.graph.find_nodes(op="placeholder"), example_inputs):
        node.meta["is_weight"] = isinstance(example, torch.nn.Parameter)
        node.meta["is_static"] = node.meta["is_weight"] or getattr(example, "_dynamo_static_input_type", None) is not None  # a module's buffer, or torch._dynamo.mark_static_address
        node.meta["requires_grad"] = isinstance(example, torch.Tensor) and example.requires_grad
    without_history(captured.graph)
    captured.meta["promised_sizes"] = _promised(mode)
    captured.meta["under_autocast"] = not make_casts_explicit(captured.graph)
    make_explicit(captured.graph)
    captured.graph.eliminate_dead_code()
    captured.recompile()
    log.get("capture").debug("captured %d nodes", len(captured.graph.nodes))
    return captured


def _promised(mode: FakeTensorMode) -> frozenset:
    """Shape symbols whose range the user has given (mark_dynamic with min or max): a guard that is narrower would be an error."""
    found = set()
    for tracked in getattr(mode.shape_env, "tracked_fakes", None) or ():
        for n, constraint in zip(getattr(tracked.fake, "shape", ()), getattr(tracked.symbolic_context, "constraint_sizes", ()) or ()):
            if isinstance(n, torch.SymInt) and type(constraint).__name__ == "StrictMinMaxConstraint":
                found |= n.node.expr.free_symbols
    return frozenset(found)


@contextlib.contextmanager
def real_tensors():
    """Inside, torch computes on real tensors again, though Dynamo or AOT are tracing, and casts none of them: kernels are timed so (pays.py)."""
    with torch.inference_mode(False), torch.no_grad(), off(), _disable_current_modes():
        yield


def compiled_frame() -> int | None:
    """Dynamo's number of the function that it is compiling now; None outside of it."""
    found = CompileContext.current_compile_id()
    return found.frame_id if found is not None else None


_when_compiled: list = []


def when_compiled(function) -> None:
    """Have ``function`` called once, when Dynamo is done with what it compiles now, guards included; at once outside of a compilation."""
    if CompileContext.current_compile_id() is None:
        function()
        return
    if _run_waiting not in callback_handler.end_callbacks:  # torch._dynamo.reset() forgets it
        callback_handler.register_end_callback(_run_waiting)
    _when_compiled.append(function)


def _run_waiting(_) -> None:
    while _when_compiled:
        _when_compiled.pop()()
