"""The whole way: models of tileweld.models through the pass driver, against eager; and what the driver promises."""

import pytest
import torch
from tileweld import models, passes
from tileweld.compiler.backend import tileweld
from tileweld.compiler.errors import OptionError
from tileweld.compiler.ir.graph import insert
from tileweld.compiler.ir.rewrite import Match, Refusal
from tileweld.compiler.report import Report
from torch import nn
from torch.overrides import TorchFunctionMode

CASES = [(name, label) for name in models.available() for label in ["", *models.load(name).VARIANTS]]
KEEPS_WEIGHTS = {("annotated_mha", "keep_weights")}


class CountCores(TorchFunctionMode):
    """Counts the softmaxes and library attentions that a model calls."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        inside = getattr(function, "__name__", "")
        if inside in ("softmax", "scaled_dot_product_attention"):
            self.count += 1
            with torch._C.DisableTorchFunction():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def run(fn, report, dynamic=None, fullgraph=False, **options):
    return torch.compile(fn, backend=lambda gm, x: tileweld(gm, x, options={"target": "reference", **options}, report=report), dynamic=dynamic, fullgraph=fullgraph)


def flat(x):
    return [x] if isinstance(x, torch.Tensor) else [t for y in x for t in flat(y)] if isinstance(x, (tuple, list)) else []


def assert_close(ours, eager, tolerance=1e-5):
    for a, b in zip(flat(ours), flat(eager), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def make(name, label):
    module = models.load(name)
    return module, module.build(**(module.VARIANTS[label] if label else {}))


@pytest.mark.parametrize("name,label", CASES)
def test_models_equal_eager_with_every_core_fused(name, label):
    module, model = make(name, label)
    inputs, report = module.example_inputs(2, 24), Report()
    with torch.no_grad():
        with CountCores() as cores:
            eager = model(*inputs)
        assert_close(run(model, report, fullgraph=True)(*inputs), eager)
    attention = [r.reason for r in report.refusals if r.rewrite == "attention"]
    if (name, label) in KEEPS_WEIGHTS:
        assert attention and all("weights are also used outside" in reason for reason in attention)
    else:
        assert not attention
        assert report.counts["attention"] == cores.count > 0


@pytest.mark.parametrize("name", ["alibi", "annotated_mha", "deepseek_mla", "llama_gqa", "t5_bias"])
def test_models_at_two_lengths(name):
    """dynamic=True: the second batch and length run on what the first compiled."""
    module, model = make(name, "")
    report, graphs, first = Report(), [], 0
    compiled = torch.compile(model, backend=lambda gm, x: graphs.append(gm) or tileweld(gm, x, options={"target": "reference"}, report=report), dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 24), (3, 16)):
            inputs = [x.clone() for x in module.example_inputs(batch, length)]  # no views: Dynamo guards on their bases
            assert_close(compiled(*inputs), model(*inputs))
            first = first if first else len(graphs)  # Dynamo calls a backend again where it restarts, on the first length only
    assert len(graphs) == first
    assert report.counts["attention"] > 0


@pytest.mark.parametrize("target", ["reference", "auto"])
@pytest.mark.parametrize("name", ["llama_gqa", "t5_bias", "gpt_oss_sinks"])
def test_gradients_equal_eagers(name, target):
    """All parameters, among them T5's bias table and the sinks, which the op reads as captures."""
    module, model = make(name, "")
    inputs, report = module.example_inputs(2, 20), Report()
    model.requires_grad_(True)
    gradients = []
    for forward in (model, run(model, report, fullgraph=True, target=target)):
        model.zero_grad()
        sum(x.square().sum() for x in flat(forward(*inputs)) if x.is_floating_point()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert report.counts["attention"] > 0
    assert gradients[0].keys() == gradients[1].keys()
    for n, expected in gradients[0].items():
        assert (gradients[1][n] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-9, n


# ---------------------------------------------------------------- the driver


def core(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


def qkv():
    return [torch.randn(2, 3, 5, 8) for _ in range(3)]


class Stub:
    """A rewrite of relu: yields what it is told."""

    NAME = "stub"

    def __init__(self, make):
        self.make = make

    def find(self, graph):
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.relu.default:
                yield self.make(node)


def relu_as_clamp(node):
    return Match(node, (node.args[0],), lambda graph: insert(graph, torch.ops.aten.clamp_min.default, node.args[0], 0), "clamp")


def test_a_match_replaces_and_is_reported_with_its_line(monkeypatch):
    monkeypatch.setattr(passes, "PIPELINE", (Stub(relu_as_clamp),))
    report = Report()

    def model(x):
        return torch.relu(x) + 1

    x = torch.randn(4)
    assert torch.equal(run(model, report)(x), model(x))
    (fusion,) = report.fusions
    assert (fusion.rewrite, fusion.detail, fusion.graph) == ("stub", "clamp", 0)
    assert "test_pipeline.py" in fusion.source and "torch.relu(x) + 1" in fusion.source
    targets = [n.target for n in report.graphs[0].graph.nodes]
    assert torch.ops.aten.clamp_min.default in targets and torch.ops.aten.relu.default not in targets
    (made,) = [n for n in report.graphs[0].graph.nodes if n.meta.get("tileweld_rewrite") == "stub"]
    assert made.meta["stack_trace"]


def test_a_refusal_leaves_the_graph(monkeypatch):
    monkeypatch.setattr(passes, "PIPELINE", (Stub(lambda node: Refusal("relu is fine as it is", node, "nothing to do")),))
    report, x = Report(), torch.randn(4)
    assert torch.equal(run(torch.relu, report)(x), x.relu())
    (refusal,) = report.refusals
    assert (refusal.rewrite, refusal.reason, refusal.cure) == ("stub", "relu is fine as it is", "nothing to do")
    assert torch.ops.aten.relu.default in [n.target for n in report.graphs[0].graph.nodes]


def test_strict_raises(monkeypatch):
    monkeypatch.setattr(passes, "PIPELINE", (Stub(lambda node: Refusal("relu is fine as it is", node)),))
    with pytest.raises(Exception, match="stub refused: relu is fine as it is"):
        run(torch.relu, Report(), strict=True)(torch.randn(4))


def test_passes_are_switched_off_by_name():
    report, inputs = Report(), qkv()
    assert_close(run(core, report, passes={"attention": False})(*inputs), core(*inputs))
    assert not report.counts
    with pytest.raises(Exception, match="attention") as caught:
        run(core, Report(), passes={"attentoin": False})(*inputs)
    assert isinstance(caught.value, OptionError) or "OptionError" in str(caught.value)


def test_graphs_are_counted_over_a_break():
    def model(q, k, v):
        x = core(q, k, v)
        torch._dynamo.graph_break()
        return core(x, k, v)

    report, inputs = Report(), qkv()
    assert_close(run(model, report)(*inputs), model(*inputs))
    assert len(report.graphs) == 2
    assert [f.graph for f in report.fusions] == [0, 1]


def test_a_layer_called_twice_is_fused_twice():
    """Shared weights, two places: both fused, and the mask computed once serves both."""
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 24)

        def forward(self, x, mask):
            q, k, v = self.project(x).chunk(3, -1)
            return x + torch.softmax((q @ k.mT).masked_fill(mask, -1e9), -1) @ v

    layer = Layer()

    def model(x):
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
        return layer(layer(x, mask), mask)

    report, x = Report(), torch.randn(2, 6, 8)
    with torch.no_grad():
        assert_close(run(model, report)(x), model(x))
    assert report.counts["attention"] == 2


def test_inputs_are_not_changed_and_strides_do_not_matter():
    q, k, v = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(1, 3, 5, 8).expand(2, 3, 5, 8), torch.randn(2, 3, 8, 5).mT
    before = [x.clone() for x in (q, k, v)]
    for target in ("reference", "auto"):
        torch._dynamo.reset()
        assert_close(run(core, Report(), target=target)(q, k, v), core(q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v)))


def test_a_mask_of_the_wrong_shape_is_eagers_own_error():
    def model(q, k, v, m):
        return torch.softmax(q @ k.mT + m, -1) @ v

    with pytest.raises(Exception, match="size of tensor|must match|broadcast"):
        run(model, Report())(*qkv(), torch.zeros(7, 7))
