"""The int8 pass: what becomes int8 and keeps its texts, what stays float and why."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tileweld import explain
from tileweld.compiler.ir.int8_linear import dequantized, quantized
from tileweld.compiler.ir.int8_scheme import SCHEMES
from tileweld.passes.int8 import ROUTER

T = torch.ops.tileweld


class Block(nn.Module):
    """A norm, a gated MLP with a residual, a head."""

    def __init__(self, width=16, dtype=torch.float32):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 24), nn.Linear(width, 24, bias=False), nn.Linear(24, width)
        self.lm_head = nn.Linear(width, 40, bias=False)
        self.to(dtype)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.lm_head(x)


def ops(report):
    return [n for n in report.graphs[-1].graph.nodes if n.target is T.int8_linear.default]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_keeps_its_texts(rewriting, scheme, dtype):
    torch.manual_seed(0)
    model, x = Block(dtype=dtype), torch.randn(3, 5, 16, dtype=dtype)
    got, report = rewriting.rewritten(model, x, int8=scheme, verify=True)
    assert report.counts["int8"] == 3 - (scheme != "weight_only") and not report.refusals
    gated = ops(report)[0]
    assert gated.args[5] == "rms" and "sigmoid" in gated.args[8][0] and len(gated.args[1]) == 2 and gated.args[10] == SCHEMES[scheme]
    with torch.no_grad():
        exact = model.double()(x.double())
    error = (got.double() - exact).norm() / exact.norm()
    assert 1e-4 < error < (0.02 if scheme == "weight_only" else 0.05)


def test_float_activations_are_exactly_dequantised_weights(rewriting):
    model, x = Block(), torch.randn(3, 16)
    got, _ = rewriting.rewritten(model, x, int8={"scheme": "weight_only", "group": 8})
    with torch.no_grad():
        for linear in (model.gate, model.up, model.down, model.lm_head):
            linear.weight.copy_(dequantized(*quantized(linear.weight, 8), torch.float32))
        torch.testing.assert_close(got, model(x))


def test_what_is_left_out(rewriting):
    model, x = Block(), torch.randn(3, 16)
    for given, count in (({"skip": ["down"]}, 2), ({"skip": ["down", "lm_*"]}, 1), ({"lm_head": False}, 2), ({"skip": ["gate", "up"]}, 2), ({"skip": ["*"]}, 0)):
        _, report = rewriting.rewritten(model, x, int8={"scheme": "weight_only", **given})
        assert report.counts["int8"] == count and not report.refusals, given
    assert rewriting.rewritten(model, x, int8={"scheme": "dynamic", "lm_head": True})[1].counts["int8"] == 3
    assert rewriting.rewritten(model, x)[1].counts["int8"] == 0


def test_gate_without_up_is_refused(rewriting):
    got, report = rewriting.rewritten(Block(), torch.randn(3, 16), int8={"scheme": "weight_only", "skip": ["up"]})
    assert ["meet in one output" in r.reason for r in report.refusals] == [True] and report.counts["int8"] == 2


class Routed(nn.Module):
    def __init__(self, experts, act):
        super().__init__()
        self.router, self.up, self.act = nn.Linear(16, experts, bias=False), nn.Linear(16, experts), act

    def forward(self, x):
        weights, chosen = self.act(self.router(x)).topk(2)
        return self.up(x).gather(1, chosen) * weights


@pytest.mark.parametrize("act", [lambda s: s.softmax(-1), lambda s: (s.sigmoid() * 2 + 1).view(-1, s.shape[-1]), lambda s: s], ids=["softmax", "sigmoid", "itself"])
def test_a_router_stays_float(rewriting, act):
    """Its choice of experts is that of the float model; a projection to a vocabulary of which the best are taken is none."""
    model, x = Routed(8, act), torch.randn(64, 16)
    _, report = rewriting.rewritten(model, x, int8="weight_only")
    assert report.counts["int8"] == 1 and not report.refusals
    with torch.no_grad():
        few, many = (explain(m, x, options={"int8": {"scheme": "weight_only", "force": True}}).int8 for m in (model, Routed(ROUTER + 1, act)))
    assert {r.name: (r.kept, "topk of its 8 results" in r.reason) for r in few} == {"up": (True, False), "router": (False, True)}
    assert all(r.kept for r in many) and "router" in str(many)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, n) for n in (16, 8, 8))

    def forward(self, x):
        return self.q(x), self.k(x).relu(), self.v(x)


def test_an_op_is_split_where_a_weight_of_it_is_left_out(rewriting):
    model, x = Three(), torch.randn(3, 16)
    got, report = rewriting.rewritten(model, x, int8={"scheme": "weight_only", "skip": ["k"]}, verify=True)
    nodes = report.graphs[-1].graph.nodes
    (op,), (rest,) = ops(report), [n for n in nodes if n.target is T.linear.default]
    assert len(op.args[1]) == 2 and len(rest.args[1]) == 1 and "a0" in rest.args[7][0]
    with torch.no_grad():
        assert torch.allclose(got[1], model(x)[1], atol=1e-6)
        for linear in (model.q, model.v):
            linear.weight.copy_(dequantized(*quantized(linear.weight), torch.float32))
        torch.testing.assert_close(got, model(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids):
        return self.out(self.inner(self.table(ids)).relu())


def test_a_tied_head_is_a_head_and_a_weight_of_two_products_is_quantised_once(rewriting):
    ids = torch.randint(0, 40, (2, 5))
    assert rewriting.rewritten(Tied(), ids, int8="dynamic")[1].counts["int8"] == 1
    assert rewriting.rewritten(Tied(), ids, int8="weight_only")[1].counts["int8"] == 2

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16, bias=False)

        def forward(self, x):
            return self.inner(self.inner(x).relu())

    _, report = rewriting.rewritten(Twice(), torch.randn(3, 16), int8="weight_only")
    assert report.counts["int8"] == 2 and sum(n.target is T.quantize_rows.default for n in report.graphs[-1].graph.nodes) == 1


class Packed(nn.Module):
    """[gate; up] in one weight, and one that is stored transposed."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(16, 32, bias=False), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return torch.addmm(x.new_zeros(16), F.silu(gate) * up, self.down)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_and_transposed_weights(rewriting, scheme):
    got, report = rewriting.rewritten(model := Packed(), x := torch.randn(3, 16), int8=scheme, verify=True)
    assert report.counts["int8"] == 2 and not report.refusals
    with torch.no_grad():
        assert (got - model(x)).norm() < 0.04 * model(x).norm()


def test_inference_alone(rewriting):
    model, x = Block(), torch.randn(3, 16)
    got, report = rewriting.rewritten(model, x, grad=True, int8="weight_only")
    assert report.counts["int8"] == 0 and report.refusals and all("is trained" in r.reason and "no_grad" in r.cure for r in report.refusals)
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize(("dtype", "given", "words"), [(torch.float64, {}, "float64"), (torch.float32, {"group": 7}, "groups of 7 do not divide its 16 columns")])
def test_what_cannot_be_quantised(rewriting, dtype, given, words):
    _, report = rewriting.rewritten(Three().to(dtype), torch.randn(3, 16, dtype=dtype), int8={"scheme": "weight_only", **given})
    assert report.counts["int8"] == 0 and len(report.refusals) == 3 and all(words in r.reason for r in report.refusals)


def test_too_many_columns_for_int32(rewriting):
    model = nn.Linear(133_145, 2)
    rewriting.refused("int8", model, torch.randn(1, 133_145), reason="133145 columns overflow sums in int32", int8="dynamic")
    assert rewriting.rewritten(model, torch.randn(1, 133_145), int8="weight_only")[1].counts["int8"] == 1


def test_a_weight_that_is_an_input_is_refused(rewriting):
    rewriting.refused("int8", lambda x, w: F.linear(x, w), torch.randn(3, 16), torch.randn(8, 16), reason="an input of the call", int8="weight_only")


# ---------------------------------------------------------------- weights that are int8 already


class Held(nn.Module):
    """What convert.quantize_ puts in a linear's place, spelled out."""

    def __init__(self, n, k, activation="float", group=0, columns=None):
        super().__init__()
        for name, t in zip(("q", "s", "b"), (*quantized(torch.randn(n, k), group), torch.randn(n))):
            self.register_buffer(name, t)
        self.register_buffer("columns", columns)
        self.activation = activation

    def forward(self, x):
        return F.linear(x, T.dequantize_rows(self.q, self.s, x.dtype, self.activation, 6.0, self.columns), self.b)


@pytest.mark.parametrize("activation", SCHEMES.values())
def test_modules_with_int8_are_fused_as_floats_are(rewriting, activation):
    columns = torch.arange(16) < 2 if activation == "mixed" else None
    norm, gate, up, down = nn.RMSNorm(16, eps=1e-6), Held(24, 16, activation, columns=columns), Held(24, 16, activation, columns=columns), Held(16, 24, activation)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gate, self.up, self.down = norm, gate, up, down
            if activation == "mixed":
                up.columns = gate.columns

        def forward(self, x):
            y = self.norm(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    model, x = Model(), torch.randn(3, 16)
    got, report = rewriting.rewritten(model, x, verify=True)
    assert report.counts["int8"] == 2 and not report.refusals
    gated, last = ops(report)
    assert gated.args[5] == "rms" and "sigmoid" in gated.args[8][0] and "+ c" in last.args[8][0] and gated.args[10] == activation
    assert (gated.args[12] is not None) == (activation == "mixed") and not any(n.target is T.dequantize_rows.default for n in report.graphs[-1].graph.nodes)
    with torch.no_grad():
        exact = model(x)
    assert (got - exact).norm() <= (1e-5 if activation == "float" else 0.03) * exact.norm()


def test_slices_of_a_packed_int8_weight(rewriting):
    held = Held(32, 16, group=8)

    def model(x):
        gate, up = held(x).chunk(2, -1)
        return F.silu(gate) * up

    got, report = rewriting.rewritten(model, x := torch.randn(3, 16))
    assert report.counts["int8"] == 1 and [value.shape[0] for value in (n.meta["val"] for n in ops(report)[0].args[1])] == [16, 16]
    torch.testing.assert_close(got, model(x))


def test_int8_modules_in_training_and_in_float64_stay_floats(rewriting):
    model = nn.Sequential(nn.Linear(16, 16), Held(8, 16, "int8"))
    x = torch.randn(3, 16)
    got, report = rewriting.rewritten(model, x, grad=True)
    assert report.counts["int8"] == 0 and any("computed in floats" in r.reason for r in report.refusals)
    torch.testing.assert_close(got, model(x))
    wide = Held(8, 16)
    wide.b = wide.b.double()
    _, report = rewriting.rewritten(wide, x.double())
    assert report.counts["int8"] == 0 and "float64" in report.refusals[0].reason


def test_threshold_and_columns_are_those_that_were_asked_for(rewriting):
    _, report = rewriting.rewritten(Three(), torch.randn(3, 16), int8={"scheme": "llm_int8", "threshold": 2.5})
    assert {op.args[11:] for op in ops(report)} == {(2.5, None)} and ops(report)[0].args[10] == "mixed"
    _, report = rewriting.rewritten(Three(), torch.randn(3, 16), int8="dynamic")
    assert {op.args[11] for op in ops(report)} == {math.inf}
