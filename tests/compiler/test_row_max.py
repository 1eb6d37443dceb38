"""Pairs of products that share row maxima, compiled: the same bits as without, parted where the clock says so, and what goes when a product of the pair becomes floats."""
import functools

import pytest
import torch
from tileweld import explain
from tileweld.compiler import pays
from tileweld.compiler import row_max as pairs
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report
from torch import nn

INT8 = {"scheme": "dynamic", "force": True}


class MLP(nn.Module):
    def __init__(self, width=32, inner=48):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, inner), nn.Linear(width, inner, bias=False), nn.Linear(inner, width)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("TILEWELD_EXECUTABLES", "0")
    with torch.no_grad():
        yield


def compiled(f, dynamic=False, **options):
    torch._dynamo.reset()
    report = Report()
    return torch.compile(f, backend=functools.partial(tileweld, report=report, options={"int8": INT8, **options}), dynamic=dynamic), report


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_any_number_of_rows_by_one_kernel_and_rows_that_are_not_finite():
    model = MLP()
    fused, report = compiled(model, dynamic=True)
    plain, _ = compiled(model, dynamic=True, passes={"row_max": False})
    for rows in (5, 1, 0, 40, 17):
        x = torch.randn(rows, 32)
        if rows > 4:
            x[0], x[1, 3], x[2, 5], x[3] = 0, float("nan"), float("inf"), 1.5
        assert same(fused(x), plain(x)), rows
    assert report.counts["row_max"] and not report.warnings and not report.refusals


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Times that the test decides: of the pair and of both parted, of an int8 kernel, of the float product, and of the fused float kernel."""
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pays, "_known", {})
    monkeypatch.setattr(pays, "WORTH_TIMING", 0.0)

    def set_times(pair, parted, int8=0.5, library=1.0, linear=0.5):
        asked = []
        monkeypatch.setattr(pairs, "_measured", lambda *rest: (asked.append("pair"), (pair, parted))[1])
        times = lambda choice: (int8(choice) if callable(int8) else int8) if choice.op == "int8_linear" else linear  # noqa: E731
        monkeypatch.setattr(pays, "_measured", lambda choice, *rest: (asked.append(choice.op), (times(choice), library))[1])
        return asked

    return set_times


@pytest.mark.parametrize(("pair", "is_parted"), [(1.02, False), (1.04, True)])
def test_a_pair_that_is_slower_is_parted(timed, pair, is_parted):
    model, x = MLP(), torch.randn(20, 32)
    wanted = compiled(model, passes={"row_max": False})[0](x)
    asked = timed(pair, 1.0)
    f, report = compiled(model)
    assert torch.equal(f(x), wanted) and asked == ["pair"]
    reasons = [k.detail for k in report.kept if k.rewrite == "row_max"]
    assert len(reasons) == is_parted and all("find their maxima themselves: 1000.00 ms for both products, 1040.00" in r for r in reasons)
    takes = ["maximum[" in s.source for s in report.sources if s.name.startswith("int8_linear")]
    assert any(takes) != is_parted and not report.warnings


@pytest.mark.parametrize("loser", ["gate", "down", "both"])
@pytest.mark.parametrize("linear", [0.5, 2.0])
def test_a_product_of_the_pair_that_becomes_floats(timed, loser, linear):
    """gate and up in floats still take the maxima for down; down in floats needs none, and nobody takes them."""
    model, x = MLP(), torch.randn(20, 32)
    timed(1.0, 1.0, int8=lambda choice: 2.0 if loser == "both" or (loser == "gate") == (len(choice.node.args[1]) == 2) else 0.5, linear=linear)
    f, report = compiled(model, int8="dynamic")
    wanted, got = model(x), f(x)
    assert (got - wanted).norm() <= (1e-5 if loser == "both" else 0.05) * wanted.norm()
    kernels = {s.name.rpartition("_")[0]: s.source for s in report.sources}
    assert [u.kept for u in report.int8] == {"gate": [False, False, True], "down": [True, True, False], "both": [False] * 3}[loser]
    taken = ["maximum[" in source for name, source in kernels.items() if name in ("linear", "int8_linear")]
    assert any(taken) == (loser == "gate" and linear == 0.5)  # taken apart, the products are torch's and the maxima a region's
    assert not report.warnings and ("row_max != 0" in kernels.get("int8_linear", "") or "call.row_max" in kernels.get("int8_linear", "")) == (loser == "gate")


def test_a_measurement_is_of_both(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pays, "_known", {})
    monkeypatch.setattr(pays, "WORTH_TIMING", 0.0)
    found = []
    monkeypatch.setattr(pairs, "_measured", lambda *rest, measured=pairs._measured: (found.append(measured(*rest)), found[-1])[1])
    f, _ = compiled(MLP())
    f(torch.randn(64, 32))
    assert len(found) == 1 and (found[0] == pays._UNSTEADY or min(found[0]) > 0)
    pays._known.clear()
    compiled(MLP())[0](torch.randn(64, 32))
    assert len(found) == 1 + (found[0] == pays._UNSTEADY)  # the second process finds it on disk


def test_scales_of_tokens_are_seen_in_a_dump():
    report = explain(MLP(), torch.randn(3, 32), options={"int8": INT8})
    assert report.counts["row_max"] == 1
    down = [n for n in report.graphs[-1].graph.nodes if n.target is torch.ops.tileweld.int8_linear.default][-1]
    assert down.args[13].meta["val"].shape == (3,) and str(down.args[13]) in report.graphs[-1].code
