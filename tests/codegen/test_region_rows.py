"""The lifting table is what regions cover: an op with a row is part of a kernel, in C++ and in Triton, one without stays a call."""
import pytest
import torch
import torch.nn.functional as F

import tileweld
from tileweld.codegen.partition import STAY
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.lift import POINTWISE, ROWS

aten = torch.ops.aten
x = torch.linspace(-5, 5, 48).view(6, 8)


def run(function, *inputs, target="cpp"):
    """(kernels, calls that stay) of a function, after its result was compared."""
    if target == "triton":
        pytest.importorskip("triton", reason="the Triton target needs triton")
    torch._dynamo.reset()
    report = tileweld.explain(function, *inputs, options={"target": target})
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend="tileweld", options={"target": target})(*inputs), function(*inputs))
    return [k.reason for k in report.kernels], dict(report.fallbacks)


def gate(x):
    return F.hardsigmoid(x * 2) + 1


@pytest.mark.filterwarnings("ignore::tileweld.DegradedWarning")
@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_one_row_brings_an_op_into_regions(target, monkeypatch):
    monkeypatch.delitem(POINTWISE, aten.hardsigmoid.default, raising=False)
    assert run(gate, x, target=target) == ([], {"mul": 1, "hardsigmoid": 1, "add": 1})
    monkeypatch.setitem(POINTWISE, aten.hardsigmoid.default, lambda x: sc.div(sc.minimum(sc.maximum(sc.add(x, sc.number(3)), sc.number(0)), sc.number(6)), sc.number(6)))
    assert run(gate, x, target=target) == (["3 ops in one kernel"], {})


@pytest.mark.parametrize("function", [
    lambda x: torch.sigmoid(torch.stack([x * 2, x + 1], -1).flatten(-2)) * 3, lambda x: torch.stack([x, x + 1, x * x], 0) * 2, lambda x: torch.diff(x * 2, dim=-1) + 1,
])
def test_stacks_and_differences_are_placed(function):
    kernels, calls = run(function, x)
    assert len(kernels) == 1 and not calls


def test_what_stays_a_call_has_a_row_for_masks_and_scores():
    assert STAY <= ROWS.keys()
    kernels, calls = run(lambda x: torch.relu((x * 2).cumsum(-1) + 1) * 3, x)
    assert calls == {"mul": 1, "cumsum": 1} and kernels == ["3 ops in one kernel"]
