"""Capture: Dynamo's graph to pre-dispatch ATen with fake metadata, symbolic shapes and the user's source lines.

Private torch API lives here and in aot.py only: Dynamo hands a backend its own FX dialect, and the one way to whole ATen ops
(linear, matmul, softmax, rms_norm and scaled_dot_product_attention not yet decomposed) that also runs dynamic shapes is make_fx
with pre_dispatch under the fake mode of the ambient TracingContext. tests/compiler/test_capture.py names each call used.
"""
from __future__ import annotations

import torch
import torch.fx.traceback
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import CompileContext, TracingContext
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from . import log


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


def capture(gm: GraphModule, example_inputs) -> GraphModule:
    """The canonical graph of what Dynamo traced; every node has meta["val"] and, where known, meta["stack_trace"]."""
    mode, fakes = fake_inputs(example_inputs)
    with mode, enable_python_dispatcher(), torch.fx.traceback.preserve_node_meta():
        captured = make_fx(torch.fx.Interpreter(gm).run, pre_dispatch=True)(*fakes)
    for node, example in zip(captured.graph.find_nodes(op="placeholder"), example_inputs):
        node.meta["is_weight"] = isinstance(example, torch.nn.Parameter)
    captured.graph.eliminate_dead_code()
    captured.recompile()
    log.get("capture").debug("captured %d nodes", len(captured.graph.nodes))
    return captured


def compiled_frame() -> int | None:
    """Dynamo's number of the function that it is compiling now; None outside of it."""
    found = CompileContext.current_compile_id()
    return found.frame_id if found is not None else None
