"""act(gate) * up of one x becomes one op, whatever the activation and however gate and up are stored; what differs is refused."""
import pytest
import torch
import torch.nn.functional as F

from tileweld import models

WIDTH, HIDDEN = 24, 40
ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu tanh": lambda g: F.gelu(g, approximate="tanh"), "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "silu by hand": lambda g: g * torch.sigmoid(g), "square relu": lambda g: F.relu(g).square(), "scaled": lambda g: 0.5 * F.silu(3 * g),
}


def operands(dtype=torch.float32, packed=False):
    x = torch.randn(2, 5, WIDTH).to(dtype)
    return (x, torch.randn(2 * HIDDEN, WIDTH).to(dtype)) if packed else (x, torch.randn(HIDDEN, WIDTH).to(dtype), torch.randn(HIDDEN, WIDTH).to(dtype))


class Held(torch.nn.Module):
    """fn with its weights as parameters: their shapes are static, those of x need not be."""

    def __init__(self, fn, *weights):
        super().__init__()
        self.fn, self.weights = fn, torch.nn.ParameterList(weights)

    def forward(self, x):
        return self.fn(x, *iter(self.weights))


def gated(act):
    return lambda x, gate, up: act(F.linear(x, gate)) * F.linear(x, up)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_any_activation(rewriting, name):
    rewriting.check(gated(ACTIVATIONS[name]), *operands(), count={"gated_mlp": 1, "linear": 0, "qkv_rotary": 0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_no_worse_than_eager(rewriting, dtype):
    rewriting.check(gated(F.silu), *operands(dtype), count={"gated_mlp": 1})


def test_bias_scale_and_the_other_order(rewriting):
    def fn(x, gate, up, b, c):
        return F.linear(x, up, c) * F.silu(F.linear(x, gate, b)) * 0.5

    report = rewriting.check(fn, *operands(), torch.randn(HIDDEN), torch.randn(HIDDEN), count={"gated_mlp": 1})
    assert "gate+up 2x[40, 24]" in report.fusions[0].detail


def clamped(x, packed, bias):
    """gpt-oss: even columns gate, odd columns up, both clamped."""
    both = F.linear(x, packed, bias)
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


@pytest.mark.parametrize("split", [lambda y: y.chunk(2, -1), lambda y: y.split(HIDDEN, -1), lambda y: (y[..., :HIDDEN], y[..., HIDDEN:]), lambda y: y.unflatten(-1, (2, HIDDEN)).unbind(-2)])
def test_packed_halves_are_slices_of_the_weight(rewriting, split):
    def fn(x, packed):
        gate, up = split(F.linear(x, packed))
        return F.silu(gate) * up

    report = rewriting.check(fn, *operands(packed=True), count={"gated_mlp": 1})
    weights = next(n for n in report.graphs[0].graph.nodes if n.target is torch.ops.tileweld.linear.default).args[1]
    assert [n.target for n in weights] == [torch.ops.aten.slice.Tensor] * 2


def test_packed_even_and_odd_columns_clamped(rewriting):
    rewriting.check(clamped, *operands(packed=True), 3 * torch.randn(2 * HIDDEN), count={"gated_mlp": 1})


def test_dynamic_shapes(rewriting):
    for act in (F.silu, F.gelu):
        x, *weights = operands()
        rewriting.check(Held(gated(act), *weights), x, count={"gated_mlp": 1}, dynamic=True)


@pytest.mark.parametrize("x", [torch.randn(WIDTH), torch.randn(1, 1, WIDTH), torch.randn(7, WIDTH), torch.randn(0, 3, WIDTH)], ids=lambda x: str([*x.shape]))
def test_other_ranks_one_row_and_no_rows(rewriting, x):
    rewriting.check(gated(F.silu), x, *operands()[1:], count={"gated_mlp": 1})


def test_gradients(rewriting):
    rewriting.check_gradients(gated(F.silu), *operands(), count={"gated_mlp": 1})
    rewriting.check_gradients(clamped, *operands(packed=True), torch.randn(2 * HIDDEN), count={"gated_mlp": 1})


@pytest.mark.parametrize(("name", "count"), [("llama_gqa", 2), ("gemma2", 2), ("annotated_mha", 0)])
def test_models(rewriting, name, count):
    module = models.load(name)
    rewriting.check(module.build(), *module.example_inputs(2, 9), count={"gated_mlp": count})


# ---------------------------------------------------------------- what must stay


def test_a_gate_that_is_returned_too_is_refused(rewriting):
    def fn(x, gate, up):
        g = F.linear(x, gate)
        return F.silu(g) * F.linear(x, up), g

    rewriting.refused("gated_mlp", fn, *operands(), reason="used elsewhere, by the graph's output")


def test_different_rows_are_refused(rewriting):
    def fn(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x + 1, up)

    rewriting.refused("gated_mlp", fn, *operands(), reason="matmuls of different tensors")


def test_dropout_in_training_is_refused(rewriting):
    def fn(x, gate, up):
        return F.dropout(F.silu(F.linear(x, gate)), 0.5, True) * F.linear(x, up)

    _, report = rewriting.rewritten(fn, *operands())
    assert report.counts["gated_mlp"] == 0 and "no scalar expression" in next(r.reason for r in report.refusals if r.rewrite == "gated_mlp")


def test_a_gate_of_one_column_is_no_gated_mlp(rewriting):
    rewriting.silent("gated_mlp", lambda x, gate, up: torch.sigmoid(F.linear(x, gate)) * F.linear(x, up), operands()[0], torch.randn(1, WIDTH), torch.randn(HIDDEN, WIDTH))


def test_a_softmax_gate_is_no_pointwise_function(rewriting):
    rewriting.silent("gated_mlp", lambda x, gate, up: torch.softmax(F.linear(x, gate), -1) * F.linear(x, up), *operands())


def test_a_narrow_cast_and_a_cast_to_integers_are_meant(rewriting):
    for cast in (lambda g: g.to(torch.bfloat16).to(torch.float32), lambda g: g.to(torch.int64).to(torch.float32)):
        inputs = operands()
        got, report = rewriting.rewritten(gated(cast), *inputs)
        assert report.counts["gated_mlp"] == 0
        torch.testing.assert_close(got, gated(cast)(*inputs), rtol=1e-2, atol=1e-2)
