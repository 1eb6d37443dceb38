"""Capture and AOT: the private torch calls they rest on, one test each, so that an upgrade of torch breaks here first."""
import torch
from tileweld import explain
from tileweld.compiler import aot, capture
from tileweld.compiler.ir.graph import source_of
from torch import nn

aten = torch.ops.aten


def captured(model, *inputs, dynamic=None):
    """The captured graph of the first (and only) Dynamo graph."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(capture.capture(gm, example_inputs))
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    (graph,) = graphs
    return graph


def targets(gm):
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def test_tracing_context_gives_the_fake_mode_and_dynamic_shapes():
    """TracingContext.try_get, tensor_to_context, FakeTensorMode.from_tensor."""
    gm = captured(nn.Linear(8, 8), torch.randn(5, 8), dynamic=True)
    x = next(n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dim() == 2 and n.meta["val"].shape[-1] == 8 and isinstance(n.meta["val"].shape[0], torch.SymInt))
    assert isinstance(x, torch._subclasses.FakeTensor) and x.fake_mode.shape_env is not None


def test_make_fx_pre_dispatch_keeps_composite_ops_whole():
    """make_fx(pre_dispatch=True) under enable_python_dispatcher."""
    def f(x, w, q):
        y = torch.nn.functional.rms_norm(torch.nn.functional.linear(x, w), (8,))
        return torch.nn.functional.scaled_dot_product_attention(q, q, q), torch.softmax(torch.matmul(y, y.mT), -1)

    found = targets(captured(f, torch.randn(2, 8, 8), torch.randn(8, 8), torch.randn(1, 2, 4, 8)))
    for op in (aten.linear.default, aten.rms_norm.default, aten.matmul.default, aten.softmax.int, aten.scaled_dot_product_attention.default):
        assert op in found


def test_preserve_node_meta_keeps_the_users_line():
    """torch.fx.traceback.preserve_node_meta with Interpreter.run."""
    def f(x):
        return torch.tanh(x) * 2  # this line

    node = next(n for n in captured(f, torch.randn(3)).graph.nodes if n.target is aten.tanh.default)
    assert "test_capture.py" in source_of(node) and "torch.tanh(x) * 2" in source_of(node)


def test_parameters_arrive_as_real_tensors():
    """Weights can be read at compile time: Dynamo hands parameters over as they are."""
    seen = []

    def backend(gm, example_inputs):
        seen.extend(x for x in example_inputs if isinstance(x, nn.Parameter))
        return gm.forward

    model = nn.Linear(4, 4)
    torch.compile(model, backend=backend)(torch.randn(2, 4))
    assert any(x is model.weight for x in seen)


def test_aot_autograd_and_min_cut_partition():
    """torch._dynamo.backends.common.aot_autograd, functorch.compile: forward and backward graphs both reach the lowering."""
    lowered = []

    def backend(gm, example_inputs):
        return aot.compile_graph(capture.capture(gm, example_inputs), example_inputs, lambda g, is_backward: lowered.append(is_backward) or g.forward)

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(2, 4)
    compiled = torch.compile(model, backend=backend)
    compiled(x).sum().backward()
    got = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    assert lowered == [False, True]
    torch.testing.assert_close(got, model[0].weight.grad)


def test_real_tensors_lifts_the_modes_of_tracing():
    """torch.utils._python_dispatch._disable_current_modes."""
    with torch._subclasses.FakeTensorMode():
        assert isinstance(torch.ones(2), torch._subclasses.FakeTensor)
        with capture.real_tensors():
            assert torch.ones(2).sum().item() == 2


def test_capture_without_a_tracing_context():
    """A pass-level unit test captures a plain function with make_fx's own fakes."""
    def f(x):
        return torch.relu(x) + 1

    gm = torch.fx.symbolic_trace(f)
    assert aten.relu.default in targets(capture.capture(gm, [torch.randn(3)]))


def test_aot_says_which_input_was_a_weight():
    """torch._functorch._aot_autograd.descriptors.PlainAOTInput, the mark _dynamo_static_input_type of buffers."""
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.unused = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(2))
            self.register_buffer("fixed", torch.randn(4))

        def forward(self, x):
            return x @ self.w + self.fixed

    found = []

    def backend(gm, example_inputs):
        def lower(graph, is_backward):
            found.append(sum("weight" in n.meta for n in graph.graph.find_nodes(op="placeholder")))
            return graph.forward

        return aot.compile_graph(capture.capture(gm, example_inputs), example_inputs, lower)

    model, x = Model(), torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x).sum().backward()
    assert found == [2, 0, 0]  # w and fixed in inference; none in the forward and backward of training


def test_storages_are_told_apart_and_optimizers_are_heard():
    """torch.multiprocessing.reductions.StorageWeakRef, UntypedStorage._cdata, torch.optim.optimizer.register_optimizer_step_post_hook."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.optim.optimizer import register_optimizer_step_post_hook

    p = nn.Parameter(torch.randn(3))
    reference, identity, heard = StorageWeakRef(p.untyped_storage()), p.untyped_storage()._cdata, []
    assert p.detach().untyped_storage()._cdata == identity and not reference.expired()
    p.data = torch.randn(3)
    assert reference.expired() and p.untyped_storage()._cdata != identity
    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: heard.append(optimizer))
    try:
        p.grad, version = torch.ones(3), p._version
        optimizer = torch.optim.SGD([p], lr=0.1, fused=True)
        optimizer.step()
        assert heard == [optimizer] and p._version == version  # a fused step leaves the version as it is
    finally:
        handle.remove()


def test_a_captured_graph_has_no_history_of_other_graphs():
    """Memory: what make_fx notes of earlier graphs, and a second copy of sizes and strides, is a third of a graph's objects."""
    report = explain(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), torch.randn(2, 4))
    metas = [n.meta for gm in (*report.captured, *report.graphs) for n in gm.graph.nodes]
    assert len(metas) > 6 and not any({"from_node", "tensor_meta"} & m.keys() for m in metas) and sum("val" in m for m in metas) >= len(metas) - 2
