"""A fusion that does not pay is not made: what is timed, what the verdict changes, what is kept."""
import functools
import itertools
import types

import pytest
import torch
from tileweld.compiler import pays
from tileweld.compiler.backend import tileweld
from tileweld.compiler.ir.kernel import Kernel
from tileweld.compiler.report import Report
from tileweld.compiler.select import Choice
from torch._subclasses import FakeTensorMode

from .mlp import MLP


def run(f, *inputs):
    torch._dynamo.reset()
    report = Report()
    with torch.no_grad():
        return torch.compile(f, backend=functools.partial(tileweld, report=report), dynamic=False)(*inputs), report


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Times that the test decides, in an empty cache: timed(fused, apart) -> the kernels that were asked about."""
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pays, "_known", {})

    def set_times(fused, apart):
        asked = []
        monkeypatch.setattr(pays, "_measured", lambda choice, *rest: (asked.append(choice.node.name), (fused, apart))[1])
        return asked

    return set_times


def test_a_slower_kernel_is_taken_apart_and_the_result_stays(timed):
    model, x = MLP(), torch.randn(64, 512)
    asked = timed(2.0, 1.0)
    result, report = run(model, x)
    torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    assert len(asked) == 2 and report.counts["gated_mlp"] == 1
    rows = [k for k in report.kernels if k.implementation == "aten:mm"]
    assert len(rows) == 2 and "2000.00" in rows[0].reason and not any(k.implementation.startswith("cpp:linear") for k in report.kernels)
    assert not report.warnings


def test_a_faster_kernel_stays_and_is_timed_once(timed):
    model, x = MLP(), torch.randn(64, 512)
    asked = timed(1.0, 1.05)
    _, report = run(model, x)
    assert sum(k.implementation.startswith("cpp:linear") for k in report.kernels) == 2
    pays._known.clear()
    before = len(asked)
    run(model, x)
    assert len(asked) == before == 2  # the second process finds it on disk


def test_small_products_are_not_timed(timed):
    asked = timed(2.0, 1.0)
    run(MLP(64), torch.randn(4, 64))
    assert not asked


def test_an_unsteady_clock_decides_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pays, "_known", {})
    ticks = itertools.count()
    monkeypatch.setattr(pays, "time", types.SimpleNamespace(perf_counter=lambda: 1.5 ** (next(ticks) % 200)))  # every interval is longer than the last
    _, report = run(MLP(), torch.randn(64, 512))
    assert not [k for k in report.kernels if k.implementation == "aten:mm"] and not list((tmp_path / "cache").glob("*.pays.json"))


def test_a_measurement_is_of_both():
    """Real times are positive, or the clock was unsteady."""
    model, x = MLP(), torch.randn(64, 512)
    before = set(pays._known)
    run(model, x)
    assert all(times == pays._UNSTEADY or min(times) > 0 for key, times in pays._known.items() if key not in before)


@pytest.mark.parametrize(("one", "other", "margin", "rounds"), [
    (1.0, 2.0, pays.MARGIN, 2), (2.0, 1.0, pays.MARGIN, 2),  # far from where the decision turns
    (1.0, 1.0, pays.MARGIN, pays.ROUNDS), (1.15, 1.0, pays.MARGIN, pays.ROUNDS), (1.15, 1.0, 1.0, 2)])
def test_what_is_clear_takes_two_rounds_and_what_is_close_all(monkeypatch, one, other, margin, rounds):
    now, calls = [0.0], []
    monkeypatch.setattr(pays, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(milliseconds):
        def call():
            calls.append(milliseconds)
            now[0] += 1e-3 * milliseconds
        return call

    assert pays.timed(taking(one), taking(other), margin) == pytest.approx((1e-3 * one, 1e-3 * other))
    assert len(calls) == 2 * (1 + rounds)  # the first calls warm up


def test_unsteady_rounds_are_not_clear_however_far_apart(monkeypatch):
    now, n = [0.0], itertools.count()

    def call():
        now[0] += 1e-3 * 2 ** (next(n) // 2)  # each twice as long as its last

    monkeypatch.setattr(pays, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    assert pays.timed(call, lambda: (call(), call()), pays.MARGIN) == pays._UNSTEADY


def on_a_gpu(monkeypatch, tmp_path, times):
    """What `losers` says of an int8 product on a GPU that there is not, whose clock the test is: times, or what the measurement raises."""
    def measured(*args):
        if isinstance(times, Exception):
            raise times
        return times

    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pays, "_known", {})
    monkeypatch.setattr(pays, "_measured", measured)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    graph = torch.fx.Graph()
    with FakeTensorMode():
        x, w, scale = torch.empty(64, 1024, device="cuda"), torch.empty(1024, 1024, dtype=torch.int8, device="cuda"), torch.empty(1024, 1, device="cuda")
    nodes = [graph.placeholder(name) for name in ("x", "w", "scale")]
    for node, known in zip(nodes, (x, w, scale)):
        node.meta["val"] = known
    node = graph.call_function(torch.ops.tileweld.int8_linear.default, (nodes[0], [nodes[1]], [nodes[2]]))
    kernel = Kernel(name="int8_linear", language="triton", source="a source", entry="launch")
    kept = {}
    return pays.losers([Choice("int8_linear", "", node=node, kernel=kernel, inputs=nodes, outputs=[node])], {kernel.source: None}, kept), kept


def test_products_on_a_gpu_are_timed_by_its_clock(monkeypatch, tmp_path):
    lost, kept = on_a_gpu(monkeypatch, tmp_path, (2e-3, 1e-3))
    assert lost == {"int8_linear_default": "the float product is faster here: 1.00 ms against 2.00"} and not kept
    lost, kept = on_a_gpu(monkeypatch, tmp_path / "other", (1e-3, 2e-3))
    assert not lost and kept == {"int8_linear_default": "int8 is faster here: 1.00 ms against 2.00"}


def test_a_gpu_that_cannot_be_timed_keeps_what_was_asked_for(monkeypatch, tmp_path):
    lost, kept = on_a_gpu(monkeypatch, tmp_path, torch.OutOfMemoryError("40 GiB"))
    assert not lost and kept == {"int8_linear_default": "it could not be timed (OutOfMemoryError)"} and not list((tmp_path / "cache").glob("*.pays.json"))


def test_calls_on_a_gpu_are_timed_in_a_row_until_it_is_done(monkeypatch):
    now, done = [0.0], []

    def call():
        now[0] += 1e-5  # the launch alone
        done.append("launched")

    def synchronize(device):
        now[0] += 1e-3 * done.count("launched")
        done.clear()

    monkeypatch.setattr(pays, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    assert pays._once(call, torch.device("cuda")) == pytest.approx(1.01e-3) and not done
    assert pays._once(call, torch.device("cpu")) == pytest.approx(1e-5) and len(done) == 1
