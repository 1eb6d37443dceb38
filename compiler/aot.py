"""torch's own AOTAutograd behind one function: functionalisation, autograd of the fused ops, min-cut partition.

Private torch API (torch._dynamo.backends.common, functorch.compile) lives here and in capture.py only, because there is no public
way for a backend to train. tests/compiler/test_capture.py names each call used.
"""
from __future__ import annotations

from collections.abc import Callable

from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch.fx import GraphModule


def compile_graph(gm: GraphModule, example_inputs, lower: Callable[[GraphModule, bool], Callable]):
    """Differentiate and functionalise a rewritten graph; ``lower(graph, is_backward)`` turns every resulting graph into a callable."""
    def compiler(is_backward):
        def compile_one(graph: GraphModule, inputs):
            made = lower(graph, is_backward)
            if (context := TracingContext.try_get()) is not None and context.fw_metadata is not None:
                context.fw_metadata.bw_donated_idxs = []  # nothing here writes over saved tensors, so backward(retain_graph=True) may run
            return made if getattr(made, "_boxed_call", False) else make_boxed_func(made)  # an executable takes its arguments as a list, to free them as it goes

        return compile_one

    backend = aot_autograd(fw_compiler=compiler(False), bw_compiler=compiler(True), inference_compiler=compiler(False), partition_fn=min_cut_rematerialization_partition,
                           keep_inference_input_mutations=True)  # a written KV cache is an op of the graph (reinplace.py), not a copy around it
    return backend(gm, example_inputs)
