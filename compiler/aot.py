"""torch's own AOTAutograd behind one function: functionalisation, autograd of the fused ops, min-cut partition.

Private torch API (torch._dynamo.backends.common, functorch.compile) lives here and in capture.py only, because there is no public
way for a backend to train. tests/compiler/test_capture.py names each call used.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._functorch._aot_autograd.schemas import MutationType, OutputType, PlainTensorMeta
from torch._guards import TracingContext
from torch.fx import GraphModule

from .autocast import as_it_will_run, is_under_autocast, without_autocast
from .autocast import is_on as autocast_is_on


def compile_graph(gm: GraphModule, example_inputs, lower: Callable[[GraphModule, bool], Callable]):
    """Differentiate and functionalise a rewritten graph; ``lower(graph, is_backward)`` turns every resulting graph into a callable."""
    weights = [(n.meta.get("label") or n.name) if n.meta.get("is_static") or n.meta.get("is_weight") else "" for n in gm.graph.find_nodes(op="placeholder")]
    casts_are_ops = autocast_is_on() and not is_under_autocast(gm)

    def compiler(is_backward, is_inference=False):
        def compile_one(graph: GraphModule, inputs):
            if is_inference:
                name_weights(graph, weights)
            made = lower(graph, is_backward)
            if (context := TracingContext.try_get()) is not None and context.fw_metadata is not None:
                context.fw_metadata.bw_donated_idxs = []  # nothing here writes over saved tensors, so backward(retain_graph=True) may run
            made = made if getattr(made, "_boxed_call", False) else make_boxed_func(made)  # an executable takes its arguments as a list, to free them as it goes
            return without_autocast(made) if casts_are_ops else made

        return compile_one

    backend = aot_autograd(fw_compiler=compiler(False), bw_compiler=compiler(True), inference_compiler=compiler(False, is_inference=True), partition_fn=min_cut_rematerialization_partition,
                           keep_inference_input_mutations=True)  # a written KV cache is an op of the graph (reinplace.py), not a copy around it
    with as_it_will_run(gm):
        return backend(gm, example_inputs)


def name_weights(graph: GraphModule, weights: Sequence[str]) -> None:
    """meta["weight"] = its name, on every input of an inference graph that was a weight when it was captured (weights: names by input, "" for others): AOT says by a descriptor which input that was."""
    for node in graph.graph.find_nodes(op="placeholder"):
        described = node.meta.get("desc")
        if isinstance(described, PlainAOTInput) and described.idx < len(weights) and weights[described.idx]:
            node.meta["weight"] = weights[described.idx]


def wrapper_does(inputs: int, guards: int) -> str:
    """What torch's wrapper around the inference graph that was compiled last does besides passing ``inputs`` arguments and the results on; "" if nothing.

    guards: Dynamo's guards before the backend was called (`guard_count`); to be called before Dynamo's compilation ends.
    """
    context = TracingContext.try_get()
    meta, shapes = (context.fw_metadata, getattr(context.fake_mode, "shape_env", None)) if context is not None else (None, None)
    if meta is None or shapes is None:
        return "nothing is known of it"
    if context.guards_context.aotautograd_guards or guard_count() != guards:
        return "guards"
    if shapes.var_to_range or shapes.guards:
        return "shape symbols"
    if len(meta.input_info) != inputs or any(x.mutates_metadata or x.mutation_inductor_storage_resize or x.mutation_type is MutationType.MUTATED_OUT_GRAPH for x in meta.input_info):
        return "writing to inputs"
    if any(x.output_type is not OutputType.non_alias or x.requires_grad or not issubclass(x.raw_type, torch.Tensor) for x in meta.output_info) or meta.num_intermediate_bases:
        return "making views of results or inputs"
    if any(type(x) is not PlainTensorMeta for x in (*meta.subclass_inp_meta, *meta.subclass_fw_graph_out_meta)):
        return "wrapping tensor subclasses"
    if meta.tokens or meta.traced_tangents or meta.grad_enabled_mutation is not None or meta.num_graphsafe_rng_states or getattr(meta, "mutated_inp_stream_indices", None):
        return "side effects"
    return ""


def guard_count() -> int:
    """Guards that Dynamo has by now; -1 outside of it."""
    context = TracingContext.try_get()
    return len(context.guards_context.dynamo_guards) if context is not None else -1
