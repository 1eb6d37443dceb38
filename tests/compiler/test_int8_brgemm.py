"""Who multiplies the bytes of many rows: kernels that may use brgemm, where they are made, and what the clock decides."""
import functools

import pytest
import torch
from tileweld.compiler import int8_brgemm, pays
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report
from tileweld.runtime import brgemm

from .mlp import MLP

FORCED = {"int8": {"scheme": "dynamic", "force": True}}
THEIRS, OWN = "generated for this op, products of brgemm", "generated for this op; its own products take"


def run(f, *inputs, dynamic=False, options=FORCED):
    torch._dynamo.reset()
    report = Report()
    with torch.no_grad():
        compiled = torch.compile(f, backend=functools.partial(tileweld, report=report, options=options), dynamic=dynamic)
        return [compiled(x) for x in inputs], report


def kernels(report):
    """(may it use brgemm?, why it runs) of the int8 kernels."""
    linked = {f"cpp:{k.name}": k.link_torch for k in report.sources}
    return [(linked[k.implementation], k.reason) for k in report.kernels if k.op == "int8_linear"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def forget_times():
    pays._known.clear()
    for path in pays.cache.root().glob("*.pays.json"):
        path.unlink()


@pytest.fixture(autouse=True)
def _own_times(monkeypatch, folder):
    """Kernels are built once for all tests; times are each test's own."""
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setattr(pays, "_known", {})
    forget_times()
    monkeypatch.delenv("TILEWELD_BRGEMM", raising=False)


@pytest.fixture
def timed(monkeypatch):
    """A processor with tiles, and times that the test decides: timed(brgemm's, its own) -> the kernels that were asked about."""
    monkeypatch.setattr(brgemm, "has_tiles", lambda: True)

    def set_times(theirs, own):
        asked = []
        monkeypatch.setattr(int8_brgemm, "_measured", lambda choice, launch: (asked.append(choice.kernel.name), (theirs, own))[1])
        return asked

    return set_times


def test_without_tiles_nothing_more_is_built_or_timed(monkeypatch):
    monkeypatch.setattr(brgemm, "has_tiles", lambda: False)
    monkeypatch.setattr(int8_brgemm, "_measured", lambda *_: pytest.fail("timed"))
    _, report = run(MLP(), torch.randn(64, 512))
    assert kernels(report) == [(False, "generated for this op")] * 2


def test_forced_it_is_used_untimed_and_changes_no_bit(monkeypatch):
    monkeypatch.setattr(int8_brgemm, "_measured", lambda *_: pytest.fail("timed"))
    model, x, made = MLP(), torch.randn(64, 512), []
    for setting, expected in (("1", (True, THEIRS)), ("0", (False, "generated for this op"))):
        monkeypatch.setenv("TILEWELD_BRGEMM", setting)
        (result,), report = run(model, x)
        assert kernels(report) == [expected] * 2 and not report.warnings
        made.append(result)
    assert torch.equal(*made)


def test_the_clock_decides_once_a_kernel(timed):
    model, x, made = MLP(), torch.randn(64, 512), []
    for theirs, own, expected in ((1.0, 2.0, THEIRS), (2.0, 1.0, f"{OWN} 1000.00 ms, brgemm's 2000.00")):
        forget_times()
        asked = timed(theirs, own)
        (result,), report = run(model, x)
        assert kernels(report) == [(True, expected)] * 2 and len(asked) == 2
        run(model, x)
        assert len(asked) == 2  # kept
        made.append(result)
    assert torch.equal(*made)


def test_a_busy_machine_and_small_products_have_brgemm(timed):
    timed(*pays._UNSTEADY)
    assert kernels(run(MLP(), torch.randn(64, 512))[1]) == [(True, THEIRS)] * 2
    asked = timed(2.0, 1.0)
    assert kernels(run(MLP(64), torch.randn(20, 64))[1]) == [(True, THEIRS)] * 2 and not asked


def test_both_ways_are_measured_on_what_a_call_has(timed, monkeypatch):
    """The clock itself: each way is launched, with the shapes of the call."""
    calls, measured = [], int8_brgemm._measured

    def recording(choice, launch):
        return measured(choice, lambda tensors, ints, floats: (calls.append((ints, [tuple(t.shape) for t in tensors])), launch(tensors, ints, floats)))

    monkeypatch.setattr(int8_brgemm, "_measured", recording)
    _, report = run(torch.nn.Sequential(torch.nn.Linear(512, 768, bias=False)), torch.randn(64, 512))
    assert len(kernels(report)) == 1 and kernels(report)[0][0]
    assert {ints for ints, _ in calls} == {(1,), (0,)} and {tuple(shapes) for _, shapes in calls} == {((64, 768), (64, 512), (768, 512), (768, 1))}


def test_symbolic_rows(monkeypatch):
    model, inputs, made = MLP(64), [torch.randn(n, 64) for n in (70, 5, 33)], []
    for setting in "10":
        monkeypatch.setenv("TILEWELD_BRGEMM", setting)
        results, report = run(model, *inputs, dynamic=True)
        assert {linked for linked, _ in kernels(report)} == {setting == "1"}
        made.append(results)
    assert all(map(torch.equal, *made))


@pytest.mark.parametrize("scheme", ["llm_int8", "weight_only"])
def test_other_schemes(scheme, monkeypatch):
    model, x, made = MLP(128), torch.randn(40, 128), []
    x[:, 5] *= 20
    for setting in "10":
        monkeypatch.setenv("TILEWELD_BRGEMM", setting)
        (result,), report = run(model, x, options={"int8": {"scheme": scheme, "force": True}})
        assert {linked for linked, _ in kernels(report)} == {setting == "1" and scheme == "llm_int8"}  # weight_only multiplies floats
        made.append(result)
    assert torch.equal(*made)


def test_when_it_is_wanted(monkeypatch):
    monkeypatch.setattr(brgemm, "has_tiles", lambda: True)
    if brgemm.has_brgemm():  # Linux
        assert brgemm.is_wanted()
    monkeypatch.setattr(brgemm, "has_brgemm", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for setting, wanted in (("1", True), ("0", False), ("", True)):
        monkeypatch.setenv("TILEWELD_BRGEMM", setting)
        assert brgemm.is_wanted() == wanted and brgemm.is_forced() == (setting == "1")
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        assert not brgemm.is_wanted()
    finally:
        torch.backends.mkldnn.enabled = enabled
    monkeypatch.setattr(brgemm, "has_tiles", lambda: False)
    assert not brgemm.is_wanted()
    monkeypatch.setenv("TILEWELD_BRGEMM", "1")
    monkeypatch.setattr(brgemm, "has_brgemm", lambda: False)
    assert not brgemm.is_wanted()
