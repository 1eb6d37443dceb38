"""options={"verify": True}: a rewrite that changes a value is refused at compile time and the model keeps running; right ones pass."""

import dataclasses

import pytest
import torch
from tileweld import models, passes
from tileweld.compiler.backend import tileweld
from tileweld.compiler.ir.graph import insert
from tileweld.compiler.report import Report
from tileweld.passes import attention

aten = torch.ops.aten


class Broken:
    """The attention rewrite with a fault in what it builds."""

    NAME = "attention"

    def __init__(self, fault):
        self.fault = fault

    def find(self, graph):
        for found in attention.find(graph):
            if hasattr(found, "build"):
                found = dataclasses.replace(found, build=lambda graph, build=found.build: self.fault(graph, build(graph)))
            yield found


def scaled(graph, new):
    """0.1% too large: no shape or dtype tells."""
    return insert(graph, aten.mul.Tensor, new, 1.001)


def shifted(graph, new):
    return insert(graph, aten.add.Tensor, new, 1e-7)


def wrong_text(graph, new):
    """The first query sees one key less than it should."""
    for node in graph.nodes:
        if node.target is torch.ops.tileweld.attention.default:
            arguments = list(node.args)
            arguments[6] = "i - j < 2"
            node.args = tuple(arguments)
    return new


def unmasked_nan(graph, new):
    return insert(graph, aten.log.default, new)


def wrong_dtype(graph, new):
    return insert(graph, aten.to.dtype, new, torch.float64)


def wrong_shape(graph, new):
    return insert(graph, aten.unsqueeze.default, new, 0)


def core(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


def run(fn, *inputs, **options):
    report = Report()
    compiled = torch.compile(fn, backend=lambda gm, x: tileweld(gm, x, options={"target": "reference", **options}, report=report))
    with torch.no_grad():
        return compiled(*inputs), report


@pytest.mark.parametrize("fault", [scaled, shifted, wrong_text, unmasked_nan], ids=lambda f: f.__name__)
def test_a_broken_rewrite_is_refused(fault, monkeypatch):
    monkeypatch.setattr(passes, "PIPELINE", (Broken(fault),))
    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    out, report = run(core, *inputs, verify=True)
    assert torch.equal(out, core(*inputs))
    assert not report.fusions
    (refusal,) = report.refusals
    assert refusal.reason.startswith("verification: ")
    assert "core" in refusal.source
    assert not any(n.target is torch.ops.tileweld.attention.default for n in report.graphs[0].graph.nodes)


def test_without_verify_the_fault_shows(monkeypatch):
    """The control: the same fault goes through unverified, so the test above tests verification."""
    monkeypatch.setattr(passes, "PIPELINE", (Broken(scaled),))
    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    out, report = run(core, *inputs)
    assert report.counts["attention"] == 1
    assert not torch.allclose(out, core(*inputs), rtol=1e-4)


@pytest.mark.parametrize("fault", [wrong_dtype, wrong_shape], ids=lambda f: f.__name__)
def test_another_type_is_refused_even_unverified(fault, monkeypatch):
    monkeypatch.setattr(passes, "PIPELINE", (Broken(fault),))
    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    out, report = run(core, *inputs)
    assert torch.equal(out, core(*inputs))
    assert "the replacement gives" in report.refusals[0].reason


@pytest.mark.parametrize("masked", ["-inf", "-1e9", "finfo.min"])
def test_right_rewrites_pass(masked):
    fill = {"-inf": float("-inf"), "-1e9": -1e9, "finfo.min": torch.finfo(torch.float32).min}[masked]

    def masked_core(q, k, v, keep):
        return torch.softmax((q @ k.mT * 0.25).masked_fill(~keep[:, None, None], fill), -1) @ v

    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0] = False
    _, report = run(masked_core, *inputs, keep, verify=True)
    assert report.counts["attention"] == 1 and not report.refusals


@pytest.mark.parametrize("name", models.available())
def test_every_model_passes(name):
    module = models.load(name)
    _, report = run(module.build(), *module.example_inputs(2, 12), verify=True)
    assert report.counts["attention"] >= 1
    assert not [r for r in report.refusals if r.reason.startswith("verification")]
