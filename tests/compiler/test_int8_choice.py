"""int8 only where it pays: the float product comes back where it is faster, the result with it; what the report says of every layer."""
import functools
import itertools
import types

import pytest
import torch
from tileweld import convert, explain
from tileweld.compiler import pays
from tileweld.compiler.backend import tileweld
from tileweld.compiler.errors import RefusalError
from tileweld.compiler.ir.int8_linear import dequantized, quantized
from tileweld.compiler.report import Report
from torch import nn

from .mlp import MLP


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def run(f, *inputs, **options):
    torch._dynamo.reset()
    report = Report()
    return torch.compile(f, backend=functools.partial(tileweld, report=report, options=options), dynamic=False)(*inputs), report


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Times that the test decides: timed(int8, float, linear) seconds of the int8 kernel, the library's product, and the fused float kernel."""
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pays, "_known", {})

    def set_times(int8, library, linear):
        asked = []
        monkeypatch.setattr(pays, "_measured", lambda choice, *rest: (asked.append(choice.op), (int8 if choice.op == "int8_linear" else linear, library))[1])
        return asked

    return set_times


@pytest.mark.parametrize(("linear", "implementation"), [(0.5, "cpp:linear"), (2.0, "aten:mm")])
def test_floats_come_back_where_they_are_faster(timed, linear, implementation):
    model, x = MLP(), torch.randn(64, 512)
    asked = timed(1.01, 1.0, linear)
    result, report = run(model, x, int8="dynamic")
    torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    assert asked.count("int8_linear") == 2 and asked.count("linear") == 2 and sum(k.implementation.startswith(implementation) for k in report.kernels) == 2
    assert [u.kept for u in report.int8] == [False] * 3 and all("1000.00 ms against 1010.00" in u.reason for u in report.int8) and not report.folded and not report.warnings


def test_int8_stays_where_it_is_faster_or_asked_for(timed):
    model, x = MLP(), torch.randn(64, 512)
    wanted = model(x)
    for int8, options in ((0.99, "weight_only"), (5.0, {"scheme": "weight_only", "force": True})):
        asked = timed(int8, 1.0, 1.0)
        result, report = run(model, x, int8=options)
        assert (result - wanted).norm() < 0.02 * wanted.norm() and not torch.allclose(result, wanted, rtol=1e-6, atol=1e-7)
        assert all(u.kept and u.bytes_after < 0.26 * u.bytes_before for u in report.int8) and len(report.int8) == 3 and len(asked) == (0 if int8 == 5.0 else 2)
        assert all(u.reason == ("force" if int8 == 5.0 else "int8 is faster here: 990.00 ms against 1000.00") for u in report.int8)
        assert report.folded_bytes == sum(u.bytes_after for u in report.int8)


def test_int8_of_a_module_has_no_floats_to_go_back_to(timed):
    model, x = MLP(), torch.randn(64, 512)
    convert.quantize_(model)
    asked = timed(9.0, 1.0, 1.0)
    result, report = run(model, x)
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-4)
    assert not asked and all(u.kept and u.error is None and "int8 in the model" in u.reason for u in report.int8) and len(report.int8) == 3


def test_an_unsteady_clock_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pays, "_known", {})
    ticks = itertools.count()
    monkeypatch.setattr(pays, "time", types.SimpleNamespace(perf_counter=lambda: 1.5 ** (next(ticks) % 200)))
    _, report = run(MLP(), torch.randn(64, 512), int8="weight_only")
    assert [(u.kept, u.reason) for u in report.int8] == [(True, "the machine is too busy to time it")] * 3
    assert {u.reason for u in run(MLP(64), torch.randn(3, 64), int8="weight_only", target="reference")[1].int8} == {"not timed: it runs on its definition"}


def test_a_measurement_is_of_both():
    before = set(pays._known)
    for scheme in ("weight_only", "dynamic", "llm_int8"):
        _, report = run(MLP(), torch.randn(64, 512), int8=scheme)
        assert len(report.int8) == 3
    assert all(times == pays._UNSTEADY or min(times) > 0 for key, times in pays._known.items() if key not in before)


def test_explain_has_a_row_for_every_layer():
    model, x = MLP(64), torch.randn(3, 64)
    report = explain(model, x, options={"int8": "weight_only"})
    assert [(u.name, u.shape, u.activation, u.kept) for u in report.int8] == [(name, (64, 64), "float", True) for name in ("gate", "up", "down")]
    w = model.gate.weight
    error = ((w - dequantized(*quantized(w), torch.float32)).norm() / w.norm()).item()
    assert report.int8[0].error == pytest.approx(error, rel=1e-4) and 38 < report.int8[0].sqnr_db < 50 and report.int8[0].bytes_before == 64 * 64 * 4 and report.int8[0].bytes_after == 64 * 64 + 64 * 4
    assert {u.reason for u in report.int8} == {"too small to be timed"} and "too small to be timed" in str(report) and "SQNR" in str(report) and '"activation": "float"' in report.to_json()
    assert not explain(model, x).int8


def test_explain_says_why_of_layers_that_stay_float():
    class Head(MLP):
        def __init__(self):
            super().__init__(64)
            self.lm_head = nn.Linear(64, 8)

        def forward(self, x):
            return self.lm_head(super().forward(x))

    model, x = Head(), torch.randn(3, 64)
    for options, wanted in (({"scheme": "dynamic", "skip": ["down"]}, {"down": "left out by skip='down'", "lm_head": "projection to the vocabulary"}), ({"scheme": "weight_only", "skip": ["up"]}, {"up": "left out by skip", "gate": "in one output"}),
                            ({"scheme": "weight_only", "group": 48}, dict.fromkeys(("gate", "up", "down", "lm_head"), "groups of 48 do not divide its 64 columns"))):
        report = explain(model, x, options={"int8": options})
        rows = {u.name: u for u in report.int8}
        assert rows.keys() == {"gate", "up", "down", "lm_head"} and {name for name, u in rows.items() if not u.kept} == wanted.keys() and not report.warnings
        for name, words in wanted.items():
            assert words in rows[name].reason and rows[name].error is None and rows[name].bytes_before == rows[name].shape[0] * 64 * 4 and words.split()[0] in str(report)
    with torch.enable_grad():
        report = explain(model, x, options={"int8": "weight_only"})
    assert len(report.int8) == 4 and all(not u.kept and "is trained" in u.reason for u in report.int8)


def test_a_misspelt_layer_is_said(caplog):
    model, x = MLP(64), torch.randn(3, 64)
    options = {"scheme": "weight_only", "skip": ["dwn", "gate", "nothing"]}
    report = explain(model, x, options={"int8": options})
    assert len(report.warnings) == 2 and "'dwn', which is no linear layer" in report.warnings[0] and "did you mean 'down'" in report.warnings[0] and "'nothing'" in report.warnings[1] and "warning: options['int8']" in str(report)
    caplog.clear()
    torch.compile(model, backend="tileweld", options={"int8": options, "target": "reference"})(x)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "dwn" in r.getMessage()] and not [r for r in caplog.records if r.levelname == "WARNING" and "nothing" in r.getMessage()]  # which may be a layer of another graph


def test_explain_has_the_errors_that_modules_have_noted():
    model, x = MLP(64), torch.randn(3, 64)
    wanted = {layer.name: (layer.error, layer.bytes_before, layer.bytes_after) for layer in convert.quantize_(model).layers}
    assert {u.name: (u.error, u.bytes_before, u.bytes_after) for u in explain(model, x).int8} == wanted and all(error > 0 for error, *_ in wanted.values())


def test_a_weight_that_int8_cannot_hold_is_named():
    model = MLP(64)
    model.up.weight[3, 5] = torch.inf
    with pytest.raises(RefusalError, match=r"inf or NaN.*\(up.weight\)"):
        run(model, torch.randn(3, 64), int8="weight_only")


def test_scales_are_seen_in_a_dump():
    report = explain(MLP(64), torch.randn(3, 64), options={"int8": "weight_only"})
    code = report.graphs[-1].code
    assert "quantize_rows" in code and "int8_linear" in code
