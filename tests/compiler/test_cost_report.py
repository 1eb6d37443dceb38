"""The cost part of the report: what a rewrite saves, in numbers counted by hand; that compiling counts nothing; tables, JSON, HTML, the picture."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import tileweld
from tileweld.compiler.cli import app
from tileweld.compiler.cost_report import Line, Work, si
from tileweld.compiler.devices import Device, named
from tileweld.compiler.errors import OptionError
from tileweld.compiler.explain import trace
from tileweld.compiler.ir import cost as cost_module
from tileweld.compiler.report import Report
from tileweld.compiler.roofline import check, draw

DEVICE = Device("toy", {"float32": 100.0}, 10.0, 1000.0)


def attention(q, k, v):
    return F.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


@pytest.fixture
def qkv():
    return tuple(torch.randn(1, 2, 8, 16) for _ in range(3))


@pytest.fixture
def report(qkv):
    return tileweld.explain(attention, *qkv)


def test_a_rewrite_is_counted_before_and_after(report):
    line = report.cost.lines[0]
    scores, width = 2 * 8 * 8, 16
    assert (line.name, line.times) == ("attention", 1)
    assert len(line.before.kernels) == 4 and len(line.after.kernels) == 1  # product, scale, softmax, product
    assert line.before.flops == scores * (2 * width + 1 + 5 + 2 * width)
    assert line.before.bytes == 4 * ((2 * 256 + scores) + 2 * scores + 2 * scores + (scores + 2 * 256))
    assert line.after.flops == scores * (4 * width + 5 + 1) and line.after.bytes == 4 * 4 * 256


def test_the_total_is_the_graphs(report):
    total = report.cost.total
    assert len(total.before.kernels) == 4 and len(total.after.kernels) == 1
    assert (total.before.flops, total.after.bytes) == (report.cost.lines[0].before.flops, report.cost.lines[0].after.bytes)
    assert report.fallbacks == {} and report.cost.unknown == {}


def test_what_stays_a_library_call_is_listed_with_its_number(qkv):
    def f(q, k, v):
        a = attention(q, k, v)
        return torch.linalg.inv(a.mT @ a + 100 * torch.eye(a.shape[-1]))

    report = tileweld.explain(f, *qkv)
    assert any("inv" in op for op in report.fallbacks) and sum(n for op, n in report.fallbacks.items() if op in ("mm", "bmm")) == 1
    assert "calls of torch's library: " in str(report) and any("inv" in op for op in report.cost.unknown)
    assert "counted by their bytes alone" in str(report)


def test_a_region_is_one_kernel(qkv):
    report = tileweld.explain(lambda x, y: torch.relu(x * y + 1).exp() * y, qkv[0], qkv[1])
    (line,) = [line for line in report.cost.lines if "lowering" in line.name]
    assert (len(line.before.kernels), len(line.after.kernels)) == (5, 1)
    assert line.before.flops == line.after.flops == 5 * 256
    assert (line.before.bytes, line.after.bytes) == (4 * 256 * (3 + 2 + 2 + 2 + 3), 4 * 256 * 3)


def test_a_backward_is_counted_in_the_total_and_costs_more(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    forward = tileweld.explain(attention, *(x.detach() for x in qkv)).cost.total
    both = trace(attention, (q, k, v), train=True).cost.total
    assert both.after.flops > 3 * forward.after.flops and len(both.after.kernels) > len(forward.after.kernels)


def test_symbolic_sizes_are_polynomials_with_their_values(qkv):
    def f(x, w):
        return torch.tanh(x @ w)

    report = tileweld.explain(f, torch.randn(6, 16), torch.randn(16, 16), dynamic=True)
    fixed = tileweld.explain(f, torch.randn(6, 16), torch.randn(16, 16), dynamic=False)
    symbols = report.cost.total.after.flops.free_symbols
    assert symbols and symbols <= report.cost.hints.keys()
    assert report.cost.evaluated()[1].after.flops == fixed.cost.total.after.flops
    assert f"FLOPs = {report.cost.total.after.flops}" in " ".join(str(report).split())


def test_the_compiler_counts_nothing_and_keeps_nothing(qkv, monkeypatch):
    def never(*args):
        raise AssertionError("a cost was computed while a model compiles")

    kept = []
    monkeypatch.setattr(cost_module, "cost", never)
    monkeypatch.setattr("tileweld.compiler.cost_report.cost", never)
    monkeypatch.setattr("tileweld.compiler.cost_report.fused", never)
    monkeypatch.setattr("tileweld.compiler.cost_report.snapshot", lambda gm: kept.append(gm))
    compiled = torch.compile(attention, backend="tileweld", options={"target": "reference"})
    torch.testing.assert_close(compiled(*qkv), attention(*qkv))
    assert not kept, "without a report that somebody holds there is no snapshot either"


def test_what_is_taken_back_is_not_counted(report):
    mark = report.mark()
    before = len(report.cost.lines)
    report.covered.append(report.covered[-1])
    report.rollback(mark)
    assert len(report.cost.lines) == before


def test_times_are_those_of_the_slower_unit():
    cheap = cost_module.Cost(*map(cost_module.Integer, (50, 10, 500, 100)))
    assert DEVICE.seconds(cheap) == pytest.approx(50 / 100 + 10 / 10)
    assert DEVICE.seconds(cost_module.Cost(*map(cost_module.Integer, (50, 1, 2000, 1000)))) == pytest.approx(3.0)
    assert Work((cheap, cheap)).seconds(DEVICE) == pytest.approx(3.0) and Work((cheap,)).intensity == pytest.approx(0.1)
    unknown = cost_module.Cost(cost_module.size(1) * cost_module.sympy.Symbol("u0"))
    assert DEVICE.seconds(unknown) is None and Work((unknown, cheap)).seconds(DEVICE) is None and Line("x", 1, Work(), Work()).before.intensity is None


def test_the_table_the_json_and_the_page_have_the_same_figures(report):
    from tileweld.compiler.options import Options
    from tileweld.compiler.report_html import page

    report.device = DEVICE
    made = json.loads(report.to_json())["cost"]
    row, total = made["lines"][0], made["total"]
    assert (row["before"]["kernels"], row["after"]["bytes"]) == (4, 4096)
    assert total["after"]["seconds"] == pytest.approx(8192 / 100 + 768 / 10) and total["after"]["intensity"] == pytest.approx((8192 + 768) / 4096)
    words = " ".join(str(report).split())
    assert "attention 1 4 -> 1 7.17 kB -> 4.1 kB 8.96 k -> 8.96 k 1.2 -> 2.2" in words and "roofline, toy" in words and "-> 159 s" in words
    assert "7.17 kB &rarr; 4.1 kB" in page(report, Options(), "t") and "roofline, toy" in page(report, Options(), "t")
    assert report.cost.headline(DEVICE).startswith("cost: 4 kernels -> 1, 7.17 kB moved -> 4.1 kB")


def test_an_empty_report_has_no_cost_table():
    assert Report().cost.tables() == [] and "kernels ->" not in str(Report())


@pytest.mark.parametrize(("x", "text"), [(0, "0 "), (12345678, "12.3 M"), (0.5, "500 m"), (9.996e5, "1 M"), (1e-7, "100 n"), (None, "? "), (999, "999 ")])
def test_numbers_are_short(x, text):
    assert si(x) == text


# ---------------------------------------------------------------- the commands


def run(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_explain_names_a_device_and_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="the picture needs tileweld[plot]")
    picture = tmp_path / "roofline.svg"
    result = run("explain", "models:llama_gqa", "--device", "h200", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "roofline, h200" in result.stdout
    text = picture.read_text()
    for words in ("attention x2", "total: ", "float32: 67 TFLOP/s", "4.8 TB/s", "FLOPs a byte moved", "models:llama_gqa on h200"):
        assert words in text, words
    assert re.search(r"attention x2: \d+ kernels -(?:>|&gt;) 2, [\d.]+ [un]s -(?:>|&gt;) [\d.]+ [un]s", text)
    assert matplotlib.get_backend  # drawn without a window system


def test_a_benchmarks_picture_is_of_the_device_that_ran(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs tileweld[plot]")
    check(tmp_path / "x.svg", None, guessed=True)
    with pytest.raises(OptionError, match="a roofline is that of a device"):
        check(tmp_path / "x.svg", None)
    report = tileweld.explain(lambda x, w: torch.relu(x @ w), torch.randn(8, 16), torch.randn(16, 4))
    draw(report.cost, named("h200"), tmp_path / "x.svg", title="f", measured=[("eager", 2.0, 1e9)])
    flops = float(report.cost.evaluated()[1].after.flops)
    assert f"measured: eager, {flops / 1e9 * 1e6:.3g} us" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(("words", "said"), [
    (("--device", "h20"), "OptionError: unknown device 'h20' (--device); did you mean 'h200'?"),
    (("--device", "flops=1e12"), "write flops=2e11,bandwidth=2e10"),
    (("--device", "flops=1e12,bandwidth=-1"), "both above 0"),
    (("--device", "flops=1,bandwidth=1,cores=2"), "write flops=2e11,bandwidth=2e10"),
    (("--plot", "x.png"), "a roofline is that of a device (--plot); add --device"),
    (("--plot", "x.gif", "--device", "h200"), "cannot draw .gif"),
    (("--plot", "/no/such/folder/x.png", "--device", "h200"), "there is no folder /no/such/folder"),
])
def test_bad_devices_and_pictures_are_one_line(words, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    result = run("explain", "models:llama_gqa", *words)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_without_matplotlib_the_command_says_what_to_install(monkeypatch):
    import importlib.util as util

    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None)
    result = run("explain", "models:llama_gqa", "--plot", "x.png", "--device", "h200")
    assert result.exit_code == 2 and "a picture needs matplotlib (--plot); pip install 'tileweld[plot]'" in result.stderr
